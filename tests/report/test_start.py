"""`started.json` and the page of real runs at toy size: begun, gone on with, ended by an error."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from halfbyte import finetune
from halfbyte.errors import TrainError
from halfbyte.recipe import command
from halfbyte.report import start
from halfbyte.runs.folder import RunFolder
from halfbyte.training.trainer import StepTrainer
from tests import tiny_run


def words(run: RunFolder) -> str:
    return run.page.read_text()


def test_a_run_keeps_what_it_began_with_and_leaves_a_page(tmp_path: Path) -> None:
    loaded = tiny_run.recipe(tmp_path, train__save_strategy="steps", train__save_steps=2, data__eval=4)
    finetune.train(loaded)
    run = RunFolder(tmp_path / "run")
    kept = json.loads(run.started.read_text())
    assert [p["step"] for p in kept["processes"]] == [0]
    assert kept["values"]["lora.r"] == {"value": 4, "from": "recipe", "why": kept["values"]["lora.r"]["why"]}
    assert kept["values"]["quant.placement"]["from"] == "auto" and kept["values"]["quant.placement"]["why"]
    assert kept["lengths"]["eval"]["shortest"] <= kept["lengths"]["eval"]["longest"]
    assert sum(part["rows"] for part in kept["histogram"]) == kept["data"]["train"]["used"] == 12
    shown = [row["tokens"] for row in kept["examples"]]
    assert shown == sorted(shown) and len(shown) == 3
    for row in kept["examples"]:
        labelled = "".join(p["text"] for p in row["pieces"] if p["labelled"])
        assert labelled.endswith("<|im_end|>") and "user" not in labelled
    assert {p["name"] for p in kept["proofs"]} == {"base", "packing", "engine"}
    page = words(run)
    assert "finished" in page and "Norm of each update" in page and "layer 1" in page

    finetune.train(command.to_resume(str(run.path), ["train.max_steps=6"]), resume=True)
    again = json.loads(run.started.read_text())
    assert [p["step"] for p in again["processes"]] == [0, 4]
    assert again["values"]["lora.r"] == kept["values"]["lora.r"]  # whence it came at first, not from the run's recipe
    assert again["values"]["train.max_steps"]["value"] == 6
    assert "Resumed at step 4 on" in words(run)


def test_a_run_that_fails_leaves_a_page_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = StepTrainer.training_step

    def fails(self: StepTrainer, *args: object) -> object:
        if self.state.global_step == 2:
            raise ValueError("something odd")
        return steps(self, *args)

    monkeypatch.setattr(StepTrainer, "training_step", fails)
    with pytest.raises(TrainError, match="something odd"):
        finetune.train(tiny_run.recipe(tmp_path))
    page = words(RunFolder(tmp_path / "run"))
    assert "The run crashed at step 2 of 4" in page and "ValueError: something odd" in page


def test_what_cannot_be_kept_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(start, "examples", lambda prepared: 1 / 0)
    with caplog.at_level(logging.WARNING, logger="halfbyte"):
        finetune.train(tiny_run.recipe(tmp_path))
    run = RunFolder(tmp_path / "run")
    assert "ZeroDivisionError" in caplog.text and not run.started.exists()
    assert run.report.is_file() and "finished" in words(run)


def test_a_step_down_is_in_the_row_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = StepTrainer.training_step

    def short(self: StepTrainer, *args: object) -> object:
        if self.state.global_step == 1:
            self.pace.tokens = 1000
            assert self.pace.down("memory is short")
        return steps(self, *args)

    monkeypatch.setattr(StepTrainer, "training_step", short)
    finetune.train(tiny_run.recipe(tmp_path, train__gradient_checkpointing=True))
    run = RunFolder(tmp_path / "run")
    downs = {row["step"]: row["stepped_down"] for row in run.read_metrics() if "stepped_down" in row}
    assert list(downs) == [2] and "memory is short" in downs[2][0]
    assert "Stepped down at step 2" in words(run)


def test_a_long_row_keeps_its_end_where_the_labels_are() -> None:
    read, said = {"labelled": False, "special": False}, {"labelled": True, "special": False}
    row = {"pieces": [{"text": "p" * 10_000, **read}, {"text": "answer", **said}]}
    kept = start.cut(row)
    assert [p["text"][-6:] for p in kept["pieces"]] == ["pppppp", "answer"]
    assert sum(len(p["text"]) for p in kept["pieces"]) == start.MAX_CHARACTERS + len("… ") and kept["cut"]
    short = {"pieces": [{"text": "a", **read}, {"text": "b", **said}]}
    assert start.cut(short) == {**short, "cut": False}
