"""What a run reports while it works, and the signals that end it: the first SIGINT or SIGTERM ends it after its
micro-batch, with a checkpoint of the last whole step; a second one at once; a lost terminal changes nothing."""

import contextlib
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halfbyte.base.store.build import Progress
    from halfbyte.types import Document

SAME_S = 1.0


class Listener:
    """Receives what a run reports. This one ignores everything; the command line prints, a script may collect."""

    def note(self, label: str, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def building(self, progress: "Progress") -> None: ...
    def begin(self, total_steps: int, done_steps: int, log_every: int) -> None: ...
    def step(self, row: "Document") -> None: ...
    def evaluating(self) -> None: ...
    def evaluated(self, row: "Document") -> None: ...
    def saved(self, path: Path, reason: str) -> None: ...
    def stopping(self, signal: Signals) -> None: ...
    def end(self) -> None: ...


@dataclass
class StopRequest:
    signal: Signals | None = None

    def give(self, signal: Signals) -> None:
        self.signal = self.signal or signal


@contextmanager
def stop_on_signals(
    tell: Callable[[Signals], None] = lambda signal: None, signals: Sequence[Signals] = (SIGINT, SIGTERM)
) -> Iterator[StopRequest]:
    """Turn the first of these signals into a request, reported to `tell` at once, and a second one into a
    KeyboardInterrupt; earlier handlers are put back. Only in the main thread.

    A SIGTERM within `SAME_S` of another is the same one: supervisors send it to a process and to its group.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    at = 0.0

    def handle(number: int, frame: object) -> None:
        nonlocal at
        if request.signal is None:
            request.signal, at = Signals(number), time.monotonic()
            with contextlib.suppress(RuntimeError):  # the signal came in the middle of a print
                tell(request.signal)
        elif number == SIGINT or time.monotonic() > at + SAME_S:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def without_a_terminal() -> Iterator[None]:
    """Go on where the terminal goes away (SIGHUP): what would be written to it goes nowhere from then on. Who has asked
    for another way (nohup) keeps it. Only in the main thread."""
    able = hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread()
    if not able or signal.getsignal(signal.SIGHUP) is not signal.SIG_DFL:
        yield
        return

    def handle(number: int, frame: object) -> None:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            with contextlib.suppress(OSError):
                if os.isatty(stream) or _is_gone(stream):
                    os.dup2(nowhere, stream)
        os.close(nowhere)

    signal.signal(signal.SIGHUP, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _is_gone(stream: int) -> bool:
    """Whether it was a terminal that no longer answers."""
    try:
        return stat.S_ISCHR(os.fstat(stream).st_mode) and os.fstat(stream).st_rdev != os.stat(os.devnull).st_rdev
    except OSError:
        return True
