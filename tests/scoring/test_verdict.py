"""A verdict follows from paired losses alone: which words it gets, and how often it is wrong."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from halfbyte.scoring.verdict import judge

BASE = np.array([[20.0, 10], [44.0, 20], [33.0, 15], [18.0, 10], [61.0, 30], [25.0, 12], [30.0, 14], [41.0, 20]])


def moved(by: list[float]) -> np.ndarray:
    """The same rows, each with so many nats a token more."""
    return BASE + np.stack([np.array(by) * BASE[:, 1], np.zeros(8)], -1)


def seen(by: list[float]) -> str:
    return judge(moved(by), BASE, "8 rows").name


def test_one_loss_of_all_rows_together_has_neither_interval_nor_word() -> None:
    verdict = judge(np.full((8, 2), [0.5, 1.0]), np.full((8, 2), [0.9, 1.0]), "8 rows")
    assert (verdict.name, verdict.interval, verdict.text) == (
        "not measured",
        None,
        "loss 0.5000 beside 0.9000, on 8 rows",
    )


def test_only_an_interval_on_one_side_of_0_is_a_verdict() -> None:
    noise = [0.03, -0.02, 0.01, -0.03, 0.02, -0.01, 0.0, 0.01]
    assert seen([n - 0.1 for n in noise]) == "better"
    assert seen([n + 0.1 for n in noise]) == "worse"
    assert seen(noise) == "no difference"
    assert seen([n + 1.0 for n in noise]) == "diverged", "a fifth above the base"
    assert seen([9.0, *[-0.1] * 7]) == "no difference", "one row of eight, however far"
    assert seen([0.0] * 8) == "no difference"
    wild = np.array([1.0, 2000.0, 3.0, 5.0])
    few, base = np.stack([wild * 20, np.full(4, 10.0)], -1), np.full((4, 2), [20.0, 10.0])
    few[0, 0] = 20.5
    verdict = judge(few, base, "4 rows")
    assert verdict.interval is not None and verdict.interval[0] < 0, "an interval without an end"
    assert verdict.name == "diverged" and verdict.useless
    few[0, 0] = 19.5
    assert judge(few, base, "4 rows").name == "no difference", "not on every row"


def test_a_loss_that_is_no_number_has_diverged_and_what_was_not_measured_is_no_verdict() -> None:
    verdict = judge(moved([math.nan, *[0.0] * 7]), BASE, "8 rows")
    assert verdict.name == "diverged" and verdict.useless and verdict.interval is None
    assert judge(None, BASE, "8 rows").name == judge(BASE, None, "8 rows").name == "not measured"
    assert judge(BASE[:1], BASE[:1], "1 row").name == "not measured"
    assert judge(BASE, None, "8 rows").text == "not compared with the base: 8 rows"


def test_its_words_and_its_json_say_what_was_measured() -> None:
    verdict = judge(moved([-0.1] * 7 + [-0.2]), BASE, "8 held-out rows")
    base, adapter = BASE[:, 0].sum() / 131, moved([-0.1] * 7 + [-0.2])[:, 0].sum() / 131
    assert verdict.text.startswith(
        f"better than the base: loss {adapter:.4f} beside {base:.4f}, {adapter - base:+.4f} ["
    )
    assert verdict.text.endswith("], on 8 held-out rows")
    entry = json.loads(json.dumps(verdict.to_json()))
    assert entry["name"] == "better" and entry["useless"] is False and entry["text"] == verdict.text
    assert entry["base"] == pytest.approx(base) and entry["interval"][1] < 0


def test_a_gain_over_the_base_alone_may_be_less_than_quantising_has_lost() -> None:
    noise = [0.03, -0.02, 0.01, -0.03, 0.02, -0.01, 0.0, 0.01]
    source = moved([-0.3 + n for n in noise])
    verdict = judge(moved([-0.1 - n for n in noise]), BASE, "8 rows", source)
    assert verdict.name == "better" and verdict.source is not None and verdict.source.lost
    loss = source[:, 0].sum() / source[:, 1].sum()
    cost = BASE[:, 0].sum() / BASE[:, 1].sum() - loss
    assert verdict.source.loss == pytest.approx(loss) and verdict.source.cost[0] == pytest.approx(cost)
    assert f"on 8 rows; the source model has {loss:.4f}, so quantising costs {cost:+.4f} [" in verdict.text
    assert "; the run is worse than it, +0." in verdict.text
    assert json.loads(json.dumps(verdict.to_json()))["source"]["won"][0] > 0
    better = judge(moved([-0.5] * 8), BASE, "8 rows", source).source
    assert better is not None and not better.lost and "the run is better than it, -0." in better.text
    assert judge(BASE, BASE, "8 rows").source is None
    itself = judge(moved([-0.5] * 8), BASE, "8 rows", BASE)
    assert itself.source is not None and itself.source.is_base and "source" not in itself.text


@pytest.mark.parametrize("rows", [8, 32])
def test_an_adapter_as_good_as_the_base_is_seldom_called_worse(rows: int) -> None:
    """Skewed losses, changed by as much as they differ in a short run: at most 2.5% a side, by chance 5%."""
    draw, names = np.random.default_rng(rows), []
    for _ in range(400):
        tokens = draw.integers(20, 90, rows).astype(float)
        base = np.stack([tokens * draw.exponential(2.0, rows), tokens], -1)
        names.append(judge(base * np.stack([draw.normal(1, 0.05, rows), np.ones(rows)], -1), base, "").name)
    most = stats.binom.ppf(1 - 1e-3, 400, 0.025)
    assert names.count("worse") + names.count("diverged") <= most and names.count("better") <= most
