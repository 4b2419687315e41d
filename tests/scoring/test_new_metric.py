"""A metric of one's own is a function and a line in each of two tables; everything else goes by them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from halfbyte import finetune
from halfbyte.recipe.evaluation import METRICS
from halfbyte.scoring.metrics import BUILDERS, of_answer
from tests import in_process, tiny_run


def length_ratio(expected: str, answer: str) -> float:
    return min(len(answer), len(expected)) / max(len(answer), len(expected), 1)


def test_a_new_metric_is_known_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "length_ratio", "the shorter text's length over the longer one's")
    monkeypatch.setitem(BUILDERS, "length_ratio", of_answer("length_ratio", length_ratio, yes_no=False))

    monkeypatch.chdir(tmp_path)
    cli = in_process.runner(tmp_path, capsys)
    loaded = tiny_run.recipe(
        tmp_path / "a", data__eval=tiny_run.rows(tmp_path / "held_out.jsonl", 4, seed=1), train__eval_strategy="steps",
        train__eval_steps=2, train__max_steps=2, train__metric_for_best_model="length_ratio",
        eval={"metrics": ["length_ratio"], "max_new_tokens": 8},
    )  # fmt: skip
    run = finetune.train(loaded).run
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [0 <= row["eval_length_ratio"] <= 1 for row in rows if "eval_loss" in row] == [True]

    ended = cli("eval", "a/run", "-m", "length_ratio", "--base")
    assert ended.code == 0 and "length_ratio" in ended.out
    metrics = {row["name"]: row for row in json.loads((run / "eval/scores.json").read_text())["metrics"]}
    answers = [json.loads(line) for line in (run / "eval/answers.jsonl").read_text().splitlines()]
    ratios = [length_ratio(row["expected"], row["adapter"]["text"]) for row in answers]
    assert [row["adapter"]["scores"] for row in answers] == [{"length_ratio": ratio} for ratio in ratios]
    score = metrics["length_ratio"]["adapter"]
    assert score["value"] == pytest.approx(sum(ratios) / 4)
    assert score["interval"][0] <= score["value"] <= score["interval"][1]
    assert metrics["length_ratio"]["difference"]["p_value"] is None  # no test of yes/no scores
    assert "length_ratio" in (run / "report.html").read_text().partition("Base against adapter")[2]

    shutil.copytree(run, tmp_path / "a/other")
    ended = cli("compare", "a/run", "a/other")
    assert ended.code == 0 and "length_ratio of the base" in ended.out
    assert "length_ratio of the base" in (tmp_path / "a/compare.html").read_text()


def test_an_unknown_metric_is_refused_and_the_known_ones_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run.recipe(tmp_path)
    cli = in_process.runner(tmp_path, capsys)
    ended = cli("train", str(tmp_path / "recipe.yaml"), "--dry-run", "--set", "eval.metrics=[length_ratio]")
    assert ended.code == 2 and "exact_match" in ended.err
