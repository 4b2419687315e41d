"""What a run says while it works, and the signals that it hears: the first SIGINT or SIGTERM ends it after the step
under way, with a checkpoint; a second SIGINT ends it at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halfbyte.base.store.build import Progress
    from halfbyte.types import Document


class Listener:
    """Who is told what a run does; this one ignores everything. The command line prints, a script may collect."""

    def note(self, label: str, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def building(self, progress: Progress) -> None: ...
    def begin(self, total_steps: int, done_steps: int, log_every: int) -> None: ...
    def step(self, row: Document) -> None: ...
    def evaluating(self) -> None: ...
    def evaluated(self, row: Document) -> None: ...
    def saved(self, path: Path, reason: str) -> None: ...
    def stopping(self, signal: Signals) -> None: ...
    def end(self) -> None: ...


@dataclass
class StopRequest:
    """The signal that came, None if none did."""

    signal: Signals | None = None


@contextmanager
def stop_on_signals(tell: Callable[[Signals], None] = lambda signal: None) -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request, which is told at once; earlier handlers are put back. Only in
    the main thread."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: object) -> None:
        if request.signal is not None and number == SIGINT:
            raise KeyboardInterrupt
        first, request.signal = request.signal is None, Signals(number)
        if first:
            with contextlib.suppress(RuntimeError):  # the signal came in the middle of a print
                tell(request.signal)

    before = {number: signal.signal(number, handle) for number in (SIGINT, SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
