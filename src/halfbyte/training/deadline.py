"""A run that ends at a time: what of it is spent, and a rate that falls to 0 with the time that is left.

Why: steps that are counted beforehand end late on a machine that is busy, and a schedule that is cut off never shows
what its rate falling to 0 is worth.
What: the rate of each step is decided when the step before has ended, and written down; a run that goes on makes the
steps after its checkpoint again at the same rates. What was lost when a process was killed is not charged: the clock
goes on from the last decision.
Source: linear to zero, arXiv:2502.15938. Cost: a line of a file a step.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil

from halfbyte.runs.folder import json_rows
from halfbyte.system import files

PACE = 8  # steps that show what one takes
SLOWEST = 3.0  # times the planned seconds, that what follows the steps is granted


class Clock:
    """The seconds of a run that are spent, over its processes."""

    def __init__(self, now: Callable[[], float] = time.monotonic, spent: float = 0.0) -> None:
        self._now, self._zero = now, now() - spent

    @classmethod
    def of_process(cls) -> "Clock":
        """From the start of this process on, its imports included."""
        return cls(spent=time.time() - psutil.Process().create_time())

    @property
    def spent(self) -> float:
        return self._now() - self._zero

    def go_on(self, spent: float) -> None:
        """From now on, so much is spent."""
        self._zero = self._now() - spent


@dataclass
class Schedule:
    """The rates of a run's steps: up over `warmup` steps, then linearly to 0 over the time or the `total` steps that
    are left, whichever are over sooner. `ends_s`: when the steps have to be done, on the clock, sooner where the
    machine slows down; `step_s`: what one is planned to take, as `tail_s` is for all that follows the last one; `step`:
    how many are done."""

    clock: Clock
    total: int
    warmup: int
    ends_s: float = math.inf
    step_s: float = 0.0
    tail_s: float = 0.0
    file: Path | None = None
    decisions: list[tuple[float, float]] = field(default_factory=list)
    """For each step its share of the highest rate, 0 where there is none, and the seconds that were spent before."""
    step: int = 0

    def __post_init__(self) -> None:
        if self.file is not None and self.file.is_file():
            whole, line_end, torn = self.file.read_bytes().rpartition(b"\n")
            if torn:  # a crash has cut it off
                files.write(self.file, whole + line_end)
            self.decisions = [(row["share"], row["at"]) for row in json_rows(whole.splitlines())]
        self._earlier = len(self.decisions)

    def share(self, step: int) -> float:
        """The share of the highest rate that the step after the first `step` ones has."""
        self.step = step
        while len(self.decisions) <= step:  # lines that a failing disk has lost are decided again
            self._decide(len(self.decisions))
        if step < self._earlier:
            self.clock.go_on(self.decisions[step][1])
        return self.decisions[step][0]

    @property
    def over(self) -> bool:
        """Whether the last step is done."""
        return self.step < len(self.decisions) and self.decisions[self.step][0] == 0

    @property
    def last(self) -> int | None:
        """The number of steps, once that is decided."""
        return next((step for step, (share, _) in enumerate(self.decisions) if share == 0), None)

    @property
    def left_s(self) -> float:
        """Seconds until the steps have to be done, as of the last decision."""
        at = self.decisions[self.step][1] if self.decisions else self.clock.spent
        return self._ends(self.step, at) - at

    @property
    def expected(self) -> int:
        """How many steps there will be, as far as is known."""
        if self.last is not None or self.ends_s == math.inf:
            return self.total if self.last is None else self.last
        spent = self.decisions[self.step][1] - self.decisions[0][1] if self.decisions else 0.0
        mean = spent / self.step if self.step else self.step_s
        return min(self.total, self.step + max(1, round(self.left_s / max(mean, 1e-9))))

    def _ends(self, step: int, at: float) -> float:
        """When the steps have to be done, as known before that after the first `step` ones, which begins `at`: where
        the last ones took longer than the first ones (but for the very first, which compiles), so will what follows."""
        if self.ends_s == math.inf or step <= 2 * PACE:
            return self.ends_s
        early, late = self.decisions[1 : PACE + 2], [*self.decisions[step - PACE : step], (0.0, at)]
        took, takes = (median(b - a for (_, a), (_, b) in pairwise(some)) for some in (early, late))
        slower = takes / max(took, 1e-9)
        return self.ends_s - self.tail_s * max(0.0, min(SLOWEST, slower) - 1)

    def _decide(self, step: int) -> None:
        at = self.clock.spent
        first, mean = (self.decisions[0][1], (at - self.decisions[0][1]) / step) if step else (at, 0.0)
        ends = self._ends(step, at)
        over = step > 0 and (step >= self.total or ends - at < mean / 2)
        by_time = 1.0 if ends == math.inf else (ends - at) / max(ends - first, 1e-9)
        share = min(1.0, (step + 1) / (self.warmup + 1), by_time, 1 - step / self.total)
        self.decisions.append((0.0 if over else max(1e-6, share), at))
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step, "share": self.decisions[-1][0], "at": at}) + "\n")
