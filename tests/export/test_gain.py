"""What is left of a run's gain in an export: the share, its interval, and when nothing is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from halfbyte.errors import DataError, ExportError
from halfbyte.export import job, witness
from halfbyte.export.job import HeldOut
from halfbyte.proofs import programs
from halfbyte.scoring.intervals import RowSums
from halfbyte.system import children

TOKENS = np.array([10.0, 40.0, 25.0, 5.0, 60.0, 30.0, 12.0, 44.0])


def losses(of_a_token: float, seed: int = 0, spread: float = 0.0) -> RowSums:
    """Rows whose losses a token are these, but for noise of their own."""
    noise = np.random.default_rng(seed).normal(0.0, 1.0, len(TOKENS)) * spread
    return RowSums((of_a_token + noise) * TOKENS, TOKENS)


def test_the_share_that_is_left_is_over_the_source_model() -> None:
    seen = HeldOut(losses(2.2), losses(2.0), losses(2.9), losses(2.5))
    assert seen.kept is not None
    assert seen.kept[0] == pytest.approx(0.6) and seen.kept[1] == pytest.approx((0.6, 0.6))
    assert "gain kept 60% (60% to 60%)" in seen.text and "60% of the run's gain is left" in seen.advice
    assert "--gguf-lora" in seen.to_json()["advice"]
    assert "the source model 2.5000, on 8 held-out rows" in seen.text and "its base alone 2.9000" in seen.text
    assert seen.to_json()["loss"] == pytest.approx({"export": 2.2, "run": 2.0, "base": 2.9, "source": 2.5})
    trained_on = HeldOut(losses(2.2), losses(2.0), losses(2.9), losses(2.5), "training rows")
    assert "on 8 training rows" in trained_on.text and "held" not in trained_on.text
    whole = HeldOut(losses(2.01), losses(2.0), losses(2.9), losses(2.5))
    assert "gain kept 98%" in whole.text and whole.advice == ""


def test_rows_that_differ_give_an_interval_that_holds_the_share() -> None:
    source, run = losses(2.5, 1, 0.3), losses(2.5, 1, 0.3)
    run = RowSums(run.numerators - TOKENS * (0.5 + 0.1 * np.arange(8) / 8), TOKENS)
    export = RowSums(source.numerators - 0.8 * (source.numerators - run.numerators) + np.sin(np.arange(8)), TOKENS)
    seen = HeldOut(export, run, source, source).kept
    assert seen is not None
    share, (low, high) = seen
    gone = 1 - (export.numerators - run.numerators).sum() / (source.numerators - run.numerators).sum()
    assert share == pytest.approx(gone) and low < 0.8 < high and high - low < 0.2


def test_without_a_measured_gain_there_is_no_share() -> None:
    better, worse, same = losses(2.0), losses(2.6), losses(2.5, 3, 0.5)
    assert HeldOut(better, worse, better, better).kept is None
    assert "the run is worse than its source model" in HeldOut(worse, worse, better, better).text
    assert "not measurably better" in HeldOut(same, same, same, losses(2.5)).text
    seen = HeldOut(better, better, worse, None)
    assert seen.kept is None and "source" not in seen.text and "gain" not in seen.text


def test_a_models_answers_are_read_back_as_sums_of_rows(tmp_path: Path) -> None:
    """Losses beside torch's cross entropy; the logits are of some positions, the losses of all labelled ones."""
    torch.manual_seed(0)
    table = torch.randn(50, 60)  # the last ten are a program's padding of the vocabulary
    rows = [
        {"ids": [1, 2, 3, 4, 5], "at": [1, 2, 3], "positions": [1, 3]},
        {"ids": [7, 8, 9], "at": [1], "positions": [1]},
    ]
    programs.observe(rows, lambda ids, at: table[[ids[i] for i in at]].numpy(), tmp_path, vocabulary=50)
    assert np.array_equal(np.load(tmp_path / "logits.npy"), table[[2, 4, 8], :50].numpy())
    expected = [
        float(torch.nn.functional.cross_entropy(table[first].double()[:, :50], torch.tensor(after), reduction="sum"))
        for first, after in (([2, 3, 4], [3, 4, 5]), ([8], [9]))
    ]
    sums = job._sums(tmp_path / "losses.npy")
    assert sums.numerators == pytest.approx(expected, rel=1e-12) and list(sums.denominators) == [3, 1]


def test_what_is_kept_on_disk_is_bounded() -> None:
    class Row:
        def __init__(self, length: int, labelled: int) -> None:
            self.input_ids = list(range(length))
            self.labels = [-100] * (length - labelled) + list(range(labelled))

    rows = [Row(300, 250), *[Row(100, 30)] * 200, Row(40, 0)]
    chosen = witness._chosen(rows)  # type: ignore[arg-type]
    assert len(chosen) == witness.ROWS and len(chosen[0]["at"]) == witness.LABELS
    assert sum(len(each["positions"]) for each in chosen) <= witness.POSITIONS
    assert all(set(each["positions"]) <= set(each["at"]) for each in chosen)
    long = witness._chosen([Row(6000, 9)] * 5)  # type: ignore[arg-type]
    assert len(long) == 2 and len(long[0]["positions"]) == 9


CHILD = """
import sys, time
from halfbyte.errors import DataError
from halfbyte.system.children import child
if __name__ == "__main__":
    with child():
        if sys.argv[1] == "refuses":
            raise DataError("no rows.", fix="give some")
        if sys.argv[1] == "fails":
            raise ValueError("a fault")
        open(sys.argv[2], "w").close()
        time.sleep(600)
"""


def test_a_child_tells_what_it_refuses_and_ends_with_its_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "task_of_a_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    with pytest.raises(DataError, match="no rows") as refused:
        children.run_child(["task_of_a_child", "refuses"], "asking")
    assert refused.value.fix == "give some"
    with pytest.raises(ExportError, match="asking failed: ValueError: a fault"):
        children.run_child(["task_of_a_child", "fails"], "asking")
    begun = tmp_path / "begun"
    code = f"from halfbyte.system.children import run_child; run_child({['task_of_a_child', 'waits', str(begun)]}, 'x')"
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not begun.exists():
        assert parent.poll() is None
        time.sleep(0.05)
    (left,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    left.wait(timeout=60)  # it would sleep for ten minutes


def test_the_figures_are_in_the_document(tmp_path: Path) -> None:
    document = HeldOut(losses(2.2), losses(2.0), losses(2.9), losses(2.5)).to_json()
    again = json.loads(json.dumps(document))
    assert again["kept"] == pytest.approx(0.6) and again["rows"] == 8 and len(again["interval"]) == 2
