"""Runs side by side: what differs, what makes a comparison unfair."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import RunError
from halfbyte.report import compare
from halfbyte.runs.folder import RunFolder
from tests.report import made
from tests.report.test_page import SCORES, answer, scored, seen, started


def two(folder: Path) -> tuple[RunFolder, RunFolder]:
    one = made.finished(folder / "one", made.metrics(20, evals=2))
    other = made.finished(folder / "other", made.metrics(40, evals=2))
    other.recipe.write_text(
        other.recipe.read_text().replace("r: 8", "r: <b>32</b>").replace("output: run", "output: o")
    )
    return one, other


def test_what_differs_is_told_and_what_is_alike_is_not(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    scored(one, SCORES, [answer("a")])
    value = compare.compare([one.path, other.path])
    assert value.names == ("one", "other")
    assert dict(value.recipe) == {"lora.r": ("8", "<b>32</b>")}
    assert dict(value.figures)["steps"] == ("20 of 20", "40 of 40")
    assert dict(value.scores) == {
        "exact_match": ("0.9583 [0.86, 0.99]", ""),
        "exact_match of the base": ("0 [0, 0.07]", ""),
        "loss": ("0.21", ""),
    }
    assert value.notes == ()
    parser = seen(compare.write(value, tmp_path / "compare.html").read_text())
    words = " ".join(parser.words)
    assert "lora.r" in words and "<b>32</b>" in words and "b" not in [tag for tag, _ in parser.tags]
    assert {attrs.get("data-name") for tag, attrs in parser.tags if tag == "path"} >= {"one", "other"}
    json.dumps(value.to_json())


def test_rewards_are_told_without_held_out_rows_too(tmp_path: Path) -> None:
    paths = [
        made.finished(tmp_path / name, made.metrics(9, reward=lambda step, a=a: a + step / 8)).path
        for name, a in (("a", 0), ("b", 1))
    ]
    figures = dict(compare.compare([*paths, made.finished(tmp_path / "c", made.metrics(9)).path]).figures)
    assert figures["reward, first to last"] == ("0.1250 → 1.1250", "1.1250 → 2.1250", "")


def test_a_path_that_is_written_otherwise_is_the_same(tmp_path: Path) -> None:
    runs = two(tmp_path)
    for run, model, rows in zip(runs, ("tiny-model", "./tiny-model"), ("rows.jsonl", "./rows.jsonl"), strict=True):
        run.started.unlink(missing_ok=True)
        run.recipe.write_text(f"model: {model}\ndata: {{train: {rows}}}\n")
    value = compare.compare([run.path for run in runs])
    assert value.recipe == () and value.notes == () and len(set(dict(value.figures)["model"])) == 1


def test_scores_of_an_earlier_adapter_are_said_to_be_so(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    scored(one, SCORES, [answer("a")])
    scored(other, {**SCORES, "adapter": {"sha256": "0" * 64, "step": 20}}, [answer("a")])
    value = compare.compare([one.path, other.path])
    assert dict(value.scores) == {
        "exact_match": ("0.9583 [0.86, 0.99]", "0.9583 [0.86, 0.99] of an earlier adapter (step 20)"),
        "exact_match of the base": ("0 [0, 0.07]", "0 [0, 0.07]"),
        "loss": ("0.21", "0.21 of an earlier adapter (step 20)"),
    }
    said = "The scores of other are of an earlier adapter (step 20), not of the one that the run has now."
    assert value.notes == (said,) and value.to_json()["notes"] == [said]


def test_a_run_from_before_origins_were_kept_is_compared_by_its_recipe(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    one.started.write_text(json.dumps(started(model={"id": "tiny-model", "revision": None})))
    value = compare.compare([one.path, other.path])
    assert dict(value.recipe) == {"lora.r": ("8", "<b>32</b>")}
    assert value.notes == ()  # what is not known of the other's rows is not another


def test_what_is_unfair_is_said(tmp_path: Path) -> None:
    one, other = two(tmp_path)
    other.recipe.write_text("model: another\n")
    scored(one, SCORES, [answer("a")])
    scored(other, {**SCORES, "data": "others.jsonl"}, [answer("a")])
    (other.report).unlink()
    notes = " ".join(compare.compare([one.path, other.path]).notes)
    for said in (
        "different models",
        "scored on different rows: others.jsonl (48 rows), test.jsonl (48 rows)",
        "other is not",
    ):
        assert said in notes


@pytest.mark.parametrize("recipe", ["task: classify", "train: {method: dpo}"])
def test_losses_of_other_objectives_are_said_to_be_no_match(tmp_path: Path, recipe: str) -> None:
    one, other = two(tmp_path)
    other.recipe.write_text(f"model: tiny-model\ndata: {{train: rows.jsonl}}\n{recipe}\n")
    learns = "classify" if "classify" in recipe else "dpo"
    said = f"They learn different things (sft, {learns}): their losses cannot be compared."
    assert said in compare.compare([one.path, other.path]).notes


def test_modules_in_another_order_are_the_same(tmp_path: Path) -> None:
    runs = [made.finished(tmp_path / name, made.metrics(3)) for name in ("one", "other")]
    for run, names, files in zip(runs, (["q", "v"], ["v", "q"]), (["a", "b"], ["b", "a"]), strict=True):
        values = {"lora.target_modules": {"value": names}, "data.train": {"value": files}}
        run.started.write_text(json.dumps(started(values=values)))
    assert [name for name, _ in compare.compare([run.path for run in runs]).recipe] == ["data.train"]


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        ((None, None), False),
        ((None, {"tokens": 0}), False),
        ((None, {"tokens": 7}), False),
        (({"tokens": 7}, {"tokens": 7}), False),
        (({"tokens": 7}, {"tokens": 8}), True),
    ],
)
def test_held_out_rows_are_compared_where_there_are_some(tmp_path: Path, held_out: tuple[Any, Any], said: bool) -> None:
    runs = [made.finished(tmp_path / name, made.metrics(3)) for name in ("one", "other")]
    for run, rows in zip(runs, held_out, strict=True):
        run.started.write_text(json.dumps(started(data={"train": {}, "eval": rows})))
    assert any("held-out" in note for note in compare.compare([run.path for run in runs]).notes) == said


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [made.run(tmp_path / name / "run", made.metrics(3)).path for name in ("a", "b")]
    assert compare.compare(paths).names == tuple(map(str, paths))


@pytest.mark.parametrize("count", [0, 1, 9])
def test_too_few_or_too_many_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(RunError, match=f"{count} {'run is' if count == 1 else 'runs are'} given; 2 to 8"):
        compare.compare([tmp_path] * count)
