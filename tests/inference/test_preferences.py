"""Held-out pairs are scored by what a training watches, of the adapter and of the base alone, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbyte import finetune
from halfbyte.errors import DataError
from halfbyte.inference import evaluate, load
from halfbyte.report import curves, record
from halfbyte.runs.folder import RunFolder
from halfbyte.scoring import sheet
from tests import pairs, tiny_run


def run(folder: Path, method: str = "dpo", **values: Any) -> Path:
    pairs.rows(folder / "train.jsonl", verdicts=method == "kto")
    pairs.rows(folder / "eval.jsonl", 6, seed=9, verdicts=method == "kto")
    loaded = tiny_run.recipe(folder, train__method=method, data__eval=folder / "eval.jsonl", **values)
    finetune.train(loaded)
    return Path(loaded.recipe.output)


def scores(folder: Path, **more: Any) -> dict[str, sheet.Score]:
    opened = load.open_run(folder)
    options = sheet.EvalOptions.of(opened.recipe.eval, with_base=True)
    return {score.name: score for score in evaluate.evaluate(opened, options, **more).scores}


def test_pairs_are_scored_beside_the_base(tmp_path: Path) -> None:
    folder = run(tmp_path, train__learning_rate=1e-2)
    seen = scores(folder)
    assert [*seen][:6] == ["loss", "accuracy", "margin", "chosen_reward", "chosen_logp", "rejected_logp"]
    last = [row for row in RunFolder(folder).read_metrics() if "eval_loss" in row][-1]
    for name in ("loss", "accuracy", "margin", "chosen_logp"):
        adapter, base = seen[name].adapter, seen[name].base
        assert adapter is not None and base is not None and adapter.interval is not None
        assert adapter.value == pytest.approx(last[f"eval_{name}"], rel=1e-4)
    assert seen["margin"].base is not None and seen["margin"].base.value == pytest.approx(0, abs=1e-6)
    assert seen["loss"].base is not None and seen["loss"].base.value == pytest.approx(0.693147, rel=1e-5)
    titles = [chart.title for chart in curves.of_run(record.read(folder))]
    assert {"Accuracy", "Margin", "Log p of an answer"} <= {*titles} and "Kl" not in titles


def test_the_reference_of_an_adapter_is_known_of_the_runs_own_rows(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    first = tiny_run.recipe(tmp_path / "sft")
    finetune.train(first)
    folder = run(tmp_path, model=first.recipe.model, lora__adapter=first.recipe.output)
    margin = scores(folder)["margin"].adapter
    last = [row for row in RunFolder(folder).read_metrics() if "eval_loss" in row][-1]
    assert margin is not None and margin.value == pytest.approx(last["eval_margin"], rel=1e-3, abs=1e-5)
    with pytest.raises(DataError, match="is known of the run's own held-out rows alone"):
        scores(folder, data=tmp_path / "train.jsonl")


def test_answers_with_a_verdict(tmp_path: Path) -> None:
    seen = scores(run(tmp_path, "kto"))
    assert [*seen][:2] == ["loss", "accuracy"]
    assert seen["loss"].base is not None and seen["loss"].base.value == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_answers_to_pairs_have_scores_of_their_own(tmp_path: Path, method: str) -> None:
    opened = load.open_run(run(tmp_path, method, train__max_steps=1))
    options = sheet.EvalOptions.of(opened.recipe.eval, ["exact_match"], with_base=True)
    (score,) = [one for one in evaluate.evaluate(opened, options).scores if one.name == "exact_match"]
    assert score.rows == 6 and score.adapter is not None and score.base is not None
    assert 0 <= score.adapter.value <= 1
