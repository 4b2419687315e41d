"""What labels and numbers of a head are worth: accuracy, F1, calibration, confusion; errors; with intervals.

Source: F1 as scikit-learn's `f1_score` (0 where a label is never said and never true); the expected calibration error
of 15 bins of one width, Guo et al., arXiv:1706.04599.
Intervals: of means as `intervals` has them, of F1 and calibration by the percentile bootstrap of rows. No torch.
Cost: `resamples` passes over the rows for each of these two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from halfbyte.recipe.evaluation import Eval
from halfbyte.scoring import intervals
from halfbyte.types import Document

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
BINS = 15


def probabilities(scores: Floats, *, several: bool) -> Floats:
    """Of a head's scores (n, L): softmax over labels, or of each label alone where a text may have `several`."""
    if several:
        return 1 / (1 + np.exp(-scores))
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def of_labels(every: Floats, truth: Bools, settings: Eval, *, several: bool) -> Document:
    """`scores` by name, each with `value` and `interval`; `by_label`; `confusion` (true, said) of one label a text.

    Args:
        every: probabilities (n, L). truth: whether a text has a label: (n, L).
    """
    answers = every > 0.5 if several else every.argmax(1)[:, None] == np.arange(every.shape[1])
    right = (answers == truth).all(1)
    sure, hit = (every, truth) if several else (every.max(1, keepdims=True), right[:, None])
    scores = {
        "accuracy": _mean(right, settings),
        "f1_macro": _bootstrap(lambda rows: _rates(answers[rows], truth[rows])[2].mean(), len(truth), settings),
        "ece": _bootstrap(lambda rows: _calibration_error(sure[rows], hit[rows]), len(truth), settings),
    }
    columns = zip(truth.sum(0).tolist(), *(rate.tolist() for rate in _rates(answers, truth)), strict=True)
    by_label = [dict(zip(("rows", "precision", "recall", "f1"), each, strict=True)) for each in columns]
    confusion = [] if several else (truth.T.astype(int) @ answers).tolist()
    return {"scores": scores, "by_label": by_label, "confusion": confusion}


def of_numbers(answers: Floats, truth: Floats, settings: Eval) -> Document:
    """`scores` of numbers: (n,) each."""
    off = answers - truth
    return of_values({"mean_squared_error": off**2, "mean_absolute_error": np.abs(off)}, settings)


def of_values(columns: Mapping[str, Floats], settings: Eval) -> Document:
    """`scores`: the mean of each column's rows."""
    return {"scores": {name: _mean(values, settings) for name, values in columns.items()}}


def _mean(values: NDArray[np.generic], settings: Eval) -> Document:
    rows = intervals.RowSums.mean(np.asarray(values, float).tolist())
    return {"value": rows.value, "interval": intervals.interval(rows, resamples=settings.resamples, seed=settings.seed)}


def _bootstrap(score: Callable[[NDArray[np.int64]], float], rows: int, settings: Eval) -> Document:
    draw, tail = np.random.default_rng(settings.seed), 50 * (1 - intervals.CONFIDENCE)
    values = [score(draw.integers(0, rows, rows)) for _ in range(settings.resamples)]
    return {"value": float(score(np.arange(rows))), "interval": np.percentile(values, [tail, 100 - tail]).tolist()}


def _rates(answers: Bools, truth: Bools) -> Sequence[Floats]:
    """Precision, recall and F1 of each label: (L,) each."""
    right, of_answers, of_truth = (x.sum(0).astype(float) for x in (answers & truth, answers, truth))
    f1 = 2 * right / np.maximum(of_answers + of_truth, 1)
    return right / np.maximum(of_answers, 1), right / np.maximum(of_truth, 1), f1


def _calibration_error(sure: Floats, hit: Bools) -> float:
    place = np.minimum((sure.ravel() * BINS).astype(int), BINS - 1)
    return float(np.abs(np.bincount(place, sure.ravel() - hit.ravel())).sum() / len(place))
