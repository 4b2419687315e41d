"""`predict`, `eval` and `serve` of runs that label texts or give vectors: what each task has, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte import finetune
from halfbyte.cli import labels as command
from tests import tiny_run
from tests.in_process import Cli, runner

ROWS: dict[str, list[dict[str, Any]]] = {
    "classify": [{"text": "red cup", "label": "a"}, {"text": "old road", "label": "b"}],
    "regress": [{"text": "red cup", "label": 1.5}, {"text": "old road", "label": 2}],
    "tag": [{"tokens": ["red", "cup"], "tags": ["B-x", "O"]}, {"tokens": ["old", "road"], "tags": ["O", "B-x"]}],
    "embed": [{"query": "red", "passage": "red cup"}, {"query": "old", "passage": "old road"}],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each task, one step each, with held-out rows."""
    folder = tmp_path_factory.mktemp("runs")
    for task, rows in ROWS.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 4))
        (folder / f"held-{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = {"data__train": folder / f"{task}.jsonl", "data__eval": str(folder / f"held-{task}.jsonl")}
        more = {"task": task, "quant__type": "none", "train__max_steps": 1, "output": folder / task}
        finetune.train(tiny_run.recipe(folder, **changes, **more))
    return folder


@pytest.fixture
def halfbyte(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(runs)
    return runner(runs, capsys)


IS_EMPTY, NEITHER = "a --text or --text-pair is empty.", "predict takes a file of rows, or --text."
REFUSED: list[Any] = [
    ("classify --text=", IS_EMPTY),
    ("classify --text=red --text=\t", IS_EMPTY),
    ("regress --text=red --text-pair=", IS_EMPTY),
    ("tag --text=red --text-pair=box", "--text-pair is for task classify and regress, and tag is of task tag."),
    ("embed --text=red --text-pair=box", "--text-pair is for task classify and regress, and embed is of task embed."),
    ("regress --text=red --calibrated", "--calibrated is for task classify, and regress is of task regress."),
    ("tag tag.jsonl --calibrated", "--calibrated is for task classify, and tag is of task tag."),
    ("embed embed.jsonl --calibrated", "--calibrated is for task classify, and embed is of task embed."),
    ("classify", NEITHER),
    ("classify classify.jsonl --text=red", NEITHER),
    ("classify --text=red --text-pair=a --text-pair=b", NEITHER),
    ("classify none.csv", "none.csv: no such file."),
    ("classify classify.jsonl --out=answers.txt", "answers.txt must end in .jsonl, .csv, .parquet."),
    ("classify classify.jsonl --out=classify.jsonl", "classify.jsonl exists and is not overwritten."),
    ("classify --text=red --calibrated", "classify has no temperature of its adapter."),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_predict_refuses(halfbyte: Cli, runs: Path, words: str, message: str) -> None:
    before = sorted(runs.iterdir())
    ended = halfbyte("predict", *words.split(" "))
    assert ended.code == 2 and ended.err.startswith(f"error: {message}"), ended.err
    assert not ended.out and sorted(runs.iterdir()) == before


def test_what_predict_says_of_each_task(halfbyte: Cli) -> None:
    kinds = {"classify": "probabilities", "regress": "prediction", "tag": "entities", "embed": "vector"}
    for task, name in kinds.items():
        (answer,) = json.loads(halfbyte("predict", task, "--text", "red cup", "--json").out)["texts"]
        assert name in answer, task
    for task in ("classify", "regress"):
        ended = halfbyte("predict", task, "--text", "red", "--text-pair", "cup", "--json")
        assert ended.code == 0 and len(json.loads(ended.out)["texts"]) == 1


@pytest.mark.parametrize("task", ROWS)
def test_scores_without_intervals(halfbyte: Cli, task: str) -> None:
    for sure in (True, False):
        flag = "--intervals" if sure else "--no-intervals"
        scored = json.loads(halfbyte("eval", task, flag, "--json").out)
        every = [metric["adapter"]["interval"] for metric in scored["metrics"]]
        assert every and any(limits is not None for limits in every) is sure
        told = halfbyte("eval", task, flag).out
        assert ("95% interval" in told) is sure


def test_a_temperature_takes_enough_rows(halfbyte: Cli) -> None:
    assert "no temperature is fitted on 2 rows: it takes 50" in halfbyte("eval", "classify", "--out", "apart").out
    halfbyte("eval", "classify")
    ended = halfbyte("predict", "classify", "--text", "red", "--calibrated")
    few = "error: classify has no temperature: its 2 held-out rows are too few for one: it takes 50."
    assert ended.code == 2 and ended.err.startswith(few)


@pytest.mark.parametrize("task", ["classify", "regress", "embed"])
def test_a_server_that_writes_nothing_refuses_what_is_for_writing(
    halfbyte: Cli, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "serve", lambda *_, **__: pytest.fail("it was served"))
    for words in (("--context", "64"), ("--at-once", "2"), ("--pack",), ("--allow-adapters", ".")):
        ended = halfbyte("serve", task, "--port", "0", *words)
        told = f"error: {task} is of task {task}, and writes no texts: {words[0]} would change nothing."
        assert ended.code == 2 and ended.err.startswith(told)
    ended = halfbyte("serve", task, "--pack", "--context", "64")
    assert "writes no texts: --context, --pack would change nothing." in ended.err
