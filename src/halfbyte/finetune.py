"""The whole story on one page: recipe -> rows -> plan -> model -> steps -> adapter and report.

Each stage is a value made of the one before: `RunStart` (where the run begins), `PlannedRun` (rows and plan),
`TrainingModel` (base, adapters, proofs), `Setup` (all that the steps need), `Ended` (how far they came), `Outcome`.
Only this file (and `doctor.py` and the command line) tells the rooms about each other.
"""

import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from signal import Signals

import numpy as np

from halfbyte.adapters import lora, passport
from halfbyte.base import load, residual
from halfbyte.data import split
from halfbyte.distributed import agree, shard
from halfbyte.distributed import world as worlds
from halfbyte.distributed.launch import launch_file
from halfbyte.distributed.world import World
from halfbyte.errors import TrainError
from halfbyte.export import sentence
from halfbyte.inference import evaluate, verify
from halfbyte.layers import heads
from halfbyte.layers.kernels.cpu import ahead
from halfbyte.objectives.labels import Labels
from halfbyte.objectives.objective import Objective
from halfbyte.objectives.vectors import TextVectors
from halfbyte.plan import calibrate, number_format
from halfbyte.plan.estimate import format_note
from halfbyte.proofs import adapter
from halfbyte.proofs.memory import Proofs
from halfbyte.recipe.adapter_folder import ADAPTER_FILES
from halfbyte.recipe.file import each_path, relative_to_run, to_yaml
from halfbyte.recipe.schema import Loaded
from halfbyte.report import page
from halfbyte.report import start as beginning
from halfbyte.rollouts.rollouts import Rollouts
from halfbyte.runs import crash, points
from halfbyte.runs import report as reporting
from halfbyte.runs.folder import VERIFIED_FROM_S, DiskRetry, RunFolder, space_for, write_json
from halfbyte.system import accelerator, device, files, threads, usage
from halfbyte.system.libraries import versions
from halfbyte.training import fit, pace, preflight, prepare, source, watch
from halfbyte.training.callback import RunCallback
from halfbyte.training.comparison import Rows
from halfbyte.training.deadline import Clock
from halfbyte.training.events import Listener, stop_on_signals, without_a_terminal
from halfbyte.training.run import Ended, run_steps, sums_of
from halfbyte.training.setup import Setup, equip, open_model
from halfbyte.tuning import fits, results
from halfbyte.tuning.budget import TimeBudget
from halfbyte.types import Document


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `stopped_by` is the signal that ended it early, with a checkpoint of `step` (none for 0).
    `at_once`: in the middle of a step; then `step` is that of the last checkpoint, 0 for none."""

    run: Path
    report: Document
    step: int
    stopped_by: Signals | None = None
    at_once: bool = False

    @property
    def exit_code(self) -> int:
        """Of a process: as a shell has it after a signal; not 0 for an adapter that is of no use."""
        if self.stopped_by is not None:
            return 128 + self.stopped_by
        unmoved = (self.report.get("adapters") or {}).get("moved") == 0
        verdict = self.report.get("verdict") or {}
        useless = unmoved or bool(verdict.get("useless")) or (self.report.get("verified") or {}).get("ok") is False
        return TrainError.exit_code if useless else 0


def train(
    loaded: Loaded, *, resume: bool = False, force: bool = False, listener: Listener | None = None,
    world: World | None = None, objective: Objective | None = None, clock: Clock | None = None, alone: bool = False,
    proofs: Proofs = "every",
) -> Outcome:  # fmt: skip
    """Fine-tune. Nothing is written before the model, the data and the adapters are known to be good.

    Args:
        resume: go on from the run's newest checkpoint; a finished run of which no more is asked stays as it is.
        force: go on also where base, tokenizer or chat template are not those of the checkpoint.
        world: the processes that train together; None for those that a launcher has started (`distributed.world`).
        objective: what is learned of the rows (`objectives/`); None for the loss of a causal LM.
        clock: of `train.within`; None for one that begins now. alone: only search for settings, in this time.
        proofs: whether those of an earlier start are believed (`proofs/memory.py`).

    Raises:
        HalfbyteError: a mistake in the recipe, the data or the model, before the run folder exists; TrainError after.
    """
    clock = clock or Clock()
    opening = worlds.open_world() if world is None else nullcontext(world)
    with opening as world, without_a_terminal():
        tell, run = (listener if world.first else None) or Listener(), Path(loaded.recipe.output)
        resume = world.goes_on(run, resume)
        loaded = number_format.settle(
            fits.open_rate(loaded), world.share(device.detect()), resume=resume, agreed=world.from_first
        )
        budget = TimeBudget.of(loaded, clock, world, resume=resume, alone=alone)
        loaded = results.settle(loaded, budget.state if budget else None)
        start = preflight.begin(world, loaded.recipe, resume=resume)
        if start.report is not None:
            if world.first:
                page.mend(RunFolder(run))
            return Outcome(run, start.report, start.report["steps"])
        for line in format_note(loaded):
            tell.note("plan", line)
        if start.resume and start.point is None:
            tell.note("resume", "from the beginning: the run was ended before its first checkpoint")
        setup = set_up(start, world, tell, objective=objective, force=force, budget=budget, proofs=proofs)
        try:
            return _lead(setup, loaded, tell, budget) if world.first else _follow(setup)
        finally:
            setup.model.placed.remove()


def set_up(
    start: preflight.RunStart, world: World, tell: Listener, *, objective: Objective | None = None, force: bool = False,
    budget: TimeBudget | None = None, proofs: Proofs = "every",
) -> Setup:  # fmt: skip
    """Rows, plan, model and micro-batches; the longest of these runs once unless the plan leaves much memory free."""
    agree.check(world, points.values_that_train(start.recipe))
    machine = world.share(device.detect())
    process = threads.configure(machine.cores, world.env, sharing=world.sharing, place=world.local_rank)
    tell.note("process", process.line)
    for text in machine.notes:
        tell.note("machine", text)

    with world.node_first():
        run = fit.plan_run(start.recipe, machine, tell, ranks=world.size, objective=objective, done=start.step)
    began = time.monotonic()
    if budget is not None:
        run = budget.limit(run, tell)
    prepared, plan = run.prepared, run.plan
    if world.first:
        fit.check_disk(plan, Path(start.recipe.output))
    if start.point is None:
        residual.look(prepared.checkpoint, prepared.config, prepared.recipe, run.modules)
    rows, learns = prepare.fingerprints(prepared), prepared.objective.name
    agree.check(world, {"rows": rows, **fit.decisions(run)})
    notices = preflight.check_resumed(start, learns, rows, run.job.steps, tell)
    fit.announce(plan, tell, timed=budget is not None)

    if run.job.uncompiled:
        ahead.begin(run.job.uncompiled, machine.cores, plan.compute_dtype)()
    model = open_model(run, start, tell, force=force, proofs=proofs)
    if line := agree.join(world, model.belongs_to, model.assembled.model, process.threads):
        tell.note("world", line)
    setup = equip(run, start, world, process, model, tell, began)
    notices += [
        *prepare.notices(setup.run.prepared),
        *(str(f) for f in setup.run.prepared.findings if f.level != "ok"),
        *plan.warnings,
    ]
    notices += [*model.notices, *setup.notices]
    for notice in notices:
        tell.note("note", notice)

    accelerator.reset_peaks()  # of a calibration and the proofs
    pace.give_back()  # what the proofs and the opening of the base left
    scores = evaluate.answer_scores(setup.run, model.assembled.model, setup.pace.tokens)
    setup = replace(setup, notices=tuple(notices), answer_scores=scores)
    return Rollouts(setup).joined() if start.recipe.train.draws else setup


def _follow(setup: Setup) -> Outcome:
    """Every step, in a process that is not the first one: it keeps nothing."""
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as folder, stop_on_signals() as stop:
        ended = run_steps(setup, RunFolder(Path(folder)), stop, Listener())
        shard.settle(setup.shards)
        return Outcome(Path(setup.start.recipe.output), {}, ended.step, ended.stopped_by)


def _lead(setup: Setup, loaded: Loaded, tell: Listener, budget: TimeBudget | None = None) -> Outcome:
    """Every step, and what a finished run leaves, in a folder that is this process's alone."""
    folder = RunFolder(Path(setup.start.recipe.output))
    if not setup.start.resume:
        folder = RunFolder.create(folder.path, _recipe_text(setup, loaded), launch_file(setup.world.agents))
    reported = crash.reporting(folder, setup.run.machine.to_json())
    with folder.lock() as run, stop_on_signals(tell.stopping) as stop, page.at_end(run), reported, usage.Peak() as peak:
        try:
            disk, setup.pace.peak = DiskRetry(tell.warn, lambda: stop.signal is not None), peak
            if budget is not None:
                setup = budget.settle(setup, run, stop, tell)
                loaded = results.settle(loaded, budget.state)
                if setup.schedule is None:  # the search is all, or a signal came
                    report = {} if stop.signal else budget.finish(setup, run, loaded.recipe)
                    return Outcome(run.path, report, 0, stop.signal)
            disk.write(lambda: _write_start(setup, loaded, run))
            ended = run_steps(setup, run, stop, tell)
            report = {}
            if ended.stopped_by is None and ended.callback is not None:
                report = _finish(setup, run, ended, ended.callback, peak, disk, budget)
            shard.settle(setup.shards)
            return Outcome(run.path, report, ended.step, ended.stopped_by)
        except KeyboardInterrupt:
            saved = [points.step_of(path) for path in points.checkpoints(run.checkpoints)]
            return Outcome(run.path, {}, max(saved, default=0), stop.signal or Signals.SIGINT, at_once=True)


def _recipe_text(setup: Setup, loaded: Loaded) -> str:
    """The recipe as it is now, with paths as they are seen from the run's folder, and streamed data sets of the hub
    with their commit."""
    prepared, recipe = setup.run.prepared, loaded.recipe
    if prepared.flow is not None:
        train = each_path(recipe.data.train, prepared.flow.at_commit)
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": train})})
    local = prepared.checkpoint.kind in ("folder", "gguf")
    return to_yaml(relative_to_run(recipe, Path(setup.start.recipe.output), model=local))


def _write_start(setup: Setup, loaded: Loaded, run: RunFolder) -> None:
    """Write the plan, the rows that were held out, and what is known before the first step; of a run that goes on the
    recipe, too, where it has changed."""
    start, planned = setup.start, setup.run
    beside = launch_file(setup.world.agents) if start.resume else {}
    if setup.schedule is not None or (start.resume and (start.point is None or start.point.changes(start.recipe))):
        beside["recipe.yaml"] = _recipe_text(setup, loaded).encode()
    for name, content in beside.items():
        files.write(run.path / name, content)
    steps = setup.planned_steps
    tokens = {"tokens": steps.tokens, "computed_tokens": planned.computed_tokens(steps)}
    write_json(run.plan, {**planned.plan.to_json(), "steps": len(steps), **tokens})
    with space_for(run.held_out):
        evaluation = planned.prepared.evaluation
        split.keep(planned.prepared.held_out, run.held_out, None if evaluation is None else evaluation.sources)
    known = partial(
        beginning.facts, run, loaded, planned, setup.model.assembled, setup.compute, setup.notices, start.step
    )
    beginning.write(run, known)


def _save(setup: Setup, run: RunFolder, callback: RunCallback) -> int | None:
    """Save the adapter, the best one where evaluations chose it, with its passport, and what it says of some rows.
    Returns the step that was chosen."""
    callback.keep_late_best()
    prepared, model = setup.run.prepared, setup.model.assembled.model
    source, recipe = prepared.checkpoint, prepared.recipe
    rows = run.read_metrics()
    best = callback.best if recipe.train.load_best_model_at_end else None
    step = None if best is None else best.step
    if best is not None and step is not None:
        lora.put_weights(model, best.folder)
        count = sum("eval_loss" in row for row in rows)
        callback.listener.note("adapter", f"the best of {count} evaluations, from step {step}")
    elif recipe.train.max_forgetting is not None:
        callback.notices.append("no evaluation was within train.max_forgetting: the adapter is that of the last step")
        callback.listener.warn(callback.notices[-1])

    def beside(folder: Path) -> None:
        if prepared.chatml is not None:
            prepared.tokenizer.save_pretrained(folder)
        if isinstance(prepared.objective, Labels):
            lm, names = model.get_base_model(), prepared.objective.config
            heads.write_config(folder, lm, prepared.config, names, prepared.tokenizer)
        passport.write(folder, setup.trained, reporting.reached(rows, step))

    dtype = load.DTYPES[recipe.lora.save_dtype]
    lora.save(model, run.adapter, base_id=source.id, revision=source.revision, dtype=dtype, beside=beside)
    if isinstance(prepared.objective, TextVectors):
        folder, lm = run.path / sentence.FOLDER, model.get_base_model()
        sentence.write(folder, run.adapter, lm, prepared.tokenizer, recipe, source)
    examples = (prepared.evaluation or prepared.train).examples
    with space_for(run.proof):
        adapter.keep_logits(run.proof, model, examples, lora.base_alone(model, setup.model.assembled.own_biases), dtype)
    return step


def _compared(ended: Ended, callback: RunCallback, adapter_step: int | None) -> Rows | None:
    """What the saved adapter has lost on the rows of the run's comparison."""
    best = callback.best
    if adapter_step is None or adapter_step == ended.step:
        return ended.compared
    return np.array(best.compared) if best is not None and best.compared is not None else None


def _verdict(setup: Setup, run: RunFolder, callback: RunCallback, compared: Rows | None) -> Document:
    """The saved adapter beside its base, by measurement, and which adapter that is."""
    verdict = setup.comparison.judge(compared)
    if verdict.useless:
        callback.listener.warn(f"{verdict.text}; lower train.learning_rate")
    elif verdict.source is not None and verdict.source.lost:
        more = source.costs_nothing(setup.run.prepared.checkpoint)
        callback.listener.warn(f"the run is worse than the model that was there before: {verdict.source.text}; {more}")
    return {**verdict.to_json(), "adapter_sha256": files.sha256(run.adapter / ADAPTER_FILES[0])}


def _on_base_text(setup: Setup, callback: RunCallback) -> Document:
    """What the saved adapter, whose weights the model has, loses on the text of the base's kind."""
    text = setup.comparison.text
    sums = None if isinstance(text, str) else sums_of(setup, callback.trainer, text, whole=True)
    if isinstance(text, str) or sums is None:
        return {"text": f"not read: {setup.comparison.text}"}
    verdict = text.judge(sums[0])
    return {**{k: v for k, v in verdict.to_json().items() if k in ("base", "adapter", "interval", "source")},
            "text": verdict.losses}  # fmt: skip


def _finish(
    setup: Setup, run: RunFolder, ended: Ended, callback: RunCallback, peak: usage.Peak, disk: DiskRetry,
    budget: TimeBudget | None,
) -> Document:  # fmt: skip
    """Save adapter and report; returns the report. After a run of some length a second process opens the adapter."""
    plan, machine = setup.run.plan, setup.run.machine
    adapter_step = disk.write(lambda: _save(setup, run, callback))
    compared, steps = _compared(ended, callback, adapter_step), setup.planned_steps
    forgotten = _on_base_text(setup, callback)
    used, cards = usage.process_memory(), accelerator.peaks()
    rows, on_card = run.read_metrics(), machine.on_card
    measured, step_s = usage.Usage(peak.private, peak.file), reporting.usual_seconds(rows)
    if step_s is not None and setup.world.alone:  # of several, the link's time is in it
        ran = usage.cpu_time()
        calibrate.correct(machine, plan.compute_dtype, plan.time, step_s, ran.waited_share if ran else None)
    base, before = setup.model.assembled.base, setup.memory_before
    report = reporting.build(
        rows,
        planned={
            "tokens": steps.tokens,
            "computed_tokens": setup.run.computed_tokens(steps),
            "steps": len(steps),
            "train_seconds": plan.time.step_s * len(steps),
            "seconds": plan.time.seconds if budget is None else budget.within_s,
            "peak_rss_bytes": None if on_card else plan.peak_bytes,
            "peak_device_bytes": plan.allocated_bytes if on_card else None,
        },
        lines=fit.compare(plan, base, before, measured, run.path, step_s, cards),
        seconds=time.monotonic() - setup.began,
        peak_rss_bytes=used["peak_rss_bytes"],
        peak_device_bytes=used.get("peak_device_bytes"),
        adapter_step=adapter_step,
    )
    least_s = 0.0 if budget is None else min(budget.within_s, VERIFIED_FROM_S)
    verified = verify.after(run.path, 0 if disk.stops() else max(least_s, report["train_seconds"]), plan, machine)
    if verified["ok"] is False:
        callback.listener.warn(f"the saved adapter does not say what it said when it was trained: {verified['seen']}")
    report |= {
        "versions": versions(),
        "machine": {**machine.to_json(), "process": setup.process.to_json()},
        "data": prepare.data_report(setup.run.prepared),
        "verdict": _verdict(setup, run, callback, compared),
        "base_text": forgotten,
        "stopped_early": callback.stopped_early,
        "adapters": callback.moved,
        "compute": setup.compute.to_json(),
        "spikes": [{"step": row["step"], **row["spike"]} for row in rows if row.get("spike")],
        "verified": verified,
        "notices": [
            *setup.notices,
            *callback.notices,
            *watch.notice(rows),
            *(f"memory: {down}" for down in setup.pace.downs),
        ],
    }
    if budget is not None:
        report["within"] = budget.finish(setup, run, setup.start.recipe, compared)
    disk.write(run.end_metrics)
    disk.write(lambda: write_json(run.report, report))
    return report
