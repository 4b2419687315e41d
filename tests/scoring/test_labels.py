"""Calibration of several labels a text, and areas of labels that all rows have or none, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from halfbyte.recipe.evaluation import Eval
from halfbyte.scoring import labels as scoring


def calibration_error(every: np.ndarray, truth: np.ndarray) -> float:
    """Of each of 15 bins how far mean probability and share of truth are apart, by its share of the entries."""
    sure, right, error = every.ravel(), truth.ravel(), 0.0
    for b in range(15):
        inside = (sure >= b / 15) & (sure < (b + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(sure[inside].mean() - right[inside].mean())
    return error


@pytest.mark.parametrize("labels", [1, 3, 20])
def test_the_calibration_error_of_several_labels_is_a_mean_over_all_of_them(labels: int) -> None:
    draw = np.random.default_rng(labels)
    every, truth = draw.random((80, labels)), draw.random((80, labels)) < 0.3
    scores = scoring.of_labels(every, truth, Eval(resamples=100), several=True)["scores"]
    wanted = calibration_error(every, truth)
    assert scores["ece"]["value"] == pytest.approx(wanted)
    low, high = scores["ece"]["interval"]
    assert low < wanted + 0.1 and high < 1 and scores["ece_calibrated"]["value"] < wanted


def test_an_error_below_1_is_no_share() -> None:
    """Its interval is that of a mean: one more row, whose error would be above 1, is not thought of."""
    off = np.full(20, 0.02) + np.arange(20) * 1e-3
    shares = scoring.of_values({"recall_1": off, "loss": off, "mean_absolute_error": off}, Eval(resamples=500))[
        "scores"
    ]
    assert shares["recall_1"]["interval"][1] > 0.1
    for name in ("loss", "mean_absolute_error"):
        low, high = shares[name]["interval"]
        assert off.min() < low < off.mean() < high < off.max()


def test_no_area_where_no_label_tells_rows_apart() -> None:
    every = np.tile([0.7, 0.3], (6, 1))
    alike = np.tile([True, False], (6, 1))
    scored = scoring.of_labels(every, alike, Eval(resamples=100), several=False)
    assert "auroc" not in scored["scores"] and scored["by_label"][0]["auroc"] is None
    assert {"accuracy", "f1_macro", "ece"} < scored["scores"].keys()


def test_resamples_that_know_no_label_do_not_count() -> None:
    """One row of eight has the other label, and is told apart: where it is drawn the area is 1, else there is none."""
    every = np.array([[0.1, 0.9]] + [[0.8, 0.2]] * 7)
    truth = np.array([[False, True]] + [[True, False]] * 7)
    area = scoring.of_labels(every, truth, Eval(resamples=200), several=False)["scores"]["auroc"]
    assert area == {"value": 1.0, "interval": [1.0, 1.0]}
