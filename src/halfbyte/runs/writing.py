"""Checkpoints written by a thread, beside the steps that follow.

What: between two steps a snapshot is taken, which copies nothing. The thread reads weights and optimiser while the next
step runs forward and backward; before the optimiser moves them, the run waits until they are read. Hashing, syncing,
reading back and removing older checkpoints are done beside the steps after that. The next one never begins before the
last is whole.
Why: on a slow disk a checkpoint takes as long as many steps.
Cost: a wait where a forward and backward is shorter than writing 12 bytes a trained number into the system's memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from halfbyte.errors import DiskFull
from halfbyte.runs import checkpoint

LAST_S = 1.0


@dataclass
class Writing:
    """The checkpoints of one process in `folder`, of which `keep` stay.

    Args:
        saved: is told of each that is whole, with the reason that was given for it.
        full: is told of each that found no room; the run goes on with the older ones.
    """

    folder: Path
    keep: int | None
    saved: Callable[[Path, str], None]
    full: Callable[[str], None]
    _thread: threading.Thread | None = None
    _read: threading.Event = field(default_factory=threading.Event)
    _made: list[Path] = field(default_factory=list)
    _failed: list[BaseException] = field(default_factory=list)
    _reason: str = ""

    def start(self, taken: checkpoint.Snapshot, reason: str) -> None:
        """Begin to write, after the one before is whole."""
        self.finish()
        self._read, self._reason = threading.Event(), reason
        # a daemon, so that a process that is told to end at once does not wait for a disk
        self._thread = threading.Thread(target=self._write, args=(taken,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait_until_read(self) -> None:
        """Return when weights and optimiser may change again."""
        if self._thread is not None:
            self._read.wait()

    def look(self) -> None:
        """`finish` where the thread is done; else nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and tell of it.

        Raises:
            TrainError: it could not be written, for another reason than a full disk.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        for path in self._made:
            self.saved(path, self._reason)
        failed, self._made, self._failed = self._failed, [], []
        for error in failed:
            if not isinstance(error, (OSError, SafetensorError)):
                raise error
            told = checkpoint.unwritable("a checkpoint", self.folder, error)
            if not isinstance(told, DiskFull):
                raise told from error
            self.full(told.message)

    def abandon(self) -> None:
        """Give the thread a second to end; what it leaves then is cleared by the next one."""
        if self._thread is not None:
            self._thread.join(LAST_S)

    def _write(self, taken: checkpoint.Snapshot) -> None:
        try:
            path = checkpoint.write(self.folder, taken, self._read.set)
            checkpoint.prune(self.folder, self.keep)
            self._made.append(path)
        except BaseException as error:  # is raised in the run's own thread
            self._failed.append(error)
        finally:
            self._read.set()
