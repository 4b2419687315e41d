"""How sure a score is: a bootstrap interval over rows, and an exact test of two yes/no scores of the same rows.

Source: percentile bootstrap of `scipy.stats.bootstrap` (its BCa is not a number where all rows agree); McNemar's exact
test, which is `scipy.stats.binomtest` of the rows on which two differ.
Cost: some 10 ms a score of 1,000 rows. scipy is an extra; without it a score has no interval.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import RecipeError

CONFIDENCE = 0.95
PIP = "pip install 'halfbyte[eval]'"
Interval = tuple[float, float]


def available() -> bool:
    return importlib.util.find_spec("scipy") is not None


def need() -> None:
    """Raise a RecipeError where scipy is missing."""
    if not available():
        raise RecipeError("intervals and tests are computed by scipy, which is not installed.", fix=PIP)


@dataclass(frozen=True)
class Rows:
    """A score as a ratio of sums over rows: (n,) each. A mean has ones below; a loss of tokens their numbers.

    `exponential`: the score is e to that ratio, as perplexity is.
    """

    above: NDArray[np.float64]
    below: NDArray[np.float64]
    exponential: bool = False

    @classmethod
    def mean(cls, values: Sequence[float | None]) -> Rows:
        """Of the rows that have a value."""
        known = np.array([value for value in values if value is not None], np.float64)
        return cls(known, np.ones_like(known))

    @property
    def value(self) -> float:
        return float(self._of(self.above, self.below))

    def _of(self, above: NDArray[np.float64], below: NDArray[np.float64]) -> NDArray[np.float64]:
        ratio = above.sum(-1) / np.maximum(below.sum(-1), 1e-30)
        made: NDArray[np.float64] = np.exp(np.minimum(ratio, 700.0)) if self.exponential else ratio
        return made


def interval(rows: Rows, *, resamples: int, seed: int) -> Interval | None:
    """Percentile bootstrap interval of a score; None for a single row."""
    return _bootstrap((rows.above, rows.below), lambda a, b, axis=-1: rows._of(a, b), resamples, seed)


def interval_of_difference(one: Rows, other: Rows, *, resamples: int, seed: int) -> Interval | None:
    """Of `one` - `other`, which are of the same rows: each resample takes the same ones of both."""
    return _bootstrap(
        (one.above, one.below, other.above, other.below),
        lambda a, b, c, d, axis=-1: one._of(a, b) - other._of(c, d),
        resamples,
        seed,
    )


def exact_test(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided p of McNemar's exact test: of the rows on which two yes/no scores differ, half are expected to be
    better in either; 1 where they differ on none."""
    from scipy import stats

    better = sum(a > b for a, b in zip(one, other, strict=True))
    worse = sum(a < b for a, b in zip(one, other, strict=True))
    return float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0


def _bootstrap(
    samples: tuple[NDArray[np.float64], ...], statistic: object, resamples: int, seed: int
) -> Interval | None:
    from scipy import stats

    if len(samples[0]) < 2:
        return None
    made = stats.bootstrap(
        samples, statistic, n_resamples=resamples, paired=True, vectorized=True, method="percentile",
        confidence_level=CONFIDENCE, rng=np.random.default_rng(seed), batch=max(1, 1_000_000 // len(samples[0])),
    )  # fmt: skip
    low, high = made.confidence_interval
    return float(low), float(high)
