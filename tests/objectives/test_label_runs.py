"""Runs with a head as runs of causal LMs: ended and gone on with, over processes, with a base that is streamed."""

from __future__ import annotations

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from halfbyte import finetune
from halfbyte.errors import RecipeError, TrainError
from halfbyte.inference import labels, prediction_file
from halfbyte.inference.load import open_run
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.schema import Loaded
from halfbyte.runs.folder import RunFolder
from tests.distributed import together
from tests.export import test_head

TASKS = ("classify", "regress", "tag")
METRICS = ("loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_mean_absolute_error", "eval_f1")


def recipe(folder: Path, task: str, **changes: Any) -> Loaded:
    """Seven steps with dropout, evaluations and checkpoints."""
    values = {
        "lora__lora_dropout": 0.1, "train__max_steps": 7, "train__save_strategy": "steps", "train__save_steps": 2,
        "train__eval_strategy": "steps", "train__eval_steps": 3,
    }  # fmt: skip
    return test_head.recipe(folder, "llama", task, **{**values, **changes})


def metrics(run: Path) -> list[tuple[Any, ...]]:
    return [tuple(row.get(name) for name in ("step", *METRICS)) for row in RunFolder(run).read_metrics()]


@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_was_ended_goes_on_to_the_same_bytes(task: str, tmp_path: Path) -> None:
    class Cut(finetune.Listener):
        def step(self, row: dict[str, Any]) -> None:
            if row["step"] == 5:
                raise RuntimeError("power cut")

    finetune.train(recipe(tmp_path, task))
    cut = recipe(tmp_path, task, output=tmp_path / "cut")
    with pytest.raises(TrainError, match="power cut"):
        finetune.train(cut, listener=Cut())
    assert finetune.train(cut, resume=True).step == 7
    whole, other = tmp_path / "run", tmp_path / "cut"
    assert metrics(other) == metrics(whole)
    for name in ("adapter_model.safetensors", "head/config.json"):
        assert (other / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()


def steps(path: Path) -> None:
    finetune.train(load_recipe(path))


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", ["classify", *(pytest.param(t, marks=pytest.mark.slow) for t in TASKS[1:])])
def test_any_number_of_processes_is_one(task: str, size: int, tmp_path: Path) -> None:
    """Rows, and the words of a text, are ragged, so that each process has other counts."""
    runs = []
    for count in (1, size):
        loaded = recipe(tmp_path, task, output=tmp_path / f"run{count}", train__max_tokens_per_micro_batch=24)
        assert loaded.path is not None
        together.run(count, steps, loaded.path) if count > 1 else steps(loaded.path)
        runs.append(metrics(tmp_path / f"run{count}"))
    for one, more in zip(*runs, strict=True):
        assert [v is None for v in more] == [v is None for v in one]
        assert [v for v in more if v is not None] == pytest.approx([v for v in one if v is not None], rel=1e-5)


@pytest.mark.parametrize("task", ["classify", pytest.param("tag", marks=pytest.mark.slow)])
def test_a_streamed_base_learns_the_same(task: str, tmp_path: Path) -> None:
    runs = []
    for placement in ("resident", "streamed"):
        finetune.train(
            recipe(tmp_path, task, quant__placement=placement, quant__type="nf4", output=tmp_path / placement)
        )
        runs.append((tmp_path / placement / "adapter" / "adapter_model.safetensors").read_bytes())
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [("train__within", "1h"), ("quant__compute", "int8"), ("data__streaming", True), ("data__packing", "stream")],
)
def test_what_does_not_go_with_a_head_is_refused(field: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=field.replace("__", ".")):
        recipe(tmp_path, "classify", **{field: value})


def predicted(run: Path, data: Path, out: Path, stop: int) -> None:
    """Killed after so many rows."""
    prediction_file.CHUNK_ROWS = 8
    labels.predict(open_run(run), data, out, lambda done: done == stop and os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("kind", ["jsonl", pytest.param("csv", marks=pytest.mark.slow)])
def test_a_prediction_that_was_killed_has_each_row_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed twice, in processes of their own, at a chunk's end and with a line cut short; one row cannot be read."""
    where, out = test_head.run(tmp_path, "llama", "classify"), tmp_path / f"out.{kind}"
    lines = [f"{n},red box {n}" if n != 21 else "21," for n in range(45)]
    (tmp_path / "many.csv").write_text("\n".join(["id,text", *lines]) + "\n")
    for stop in (16, 32):
        killed = together.Processes(1, predicted, where, tmp_path / "many.csv", out, stop)
        assert killed.codes([0], 120) == [-signal.SIGKILL]
        assert not out.exists()
        with out.with_name(f"{out.name}.partial").open("ab") as file:
            file.write(b'{"id": ')
    monkeypatch.setattr(prediction_file, "CHUNK_ROWS", 8)
    assert labels.predict(open_run(where), tmp_path / "many.csv", out)["resumed"] == stop
    rows = list(csv.DictReader(out.open())) if kind == "csv" else [json.loads(line) for line in out.open()]
    assert [int(row["id"]) for row in rows] == [*range(45)]
    assert [bool(row.get("prediction")) for row in rows] == [n != 21 for n in range(45)]
    assert "many.csv:23" in rows[21]["error"]
