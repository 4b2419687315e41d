"""Intervals and tests against scipy called by hand, and against what is known without it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from halfbyte.recipe.evaluation import Eval
from halfbyte.scoring import intervals, sheet
from halfbyte.scoring.intervals import RowSums

DRAWN = {"resamples": 3000, "seed": 7}


def side(values: list[float], losses: list[float]) -> sheet.Side:
    answers = tuple(sheet.Answer("", {"exact_match": value}) for value in values)
    return sheet.Side(tuple(losses), tuple(range(1, len(losses) + 1)), answers)


def test_a_loss_has_no_interval_below_nothing() -> None:
    losses = np.array([0.0, 0.001, 0.002, 0.4])
    for exponential, least in ((False, 0.0), (True, 1.0)):
        rows = RowSums(losses, np.full(4, 10.0), exponential=exponential)
        low, high = intervals.interval(rows, resamples=200, seed=0) or (-1.0, -1.0)
        assert low == least < rows.value < high
    margins = RowSums(losses - 0.1, np.full(4, 1.0))
    assert (intervals.interval(margins, resamples=200, seed=0) or (1.0,))[0] < 0


def test_losses_count_by_their_tokens() -> None:
    made = side([], [1.0, 6.0])  # of 1 and 2 tokens
    assert made.rows_of("loss").value == pytest.approx(7 / 3)
    assert made.rows_of("perplexity").value == pytest.approx(math.exp(7 / 3))


def test_without_intervals_there_are_values_alone() -> None:
    sides = {"base": side([0, 1], [2, 2]), "adapter": side([1, 1], [1, 1])}
    made = sheet.score("exact_match", sides, Eval(), yes_no=True, sure=False)
    assert made.to_json() == {
        "name": "exact_match", "rows": 2, "source": None, "adapter": {"value": 1, "interval": None},
        "base": {"value": 0.5, "interval": None}, "difference": {"value": 0.5, "interval": None, "p_value": None},
    }  # fmt: skip
    assert sheet.EvalOptions.of(Eval()).sure, "what nobody has asked for is there"


def sums(losses: list[float]) -> RowSums:
    return RowSums(np.array(losses), np.ones(len(losses)))


def test_a_mean_of_losses_has_students_interval_where_rows_are_many_and_alike() -> None:
    values = np.random.default_rng(0).normal(5, 1, 2000)
    wanted = stats.t.interval(0.95, 1999, values.mean(), values.std(ddof=1) / 2000**0.5)
    found = intervals.interval(sums(values.tolist()), **DRAWN)
    assert found == pytest.approx(wanted, abs=0.005)
    assert intervals.interval(sums(values.tolist()), **DRAWN) == found
    assert intervals.interval(sums([0.5]), **DRAWN) is None
    low, high = intervals.interval(sums([11.0, 12.0]), **DRAWN) or (0, 0)
    assert high - 11.5 == pytest.approx(stats.t.ppf(0.975, 1) * 0.5) and low - 11.5 == pytest.approx(11.5 - high)


def test_skewed_rows_have_a_wider_side() -> None:
    """The bootstrap of t by hand, a resample at a time."""
    values = np.array([11.0, 11.1, 11.2, 11.0, 11.3, 11.1, 19.0, 11.2])
    mean, error = values.mean(), values.std(ddof=1) / 8**0.5
    draw, t = np.random.default_rng(3), []
    for _ in range(5000):
        chosen = values[draw.integers(0, 8, 8)]
        t.append((chosen.mean() - mean) / max(chosen.std(ddof=1) / 8**0.5, 1e-12))
    student = stats.t.ppf(0.975, 7)
    low, high = intervals.interval(sums(values.tolist()), resamples=5000, seed=1) or (0, 0)
    assert low == pytest.approx(mean - student * error), "no resample is as far above as t allows"
    assert high == pytest.approx(mean - float(np.quantile(t, 0.025)) * error, rel=0.1) and high > mean + 2 * student


def test_a_difference_is_of_the_same_rows() -> None:
    """Rows that differ much, and two scores that differ little on each: a paired interval is narrow."""
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


def test_sums_over_sums_err_as_their_rows_left_out_one_by_one_say() -> None:
    """The jackknife's error, which a linear part is near, for loss, perplexity and their paired differences."""
    draw = np.random.default_rng(2)
    tokens = draw.integers(20, 60, 300).astype(float)
    losses, others = tokens * draw.gamma(9, 0.2, 300), tokens * draw.gamma(9, 0.21, 300)
    left_out = ~np.eye(300, dtype=bool)
    for exponential in (False, True):
        one, other = (RowSums(x, tokens, exponential=exponential) for x in (losses, others))

        def error(score: np.ndarray) -> float:
            return float(((score - score.mean()) ** 2).sum() * 299 / 300) ** 0.5

        alone = [np.array([r.ratio(r.numerators[k], r.denominators[k]) for k in left_out]) for r in (one, other)]
        for found, wanted in (
            (intervals.interval(one, **DRAWN), error(alone[0])),
            (intervals.interval_of_difference(one, other, **DRAWN), error(alone[0] - alone[1])),
        ):
            low, high = found or (0, 0)
            assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 299) * wanted, rel=0.12)


def test_perplexitys_interval_is_that_of_the_loss() -> None:
    losses, tokens = np.array([1.0, 9.0, 2.0, 30.0, 4.0]), np.array([1.0, 3.0, 2.0, 10.0, 8.0])
    of_loss = intervals.interval(RowSums(losses, tokens), **DRAWN)
    of_perplexity = intervals.interval(RowSums(losses, tokens, exponential=True), **DRAWN)
    assert of_loss is not None and of_perplexity == pytest.approx(tuple(map(math.exp, of_loss)))


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    # two-sided binomial test of a fair coin, by hand: 2 (1/2)^5, and the whole
    [(5, 0, 2 / 32), (0, 5, 2 / 32), (3, 3, 1.0), (0, 0, 1.0), (9, 1, 22 / 1024)],
)
def test_the_exact_test_is_mcnemars(better: int, worse: int, p: float) -> None:
    both = [(1.0, 1.0), (0.0, 0.0)] * 7
    rows = [(1.0, 0.0)] * better + [(0.0, 1.0)] * worse + both
    assert intervals.exact_test([a for a, _ in rows], [b for _, b in rows]) == pytest.approx(p)


def test_a_share_has_an_exact_interval_also_where_all_rows_agree() -> None:
    for right, rows in ((0, 8), (8, 8), (3, 8), (1, 1), (150, 200)):
        wanted = stats.binomtest(right, rows).proportion_ci(method="exact")
        values = [1.0] * right + [0.0] * (rows - right)
        assert intervals.interval(RowSums.mean(values), **DRAWN) == pytest.approx((wanted.low, wanted.high))
    # by hand: none of 8 is right with probability (1 - p)^8, which is 2.5% at the upper limit
    assert intervals.interval(RowSums.mean([0.0] * 8), **DRAWN) == pytest.approx((0, 1 - 0.025 ** (1 / 8)))


def test_a_difference_of_shares_has_a_width_also_where_all_rows_agree() -> None:
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
    return bool((covered.sum(-1) >= stats.binom.ppf(1e-5, covered.shape[-1], intervals.CONFIDENCE)).all())


@pytest.mark.parametrize("rows", SIZES)
def test_intervals_of_shares_and_of_their_differences_cover(rows: int) -> None:
    """Seeded samples of rows on which base and adapter are right or wrong; shares from 0 to 1, differences -1 to 1."""
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


LEAST = 0.93
GRID = (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1.0)


def coverage(
    draw: Callable[[np.random.Generator], tuple[RowSums, RowSums | None]], truth: float, repetitions: int
) -> float:
    """How many of the samples' intervals hold the truth: of the first, or of its difference from the second."""
    random, covered = np.random.default_rng(11), 0
    few = {"resamples": 400, "seed": 5}
    for _ in range(repetitions):
        one, other = draw(random)
        found = intervals.interval(one, **few) if other is None else intervals.interval_of_difference(one, other, **few)
        assert found is not None
        covered += found[0] - 1e-9 <= truth <= found[1] + 1e-9
    return covered / repetitions


@pytest.mark.parametrize("rows", [5, 8, 20, 60, 200])
@pytest.mark.parametrize("kind", ["mean of scores", "difference of scores", "loss", "difference of losses"])
def test_intervals_of_means_cover(rows: int, kind: str) -> None:
    """Scores in parts of 1 with a mean from 0 to 1, most rows at an end; losses of tokens, skewed as an exponential
    distribution is; at least 93% of the intervals, less what chance takes from so many (1 of 1,000)."""
    repetitions = min(2000, 40_000 // rows)

    def parts(random: np.random.Generator, p: float) -> np.ndarray:
        """Scores such as those of JSON fields: 0 or 1, and one in three the mean of 4 fields."""
        mixed = random.random(rows) < 1 / 3
        return np.where(mixed, random.binomial(4, p, rows) / 4, random.binomial(1, p, rows))

    def losses(random: np.random.Generator, mean: float, tokens: np.ndarray) -> RowSums:
        return RowSums(tokens * random.exponential(mean, rows), tokens)

    for p in GRID if "scores" in kind else (0.5,):

        def draw(random: np.random.Generator, p: float = p) -> tuple[RowSums, RowSums | None]:
            if "scores" in kind:
                one = RowSums.mean(parts(random, p).tolist())
                return one, RowSums.mean(parts(random, 0.3).tolist()) if "difference" in kind else None
            tokens = random.integers(30, 90, rows).astype(float)
            one = losses(random, 2.0, tokens)
            if "difference" not in kind:
                return one, None
            # the same rows: what is easy for one is easy for the other
            return RowSums(0.9 * one.numerators * random.gamma(20, 1 / 20, rows), tokens), one

        truth = {"mean of scores": p, "difference of scores": p - 0.3, "loss": 2.0}.get(kind, -0.2)
        seen = coverage(draw, truth, repetitions)
        assert seen >= stats.binom.ppf(1e-3, repetitions, LEAST) / repetitions, (kind, rows, p, seen)
