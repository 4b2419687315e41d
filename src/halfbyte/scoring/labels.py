"""What labels and numbers of a head are worth: accuracy, F1, areas, calibration, confusion; errors; with intervals.

Source: F1 as scikit-learn's `f1_score` (0 where a label is never said and never true), the area under the ROC curve as
its `roc_auc_score` (one label against the rest; the mean of those that some rows have and some have not, no score where
there is none, and no part of an interval where a resample has none); the expected
calibration error of 15 bins of one width, and one temperature for all scores, Guo et al., arXiv:1706.04599. What the
error is at a temperature is measured on rows that it was not fitted on: each half's at that of the other half.
Intervals: of means as `intervals` has them, of all else by the percentile bootstrap of rows, none with `resamples` 0.
Cost: 0.6 s for 2,000 rows, 77 labels and 2,000 resamples: these are how often each row is taken, and scores are sums.

Letters: n rows, L labels, k resamples at once; `taken`: how often each row is, (k, n).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from halfbyte.recipe.evaluation import Eval
from halfbyte.scoring import intervals
from halfbyte.types import Document

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]
Measure = Callable[[Floats], Floats]
"""How often each row is taken, (k, n), to a score of each: (k,)."""
BINS = 15
HOTTEST, SMALLEST = 4.0, 1e-12  # logarithm of the highest temperature; a probability
LEAST_ROWS = 50  # for a temperature
FEW = 256  # rows with a label: they are compared with all others at once


def probabilities(scores: Floats, *, several: bool, temperature: float = 1.0) -> Floats:
    """Of a head's scores (n, L): softmax over labels, or of each label alone where a text may have `several`."""
    scores = scores / temperature
    if several:
        return 1 / (1 + np.exp(-scores))
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def of_labels(every: Floats, truth: Bools, settings: Eval, *, several: bool) -> Document:
    """`scores` by name, each with `value` and `interval`; `by_label`; `confusion` (true, said) of one label a text;
    `reliability`, and the `temperature` of these rows, None of fewer than `LEAST_ROWS`.

    Args:
        every: probabilities (n, L). truth: whether a text has a label: (n, L).
    """
    answers = every > 0.5 if several else every.argmax(1)[:, None] == np.arange(every.shape[1])
    right, both = (answers == truth).all(1), (answers & truth).sum(1)
    every_one = answers.sum(1) + truth.sum(1)
    hit, heat = truth if several else right[:, None], None

    def error(every: Floats) -> Measure:
        apart = _apart(every if several else every.max(1, keepdims=True), hit)
        return lambda taken: np.abs(taken @ apart).sum(1) / hit.size

    measures: dict[str, Measure] = {
        "f1_macro": lambda taken: _rates(answers, truth, taken)[2].mean(1),
        "f1_micro": lambda taken: 2 * (taken @ both) / np.maximum(1, taken @ every_one),
        "auroc": lambda taken: _mean_of_known(_areas(every, truth, taken)),
        "ece": error(every),
    }
    if len(truth) >= LEAST_ROWS:
        heat = _temperature(every, truth, several=several)
        measures["ece_calibrated"] = error(_at_temperature(every, truth, settings.seed, several=several))
    every_score = {name: _bootstrap(measure, len(truth), settings) for name, measure in measures.items()}
    scores = {name: score for name, score in every_score.items() if not np.isnan(score["value"])}
    once = np.ones((1, len(truth)))
    areas = [None if np.isnan(area) else float(area) for area in _areas(every, truth, once)[0]]
    rates = (rate[0].tolist() for rate in _rates(answers, truth, once))
    columns = zip(truth.sum(0).tolist(), *rates, areas, strict=True)
    by_label = [dict(zip(("rows", "precision", "recall", "f1", "auroc"), each, strict=True)) for each in columns]
    confusion = [] if several else (truth.T.astype(int) @ answers).tolist()
    sure = every if several else every.max(1, keepdims=True)
    return {"scores": {"accuracy": _mean(right, settings), **scores}, "by_label": by_label, "confusion": confusion,
            "reliability": _bins(sure, hit), "temperature": heat}  # fmt: skip


def of_numbers(answers: Floats, truth: Floats, settings: Eval) -> Document:
    """`scores` of numbers: (n,) each."""
    off = answers - truth
    result = of_values({"mean_squared_error": off**2, "mean_absolute_error": np.abs(off)}, settings)
    result["scores"]["spearman"] = spearman(answers, truth, settings)
    return result


_ERRORS = {"loss", "mean_squared_error", "mean_absolute_error"}  # may be above 1


def of_values(columns: Mapping[str, Floats], settings: Eval) -> Document:
    """`scores`: the mean of each column's rows."""
    return {"scores": {name: _mean(values, settings, share=name not in _ERRORS) for name, values in columns.items()}}


def spearman(answers: Floats, truth: Floats, settings: Eval) -> Document:
    """How alike two orders of the same rows are, from -1 to 1; 0 where one of them is none."""

    def alike(taken: Floats) -> Floats:
        one, other = (ranks - (taken * ranks).sum(1, keepdims=True) / len(truth) for ranks in
                      (_ranks(answers, taken), _ranks(truth, taken)))  # fmt: skip
        spread = np.sqrt((taken * one**2).sum(1) * (taken * other**2).sum(1))
        return np.where(spread > 0, (taken * one * other).sum(1) / np.where(spread > 0, spread, 1.0), 0.0)

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
    rates: dict[str, Callable[..., Floats]] = {
        "f1": lambda right, predicted, true: 2 * right / np.maximum(predicted + true, 1),
        "precision": lambda right, predicted, true: right / np.maximum(predicted, 1),
        "recall": lambda right, predicted, true: right / np.maximum(true, 1),
    }

    def score(rate: Callable[..., Floats], sums: Floats) -> Document:
        return _bootstrap(lambda taken: rate(*(taken @ sums).T), len(texts), settings)

    scores = {name: score(rate, every) for name, rate in rates.items()}
    scores["accuracy"] = score(lambda right, tags: right / tags, tags)
    by_label = [{"rows": int(of[2]), **{name: rate(*of) for name, rate in rates.items()}} for of in counts.sum(0).T]
    return {"scores": scores, "labels": kinds, "by_label": by_label, "confusion": []}


def _mean(values: NDArray[np.generic], settings: Eval, *, share: bool = True) -> Document:
    rows, count = intervals.RowSums.mean(np.asarray(values, float).tolist()), settings.resamples
    limits = (
        intervals.interval(replace(rows, bounded=rows.bounded and share), resamples=count, seed=settings.seed)
        if count
        else None
    )
    return {"value": rows.value, "interval": limits}


def _bootstrap(score: Measure, rows: int, settings: Eval) -> Document:
    draw, tail = np.random.default_rng(settings.seed), 50 * (1 - intervals.CONFIDENCE)
    values = list[float]()
    while len(values) < settings.resamples:
        count = min(settings.resamples - len(values), max(1, intervals.RESAMPLED_AT_ONCE // rows))
        chosen = draw.integers(0, rows, (count, rows)) + rows * np.arange(count)[:, None]
        taken = np.bincount(chosen.ravel(), minlength=count * rows).reshape(count, rows)
        values += score(taken.astype(float)).tolist()
    known = [value for value in values if not np.isnan(value)]
    limits = np.percentile(known, [tail, 100 - tail]).tolist() if known else None
    return {"value": float(score(np.ones((1, rows)))[0]), "interval": limits}


def _rates(answers: Bools, truth: Bools, taken: Floats) -> Sequence[Floats]:
    """Precision, recall and F1 of each label: (k, L) each."""
    right, of_answers, of_truth = (taken @ x.astype(float) for x in (answers & truth, answers, truth))
    f1 = 2 * right / np.maximum(of_answers + of_truth, 1)
    return right / np.maximum(of_answers, 1), right / np.maximum(of_truth, 1), f1


def _areas(every: Floats, truth: Bools, taken: Floats) -> Floats:
    """Under the ROC curve of each label, (k, L): how often a row that has it gets more of it than one that has not; not
    a number where all rows have it, or none."""
    below, exact = list[Floats](), taken.astype(np.float32)  # counts, and halves of them
    for scores, has in zip(every.T, truth.T, strict=True):
        few = scores[has]
        if len(few) <= FEW:
            less = ((scores[:, None] < few) + (scores[:, None] == few) / 2) * ~has[:, None]  # (n, rows with the label)
            below.append(((exact @ less.astype(np.float32)) * taken[:, has]).sum(1))
        else:
            ones = taken[:, has].sum(1)
            below.append((_ranks(scores, taken) * taken)[:, has].sum(1) - ones * (ones + 1) / 2)
    with np.errstate(invalid="ignore"):
        areas: Floats = np.stack(below, 1) / ((taken @ truth.astype(float)) * (taken @ (~truth).astype(float)))
    return areas


def _ranks(values: Floats, taken: Floats) -> Floats:
    """The rank of each row from 1, (k, n), where rows are there as often as they are `taken`; equal ones share a mean
    rank."""
    order = np.argsort(values, kind="stable")
    upto = np.hstack([np.zeros((len(taken), 1)), taken[:, order].cumsum(1)])
    before, through = (np.searchsorted(values[order], values, side) for side in ("left", "right"))
    return (upto[:, before] + upto[:, through] + 1) / 2


def _mean_of_known(values: Floats) -> Floats:
    known = ~np.isnan(values)
    sums: Floats = np.where(known, values, 0.0).sum(1)
    return np.where(known.any(1), sums / np.maximum(1, known.sum(1)), np.nan)


def _apart(sure: Floats, hit: Bools) -> Floats:
    """How much more sure than right each row is, in each bin: (n, bins)."""
    apart = np.zeros((len(sure), BINS))
    np.add.at(apart, (np.repeat(np.arange(len(sure)), sure.shape[1]), _bin_of(sure)), sure.ravel() - hit.ravel())
    return apart


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


def _at_temperature(every: Floats, truth: Bools, seed: int, *, several: bool) -> Floats:
    """The probabilities of each half of the rows at the temperature of the other half: (n, L)."""
    half, result = np.random.default_rng(seed).permutation(len(every)) % 2 == 0, np.empty_like(every)
    for rows in (half, ~half):
        heat, scores = _temperature(every[~rows], truth[~rows], several=several), _scores(every[rows], several=several)
        result[rows] = probabilities(scores, several=several, temperature=heat)
    return result


def _scores(every: Floats, *, several: bool) -> Floats:
    logs: Floats = np.log(np.maximum(every, SMALLEST))
    return logs - np.log(np.maximum(1 - every, SMALLEST)) if several else logs
