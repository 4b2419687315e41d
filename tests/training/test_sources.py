"""A run on a mixture: what each source loses, the best evaluation by it, and a run that goes on with other shares."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte import finetune
from halfbyte.errors import RunError
from halfbyte.inference import load as opened_run
from halfbyte.inference.evaluate import evaluate
from halfbyte.recipe.file import load_recipe, recipe_from
from halfbyte.report import compare as comparing
from halfbyte.report import record
from halfbyte.runs.folder import RunFolder
from halfbyte.scoring.sheet import EvalOptions
from tests import tiny_run


def mixed(folder: Path, **more: Any) -> Any:
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(("mine", "wide", "mine_test", "wide_test")):
        tiny_run.rows(folder / f"{name}.jsonl", 24, seed=seed)
    values: dict[str, Any] = {
        "data__train": [{"path": f"{folder}/mine.jsonl", "weight": 3}, {"path": f"{folder}/wide.jsonl"}],
        "data__eval": [{"path": f"{folder}/mine_test.jsonl", "name": "mine"}, {"path": f"{folder}/wide_test.jsonl",
                                                                              "name": "wide"}],
        "train__eval_strategy": "steps", "train__eval_steps": 2,
        "train__save_strategy": "steps", "train__save_steps": 2,
    }  # fmt: skip
    return tiny_run.recipe(folder, **{**values, **more})


def rows(loaded: Any) -> list[dict[str, Any]]:
    return RunFolder(Path(loaded.recipe.output)).read_metrics()


def test_losses_by_source_are_those_of_separate_evaluations(tmp_path: Path) -> None:
    """Of the last adapter, each source's file scored alone; and the page and `compare` have them."""
    loaded = mixed(tmp_path, train__load_best_model_at_end=False, eval__metrics=["exact_match"], eval__max_new_tokens=3)
    finetune.train(loaded)
    last = [row for row in rows(loaded) if "eval_loss" in row][-1]
    run = Path(loaded.recipe.output)
    opened = opened_run.open_run(run)
    options = dataclasses.replace(EvalOptions.of(loaded.recipe.eval), names=(), with_base=False)
    for name in ("mine", "wide"):
        score = evaluate(opened, options, data=tmp_path / f"{name}_test.jsonl").scores[0].adapter
        assert score is not None and last[f"eval_{name}_loss"] == pytest.approx(score.value, rel=1e-5)
        assert 0 <= last[f"eval_{name}_exact_match"] <= 1
    assert last["eval_mine_loss"] != last["eval_wide_loss"]
    page = record.read(run)
    assert f"{last['eval_mine_loss']:.4f}" in dict(comparing.page.facts(page))["held-out loss of mine, last"]
    html = comparing.page.html(page)
    assert "Evaluation: loss by source" in html


def test_eval_scores_each_source_also_of_rows_that_the_run_held_out(tmp_path: Path) -> None:
    """Each source's loss and exact match are those of its rows scored alone; the page and `compare` have them."""
    named = mixed(tmp_path / "named", eval__metrics=["exact_match"], eval__max_new_tokens=3)
    split = mixed(tmp_path / "split", data__eval=12, train__max_steps=2)
    for loaded in (named, split):
        finetune.train(loaded)
        run = Path(loaded.recipe.output)
        options = dataclasses.replace(EvalOptions.of(loaded.recipe.eval), names=("exact_match",), with_base=True)
        opened = opened_run.open_run(run)
        sheet = evaluate(opened, options)
        scores = {score.name: score for score in sheet.scores}
        assert list(scores)[:3] == ["loss", "perplexity", "exact_match"] and "mine_perplexity" not in scores
        assert sum(scores[f"{name}_loss"].rows for name in ("mine", "wide")) == scores["loss"].rows == sheet.rows
        for side in ("adapter", "base"):
            of = [
                (getattr(scores[f"{name}_exact_match"], side).value, scores[f"{name}_loss"].rows)
                for name in ("mine", "wide")
            ]
            mean = sum(value * rows for value, rows in of) / sheet.rows
            assert getattr(scores["exact_match"], side).value == pytest.approx(mean)
        if loaded is named:
            alone = evaluate(opened, options, data=tmp_path / "named" / "mine_test.jsonl").scores[0]
            assert alone.adapter is not None and scores["mine_loss"].adapter is not None
            assert scores["mine_loss"].adapter.value == pytest.approx(alone.adapter.value, rel=1e-5)
            assert scores["mine_loss"].difference is not None
        sheet.write(run / "eval")
    compared = comparing.compare([Path(loaded.recipe.output) for loaded in (named, split)])
    assert {"mine_loss", "wide_exact_match", "mine_loss of the base"} <= {name for name, _ in compared.scores}
    assert "<th>wide_loss</th>" in comparing.page.html(record.read(Path(named.recipe.output)))


def test_the_best_evaluation_by_a_source_or_while_none_loses_more(tmp_path: Path) -> None:
    """By a source its own lowest; no evaluation is allowed where one has lost more than is allowed."""
    loaded = mixed(tmp_path / "by", train__metric_for_best_model="wide_loss", train__max_steps=6)
    finetune.train(loaded)
    seen = [row for row in rows(loaded) if "eval_loss" in row]
    best = min(seen, key=lambda row: float(row["eval_wide_loss"]))
    kept = finetune_best(loaded)
    assert kept["step"] == best["step"] and kept["value"] == best["eval_wide_loss"]

    def one_word(name: str, most: float) -> Path:
        """Learns one word, and unlearns the others."""
        folder = tmp_path / name
        folder.mkdir()
        for file, word in (("mine", "red"), ("wide", "blue")):
            line = json.dumps({"prompt": "say", "completion": f"{word} {word} {word}"})
            (folder / f"{file}.jsonl").write_text(f"{line}\n" * 8)
        named = [{"path": f"{folder}/{name}.jsonl", "name": name} for name in ("mine", "wide")]
        changed = {"data__train": named[:1], "data__eval": named, "train__learning_rate": 0.05}
        changed |= {"train__eval_strategy": "steps", "train__eval_steps": 2, "train__max_source_rise": most}
        loaded = tiny_run.recipe(folder, **changed)
        finetune.train(loaded)
        last = rows(loaded)[-1]
        assert last["eval_wide_loss"] > last["eval_mine_loss"]
        return Path(loaded.recipe.output) / "checkpoints" / "best"

    assert not one_word("rise", 0.0).exists() and one_word("free", 1e9).exists()


def finetune_best(loaded: Any) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((Path(loaded.recipe.output) / "checkpoints" / "best" / "best.json").read_text())
    return read


def test_a_run_goes_on_with_its_shares_and_not_with_others(tmp_path: Path) -> None:
    whole = mixed(tmp_path / "whole", train__max_steps=6)
    finetune.train(whole)
    part = mixed(tmp_path / "part", train__max_steps=2)
    finetune.train(part)
    run = RunFolder(Path(part.recipe.output))
    other = [{"path": f"{tmp_path}/part/mine.jsonl", "weight": 1}, {"path": f"{tmp_path}/part/wide.jsonl"}]
    with pytest.raises(RunError, match=r"data.train .* has changed since step 2"):
        finetune.train(load_recipe(run.recipe, ["train.max_steps=6", f"data.train={other}"]), resume=True)
    finetune.train(load_recipe(run.recipe, ["train.max_steps=6"]), resume=True)
    tokens = [[row["tokens"] for row in rows(loaded) if "loss" in row] for loaded in (whole, part)]
    assert tokens[0] == tokens[1]
    losses = [np.array([row["loss"] for row in rows(loaded) if "loss" in row]) for loaded in (whole, part)]
    assert np.isfinite(losses).all()


@pytest.mark.slow
@pytest.mark.usefixtures("whole_base_text")
def test_replay_keeps_what_the_base_knew(tmp_path: Path) -> None:
    """A task of words backwards, at a rate that forgets: with a third of plain text in every step, the loss on the text
    of the base's kind, which is not among it, stays nearer to the base's."""
    tiny_run.rows(tmp_path / "task.jsonl", 200)
    pages = Path(__file__).parents[2] / "docs"
    replay = {"path": f"{pages}/*.md", "format": "text", "name": "plain", "replay": 0.34}

    def forgotten(name: str, *sources: Any) -> float:
        values = {
            "data.train": list(sources), "data.eval": 8, "data.overlong": "truncate", "data.max_length": 128,
            "train.max_steps": 24, "train.gradient_accumulation_steps": 1, "train.learning_rate": 2e-3,
            "train.max_forgetting": 9, "train.eval_steps": 100, "output": str(tmp_path / name),
        }  # fmt: skip
        sets = [f"{field}={value}" for field, value in values.items()]
        text = finetune.train(recipe_from("smollm2-135m", "unread.jsonl", sets)).report["base_text"]
        return float(text["adapter"] - text["base"])

    task = {"path": str(tmp_path / "task.jsonl"), "name": "task"}
    alone, kept = forgotten("alone", task), forgotten("replay", task, replay)
    assert alone > 0.05 and kept < 0.5 * alone, (alone, kept)
