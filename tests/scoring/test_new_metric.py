"""A metric of one's own is a function and a line in each of two tables; everything else goes by them, in training as in
an evaluation."""

from __future__ import annotations

import json
import re
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import finetune
from halfbyte.inference import choices, evaluate
from halfbyte.layers import loss
from halfbyte.layers.kernels.pool import POOL
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


def test_a_choice_in_training_is_the_one_of_eval_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row by row in bf16, though dropout is on while the steps run, and their micro-batches are smaller."""
    monkeypatch.chdir(tmp_path)
    cli, named = in_process.runner(tmp_path, capsys), ("red", "cup", "blue", "tree")
    prompts = map(" ".join, product(named[:2], named, named))
    rows = [{"prompt": prompt, "completion": named[n % 4]} for n, prompt in enumerate(prompts)]
    held_out = tmp_path / "labels.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = tiny_run.recipe(
        tmp_path / "a", data__eval=str(held_out), train__eval_strategy="steps", train__eval_steps=2, train__max_steps=2,
        lora__lora_dropout=0.9, train__learning_rate=0.1, quant__compute_dtype="bf16", eval={"metrics": ["choice"]},
    )  # fmt: skip
    scored: list[list[str]] = []
    forwards: list[list[int]] = [[], []]
    original, text_losses = choices.choose, loss.text_losses
    free: list[int] = []

    def choose(*args: Any, **options: Any) -> list[str]:
        free.append(sum(map(len, POOL._free)) + len(POOL._returned))

        def losses(model: Any, batch: Any) -> list[float]:
            forwards[len(scored)] += batch["cu_seq_lens_q"].tolist()
            return text_losses(model, batch)

        with monkeypatch.context() as patched:
            patched.setattr(loss, "text_losses", losses)
            answers = original(*args, **options)
        scored.append(answers)
        return answers

    monkeypatch.setattr(choices, "choose", choose)
    answer_scores = evaluate.answer_scores

    def with_a_free_block(run: Any, model: Any, tokens: int) -> Any:
        scores = answer_scores(run, model, 40)

        def of_answers() -> dict[str, float]:
            POOL.empty((1 << 22,), torch.uint8)
            return scores()

        return of_answers

    monkeypatch.setattr(evaluate, "answer_scores", with_a_free_block)
    run = finetune.train(loaded).run
    assert free == [0], "what a micro-batch had is planned for answers"
    ended = cli("eval", "a/run", "-m", "choice", "--samples", "1")
    answers = [json.loads(line)["adapter"] for line in (run / "eval/answers.jsonl").read_text().splitlines()]
    assert scored == [[answer["choice"] for answer in answers]] * 2
    assert forwards[0] == forwards[1], "in bf16 a near tie goes by what else is in the forward"
    assert len(set(scored[0])) > 1 and {answer["text"] for answer in answers} == {""}
    assert re.search(rf"^  adapter: {scored[0][0]}  (not )?choice$", ended.out, re.MULTILINE), ended.out


def test_an_unknown_metric_is_refused_and_the_known_ones_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_run.recipe(tmp_path)
    cli = in_process.runner(tmp_path, capsys)
    ended = cli("train", str(tmp_path / "recipe.yaml"), "--dry-run", "--set", "eval.metrics=[length_ratio]")
    assert ended.code == 2 and "exact_match" in ended.err
