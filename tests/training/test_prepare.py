"""What a recipe names, before a weight is loaded: rows as tokens, what is said of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import DataError
from halfbyte.training.prepare import data_note, data_report, look, notices, prepare, with_trained
from tests import tiny_run


def write(path: Path, lengths: list[int]) -> Path:
    rows = [{"prompt": f"red {n}", "completion": " ".join(["cup"] * length)} for n, length in enumerate(lengths)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_row_is_there_with_its_tokens_and_its_figures(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tmp_path, data__eval=tiny_run.rows(tmp_path / "eval.jsonl", 5, seed=5)).recipe
    made = prepare(recipe)
    rows = list(made.train.examples)
    tokens, labelled = sum(len(r.input_ids) for r in rows), sum(label >= 0 for r in rows for label in r.labels)
    assert list(made.train.lengths) == [len(r.input_ids) for r in rows]
    assert data_note(made) == (
        f"16 rows, {tokens} tokens ({min(made.train.lengths)} to {max(made.train.lengths)} a row), "
        f"{labelled / tokens:.0%} of them trained; 5 rows held out"
    )
    report = data_report(made)
    assert (report["train"]["rows"], report["train"]["used"], report["eval"]["rows"]) == (16, 16, 5)
    assert (report["train"]["tokens"], report["train"]["labelled_tokens"]) == (tokens, labelled)
    assert [gate["gate"] for gate in report["gates"]] == [finding.gate for finding in made.findings]
    assert notices(made) == [] and made.chatml is None and made.recipe == recipe


def test_texts_are_blocks_and_nothing_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} red cup" + " red cup" * 8}) + "\n" for n in range(8))
    )
    values: dict[str, Any] = {
        "data__packing": "stream",
        "data__max_length": 24,
        "data__train": tmp_path / "texts.jsonl",
    }
    made = prepare(tiny_run.recipe(tmp_path, **values).recipe)
    blocks = len(made.train.examples)
    assert data_note(made).startswith(f"8 texts in {blocks} blocks, {sum(made.train.lengths)} tokens")
    report = data_report(made)
    assert report["train"]["blocks"] == blocks and report["eval"] is None and made.evaluation is None


def test_rows_that_are_left_out_are_told(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", [2, 3, 40])
    made = prepare(tiny_run.recipe(tmp_path, data__train=rows, data__max_length=32, data__overlong="skip").recipe)
    assert len(made.train.examples) == 2 and data_report(made)["train"]["skipped"] == 1
    (length,) = (finding for finding in made.findings if finding.gate == "length")
    assert length.level == "warning", length


def test_why_other_rows_are_held_out_than_were_asked_for(tmp_path: Path) -> None:
    """Rows with the same tokens are on one side together."""
    rows = write(tmp_path / "rows.jsonl", [*range(2, 18)])
    made = prepare(tiny_run.recipe(tmp_path, data__train=rows, data__eval=4).recipe)
    assert notices(made) == ["4 of 16 rows are held out (data.eval: 4)"]
    rows.write_text(rows.read_text() * 2)
    made = prepare(tiny_run.recipe(tmp_path, data__train=rows, data__eval=5).recipe)
    why = "of rows with the same tokens all are or none, and 16 rows are another one again"
    assert notices(made) == [f"4 of 32 rows are held out (data.eval: 5; {why})"]


def test_a_number_of_held_out_rows_has_some_of_each_source(tmp_path: Path) -> None:
    few, many = write(tmp_path / "few.jsonl", [50, 51]), write(tmp_path / "many.jsonl", [*range(2, 42)])
    mixed = [{"path": str(few), "name": "few", "weight": 1}, {"path": str(many), "name": "many", "weight": 1}]
    made = prepare(tiny_run.recipe(tmp_path, data__train=mixed, data__eval=4).recipe)
    assert made.evaluation is not None and made.evaluation.sources is not None
    assert {name: len(rows) for name, rows in made.evaluation.sources.numbers().items()} == {"few": 1, "many": 4}
    why = "over all sources, at least one of each, rows with the same tokens together"
    assert f"5 of 42 rows are held out (data.eval: 4 {why})" in notices(made)


def test_what_the_gates_refuse_is_looked_at_but_not_prepared(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tmp_path).recipe
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 100}))
    refused = [finding.gate for finding in look(recipe).findings if finding.level == "refused"]
    assert "vocabulary" in refused
    with pytest.raises(DataError, match="vocabulary"):
        prepare(recipe)


def test_tokens_that_train_join_those_of_the_recipe(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tmp_path, lora__trainable_token_indices=[7, 3]).recipe
    assert with_trained(recipe, ()) is recipe
    assert with_trained(recipe, (5, 3)).lora.trainable_token_indices == (3, 5, 7)
    assert recipe.lora.trainable_token_indices == (7, 3)
    whole = tiny_run.recipe(tmp_path, lora__modules_to_save=["embed_tokens", "lm_head"]).recipe
    assert with_trained(whole, (5, 3)) is whole  # PEFT trains an embedding, or rows of it
