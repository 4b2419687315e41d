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
    assert intervals.interval(RowSums.mean([0.5]), **DRAWN) is None


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


def test_a_share_has_an_exact_interval_also_where_all_rows_agree() -> None:
    stats = pytest.importorskip("scipy.stats")
    for right, rows in ((0, 8), (8, 8), (3, 8), (1, 1), (150, 200)):
        wanted = stats.binomtest(right, rows).proportion_ci(method="exact")
        values = [1.0] * right + [0.0] * (rows - right)
        assert intervals.interval(RowSums.mean(values), **DRAWN) == pytest.approx((wanted.low, wanted.high))
    # by hand: none of 8 is right with probability (1 - p)^8, which is 2.5% at the upper limit
    assert intervals.interval(RowSums.mean([0.0] * 8), **DRAWN) == pytest.approx((0, 1 - 0.025 ** (1 / 8)))


def test_a_difference_of_shares_has_a_width_also_where_all_rows_agree() -> None:
    pytest.importorskip("scipy")
    sides = {"base": side([0.0] * 8, [2.0] * 8), "adapter": side([0.0] * 8, [1.0] * 8)}
    same = sheet.score("exact_match", sides, Eval(), yes_no=True, sure=True).difference
    assert same is not None and same.interval is not None
    assert same.interval[0] == pytest.approx(-same.interval[1]) and 0.3 < same.interval[1] < 0.4
    sides["adapter"] = side([1.0] * 8, [1.0] * 8)
    better = sheet.score("exact_match", sides, Eval(), yes_no=True, sure=True).difference
    assert better is not None and better.interval is not None
    assert better.value == better.interval[1] == 1 and 0.2 < better.interval[0] < 0.5
    assert intervals.interval(sides["base"].rows_of("loss"), **DRAWN) is not None, "a loss is no share"


SIZES = (5, 8, 13, 30, 200)
REPETITIONS = 400


def enough(covered: np.ndarray) -> bool:
    """Whether so many of the repetitions are covered as a coverage of 95% has in all but 1 of 100,000 cases."""
    from scipy import stats

    return bool((covered.sum(-1) >= stats.binom.ppf(1e-5, covered.shape[-1], intervals.CONFIDENCE)).all())


@pytest.mark.parametrize("rows", SIZES)
def test_intervals_of_shares_and_of_their_differences_cover(rows: int) -> None:
    """Seeded samples of rows on which base and adapter are right or wrong; shares from 0 to 1, differences -1 to 1."""
    pytest.importorskip("scipy")
    draw, grid = np.random.default_rng(rows), np.linspace(0, 1, 21)
    right = draw.binomial(rows, grid[:, None], (len(grid), REPETITIONS))
    low, high = intervals.share_limits(right, rows)
    assert enough((low <= grid[:, None] + 1e-12) & (grid[:, None] - 1e-12 <= high))
    shares = np.array([(p, q, max(0.0, 1 - p - q)) for p in grid for q in grid if p + q < 1 + 1e-9])
    shares /= shares.sum(-1, keepdims=True)
    better, worse, _ = np.moveaxis(draw.multinomial(rows, shares[:, None], (len(shares), REPETITIONS)), -1, 0)
    low, high = intervals.difference_limits(better, worse, rows)
    truth = (shares[:, 0] - shares[:, 1])[:, None]
    assert enough((low <= truth + 1e-12) & (truth - 1e-12 <= high))
    assert (low >= -1 - 1e-12).all() and (high <= 1 + 1e-12).all() and (high - low > 0).all()


@pytest.mark.parametrize("rows", SIZES[:4])
def test_intervals_of_shares_cover_by_summing_over_all_outcomes(rows: int) -> None:
    """The same without chance: the probability of every outcome whose interval holds the truth."""
    stats = pytest.importorskip("scipy.stats")
    right, grid = np.arange(rows + 1), np.linspace(0.01, 0.99, 99)
    low, high = intervals.share_limits(right, rows)
    for p in grid:
        assert stats.binom.pmf(right, rows, p)[(low <= p) & (p <= high)].sum() >= 0.95
    counts = np.indices((rows + 1, rows + 1))
    better, worse = counts[:, counts.sum(0) <= rows]
    low, high = intervals.difference_limits(better, worse, rows)
    outcomes = np.stack([better, worse, rows - better - worse], -1)
    for p in (0.01, 0.05, 0.2, 0.5, 0.8, 0.95):
        for q in (0.0, 0.02, 0.05, 0.2, 0.5):
            if p + q <= 1:
                chances = stats.multinomial.pmf(outcomes, rows, [p, q, max(0.0, 1 - p - q)])
                assert chances[(low <= p - q + 1e-12) & (p - q - 1e-12 <= high)].sum() >= 0.95, (p, q)
