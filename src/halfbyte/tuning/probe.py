"""Short runs on a base that is open: ordinary trainings with other values, of which only what they lost is left.

Why: opening a base anew for each would cost more than what is learned in it. Fresh adapters are put back as they began;
only other settings of the adapters are put on anew.
Cost: of other values under `train:` the weights of an adapter read from a file; of others under `lora:` the proofs.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from halfbyte.adapters import lora
from halfbyte.errors import DiskFull, TrainError
from halfbyte.runs import points
from halfbyte.runs.folder import RunFolder
from halfbyte.training import fit, schedule
from halfbyte.training.comparison import compare
from halfbyte.training.deadline import Clock, Schedule
from halfbyte.training.events import Listener, StopRequest
from halfbyte.training.model import open_model
from halfbyte.training.run import run_steps
from halfbyte.training.setup import Setup, equip
from halfbyte.tuning.results import with_values
from halfbyte.tuning.search import RATE, Result
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
        run, limits = replace(now.run, prepared=prepared), (now.pace.tokens, now.pace.examples_per_micro_batch)
        steps, held_out = schedule.micro_batches(prepared, *limits)
        store, products = now.model.assembled.base.store, now.compute.products
        belongs = now.trained["rows"], now.trained["belongs_to"]
        self._now = replace(
            now,
            start=start,
            run=run,
            steps=steps,
            held_out=held_out,
            comparison=compare(prepared, steps, run.plan, now.world, limits, store, products, seconds=evaluation_s),
            trained=points.trained_with(start.recipe, prepared.objective.name, *belongs),
        )
        return self._now

    def _keep_fresh(self) -> None:
        source = self.first.run.prepared.checkpoint
        shutil.rmtree(self._fresh, ignore_errors=True)
        self._fresh.mkdir()
        model = self._now.model.assembled.model
        lora.writer(model, base_id=source.id, revision=source.revision, dtype=None)(self._fresh)
