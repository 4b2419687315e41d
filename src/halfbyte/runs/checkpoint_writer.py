"""Checkpoints written by a thread, while training goes on.

What: between two steps a snapshot is taken, which copies nothing. The thread reads weights and optimiser during the
next step's forward and backward; before the optimiser changes them, the run waits until they are read. Hashing,
syncing, reading back and removing older checkpoints go on during later steps. One checkpoint is written at a time.
Why: on a slow disk a checkpoint takes as long as many steps.
Cost: a wait where a forward and backward is shorter than writing 12 bytes a trained number into the system's memory.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from halfbyte.errors import DiskFull
from halfbyte.runs import checkpoint

ABANDON_S = 1.0


@dataclass
class CheckpointWriter:
    """The checkpoints of one process in `folder`, of which `keep` stay. `full`: called with a message where the disk is
    full; the run goes on with the older checkpoints."""

    folder: Path
    keep: int | None
    saved: Callable[[Path, str], None]  # called with each whole checkpoint and the reason that was given for it
    full: Callable[[str], None]
    _thread: threading.Thread | None = None
    _read: threading.Event = field(default_factory=threading.Event)
    _whole: list[Path] = field(default_factory=list)
    _errors: list[BaseException] = field(default_factory=list)
    _reason: str = ""

    def start(self, snapshot: checkpoint.Snapshot, reason: str) -> None:
        """Begin to write; waits for the one before."""
        self.finish()
        self._read, self._reason = threading.Event(), reason
        # a daemon thread: a process that ends at once does not wait for a disk
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait_until_read(self) -> None:
        """Return when weights and optimiser may change again."""
        if self._thread is not None:
            self._read.wait()

    def look(self) -> None:
        """`finish` if the thread is done; never waits."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and report it. Raises TrainError: it could not be written, for
        another reason than a full disk."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        for path in self._whole:
            self.saved(path, self._reason)
        errors = self._errors
        self._whole, self._errors = [], []
        for error in errors:
            if not isinstance(error, (OSError, SafetensorError)):
                raise error
            ours = checkpoint.unwritable("a checkpoint", self.folder, error)
            if not isinstance(ours, DiskFull):
                raise ours from error
            self.full(ours.message)

    def abandon(self) -> None:
        """Give the thread a second to end; what it leaves half written is cleared by the next process."""
        if self._thread is not None:
            self._thread.join(ABANDON_S)

    def _write(self, snapshot: checkpoint.Snapshot) -> None:
        try:
            path = checkpoint.write(self.folder, snapshot, self._read.set)
            checkpoint.prune(self.folder, self.keep)
            self._whole.append(path)
        except BaseException as error:  # raised by `finish`, in the run's own thread
            self._errors.append(error)
        finally:
            self._read.set()
