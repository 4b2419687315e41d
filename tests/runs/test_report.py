"""The figures of a run, from its rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from halfbyte.errors import RunError
from halfbyte.runs.report import MeasuredLine, build, usual_seconds

ROWS: list[dict[str, Any]] = [
    {"step": 1, "loss": 4.0, "tokens": 100, "seconds": 1.0, "rss_bytes": 700},
    {"step": 2, "loss": 3.0, "tokens": 300, "computed_tokens": 250, "seconds": 3.0, "rss_bytes": 900},
    {"step": 2, "eval_loss": 3.5, "eval_tokens": 50},
    {"step": 3, "loss": 2.5, "tokens": 200, "seconds": 1.0},
    {"step": 3, "eval_loss": 2.75},
]


def report(rows: list[dict[str, Any]], peak_rss_bytes: int = 800) -> dict[str, Any]:
    planned = {"tokens": 650, "computed_tokens": 600, "steps": 3, "train_seconds": 5.5, "seconds": 7.0}
    planned |= {"peak_rss_bytes": 1000, "peak_device_bytes": None}
    built = build(
        rows,
        planned=planned,
        seconds=8.0,
        peak_rss_bytes=peak_rss_bytes,
        peak_device_bytes=None,
        lines=[MeasuredLine("base", 90, 100)],
    )
    document: dict[str, Any] = json.loads(json.dumps(built))
    return document


def test_every_field_is_there_and_measured() -> None:
    assert report(ROWS) == {
        "tokens": 600,
        "computed_tokens": 550,
        "train_seconds": 5.0,
        "seconds": 8.0,
        "tokens_per_second": 120.0,
        "steps": 3,
        "loss": {"first": 4.0, "last": 2.5},
        "eval_loss": 2.75,
        "peak_rss_bytes": 900,
        "peak_device_bytes": None,
        "planned": {
            "tokens": 650, "computed_tokens": 600, "steps": 3, "train_seconds": 5.5, "seconds": 7.0,
            "peak_rss_bytes": 1000,
            "peak_device_bytes": None,
        },
        "measured": {
            "tokens": 600, "computed_tokens": 550, "steps": 3, "train_seconds": 5.0, "seconds": 8.0,
            "peak_rss_bytes": 900,
            "peak_device_bytes": None,
        },
        "errors": {
            "tokens": 50 / 600, "computed_tokens": 50 / 550, "steps": 0.0, "train_seconds": 0.1, "seconds": -0.125,
            "peak_rss_bytes": 100 / 900,
        },
        "lines": [{"name": "base", "planned": 90, "measured": 100, "error": -0.1}],
    }  # fmt: skip


def test_the_peak_is_the_larger_of_this_process_and_the_rows() -> None:
    assert report(ROWS, 5000)["peak_rss_bytes"] == 5000


def test_without_an_evaluation_there_is_no_eval_loss() -> None:
    assert report([r for r in ROWS if "loss" in r])["eval_loss"] is None


def test_no_step_is_an_error() -> None:
    with pytest.raises(RunError, match="made no step"):
        report([{"step": 0, "eval_loss": 1.0}])


def test_a_usual_step_is_the_median_without_the_first() -> None:
    assert usual_seconds(ROWS) == 3.0
    assert usual_seconds(ROWS[:1]) is None


def test_a_line_that_could_not_be_measured_has_no_error() -> None:
    assert MeasuredLine("a micro-batch", 5, 0).error == 0.0
