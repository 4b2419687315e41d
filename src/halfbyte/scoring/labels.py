"""What labels and numbers of a head are worth: accuracy, F1, areas, calibration, confusion; errors; with intervals.

Source: F1 as scikit-learn's `f1_score` (0 where a label is never said and never true), the area under the ROC curve as
its `roc_auc_score` (one label against the rest; the mean of those that some rows have and some have not); the expected
calibration error of 15 bins of one width, and one temperature for all scores, Guo et al., arXiv:1706.04599.
Intervals: of means as `intervals` has them, of all else by the percentile bootstrap of rows. No torch.
Cost: `resamples` passes over the rows for each of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.recipe.evaluation import Eval
from halfbyte.scoring import intervals
from halfbyte.types import Document

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]
BINS = 15
HOTTEST, SMALLEST = 4.0, 1e-12  # logarithm of the highest temperature; a probability


def probabilities(scores: Floats, *, several: bool, temperature: float = 1.0) -> Floats:
    """Of a head's scores (n, L): softmax over labels, or of each label alone where a text may have `several`."""
    scores = scores / temperature
    if several:
        return 1 / (1 + np.exp(-scores))
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def of_labels(every: Floats, truth: Bools, settings: Eval, *, several: bool) -> Document:
    """`scores` by name, each with `value` and `interval`; `by_label`; `confusion` (true, said) of one label a text;
    `reliability`, and the `temperature` of these rows.

    Args:
        every: probabilities (n, L). truth: whether a text has a label: (n, L).
    """
    answers = every > 0.5 if several else every.argmax(1)[:, None] == np.arange(every.shape[1])
    right = (answers == truth).all(1)
    sure, hit = (every, truth) if several else (every.max(1, keepdims=True), right[:, None])
    measures: dict[str, Callable[[Rows], float]] = {
        "f1_macro": lambda rows: _rates(answers[rows], truth[rows])[2].mean(),
        "f1_micro": lambda rows: 2 * (answers & truth)[rows].sum() / max(1, (answers[rows].sum() + truth[rows].sum())),
        "auroc": lambda rows: _known(_areas(every[rows], truth[rows])).mean(),
        "ece": lambda rows: _calibration_error(sure[rows], hit[rows]),
    }
    scores = {name: _bootstrap(measure, len(truth), settings) for name, measure in measures.items()}
    areas = [None if np.isnan(area) else float(area) for area in _areas(every, truth)]
    columns = zip(truth.sum(0).tolist(), *(rate.tolist() for rate in _rates(answers, truth)), areas, strict=True)
    by_label = [dict(zip(("rows", "precision", "recall", "f1", "auroc"), each, strict=True)) for each in columns]
    confusion = [] if several else (truth.T.astype(int) @ answers).tolist()
    heat = _temperature(every, truth, several=several)
    return {"scores": {"accuracy": _mean(right, settings), **scores}, "by_label": by_label, "confusion": confusion,
            "reliability": _bins(sure, hit), "temperature": heat}  # fmt: skip


def of_numbers(answers: Floats, truth: Floats, settings: Eval) -> Document:
    """`scores` of numbers: (n,) each."""
    off = answers - truth
    result = of_values({"mean_squared_error": off**2, "mean_absolute_error": np.abs(off)}, settings)
    result["scores"]["spearman"] = spearman(answers, truth, settings)
    return result


def of_values(columns: Mapping[str, Floats], settings: Eval) -> Document:
    """`scores`: the mean of each column's rows."""
    return {"scores": {name: _mean(values, settings) for name, values in columns.items()}}


def spearman(answers: Floats, truth: Floats, settings: Eval) -> Document:
    """How alike two orders of the same rows are, from -1 to 1; 0 where one of them is none."""

    from scipy import stats

    def alike(rows: Rows) -> float:
        one, other = (stats.rankdata(values[rows]) for values in (answers, truth))
        return float(np.corrcoef(one, other)[0, 1]) if one.std() * other.std() > 0 else 0.0

    return _bootstrap(alike, len(truth), settings)


class Tagged(NamedTuple):
    """Of a text: predicted entities and true ones, each with its kind first; tags that are right, and all."""

    predicted: set[tuple[str, int, int]]
    there: set[tuple[str, int, int]]
    right: int
    tags: int


def of_entities(texts: Sequence[Tagged], settings: Eval) -> Document:
    """`scores`: F1, precision and recall of entities of any kind, accuracy of tags; `labels`, the kinds, and `by_label`
    as `of_labels` has it. Source: seqeval, which counts an entity as right where its ends and its kind are."""
    kinds = sorted({each[0] for text in texts for each in text.predicted | text.there})
    both = [(text.predicted & text.there, text.predicted, text.there) for text in texts]
    counts = np.array([[[sum(e[0] == kind for e in x) for kind in kinds] for x in of] for of in both], float)
    counts = counts.reshape(len(texts), 3, len(kinds))  # (n, right predicted true, kinds)
    tags, every = np.array([(text.right, text.tags) for text in texts], float), counts.sum(2)
    rates: dict[str, Callable[..., float]] = {
        "f1": lambda right, predicted, true: 2 * right / max(predicted + true, 1),
        "precision": lambda right, predicted, true: right / max(predicted, 1),
        "recall": lambda right, predicted, true: right / max(true, 1),
    }

    def score(name: str) -> Document:
        return _bootstrap(lambda rows: rates[name](*every[rows].sum(0)), len(texts), settings)

    scores = {name: score(name) for name in rates}
    scores["accuracy"] = _bootstrap(lambda rows: tags[rows, 0].sum() / tags[rows, 1].sum(), len(texts), settings)
    by_label = [{"rows": int(of[2]), **{name: rate(*of) for name, rate in rates.items()}} for of in counts.sum(0).T]
    return {"scores": scores, "labels": kinds, "by_label": by_label, "confusion": []}


def _mean(values: NDArray[np.generic], settings: Eval) -> Document:
    rows = intervals.RowSums.mean(np.asarray(values, float).tolist())
    return {"value": rows.value, "interval": intervals.interval(rows, resamples=settings.resamples, seed=settings.seed)}


def _bootstrap(score: Callable[[Rows], float], rows: int, settings: Eval) -> Document:
    draw, tail = np.random.default_rng(settings.seed), 50 * (1 - intervals.CONFIDENCE)
    values = [score(draw.integers(0, rows, rows)) for _ in range(settings.resamples)]
    return {"value": float(score(np.arange(rows))), "interval": np.percentile(values, [tail, 100 - tail]).tolist()}


def _rates(answers: Bools, truth: Bools) -> Sequence[Floats]:
    """Precision, recall and F1 of each label: (L,) each."""
    right, of_answers, of_truth = (x.sum(0).astype(float) for x in (answers & truth, answers, truth))
    f1 = 2 * right / np.maximum(of_answers + of_truth, 1)
    return right / np.maximum(of_answers, 1), right / np.maximum(of_truth, 1), f1


def _areas(every: Floats, truth: Bools) -> Floats:
    """Under the ROC curve of each label: how often a row that has it gets more of it than one that has not; not a
    number where all rows have it, or none."""
    from scipy import stats

    ones = truth.sum(0)
    below = (stats.rankdata(every, axis=0) * truth).sum(0) - ones * (ones + 1) / 2
    with np.errstate(invalid="ignore"):
        areas: Floats = below / (ones * (len(truth) - ones))
    return areas


def _known(values: Floats) -> Floats:
    return values[~np.isnan(values)] if not np.isnan(values).all() else np.array([0.5])


def _calibration_error(sure: Floats, hit: Bools) -> float:
    return float(np.abs(np.bincount(_bin_of(sure), sure.ravel() - hit.ravel())).sum() / len(hit))


def _bin_of(sure: Floats) -> Rows:
    return np.minimum((sure.ravel() * BINS).astype(int), BINS - 1)


def _bins(sure: Floats, hit: Bools) -> list[Document]:
    """Of each bin that has some: how many, how sure on average, and how often right."""
    place = _bin_of(sure)
    every = [(int((place == b).sum()), sure.ravel()[place == b], hit.ravel()[place == b]) for b in range(BINS)]
    return [{"count": n, "sure": float(p.mean()), "right": float(r.mean())} for n, p, r in every if n]


def _temperature(every: Floats, truth: Bools, *, several: bool) -> float:
    """What scores are to be divided by so that these labels are the likeliest."""
    from scipy import optimize

    scores = _scores(every, several=several)

    def loss(heat: float) -> float:
        p = probabilities(scores, several=several, temperature=float(np.exp(heat)))
        return -float(np.log(np.maximum(np.where(truth, p, 1 - p) if several else p[truth], SMALLEST)).mean())

    return float(np.exp(optimize.minimize_scalar(loss, bounds=(-HOTTEST, HOTTEST), method="bounded").x))


def _scores(every: Floats, *, several: bool) -> Floats:
    logs: Floats = np.log(np.maximum(every, SMALLEST))
    return logs - np.log(np.maximum(1 - every, SMALLEST)) if several else logs
