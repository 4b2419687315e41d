"""Columns of metrics, smoothing against its definition, thinning that loses no extreme."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from halfbyte.report import series
from halfbyte.report.series import Series
from tests.report import made


def test_rows_become_columns_and_what_is_no_number_is_a_gap(tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "loss": 2.0, "seconds": 1.0, "stepped_down": ["recomputation none -> full"]}',
        '{"step": 2, "loss": NaN, "grad_norm": "high", "seconds": 2.0}',
        '{"step": 2, "eval_loss": 1.5, "eval_exact_match": 0.25}',
        "not json",
        "[1]",
        '{"step": 3, "loss": null, "tokens": true, "learning_rate": 1e999}',
        '{"step": 4, "loss": 1.0, "seconds"',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    read = series.read(tmp_path / "metrics.jsonl")
    np.testing.assert_array_equal(read.steps["step"], [1, 2, 3])
    np.testing.assert_array_equal(read.steps["loss"], [2.0, np.nan, np.nan])
    for name in ("grad_norm", "tokens", "learning_rate"):
        assert np.isnan(read.steps[name]).all()
    assert read.unread == 3
    assert read.step_downs == ((1, "recomputation none -> full"),)
    assert {name: s.y.tolist() for name, s in read.evals.items()} == {"eval_loss": [1.5], "eval_exact_match": [0.25]}
    assert read.last_step == 3


def test_of_no_file_there_is_nothing(tmp_path: Path) -> None:
    read = series.read(tmp_path / "metrics.jsonl")
    assert len(read.column("loss")) == 0 and not read.evals and read.last_step == 0


def test_missing_rows_break_a_line() -> None:
    line = series.with_gaps(Series(np.array([1.0, 2, 3, 30, 31]), np.arange(5.0)))
    np.testing.assert_array_equal(line.y, [0, 1, 2, np.nan, 3, 4])
    whole = Series(np.array([1.0, 2, 4, 6]), np.arange(4.0))
    np.testing.assert_array_equal(series.with_gaps(whole).y, whole.y)


def by_definition(values: list[float], width: int) -> list[float]:
    """The weighted mean of all values so far, each (1 - 2 / (width + 1)) times the weight of the next."""
    keep, out = 1 - 2 / (width + 1), list[float]()
    for i, value in enumerate(values):
        if math.isnan(value):
            out.append(math.nan)
            continue
        known = [v for v in values[: i + 1] if not math.isnan(v)]
        weights = [keep ** (len(known) - 1 - j) for j in range(len(known))]
        out.append(sum(w * v for w, v in zip(weights, known, strict=True)) / sum(weights))
    return out


def test_smoothing_is_a_weighted_mean_that_passes_over_gaps() -> None:
    values = np.random.default_rng(0).normal(size=60)
    values[[0, 17, 18]] = np.nan
    line = Series(np.arange(60.0), values)
    width = series.span(57)
    assert width >= 3
    np.testing.assert_allclose(series.smooth(line).y, by_definition(values.tolist(), width), rtol=1e-12)


def test_a_short_line_is_not_smoothed() -> None:
    assert len(series.smooth(Series(np.arange(5.0), np.arange(5.0)))) == 0


@pytest.mark.parametrize("points", [7, 1200, 1201, 99_991])
def test_thinning_keeps_every_extreme_and_the_ends(points: int) -> None:
    values = np.random.default_rng(points).normal(size=points)
    values[points // 3], values[points // 2] = 1e6, -1e6
    line = Series(np.arange(float(points)), values)
    thin = series.thin(line)
    assert len(thin) <= max(points, 5 * series.BUCKETS) and len(thin) <= 5 * series.BUCKETS
    assert {1e6, -1e6} <= set(thin.y.tolist())
    assert (thin.x[0], thin.x[-1]) == (0, points - 1)
    assert (np.diff(thin.x) > 0).all()
    np.testing.assert_array_equal(values[thin.x.astype(int)], thin.y)


def test_thinning_keeps_a_gap_of_each_part_that_has_one() -> None:
    values = np.ones(100_000)
    values[::2] = np.nan
    thin = series.thin(Series(np.arange(100_000.0), values))
    assert np.isnan(thin.y).sum() == series.BUCKETS
    assert len(thin) <= 5 * series.BUCKETS


def test_minutes_add_up_over_a_gap() -> None:
    np.testing.assert_allclose(series.minutes(np.array([60.0, np.nan, 120.0])), [1, 1, 3])


def test_a_run_as_it_is_written_is_read_whole(tmp_path: Path) -> None:
    rows = made.metrics(30, evals=3)
    run = made.run(tmp_path / "run", rows)
    read = series.read(run.metrics)
    assert read.unread == 0 and len(read.evals["eval_loss"]) == 3
    assert read.steps["loss"].tolist() == [row["loss"] for row in rows if "loss" in row]
    assert json.loads(run.metrics.read_text().splitlines()[0])["step"] == 1
