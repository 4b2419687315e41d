"""What is forgotten: the losses of base, source and adapter on a text of the base's kind, in a run and in `eval`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from halfbyte import finetune
from halfbyte.data import base_text
from halfbyte.errors import RecipeError
from halfbyte.report import compare
from halfbyte.runs.folder import RunFolder
from halfbyte.training import run
from halfbyte.training.events import Listener
from tests import scored, tiny_run

WILD = {"train__learning_rate": 0.2, "train__lr_scheduler_type": "constant", "train__max_steps": 6}


class Notes(Listener):
    def __init__(self) -> None:
        self.text, self.warnings = list[str](), list[str]()

    def note(self, label: str, text: str) -> None:
        self.text += [text] if label == "base text" else []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def held_out(tmp_path: Path) -> dict[str, Any]:
    return {"data__eval": tiny_run.rows(tmp_path / "held.jsonl", 9, seed=5)}


def plain_loss(model: Path) -> float:
    """Of every token of the text but the first of each part, by plain transformers."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    summed, count = 0.0, 0
    for row in base_text.encode(tiny_run.tokenizer(), lm.config.max_position_embeddings).examples:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            logits = lm(input_ids=ids).logits[0, :-1].double()
        summed += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    return summed / count


def test_the_text_is_whole_and_every_token_counts(whole_base_text: None) -> None:
    rows = base_text.encode(tiny_run.tokenizer(), 100_000)
    text = base_text.FILE.read_text("utf-8")
    assert len(rows.examples) == len(text.strip().split("\n\n")) >= 25
    assert int(rows.labelled.sum()) == int(rows.lengths.sum()) - len(rows.examples)
    assert text.isascii() and max(base_text.encode(tiny_run.tokenizer(), 40).lengths) == 40


def test_a_run_says_what_it_has_forgotten(whole_base_text: None, tmp_path: Path) -> None:
    """The source's loss is plain transformers'; those of base and adapter are what an evaluation finds."""
    tell = Notes()
    loaded = tiny_run.recipe(tmp_path, **held_out(tmp_path), **WILD)
    seen = finetune.train(loaded, listener=tell).report["base_text"]
    assert "texts of the base's kind, measured in" in tell.text[-1]
    assert seen["source"]["loss"] == pytest.approx(plain_loss(Path(loaded.recipe.model)), rel=1e-5)
    low, high = seen["interval"]
    assert abs(seen["adapter"] - seen["base"]) > 0.05 and low * high > 0, "so high a rate changes it"
    sheet = scored.evaluated(tmp_path / "run", with_base=True, sure=True)
    score = sheet.scores[-1]
    assert score.name == "base_text_loss" and score.adapter and score.base and score.source and score.difference
    assert score.adapter.value == pytest.approx(seen["adapter"], rel=1e-4)
    assert score.base.value == pytest.approx(seen["base"], rel=1e-4)
    assert score.source.value == pytest.approx(seen["source"]["loss"], rel=1e-6)
    assert score.difference.interval == pytest.approx(seen["interval"], rel=1e-2, abs=1e-3)
    again = Notes()
    other = finetune.train(tiny_run.recipe(tmp_path, output=tmp_path / "other"), listener=again).report["base_text"]
    assert "kept with its store" in again.text[-1] and other["base"] == seen["base"]
    figures = dict(compare.compare([tmp_path / "run", tmp_path / "other"]).figures)
    assert figures["loss on base text"] == tuple(
        f"{each['adapter']:.4f} ({each['base']:.4f} of the base, {each['source']['loss']:.4f} of the source)"
        for each in (seen, other)
    )


def test_where_it_would_cost_too_much_it_is_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfbyte.training.comparison.SHORT_S", 0.0)
    tell = Notes()
    report = finetune.train(tiny_run.recipe(tmp_path), listener=tell).report
    assert "more than a tenth of the run" in tell.text[-1] and report["base_text"] == {"text": tell.text[-1]}
    asked = tiny_run.recipe(tmp_path, **held_out(tmp_path), train__max_forgetting=1.0, output=tmp_path / "asked")
    assert "adapter" in finetune.train(asked).report["base_text"], "who asks for it gets it"


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [row for row in RunFolder(run).read_metrics() if "eval_loss" in row]


def test_the_best_adapter_is_one_that_has_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The held-out loss falls all the way, and from the fourth evaluation on too much is forgotten."""
    asked = {**held_out(tmp_path), "train__eval_strategy": "steps", "train__eval_steps": 1, "train__max_steps": 6,
             "train__learning_rate": 0.01}  # fmt: skip
    free = finetune.train(tiny_run.recipe(tmp_path, **asked, train__max_forgetting=100.0))
    rows, base = evaluations(free.run), free.report["base_text"]["base"]
    assert min(rows, key=lambda row: row["eval_loss"])["step"] == 6
    assert rows[-1]["eval_base_text_loss"] == pytest.approx(free.report["base_text"]["adapter"], rel=1e-6)

    def bound(name: str, more: list[float]) -> tuple[int, dict[str, Any], Notes]:
        tell, each = Notes(), iter(more)
        monkeypatch.setattr(run, "_text_score", lambda setup, trainer: {"base_text_loss": base + next(each)})
        loaded = tiny_run.recipe(tmp_path, **asked, train__max_forgetting=0.1, output=tmp_path / name)
        report = finetune.train(loaded, listener=tell).report
        return json.loads((tmp_path / name / "adapter/halfbyte.json").read_text())["reached"]["steps"], report, tell

    step, report, _ = bound("some", [0.0, -0.1, 0.09, 0.11, 0.2, 0.3])
    assert step == 3 and report["eval_loss"] == pytest.approx(rows[2]["eval_loss"], rel=1e-4)
    step, report, tell = bound("none", [0.2] * 6)
    said = "no evaluation was within train.max_forgetting: the adapter is that of the last step"
    assert step == 6 and said in report["notices"] and said in tell.warnings


def test_a_bound_needs_evaluations(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.max_forgetting 0\.1 asks for evaluations, but data\.eval is none"):
        tiny_run.recipe(tmp_path, data__eval="none", train__max_forgetting=0.1)
