"""A run in a given time: what fits, what is searched, when its steps have to be done.

All that is decided stands in `tuning.json` and `schedule.jsonl` in the run's folder, so that a process that is killed,
in a probe or a step, loses only what it was at.

Short runs on a base that is open: ordinary trainings with other values, of which only what they lost is left.

Why: opening a base anew for each would cost more than what is learned in it. Fresh adapters are put back as they began;
only other settings of the adapters are put on anew.
Cost: of other values under `train:` the weights of an adapter read from a file; of others under `lora:` the proofs.
"""

import gc
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from halfbyte.adapters import lora
from halfbyte.adapters.targets import Targets
from halfbyte.distributed.world import World
from halfbyte.errors import DiskFull, RecipeError, RunError, TrainError, typed
from halfbyte.models.structure import meta_model
from halfbyte.recipe.schema import Loaded, Lora, Recipe
from halfbyte.runs import points
from halfbyte.runs.folder import RunFolder, write_json
from halfbyte.system.words import duration
from halfbyte.training import fit, schedule
from halfbyte.training.comparison import Rows, compare
from halfbyte.training.deadline import Clock, Schedule
from halfbyte.training.events import Listener, StopRequest
from halfbyte.training.fit import PlannedRun
from halfbyte.training.run import run_steps
from halfbyte.training.schedule import count_steps, warmup_steps
from halfbyte.training.setup import Setup, equip, open_model
from halfbyte.tuning import fits, results
from halfbyte.tuning.results import with_values
from halfbyte.tuning.search import ACCUMULATION, BATCH, RANK, RATE, TARGETS, Result, Search, SearchState, of_all
from halfbyte.types import Document

# What a probe leaves out.
QUIET: Document = {
    "train.save_strategy": "no",
    "train.save_minutes": None,
    "train.eval_strategy": "no",
    "train.eval_steps": None,
    "train.eval_on_start": False,
    "train.early_stopping_patience": None,
    "train.report_to": "none",
}


def first_targets(asked: Lora, targets: Targets) -> str | list[str]:
    """The `lora.target_modules` that a search begins with: the endings that were chosen; else as the recipe has it."""
    names = targets.names if isinstance(targets.names, tuple) else asked.target_modules
    return names if isinstance(names, str) else list(names)


class Probes:
    """Probes of a run that is set up, `first`. `evaluation_s`: what each one's evaluation may take; `folder`: an empty
    one, for the adapters as they begin."""

    def __init__(self, first: Setup, stop: StopRequest, evaluation_s: float, folder: Path) -> None:
        self.first, self.stop = first, stop
        self.evaluation_s = evaluation_s
        self._now, self._fresh = first, folder / "fresh"
        self._keep_fresh()

    def __call__(self, arm: Document, rate: float, rows: int) -> Result | None:
        """Train an arm at a rate; None where a signal came."""
        steps = max(1, rows // with_values(self.first.start.recipe, arm).train.rows_per_step)
        setup = self.setup({**arm, RATE: rate, "train.max_steps": steps, **QUIET}, self.evaluation_s)
        course = Schedule(Clock(), steps, schedule.warmup_steps(setup.start.recipe.train, steps))
        setup = replace(setup, schedule=course, is_probe=True)
        with tempfile.TemporaryDirectory(prefix="halfbyte-") as folder:
            try:
                ended = run_steps(setup, RunFolder(Path(folder)), self.stop, Listener())
            except DiskFull:
                raise
            except TrainError:  # a loss or a gradient that is not finite
                setup.model.assembled.model.zero_grad()
                return Result(rate, steps, {})
            finally:
                gc.collect()  # a Trainer and its optimiser hold each other
        if ended.stopped_by is not None or ended.compared is None:
            return None
        sums = dict(zip(setup.comparison.names, ended.compared.tolist(), strict=True))
        return Result(rate, steps, sums if np.isfinite(ended.compared).all() else {})

    def setup(self, values: Mapping[str, object], evaluation_s: float | None = None) -> Setup:
        """The run with other values, and adapters as they begin. `evaluation_s`: as of `comparison.choose`."""
        before, now = self.first.run.prepared, self._now
        start = replace(self.first.start, recipe=with_values(self.first.start.recipe, values))
        prepared = replace(before, recipe=with_values(before.recipe, values))
        if prepared.recipe.lora != now.run.prepared.recipe.lora:
            run = fit.with_plan(prepared, now.run.machine)
            model = open_model(run, start, Listener(), force=False, before=now.model)
            other = equip(run, start, now.world, now.process, model, Listener(), now.began)
            other.pace.peak = now.pace.peak
            now = replace(other, notices=now.notices, answer_scores=now.answer_scores)
            self._now = now
            self._keep_fresh()
        else:
            lora.put_weights(now.model.assembled.model, self._fresh)
        run, examples = replace(now.run, prepared=prepared), now.pace.examples_per_micro_batch
        steps = schedule.plan_steps(prepared, now.pace.tokens, examples)
        held_out = schedule.eval_batches(prepared, prepared.evaluation, run.plan.evaluation_tokens, examples)
        store, products = now.model.assembled.base.store, now.compute.products
        belongs = now.trained["rows"], now.trained["belongs_to"]
        self._now = replace(
            now,
            start=start,
            run=run,
            steps=steps,
            held_out=held_out,
            comparison=compare(prepared, steps, run.plan, now.world, examples, store, products, seconds=evaluation_s),
            trained=points.trained_with(start.recipe, prepared.objective.name, *belongs),
        )
        return self._now

    def _keep_fresh(self) -> None:
        source = self.first.run.prepared.checkpoint
        shutil.rmtree(self._fresh, ignore_errors=True)
        self._fresh.mkdir()
        model = self._now.model.assembled.model
        lora.writer(model, base_id=source.id, revision=source.revision, dtype=None)(self._fresh)


EVALUATION_SHARE = 0.03  # of the time for probes, for each one's evaluation
NOTHING_HELD_OUT = "no rows are held out that would tell a better one, and the adapter is that of the last step"


@dataclass
class TimeBudget:
    """`state` is None until the run's folder is begun. `alone`: the search is all (`halfbyte tune`). `started_s`: what
    the start of this process took."""

    within_s: float
    clock: Clock
    rate_is_open: bool
    alone: bool
    state: SearchState | None
    started_s: float
    fit: fits.Fit | None = None

    @classmethod
    def of(cls, loaded: Loaded, clock: Clock, world: World, *, resume: bool, alone: bool) -> "TimeBudget | None":
        """What a recipe asks for; None where it gives no time."""
        started_s = clock.spent
        run, within_s = loaded.recipe.output, loaded.recipe.train.within_s
        if within_s is None:
            return None
        if not world.alone:
            raise RecipeError("train.within is for one process.", fix="leave it out, and give train.num_train_epochs")
        state = SearchState.read(results.file(RunFolder(Path(run)))) if resume else None
        if state is not None and state.alone != alone:
            what, command = ("search", "tune") if state.alone else ("training", "train")
            raise RunError(f"the run {run} is a {what}.", fix=f"halfbyte {command} {typed(run)} --resume")
        return cls(within_s, clock, loaded.origins[RATE].kind == "auto", alone, state, started_s)

    def limit(self, run: PlannedRun, tell: Listener) -> PlannedRun:
        """The same with as many held-out rows as the time has room for. Says what fits; RecipeError where nothing."""
        state, before = self.state, run.prepared.evaluation
        most = None if state is None else state.held_out
        prepared = fits.limit_held_out(run.prepared, run.plan.time.forward_s, self.within_s, most)
        if state is not None:
            spent = f"{duration(state.spent_s)} of {duration(self.within_s)}"
            tell.note("within", f"{spent} were spent until the last probe")
        elif not self.alone:
            held_out, now = 0 if before is None else len(before.examples), self.clock.spent
            self.fit = fits.fit(
                prepared, run.plan, self.within_s, now,
                probes=self.rate_is_open, held_out=held_out, started_s=self.started_s,
            )  # fmt: skip
            tell.note("within", self.fit.line)
        elif before is None:
            raise RecipeError("tune compares on held-out rows, and none are held out.", fix="--set data.eval=10%")
        else:
            fits.check_search(run.plan, self.within_s, self.clock.spent, len(results.FIELDS))
        return replace(run, prepared=prepared)

    def settle(self, setup: Setup, folder: RunFolder, stop: StopRequest, tell: Listener) -> Setup:
        """Probe what is open, and set up the run with what has won, unless a signal came or the search is all."""
        state = self._begin(setup, folder)
        if state.winner is None:
            with tempfile.TemporaryDirectory(prefix="halfbyte-") as empty:
                probes = Probes(setup, stop, self._evaluation_s, Path(empty))
                if not self._search(state, setup, probes, folder, tell) or self.alone:
                    return setup
                setup = probes.setup(state.winner or state.start)
        if self.alone:
            return setup
        for text in results.verdicts(state):
            tell.note("probes", text)
        train, total = setup.run.prepared.recipe.train, count_steps(setup.run.prepared)
        warmup = warmup_steps(train, state.run_rows // train.rows_per_step)
        step_s, tail_s = setup.run.plan.time.step_s, state.within_s - state.ends_s
        course = Schedule(self.clock, total, warmup, state.ends_s, step_s, tail_s, folder.path / "schedule.jsonl")
        steps = setup.steps if course.last is None else replace(setup.steps, total=course.last)
        return replace(setup, schedule=course, steps=steps)

    def finish(self, setup: Setup, folder: RunFolder, recipe: Recipe, compared: Rows | None = None) -> Document:
        """What the report has of the time, the probes, and what more time would bring; the recipe that repeats the run
        is written. `compared`: what the adapter has lost on the rows of the run's comparison."""
        state, course = self.state, setup.schedule
        value = {**results.document(folder), "spent_s": self.clock.spent, "repeat": results.REPEAT}
        steps = 0 if course is None else course.step
        if state is not None and course is not None:
            sums = {} if compared is None else dict(zip(setup.comparison.names, compared.tolist(), strict=True))
            seconds = course.decisions[steps][1] - course.decisions[0][1]
            rows, ends = steps * recipe.train.rows_per_step, steps >= course.total
            value["more"] = results.more(state, rows=rows, seconds=seconds, sums=sums, at_end=ends)
        local = setup.run.prepared.checkpoint.kind in ("folder", "gguf")
        results.write_repeat(recipe, folder.path, steps, local=local)
        if self.alone:
            write_json(folder.report, {"within": value})
        return value

    @property
    def _evaluation_s(self) -> float:
        """What a probe's evaluation may take."""
        return EVALUATION_SHARE * self.within_s * (1 if self.alone else fits.PROBES_SHARE)

    def _begin(self, setup: Setup, folder: RunFolder) -> SearchState:
        """The state of this process or an earlier one; the clock goes on from there."""
        if self.state is None:
            prepared, fit = setup.run.prepared, self.fit
            train = prepared.recipe.train
            start: Document = {RATE: float(train.learning_rate)}
            if self.alone:
                start[TARGETS] = first_targets(prepared.recipe.lora, setup.run.targets)
                start |= {RANK: prepared.recipe.lora.r, BATCH: train.rows_per_step, ACCUMULATION: 1}
            self.state = SearchState(
                within_s=self.within_s,
                until_s=self.within_s,
                ends_s=self.within_s - (0.0 if fit is None else fit.tail_s),
                run_rows=count_steps(prepared) * train.rows_per_step if fit is None else fit.trained_rows,
                most_rows=count_steps(prepared) * train.rows_per_step,
                start=start,
                whats=list(results.FIELDS) if self.alone else ["rate"] * self.rate_is_open,
                held_out=None if prepared.evaluation is None else len(prepared.evaluation.examples),
                spent_s=self.clock.spent,
                alone=self.alone,
            )
            if fit is not None:
                self.state.until_s = self.state.spent_s + fit.probes_s
            if prepared.evaluation is None:
                self.state.skipped = dict.fromkeys(self.state.whats, NOTHING_HELD_OUT)
            self.state.write(results.file(folder))
        self.clock.go_on(self.state.spent_s)
        return self.state

    def _search(self, state: SearchState, setup: Setup, probes: Probes, folder: RunFolder, tell: Listener) -> bool:
        """False where a signal came first."""
        prepared, linear = setup.run.prepared, list[str]()
        if self.alone:
            model = meta_model(prepared.config, trust_remote_code=prepared.recipe.trust_remote_code)
            _, linear = lora.choose_targets(model, Lora(target_modules="all-linear"))
        per_step = prepared.recipe.train.rows_per_step
        return Search(
            state,
            of_all(linear),
            probes,
            self.clock,
            save=lambda: state.write(results.file(folder)),
            row_s=setup.run.plan.time.step_s / max(1, min(per_step, len(prepared.train.examples))),
            evaluation_s=self._evaluation_s,
            per_step=per_step,
            tell=lambda rung, number: tell.note("probe", results.line(rung, number)),
        ).run()
