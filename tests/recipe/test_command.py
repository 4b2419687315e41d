"""The words of a command become a recipe, or an error with the command to type."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.errors import RecipeError
from halfbyte.recipe import command
from halfbyte.recipe.file import relative_to_run, to_yaml


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, rows, a model folder, and the run `runs/a` of it."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("")
    Path("model").mkdir()
    Path("r.yaml").write_text("model: model\ndata: {train: rows.jsonl, eval: rows.jsonl}\noutput: runs/a\n")
    recipe = command.recipe_or_model("r.yaml", ()).recipe
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/recipe.yaml").write_text(to_yaml(relative_to_run(recipe, Path("runs/a"), model=True)))
    return tmp_path


def test_a_recipe_a_model_or_a_model_with_rows() -> None:
    assert command.recipe_or_model("r.yaml", ["lora.r=4"]).recipe.lora.r == 4
    assert command.recipe_or_model("org/name@v1", ()).recipe.revision == "v1"
    made = command.to_train("org/name", "rows.jsonl", ()).recipe
    assert (made.model, made.data.train, made.output) == ("org/name", "rows.jsonl", "runs/name-rows")
    assert command.to_train("r.yaml", None, ()).recipe.output == "runs/a"
    assert command.recipe_or_rows("r.yaml", "other", ()).recipe.model == "other"
    assert command.recipe_or_rows("rows.jsonl", "org/name", ()).recipe.model == "org/name"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: command.to_train("r.yaml", "rows.jsonl", ()), "names its own data"),
        (lambda: command.to_train("runs/a", None, ()), "is a run folder.\n  fix: halfbyte train runs/a --resume"),
        (lambda: command.to_train("org/name", None, ()), "no data is given.*\n  fix: halfbyte train org/name DATA"),
        (lambda: command.recipe_or_rows("rows.jsonl", None, ()), "fix: halfbyte data check rows.jsonl --model"),
        (lambda: command.to_resume("runs/b"), "has no recipe.yaml"),
        (lambda: command.to_use(Path("runs/a/recipe.yaml"), ["lora.r=3"]), "used with the values that it was"),
        (lambda: command.to_use_alone("org/name", ["train.seed=3"]), "allowed here: model, revision, quant"),
        (lambda: command.write_new(Path("r.yaml"), "model: m\n"), "exists and is not overwritten"),
    ],
)
def test_what_cannot_be_meant(call: object, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        call()  # type: ignore[operator]


def test_a_runs_paths_go_from_its_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the working directory, though there are others of these names; and it may be moved."""
    assert command.to_resume("runs/a").recipe.data.train == "rows.jsonl"
    (here / "sub" / "deep").mkdir(parents=True)
    monkeypatch.chdir(here / "sub" / "deep")
    Path("rows.jsonl").write_text("other")
    for recipe in (command.to_use(here / "runs/a/recipe.yaml"), command.to_resume("../../runs/a").recipe):
        assert Path(str(recipe.data.eval)).resolve() == here / "rows.jsonl"
        assert Path(recipe.model).resolve() == here / "model"
    assert command.to_use(here / "runs/a/recipe.yaml", ["data.eval=rows.jsonl"]).data.eval == "rows.jsonl"


@pytest.mark.parametrize("model", ["smollm2-135m", "org/name"])
def test_names_that_are_no_paths_stay_as_they_are_in_a_run(model: str) -> None:
    Path("runs/a/recipe.yaml").write_text(f"model: {model}\ndata: {{train: 'hub:org/rows'}}\noutput: runs/a\n")
    for recipe in (command.to_resume("runs/a").recipe, command.to_use(Path("runs/a/recipe.yaml"))):
        assert (recipe.model, recipe.data.train) == (model, "hub:org/rows")


def test_a_run_that_was_moved_alone_finds_its_paths_from_where_it_was() -> None:
    Path("elsewhere/deeper").mkdir(parents=True)
    Path("runs/a").rename("elsewhere/deeper/a")
    recipe = command.to_resume("elsewhere/deeper/a").recipe
    assert (recipe.model, recipe.data.train) == ("./model", "rows.jsonl")
    Path("model").rename("gone")
    assert command.to_resume("elsewhere/deeper/a").recipe.model == "./elsewhere/model", "and is missed under its name"
