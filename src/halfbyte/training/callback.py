"""What happens around a step: metrics, checkpoints by steps, minutes and signals, the best adapter, early stopping.

Why: a run that is stopped at any moment loses at most the time since its last checkpoint; SIGINT and SIGTERM save one.
Source: `transformers/trainer_callback.py` (events and their order in `trainer.py`, `_run_epoch`).
Cost: one JSON line a step; a checkpoint costs its files.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from halfbyte.adapters import learning
from halfbyte.distributed import shard
from halfbyte.errors import DiskFull
from halfbyte.recipe.schema import Train
from halfbyte.runs import checkpoint
from halfbyte.runs.checkpoint import CheckpointWriter
from halfbyte.runs.folder import RunFolder
from halfbyte.system import files, usage
from halfbyte.training.comparison import Comparison
from halfbyte.training.events import Listener, StopRequest
from halfbyte.training.schedule import Cadence
from halfbyte.training.trainer import StepTrainer
from halfbyte.training.watch import BATCH, Spikes, Witness
from halfbyte.types import Document


@dataclass(kw_only=True)
class Follower(TrainerCallback):
    """In a process that is not the run's first: it writes nothing, and begins and ends as the first one does. `resume`
    is the checkpoint whose optimiser and schedule are put back before the first step."""

    trainer: StepTrainer
    stop: StopRequest
    resume: Path | None = None

    def on_train_begin(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        if self.resume is not None:
            # the Trainer has put the adapter and the position back; it would start with a fresh optimiser
            trainer = self.trainer
            checkpoint.load_optimizer(self.resume, trainer.optimizer, trainer.lr_scheduler, trainer.scaler)

    def on_step_begin(self, *_: object, **__: object) -> None:
        if self.resume is None:
            return
        self.resume = None
        shard.settle(self.trainer.shards)
        if self.trainer.world.from_first(self._was_evaluating):
            self.trainer.evaluate()

    def _was_evaluating(self) -> bool:
        """Whether the run was stopped in an evaluation, after its checkpoint; asked in the first process."""
        raise NotImplementedError

    def on_step_end(self, args: object, state: object, control: TrainerControl, **_: object) -> None:
        control.should_training_stop |= self.trainer.is_done or self.stop.signal is not None
        _evaluate_at_end(self.trainer, control)


def _evaluate_at_end(trainer: StepTrainer, control: TrainerControl) -> None:
    """Whether an evaluation comes after the last step is ours to say: transformers 5.24 asks for one always."""
    if trainer.is_done:
        due = trainer.args.eval_strategy == "steps" and trainer.state.global_step % trainer.state.eval_steps == 0
        control.should_evaluate = trainer.ends_with_evaluation or due


@dataclass(kw_only=True)
class RunCallback(Follower):
    """Writes the run folder while the Trainer trains. `adapter` makes what writes PEFT's two files into a folder;
    `trained` is kept with each checkpoint. `witness` is asked before each checkpoint."""

    run: RunFolder
    listener: Listener
    cadence: Cadence
    adapter: Callable[..., Callable[[Path], None]]
    trained: Document
    witness: Witness
    comparison: Comparison
    allowed: Callable[[Document], bool] = lambda row: True  # whether an evaluation may be the best one
    best: checkpoint.Best | None = None
    notices: list[str] = field(default_factory=list)
    stopped_early: bool = False
    moved: Document | None = None
    _spikes: Spikes = field(default_factory=Spikes)
    _start: dict[str, str] = field(default_factory=dict)
    _rates: float = 0.0
    _saved_at: float = 0.0
    _saved_step: int = -1
    _disk_full: bool = False
    _late_best: Callable[[], None] | None = None
    _randomness: checkpoint.Randomness | None = None

    def __post_init__(self) -> None:
        self.writer = CheckpointWriter(self.run.checkpoints, self.cadence.keep, self.listener.saved, self._no_room)

    def on_train_begin(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        super().on_train_begin(args, state, control)
        self._spikes, self._start = Spikes(self.run.read_metrics()), learning.digests(self.trainer.model)
        (self.run.path / BATCH).unlink(missing_ok=True)  # of an earlier process
        self.witness.begin()
        self._saved_at = time.monotonic()
        schedule = self.trainer.schedule
        total = state.max_steps if schedule is None else schedule.expected
        self.listener.begin(total, state.global_step, int(state.logging_steps) or 1)

    def on_step_begin(self, *_: object, **__: object) -> None:
        if self.resume is not None:
            checkpoint.load_rng(self.resume)
        self._randomness = checkpoint.Randomness.now()
        super().on_step_begin()

    def _was_evaluating(self) -> bool:
        args, step = self.trainer.args, self.trainer.state.global_step
        every = args.eval_steps if args.eval_strategy == "steps" else None
        seen = any(row["step"] == step and "eval_loss" in row for row in self.run.read_metrics())
        return bool(every) and step % int(every or 1) == 0 and not seen

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        self.writer.wait_until_read()

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        row, schedule = {**self.trainer.last, **usage.process_memory()}, self.trainer.schedule
        if schedule is not None and schedule.file is not None:
            row["left_s"] = schedule.left_s
        self._rates += row["learning_rate"]
        if spike := self._spikes.find(row):
            row["spike"] = spike
        self.writer.look()
        self._append(row)
        self.listener.step(row)
        seconds = time.monotonic() - self._saved_at
        if self.stop.signal is not None:
            self.save(f"{self.stop.signal.name} received", randomness=checkpoint.Randomness.now())
            control.should_training_stop = True
        elif self.trainer.is_done:
            control.should_training_stop = True
        elif self.cadence.is_due(state.global_step, seconds):
            self.save("", randomness=checkpoint.Randomness.now())
        _evaluate_at_end(self.trainer, control)

    def on_evaluate(
        self, args: object, state: TrainerState, control: object, metrics: dict[str, float], **_: object
    ) -> None:
        row: Document = {"step": state.global_step, **metrics}
        self._append(row)
        best, compared = self.best, self.trainer.evaluated[1][self.comparison.chosen]
        if best is not None and best.metric in row and best.is_better(row[best.metric]) and self.allowed(row):
            self._late_best = None
            entry = {"value": row[best.metric], "step": state.global_step, "compared": compared.tolist()}
            try:
                best.keep(entry, self.adapter())
            except DiskFull as error:
                self._no_room(error.message)
                self._late_best = partial(best.keep, entry, self.adapter(copied=True))
                best.value = row[best.metric]  # of those that follow, none is kept that is not better
            row = {**row, "best": True}
        verdict = self.comparison.judge(compared)
        self.listener.evaluated({**row, "worse": verdict.text} if state.global_step and verdict.useless else row)

    def on_train_end(self, *_: object, **__: object) -> None:
        if self._rates > 0 and self.stop.signal is None:
            self.moved = self._has_moved()
        if self.cadence.at_end and self.stop.signal is None:
            self.save("end of training", randomness=checkpoint.Randomness.now())
        elif self.stop.signal is not None and self._saved_step != self.trainer.state.global_step:
            self.save(f"{self.stop.signal.name} received", randomness=checkpoint.Randomness.now())
        self.writer.finish()
        self.listener.end()

    def save_last_step(self, why: str) -> None:
        """Save the last whole step, after a signal, or what `why` names, has ended the next one."""
        step, signal = self.trainer.state.global_step, self.stop.signal
        if self._randomness is not None and step and self._saved_step != step:
            self.save(why if signal is None else f"{signal.name} received", randomness=self._randomness)
        self.writer.finish()

    def keep_late_best(self) -> None:
        """Write the best adapter that found no space when it was evaluated; DiskFull where there is still none."""
        if self._late_best is not None:
            self._late_best()
            self._late_best = None

    def _append(self, row: Document) -> None:
        if not self.run.append_metrics(row):
            self._no_room(f"metrics wait in memory: {files.no_room(self.run.path)}")
        elif self._disk_full:
            with contextlib.suppress(DiskFull):
                self.keep_late_best()
                self._disk_full = False
                self.listener.note("disk", "there is room again")

    def _no_room(self, text: str) -> None:
        """Warn once until there is space again."""
        if not self._disk_full:
            self._disk_full = True
            self.notices.append(f"step {self.trainer.state.global_step}: {text}")
            self.listener.warn(f"{text.rstrip('.')}; the run goes on, and its earlier checkpoints stay")

    def _has_moved(self) -> Document:
        """How many LoRA layers trained, and how many of them are no longer what they were when this process began."""
        layers, still = learning.pairs(self.trainer.model), learning.unmoved(self.trainer.model, self._start)
        if still:
            some = f"{', '.join(still[:3])}{' ...' if len(still) > 3 else ''}"
            self.notices.append(f"{len(still)} of {len(layers)} adapters are still what they were at the start: {some}")
            self.listener.warn(self.notices[-1])
        return {"layers": len(layers), "moved": len(layers) - len(still)}

    def save(self, reason: str, *, randomness: checkpoint.Randomness) -> None:
        trainer = self.trainer
        self.witness.check(trainer.state.global_step, self.run.path)
        self._saved_at, self._saved_step = time.monotonic(), trainer.state.global_step
        if not self.run.write_metrics():
            return  # a checkpoint without its rows would be resumed without them
        snapshot = checkpoint.snapshot(
            trainer.state.global_step,
            randomness=randomness,
            write_adapter=self.adapter(),
            trainer_state=json.dumps(asdict(trainer.state), indent=2, sort_keys=True) + "\n",
            optimizer=trainer.optimizer,
            scheduler=trainer.lr_scheduler,
            trained=self.trained,
            scaler=trainer.scaler,
        )
        self.writer.start(snapshot, reason)


class EarlyStopping(EarlyStoppingCallback):
    """Stops after `early_stopping_patience` evaluations that were not better. `earlier`: rows of the evaluations of
    this run's earlier processes. They are counted again, as a checkpoint can be older than they are."""

    def __init__(self, train: Train, earlier: Sequence[Document]) -> None:
        super().__init__(train.early_stopping_patience, train.early_stopping_threshold)
        metric = checkpoint.metric_name(train)
        worst = -math.inf if train.best_is_greatest else math.inf  # null: nothing applied
        self.earlier = [worst if row[metric] is None else row[metric] for row in earlier if metric in row]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        state.best_metric = None
        for value in self.earlier:
            self.check_metric_value(args, state, control, value)
            better = max if args.greater_is_better else min
            state.best_metric = value if state.best_metric is None else better(value, state.best_metric)

    @property
    def stops(self) -> bool:
        return bool(self.early_stopping_patience_counter >= self.early_stopping_patience)
