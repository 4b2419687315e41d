"""Rows held out: how many, from which file, twins on one side, the same again; kept by the run, scored and resumed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte import finetune
from halfbyte.data import split
from halfbyte.errors import DataError, RunError
from halfbyte.inference.load import open_run
from halfbyte.recipe import command
from halfbyte.recipe.data import Data
from halfbyte.runs.folder import RunFolder
from halfbyte.training import preview
from halfbyte.training.prepare import data_report, look, notices
from tests import tiny_run
from tests.scored import loss, scored


def write(path: Path, count: int, name: str = "w") -> Path:
    rows = [{"prompt": f"red {name} {n}", "completion": f"cup {n}"} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("asked", "rows", "held"),
    [
        ("auto", 199, 0), ("auto", 200, 10), ("auto", 100_000, 200), ("none", 999, 0), (None, 999, 0), ("5%", 100, 5),
        ("2.5 %", 1000, 25), (0.1, 50, 5), ("0.1", 50, 5), ("1%", 10, 1), (64, 100, 64), ("64", 100, 64),
        ("64.jsonl", 100, 0),
    ],
)  # fmt: skip
def test_how_many_rows_are_held_out(asked: Any, rows: int, held: int) -> None:
    data = Data(train="t.jsonl", eval=asked)
    assert data.held_out_of(rows) == held and Data(train="t", eval=data.eval) == data.model_copy(update={"train": "t"})
    assert data.eval_names == ("64.jsonl" if asked == "64.jsonl" else None)


@pytest.mark.parametrize("asked", [0, "0", "0%", "100%", "250%", 0.0, -3, True, [], [5]])
def test_what_holds_out_no_row_or_all_of_them(asked: Any) -> None:
    with pytest.raises(ValueError, match="5% or a number of the training rows; none; or auto"):
        Data(train="t.jsonl", eval=asked)


@pytest.mark.parametrize("files", [[1000], [100, 300, 600], [1] * 1000])
@pytest.mark.parametrize("count", [1, 40, 333])
def test_each_file_gives_its_share_and_the_seed_draws(files: list[int], count: int) -> None:
    digests = np.random.default_rng(0).permutation(1000).astype(np.uint64)
    held = split.choose(digests, files, count, 7)
    assert len(held) == count == len(set(held.tolist())) and held.tolist() == sorted(held.tolist())
    given = Counter(np.searchsorted(np.cumsum(files), held, side="right").tolist())
    for number, size in enumerate(files):
        assert abs(given[number] - count * size / 1000) < 1
    assert split.choose(digests, files, count, 7).tolist() == held.tolist()
    assert split.choose(digests, files, count, 8).tolist() != held.tolist()


def test_rows_that_are_the_same_are_on_one_side() -> None:
    digests = np.random.default_rng(0).integers(0, 60, 300).astype(np.uint64)
    held = split.choose(digests, [300], 60, 1)
    assert 30 < len(held) < 90
    assert not set(digests[held].tolist()) & set(np.delete(digests, held).tolist())
    assert not len(split.choose(np.zeros(9, np.uint64), [9], 3, 1)), "no row differs from another"


@pytest.mark.parametrize("packing", ["rows", "stream"])
def test_a_run_trains_on_what_is_left_and_says_so(tmp_path: Path, packing: str) -> None:
    texts = "".join(json.dumps({"text": f"red cup {n} " * 3}) + "\n" for n in range(240))
    (tmp_path / "texts.jsonl").write_text(texts)
    rows = write(tmp_path / "rows.jsonl", 240) if packing == "rows" else tmp_path / "texts.jsonl"
    values = {"data__train": rows, "data__packing": packing, "data__max_length": 64}
    made = look(tiny_run.recipe(tmp_path, **values).recipe)
    assert made.held_out is not None and made.evaluation is not None and len(made.held_out) == 12
    report = data_report(made)
    assert (report["train"]["rows"], report["train"]["used"], report["eval"]["used"]) == (240, 228, 12)
    whole = look(tiny_run.recipe(tmp_path, **values, data__eval="none").recipe)
    assert made.train.stats.tokens + made.evaluation.stats.tokens == whole.train.stats.tokens
    if packing == "rows":
        names = [{example.where for example in made.train.examples}, {example.where for example in made.held_out}]
        assert len(names[0] | names[1]) == 240 and not names[0] & names[1]
        assert list(made.held_out)[3] == next(e for e in whole.train.examples if e.where == made.held_out.where(3))
    said = "12 of 240 rows are held out (data.eval: auto); data.eval: none trains on them too"
    assert said in notices(made) and notices(whole) == [] and whole.evaluation is None
    overlap = next(f for f in made.findings if f.gate == "overlap")
    assert str(overlap) == "none of 12 held-out rows is trained on"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"data__eval": 16}, "16 rows cannot be held out of 16"),
        ({"train__eval_strategy": "epoch"}, "evaluations are asked for, and 16 rows are too few"),
        ({"train__eval_on_start": True}, "evaluations are asked for, and 16 rows are too few"),
    ],
)
def test_rows_that_cannot_be_held_out(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        look(tiny_run.recipe(tmp_path, **values).recipe)


def test_nothing_is_held_out_where_nothing_is_evaluated(tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", 240)
    values = {"data__train": rows, "train__eval_strategy": "no"}
    assert look(tiny_run.recipe(tmp_path, **values).recipe).held_out is None
    assert look(tiny_run.recipe(tmp_path, **values, data__eval="5%").recipe).held_out is not None


def test_a_dry_run_says_what_auto_is(tmp_path: Path) -> None:
    loaded = tiny_run.recipe(tmp_path, data__train=write(tmp_path / "rows.jsonl", 240))
    found = preview.resolve(loaded).to_json()["values"]["data.eval"]
    assert found == {"value": "12 rows", "from": "auto", "why": "of 240 training rows; none trains on all"}


def test_the_run_keeps_them_scores_them_and_resumes_with_them(tmp_path: Path) -> None:
    values = {"data__eval": "25%", "train__save_strategy": "steps", "train__save_steps": 2}
    loaded = tiny_run.recipe(tmp_path, **values)
    report = finetune.train(loaded).report
    run = RunFolder(tmp_path / "run")
    kept = [row.where for row in split.load(run.held_out).examples]
    assert kept == [row.where for row in look(loaded.recipe).held_out or ()] and len(kept) == 4
    assert report["eval_loss"] is not None
    rows = (tmp_path / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text("gone")
    made = scored(open_run(run.path))
    assert [question.where for question in made.questions] == kept
    assert loss(made) == pytest.approx(report["eval_loss"], rel=1e-3)
    saved = scored(open_run(run.checkpoints / "step-000004"))
    assert [question.where for question in saved.questions] == kept and loss(saved) == loss(made)

    (tmp_path / "train.jsonl").write_text(rows)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "step-000004")
    again = finetune.train(command.to_resume(str(run.path)), resume=True).report
    assert again["eval_loss"] == report["eval_loss"] and again["loss"] == report["loss"]

    shutil.rmtree(run.checkpoints / "step-000004")
    shutil.rmtree(run.adapter)
    tiny_run.rows(tmp_path / "train.jsonl", 16, seed=9)
    with pytest.raises(RunError, match="has changed since"):
        finetune.train(command.to_resume(str(run.path)), resume=True)


def test_a_run_never_holds_other_rows_out_than_at_first(tmp_path: Path) -> None:
    held = [look(tiny_run.recipe(tmp_path, data__eval=4, train__seed=seed).recipe).held_out for seed in (1, 2)]
    file = tmp_path / "held_out.arrow"
    split.keep(held[0], file)
    split.keep(held[0], file)
    for other in (held[1], None):
        with pytest.raises(RunError, match=r"holds 4 rows out, and data.train has changed since.*\n  fix: put data"):
            split.keep(other, file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match="cannot be read"):
        split.load(file)


def test_a_run_of_before_is_resumed_on_all_its_rows(tmp_path: Path) -> None:
    """Its recipe says nothing of data.eval, since null was left out of it."""
    loaded = tiny_run.recipe(tmp_path, data__train=write(tmp_path / "rows.jsonl", 240))
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tmp_path / "recipe.yaml", run / "recipe.yaml")
    assert loaded.recipe.data.eval == "auto"
    assert command.to_resume(str(run)).recipe.data.eval == "none"
