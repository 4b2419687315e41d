"""What a run does where its disk is full: it says so, waits, and goes on when there is room.

Why: what is lost otherwise is the end of a run, after hours, for want of some megabytes that another program holds.
Cost: nothing while there is room.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from halfbyte.errors import DiskFull

T = TypeVar("T")
WAIT_S, EVERY_S = 600.0, 1.0


@dataclass(frozen=True)
class Room:
    """Tries a write again until there is room.

    Args:
        warn: is told once of each wait. stops: whether the run is told to end: then nothing is waited for.
        wait_s: the longest wait.
    """

    warn: Callable[[str], None]
    stops: Callable[[], bool] = lambda: False
    wait_s: float = WAIT_S

    def write(self, write: Callable[[], T]) -> T:
        """What `write` returns, which may be called several times.

        Raises:
            DiskFull: there was no room for so long.
        """
        until, told = time.monotonic() + self.wait_s, False
        while True:
            try:
                return write()
            except DiskFull as error:
                if self.stops() or time.monotonic() >= until:
                    raise
                if not told:
                    self.warn(f"{error.message} Waiting {self.wait_s / 60:.0f} minutes for room")
                    told = True
                time.sleep(min(EVERY_S, self.wait_s))
