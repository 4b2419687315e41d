"""What happens around a step: metrics, checkpoints by steps, minutes and signals, and the best adapter.

Why: a run that is stopped at any moment loses at most the time since its last checkpoint; SIGINT and SIGTERM save one.
Source: `transformers/trainer_callback.py` (events and their order in `trainer.py`, `_run_epoch`).
Cost: one JSON line a step; a checkpoint costs its files.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback

from halfbyte.runs import checkpoint
from halfbyte.system import files

if TYPE_CHECKING:
    from halfbyte.base.store.build import Progress
    from halfbyte.runs.folder import RunFolder
    from halfbyte.training.trainer import StepTrainer


class Listener(Protocol):
    """Who is told what a run does. `cli.py` prints it; a script may collect it."""

    def note(self, label: str, text: str) -> None: ...
    def building(self, progress: Progress) -> None: ...
    def begin(self, total_steps: int, done_steps: int, log_every: int) -> None: ...
    def step(self, row: dict[str, Any]) -> None: ...
    def evaluated(self, row: dict[str, Any]) -> None: ...
    def saved(self, path: Path, reason: str) -> None: ...
    def end(self) -> None: ...


class Silent:
    """A listener that ignores everything."""

    def note(self, label: str, text: str) -> None: ...
    def building(self, progress: Progress) -> None: ...
    def begin(self, total_steps: int, done_steps: int, log_every: int) -> None: ...
    def step(self, row: dict[str, Any]) -> None: ...
    def evaluated(self, row: dict[str, Any]) -> None: ...
    def saved(self, path: Path, reason: str) -> None: ...
    def end(self) -> None: ...


@dataclass
class StopRequest:
    """Set by SIGINT or SIGTERM; the run stops after the step that is under way. A second SIGINT stops at once."""

    signal: int | None = None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; earlier handlers are put back. Only in the main thread."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def handle(number: int, frame: Any) -> None:
        if request.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = number

    for number in numbers:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Cadence:
    """When to save. `steps` 0: not by steps; `minutes` None: not by time; `keep` None: all of them."""

    steps: int
    minutes: float | None
    keep: int | None
    at_end: bool = True


@dataclass
class Best:
    """The best (lowest) evaluation so far, kept as an adapter in `checkpoints/best/` with `best.json`."""

    metric: str
    folder: Path
    value: float | None = None
    step: int | None = None

    def restore(self) -> None:
        """Find the best of an earlier process again."""
        if not self.folder.exists() and files.aside(self.folder).exists():
            os.replace(files.aside(self.folder), self.folder)
        path = self.folder / "best.json"
        if path.is_file():
            row = json.loads(path.read_text())
            if row.get("metric") == self.metric:
                self.value, self.step = row["value"], row["step"]

    def better(self, value: float) -> bool:
        return self.value is None or value < self.value


@dataclass
class RunCallback(TrainerCallback):
    """Writes the run folder while the Trainer trains.

    Args:
        write_adapter: writes PEFT's two files into a folder.
        resume: checkpoint whose optimiser, schedule and random state are put back before the first step.
    """

    run: RunFolder
    listener: Listener
    cadence: Cadence
    write_adapter: Callable[[Path], None]
    stop: StopRequest
    best: Best | None = None
    resume: Path | None = None
    trainer: StepTrainer | None = None
    evals: list[dict[str, Any]] = field(default_factory=list)
    _saved_at: float = field(default_factory=time.monotonic)
    _restore_rng: bool = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        if self.resume is not None:
            # the Trainer has put the adapter and the position back; it would start with a fresh optimiser
            optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
            checkpoint.load_optimizer(self.resume, optimizer, trainer.lr_scheduler)
            self._restore_rng = True
        self._saved_at = time.monotonic()
        self.listener.begin(state.max_steps, state.global_step, int(state.logging_steps) or 1)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._restore_rng and self.resume is not None:
            checkpoint.load_rng(self.resume)
            self._restore_rng = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        record = self._trainer.last
        if record is not None:
            row = {**record.to_json(), **process_memory()}
            self.run.append_metrics(row)
            self.listener.step(row)
        due = bool(self.cadence.steps) and state.global_step % self.cadence.steps == 0
        minutes = self.cadence.minutes
        if minutes is not None and time.monotonic() - self._saved_at >= minutes * 60:
            due = True
        if self.stop.signal is not None:
            self.save(f"{signal.Signals(self.stop.signal).name} received")
            control.should_training_stop = True
        elif due and state.global_step < state.max_steps:
            self.save("")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        row: dict[str, Any] = {"step": state.global_step, **(metrics or {})}
        self.evals.append(row)
        self.run.append_metrics(row)
        best = self.best
        if best is not None and best.metric in row and best.better(row[best.metric]):
            best.value, best.step = row[best.metric], state.global_step
            with checkpoint.whole_or_absent(f"the best adapter {best.folder}", best.folder) as temporary:
                self.write_adapter(temporary)
                (temporary / "best.json").write_text(
                    json.dumps({"metric": best.metric, "value": best.value, "step": best.step})
                )
            row = {**row, "best": True}
        self.listener.evaluated(row)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.cadence.at_end and self.stop.signal is None:
            self.save("end of training")
        self.listener.end()

    def save(self, reason: str) -> Path:
        trainer = self._trainer
        path = checkpoint.save(
            self.run.checkpoints,
            trainer.state.global_step,
            write_adapter=self.write_adapter,
            write_trainer_state=lambda p: trainer.state.save_to_json(str(p)),
            optimizer=getattr(trainer.optimizer, "optimizer", trainer.optimizer),
            scheduler=trainer.lr_scheduler,
        )
        checkpoint.prune(self.run.checkpoints, self.cadence.keep)
        self._saved_at = time.monotonic()
        self.listener.saved(path, reason)
        return path

    @property
    def _trainer(self) -> StepTrainer:
        if self.trainer is None:
            raise RuntimeError("RunCallback.trainer is set after the Trainer is made, before train()")
        return self.trainer


def process_memory() -> dict[str, int]:
    """Resident bytes of this process now and at their peak, and the peak on the cards where there are any."""
    import psutil
    import torch

    scale = 1 if sys.platform == "darwin" else 1024
    found = {
        "rss_bytes": int(psutil.Process().memory_info().rss),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale,
    }
    if torch.cuda.is_available():
        found["peak_device_bytes"] = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return found
