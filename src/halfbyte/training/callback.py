"""What happens around a step: metrics, checkpoints by steps, minutes and signals, and the best adapter.

Why: a run that is stopped at any moment loses at most the time since its last checkpoint; SIGINT and SIGTERM save one.
Source: `transformers/trainer_callback.py` (events and their order in `trainer.py`, `_run_epoch`).
Cost: one JSON line a step; a checkpoint costs its files.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from halfbyte.runs import checkpoint
from halfbyte.runs import report as reporting
from halfbyte.runs.folder import RunFolder
from halfbyte.system import usage
from halfbyte.training.events import Listener, StopRequest
from halfbyte.training.schedule import Cadence
from halfbyte.training.trainer import StepTrainer
from halfbyte.types import Document


@dataclass
class RunCallback(TrainerCallback):
    """Writes the run folder while the Trainer trains. `write_adapter` writes PEFT's two files into a folder; `trained`
    is kept with each checkpoint. `resume` is the checkpoint whose optimiser, schedule and random state are put back
    before the first step."""

    trainer: StepTrainer
    run: RunFolder
    listener: Listener
    cadence: Cadence
    write_adapter: Callable[[Path], None]
    stop: StopRequest
    trained: Document
    best: checkpoint.Best | None = None
    resume: Path | None = None
    notices: list[str] = field(default_factory=list)
    stopped_early: bool = False
    _saved_at: float = 0.0
    _saved_step: int = -1

    def on_train_begin(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        if self.resume is not None:
            # the Trainer has put the adapter and the position back; it would start with a fresh optimiser
            checkpoint.load_optimizer(self.resume, self.trainer.optimizer, self.trainer.lr_scheduler)
        self._saved_at = time.monotonic()
        self.listener.begin(state.max_steps, state.global_step, int(state.logging_steps) or 1)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        if self.resume is None:
            return
        checkpoint.load_rng(self.resume)
        self.resume = None
        rows, every = self.run.read_metrics(), args.eval_steps if args.eval_strategy == "steps" else None
        seen = any(row["step"] == state.global_step and "eval_loss" in row for row in rows)
        if every and state.global_step % int(every) == 0 and not seen:
            self.trainer.evaluate()  # which the run was stopped in, after its checkpoint

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:
        row = {**self.trainer.last, **usage.process_memory()}
        self.run.append_metrics(row)
        self.listener.step(row)
        seconds = time.monotonic() - self._saved_at
        if self.stop.signal is not None:
            self.save(f"{self.stop.signal.name} received")
            control.should_training_stop = True
        elif state.global_step < state.max_steps and self.cadence.is_due(state.global_step, seconds):
            self.save("")

    def on_evaluate(
        self, args: object, state: TrainerState, control: object, metrics: dict[str, float], **_: object
    ) -> None:
        row: Document = {"step": state.global_step, **metrics}
        self.run.append_metrics(row)
        best = self.best
        if best is not None and best.metric in row and best.is_better(row[best.metric]):
            best.keep(row[best.metric], state.global_step, self.write_adapter)
            above = reporting.above_start(self.run.read_metrics(), row["eval_loss"]) if state.global_step else None
            row = {**row, "best": True, **({"above": above} if above is not None else {})}
        self.listener.evaluated(row)

    def on_train_end(self, *_: object, **__: object) -> None:
        if self.cadence.at_end and self.stop.signal is None:
            self.save("end of training")
        elif self.stop.signal is not None and self._saved_step != self.trainer.state.global_step:
            self.save(f"{self.stop.signal.name} received")
        self.listener.end()

    def save(self, reason: str) -> None:
        trainer = self.trainer
        path = checkpoint.save(
            self.run.checkpoints,
            trainer.state.global_step,
            write_adapter=self.write_adapter,
            write_trainer_state=lambda p: trainer.state.save_to_json(str(p)),
            optimizer=trainer.optimizer,
            scheduler=trainer.lr_scheduler,
            trained=self.trained,
        )
        checkpoint.prune(self.run.checkpoints, self.cadence.keep)
        self._saved_at, self._saved_step = time.monotonic(), trainer.state.global_step
        self.listener.saved(path, reason)
