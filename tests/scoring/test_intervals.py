"""Intervals and tests against scipy called by hand, and against what is known without it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from halfbyte.errors import RecipeError
from halfbyte.recipe.evaluation import Eval
from halfbyte.scoring import intervals, sheet
from halfbyte.scoring.intervals import RowSums

DRAWN = {"resamples": 3000, "seed": 7}


def side(values: list[float], losses: list[float]) -> sheet.Side:
    answers = tuple(sheet.Answer("", {"exact_match": value}) for value in values)
    return sheet.Side(tuple(losses), tuple(range(1, len(losses) + 1)), answers)


def test_losses_count_by_their_tokens() -> None:
    made = side([], [1.0, 6.0])  # of 1 and 2 tokens
    assert made.rows_of("loss").value == pytest.approx(7 / 3)
    assert made.rows_of("perplexity").value == pytest.approx(math.exp(7 / 3))


def test_without_scipy_scores_have_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {"base": side([0, 1], [2, 2]), "adapter": side([1, 1], [1, 1])}
    made = sheet.score("exact_match", sides, Eval(), yes_no=True, sure=False)
    assert made.to_json() == {
        "name": "exact_match", "rows": 2, "adapter": {"value": 1, "interval": None},
        "base": {"value": 0.5, "interval": None}, "difference": {"value": 0.5, "interval": None, "p_value": None},
    }  # fmt: skip
    monkeypatch.setattr(intervals, "available", lambda: False)
    with pytest.raises(RecipeError, match=r"not installed\.\n  fix: pip install 'halfbyte\[eval\]'"):
        sheet.EvalOptions.of(Eval(), sure=True)


def test_a_mean_has_scipys_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(0).random(40)
    wanted = stats.bootstrap(
        (values,), np.mean, n_resamples=3000, method="percentile", rng=np.random.default_rng(7), vectorized=True
    ).confidence_interval
    found = intervals.interval(RowSums.mean(values.tolist()), **DRAWN)
    assert found == pytest.approx((wanted.low, wanted.high), rel=1e-9)
    assert intervals.interval(RowSums.mean(values.tolist()), **DRAWN) == found
    assert intervals.interval(RowSums.mean(values.tolist()), resamples=3000, seed=8) != found
    assert intervals.interval(RowSums.mean([1.0]), **DRAWN) is None


def test_a_difference_is_of_the_same_rows() -> None:
    """Rows that differ much, and two scores that differ little on each: a paired interval is narrow."""
    pytest.importorskip("scipy")
    draw = np.random.default_rng(1)
    one = draw.normal(size=200) * 10
    other = one - 0.5 + 0.01 * draw.normal(size=200)
    low, high = intervals.interval_of_difference(RowSums.mean(one.tolist()), RowSums.mean(other.tolist()), **DRAWN) or (
        0,
        0,
    )
    assert 0.49 < low < 0.5 < high < 0.51
    plain = intervals.interval(RowSums.mean(one.tolist()), **DRAWN) or (0, 0)
    assert plain[1] - plain[0] > 1


def test_an_interval_of_a_loss_is_that_of_resampled_rows_by_hand() -> None:
    pytest.importorskip("scipy")
    losses, tokens = np.array([1.0, 9.0, 2.0, 30.0, 4.0]), np.array([1.0, 3.0, 2.0, 10.0, 8.0])
    draw = np.random.default_rng(3)
    chosen = draw.integers(0, 5, (20_000, 5))
    wanted = np.percentile(losses[chosen].sum(1) / tokens[chosen].sum(1), [2.5, 97.5])
    found = intervals.interval(RowSums(losses, tokens), resamples=20_000, seed=0)
    assert found == pytest.approx(tuple(wanted), rel=0.02)


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    # two-sided binomial test of a fair coin, by hand: 2 (1/2)^5, and the whole
    [(5, 0, 2 / 32), (0, 5, 2 / 32), (3, 3, 1.0), (0, 0, 1.0), (9, 1, 22 / 1024)],
)
def test_the_exact_test_is_mcnemars(better: int, worse: int, p: float) -> None:
    pytest.importorskip("scipy")
    both = [(1.0, 1.0), (0.0, 0.0)] * 7
    rows = [(1.0, 0.0)] * better + [(0.0, 1.0)] * worse + both
    assert intervals.exact_test([a for a, _ in rows], [b for _, b in rows]) == pytest.approx(p)


def test_all_rows_equal_have_an_interval_of_no_width() -> None:
    pytest.importorskip("scipy")
    assert intervals.interval(RowSums.mean([1.0] * 9), **DRAWN) == (1.0, 1.0)
