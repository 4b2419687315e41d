"""What became of an adapter, by measurement: its loss beside the base's and the source model's, on the same rows.

Why: losses of single steps are of other rows each; they say nothing of whether something was gained. And what is
gained over a quantised base alone may be less than quantising has lost.
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
WILD = 3.0  # times it, and on every row: such losses are so unlike each other that the interval of a few has no end
WORDS: dict[Name, str] = {
    "better": "better than the base",
    "no difference": "no difference from the base is measured",
    "worse": "worse than the base",
    "diverged": "diverged, far worse than the base",
}
RESAMPLES, SEED = 2000, 0


@dataclass(frozen=True)
class SourceLoss:
    """What the model as it came loses. `cost`: what its base loses more, that is, by quantising; `won`: what the
    adapter loses more, below 0 where something was won; each with its interval."""

    loss: float
    cost: tuple[float, Interval]
    won: tuple[float, Interval] | None

    @property
    def text(self) -> str:
        text = f"the source model has {self.loss:.4f}, so quantising costs {_signed(*self.cost)}"
        if self.won is None:
            return text
        low, high = self.won[1]
        word = "better" if high < 0 else "worse" if low > 0 else "not measurably better"
        return f"{text}; the run is {word} than it, {_signed(*self.won)}"

    @property
    def is_base(self) -> bool:
        """Whether there is nothing between them."""
        return self.cost == (0.0, (0.0, 0.0))

    def to_json(self) -> Document:
        """`cost` and `won` as [value, [low, high]]."""
        cost, won = (None if pair is None else [pair[0], list(pair[1])] for pair in (self.cost, self.won))
        return {"loss": self.loss, "cost": cost, "won": won, "text": self.text}

    @property
    def lost(self) -> bool:
        """Whether the run is measured to be worse than the model that was there before."""
        return self.won is not None and self.won[1][0] > 0


@dataclass(frozen=True)
class Verdict:
    """`rows`: which they are, in words. `interval`: of adapter less base. `source`: None where it was not measured."""

    name: Name
    rows: str
    base: float | None = None
    adapter: float | None = None
    interval: Interval | None = None
    source: SourceLoss | None = None

    @property
    def text(self) -> str:
        """In a sentence, with what was measured."""
        return f"{WORDS[self.name]}: {self.losses}" if self.name in WORDS else self.losses

    @property
    def losses(self) -> str:
        """What was measured, without a word on it."""
        if self.adapter is None or self.base is None:
            return f"not compared with the base: {self.rows}"
        losses = f"loss {self.adapter:.4f} beside {self.base:.4f}"
        if self.interval is not None:
            losses += f", {_signed(self.adapter - self.base, self.interval)}"
        beside = "" if self.source is None or self.source.is_base else f"; {self.source.text}"
        return f"{losses}, on {self.rows}{beside}"

    @property
    def useless(self) -> bool:
        """Whether the base alone is measured to be better."""
        return self.name in ("worse", "diverged")

    def to_json(self) -> Document:
        interval = None if self.interval is None else list(self.interval)
        source = None if self.source is None else self.source.to_json()
        return {**vars(self), "interval": interval, "source": source, "text": self.text, "useless": self.useless}


def _signed(value: float, interval: Interval) -> str:
    return f"{value:+.4f} [{interval[0]:.4f}, {interval[1]:.4f}]"


def beside_source(
    source: NDArray[np.float64] | None, base: NDArray[np.float64], adapter: NDArray[np.float64] | None = None
) -> SourceLoss | None:
    """What quantising costs, and what an adapter has won over the source model; None where it was not measured, or not
    on rows enough. Each: (rows, 2 or more), as of `judge`."""
    if source is None or len(source) < 2 or not all(np.isfinite(x).all() for x in (source, base)):
        return None
    as_came = RowSums(source[:, 0], source[:, 1])

    def more(rows: NDArray[np.float64]) -> tuple[float, Interval] | None:
        other = RowSums(rows[:, 0], rows[:, 1])
        limits = intervals.interval_of_difference(other, as_came, resamples=RESAMPLES, seed=SEED)
        return None if limits is None or not math.isfinite(other.value) else (other.value - as_came.value, limits)

    cost = more(base)
    return None if cost is None else SourceLoss(as_came.value, cost, None if adapter is None else more(adapter))


def judge(
    adapter: NDArray[np.float64] | None, base: NDArray[np.float64] | None, rows: str,
    source: NDArray[np.float64] | None = None,
) -> Verdict:  # fmt: skip
    """The verdict on an adapter. `adapter`, `base`, `source`: (rows, 2 or more): the loss of each row, summed, and what
    it counts for; None: not measured. `rows`: which they are, in words."""
    if adapter is None or base is None or len(base) < 2 or not np.isfinite(base).all():
        return Verdict("not measured", rows)
    now, before = RowSums(adapter[:, 0], adapter[:, 1]), RowSums(base[:, 0], base[:, 1])
    if not math.isfinite(now.value):
        return Verdict("diverged", rows, before.value, now.value)
    if not np.ptp(adapter[:, 0]) and not np.ptp(base[:, 0]):  # one loss of all rows together has no interval
        return Verdict("not measured", rows, before.value, now.value)
    interval = intervals.interval_of_difference(now, before, resamples=RESAMPLES, seed=SEED)
    assert interval is not None
    name: Name = "no difference"
    is_wild = now.value > WILD * before.value and bool((adapter[:, 0] > base[:, 0]).all())
    if interval[1] < 0:
        name = "better"
    elif interval[0] > 0 or is_wild:
        name = "diverged" if now.value > FAR * before.value else "worse"
    return Verdict(name, rows, before.value, now.value, interval, beside_source(source, base, adapter))
