"""What became of an adapter, by measurement: its loss beside the base's, on the same rows.

Why: losses of single steps are of other rows each; they say nothing of whether something was gained.
What: `worse` and `better` only where the interval of the paired difference is wholly on one side of 0; so at most one
in 40 adapters that are as good as the base is called worse.
Cost: milliseconds; no torch.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from halfbyte.scoring import intervals
from halfbyte.scoring.intervals import Interval, RowSums
from halfbyte.types import Document

Name = Literal["better", "no difference", "worse", "diverged", "not measured"]
FAR = 1.2  # times the base's loss
WORDS: dict[Name, str] = {
    "better": "better than the base",
    "no difference": "no difference from the base is measured",
    "worse": "worse than the base",
    "diverged": "diverged, far worse than the base",
}
RESAMPLES, SEED = 2000, 0


@dataclass(frozen=True)
class Verdict:
    """`rows`: which they are, in words. `interval`: of adapter less base."""

    name: Name
    rows: str
    base: float | None = None
    adapter: float | None = None
    interval: Interval | None = None

    @property
    def text(self) -> str:
        """In a sentence, with what was measured."""
        if self.adapter is None or self.base is None:
            return f"not compared with the base: {self.rows}"
        losses = f"loss {self.adapter:.4f} beside {self.base:.4f}"
        if self.interval is not None:
            losses += f", {self.adapter - self.base:+.4f} [{self.interval[0]:.4f}, {self.interval[1]:.4f}]"
        return f"{WORDS[self.name]}: {losses}, on {self.rows}"

    @property
    def useless(self) -> bool:
        """Whether the base alone is measured to be better."""
        return self.name in ("worse", "diverged")

    def to_json(self) -> Document:
        interval = None if self.interval is None else list(self.interval)
        return {**vars(self), "interval": interval, "text": self.text, "useless": self.useless}


def judge(adapter: NDArray[np.float64] | None, base: NDArray[np.float64] | None, rows: str) -> Verdict:
    """The verdict on an adapter. `adapter`, `base`: (rows, 2 or more): the loss of each row, summed, and what it counts
    for; None: not measured. `rows`: which they are, in words."""
    if adapter is None or base is None or len(base) < 2 or not np.isfinite(base).all():
        return Verdict("not measured", rows)
    now, before = RowSums(adapter[:, 0], adapter[:, 1]), RowSums(base[:, 0], base[:, 1])
    if not math.isfinite(now.value):
        return Verdict("diverged", rows, before.value, now.value)
    interval = intervals.interval_of_difference(now, before, resamples=RESAMPLES, seed=SEED)
    assert interval is not None
    name: Name = "no difference"
    if interval[1] < 0:
        name = "better"
    elif interval[0] > 0:
        name = "diverged" if now.value > FAR * before.value else "worse"
    return Verdict(name, rows, before.value, now.value, interval)
