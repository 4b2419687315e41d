"""`predict`, `eval` and `serve` of runs that label texts or give vectors: what each task has, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from halfbyte import finetune
from halfbyte.cli import labels as command
from halfbyte.cli import scores
from halfbyte.scoring import labels
from halfbyte.system import files
from tests import in_process, tiny_run
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
    ("classify --text=red --out=a.csv", "--out is for a file of rows: what is said of a --text is printed."),
    ("classify classify.jsonl --out=nodir/a.csv", "nodir/a.csv: there is no folder nodir."),
    ("classify nodir/none.csv", "nodir/none.csv: no such file."),
    ("classify latin.csv", "latin.csv looks like Latin-1"),
    ("classify empty.csv --out=a.jsonl", "empty.csv has no rows."),
    ("classify empty.csv --out=a.csv", "empty.csv has no rows."),
    ("classify empty.csv --out=a.parquet", "empty.csv has no rows."),
    ("classify texts", "texts is a folder; it holds 2 .txt."),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_what_predict_refuses(halfbyte: Cli, runs: Path, words: str, message: str) -> None:
    (runs / "latin.csv").write_bytes("text\nÜber Käse\n".encode("latin-1"))
    (runs / "empty.csv").write_text("text\n")
    (runs / "texts").mkdir(exist_ok=True)
    for name in ("a.txt", "b.txt"):
        (runs / "texts" / name).write_text("red cup")
    before = sorted(runs.iterdir())
    ended = halfbyte("predict", *words.split(" "))
    assert ended.code == 2 and ended.err.startswith(f"error: {message}"), ended.err
    assert not ended.out and sorted(runs.iterdir()) == before
    assert "texts is a folder" not in ended.err or "fix: halfbyte predict RUN 'texts/*.txt'" in ended.err


@pytest.mark.parametrize("words", [("none.csv",), ("latin.csv",), ("classify.jsonl", "--out", "nodir/a.csv")])
def test_a_file_that_cannot_be_read_or_written_is_refused_without_torch(runs: Path, words: tuple[str, ...]) -> None:
    (runs / "latin.csv").write_bytes("text\nÜber Käse\n".encode("latin-1"))
    code, libraries, _ = in_process.imported({"torch", "transformers"}, "predict", "classify", *words, cwd=runs)
    assert (code, libraries) == (2, [])


def test_where_no_row_can_be_read_the_first_says_why(halfbyte: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("body,n\nred cup,1\nold road,2\n")
    ended = halfbyte("predict", "classify", str(tmp_path / "a.csv"), "--out", str(tmp_path / "a.jsonl"))
    told = "the first: a.csv:2: text: missing; the row has 'body', 'n'\n  fix: --set data.fields.text=NAME"
    assert ended.code == 1 and "2 could not be read (column error)" in ended.out and told in ended.out
    (tmp_path / "b.csv").write_text('text\nred cup\n" "\n')
    ended = halfbyte("predict", "classify", str(tmp_path / "b.csv"), "--out", str(tmp_path / "b.csv.csv"))
    assert ended.code == 1 and "1 could not be read" in ended.out and "the first" not in ended.out


def test_words_with_half_a_character_are_a_bad_row(halfbyte: Cli, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"tokens": ["red", "\ud800"]}, {"tokens": ["red", "cup"], "tags": ["B-x", "O"]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = halfbyte("predict", "tag", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "b.jsonl"))
    bad, good = map(json.loads, (tmp_path / "b.jsonl").read_text().splitlines())
    assert ended.code == 1 and bad["error"].startswith("a.jsonl:1: tokens[1]: half a surrogate pair")
    assert good["input.tags"] == ["B-x", "O"] and len(good["tags"]) == 2


def test_a_temperature_of_other_rows_is_not_said_to_count(
    halfbyte: Cli, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "LEAST_ROWS", 2)
    counts = ", which --calibrated divides scores by"
    others = " of these rows; --calibrated divides scores by that of: halfbyte eval classify\n"
    for words, told in (("--data classify.jsonl", others), ("--out apart", others), ("", counts)):
        (line,) = [
            line for line in halfbyte("eval", "classify", *words.split()).out.splitlines(keepends=True)
            if line.startswith("temperature")
        ]  # fmt: skip
        assert told in line, words
    shutil.rmtree(runs / "classify" / "eval")


@pytest.mark.parametrize("task", ROWS)
def test_scores_are_shown_on_a_full_disk_too(halfbyte: Cli, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    ended = halfbyte("eval", task, "--out", "kept")
    assert ended.code == 0 and "2 rows in" in ended.out and "scores   kept" in ended.out, ended
    monkeypatch.setattr(files, "put", full)
    ended = halfbyte("eval", task, "--out", "none")
    assert ended.code == 1 and "scores.json: No space left on device" in ended.err
    assert "2 rows in" in ended.out and "scores   " not in ended.out


@pytest.mark.parametrize("task", ["tag", "embed"])
def test_scores_are_kept_where_what_reads_them_ends(
    halfbyte: Cli, task: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def closed(*_: object) -> None:
        raise SystemExit(1)  # as rich answers a broken pipe

    monkeypatch.setattr(scores.labels, "table", closed)
    assert halfbyte("eval", task, "--out", str(tmp_path / "kept")).code == 1
    assert json.loads((tmp_path / "kept/scores.json").read_text())["sides"]["adapter"]["scores"]


def test_a_pipe_of_rows_is_refused_at_once(halfbyte: Cli, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    for name in (str(tmp_path / "rows.jsonl"), "-"):
        ended = halfbyte("predict", "classify", name, "--out", str(tmp_path / "out.csv"))
        assert ended.code == 2 and f"{name} is a pipe or a device, and rows are read more than once." in ended.err


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
