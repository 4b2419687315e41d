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
class RowSums:
    """A score as a ratio of sums over rows, (n,) each: a mean divides by ones, a loss by each row's tokens.

    `exponential`: the score is e to that ratio, as perplexity is.
    """

    numerators: NDArray[np.float64]
    denominators: NDArray[np.float64]
    exponential: bool = False

    @classmethod
    def mean(cls, values: Sequence[float | None]) -> RowSums:
        """The mean of the rows that have a value."""
        known = np.array([value for value in values if value is not None], np.float64)
        return cls(known, np.ones_like(known))

    @property
    def value(self) -> float:
        return float(self.ratio(self.numerators, self.denominators))

    def ratio(self, numerators: NDArray[np.float64], denominators: NDArray[np.float64]) -> NDArray[np.float64]:
        """The score of resampled rows: (..., n) -> (...)."""
        ratio: NDArray[np.float64] = numerators.sum(-1) / np.maximum(denominators.sum(-1), 1e-30)
        return np.exp(np.minimum(ratio, 700.0)) if self.exponential else ratio


def interval(rows: RowSums, *, resamples: int, seed: int) -> Interval | None:
    """Percentile bootstrap interval of a score; None for a single row."""
    samples = rows.numerators, rows.denominators
    return _bootstrap(samples, lambda a, b, axis=-1: rows.ratio(a, b), resamples, seed)


def interval_of_difference(one: RowSums, other: RowSums, *, resamples: int, seed: int) -> Interval | None:
    """Interval of `one` - `other`, which are of the same rows: each resample takes the same rows of both."""
    samples = (one.numerators, one.denominators, other.numerators, other.denominators)
    return _bootstrap(samples, lambda a, b, c, d, axis=-1: one.ratio(a, b) - other.ratio(c, d), resamples, seed)


def exact_test(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided p of McNemar's exact test on two yes/no scores of the same rows; 1 where they differ on no row."""
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
    result = stats.bootstrap(
        samples, statistic, n_resamples=resamples, paired=True, vectorized=True, method="percentile",
        confidence_level=CONFIDENCE, rng=np.random.default_rng(seed), batch=max(1, 1_000_000 // len(samples[0])),
    )  # fmt: skip
    low, high = result.confidence_interval
    return float(low), float(high)
