"""From the words of a command to a recipe: a recipe file, a model, a model with rows, or the folder of a run.

Why: `halfbyte train`, `plan`, `doctor`, `quantize` and `data check` take each of these in one place of the line; what
cannot be meant is an error that shows the command to type instead.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from halfbyte.errors import RecipeError, typed
from halfbyte.recipe.adapter_folder import is_run
from halfbyte.recipe.file import load_recipe, recipe_from
from halfbyte.recipe.number_formats import AUTO, UNSET
from halfbyte.recipe.schema import Loaded, Origin, Recipe
from halfbyte.recipe.start import START, StartValue

ROW_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md", ".gz"})
NO_ROWS = "-"  # what stands for the rows in the recipe of a model alone


def recipe_or_model(
    target: str, overrides: Sequence[str], start: Mapping[str, StartValue] = MappingProxyType({})
) -> Loaded:
    """A recipe file, that of a run, or a recipe of defaults (and of `start`) for a model, for commands that read no
    rows."""
    if (Path(target) / "recipe.yaml").is_file():
        target = str(Path(target) / "recipe.yaml")
    if is_recipe(target):
        return load_recipe(Path(target), overrides)
    return recipe_from(target, NO_ROWS, overrides, start)


def recipe_or_rows(target: str, model: str | None, overrides: Sequence[str]) -> Loaded:
    """A recipe file, in which `model` stands for another one; or a file of rows, for `model`. Raises RecipeError: rows
    without a model; what the recipe holds."""
    if is_recipe(target):
        return load_recipe(Path(target), [*overrides, *([f"model={model}"] if model else [])])
    if model is None:
        raise RecipeError(
            f"{target} alone cannot be tokenised: no model is named.",
            fix=f"halfbyte data check {typed(target)} --model MODEL",
        )
    return recipe_from(model, target, overrides)


def to_train(target: str, data: str | None, overrides: Sequence[str]) -> Loaded:
    """A recipe file; or that of a model with a file of rows, as it is measured to be best. Raises RecipeError: a run
    folder, a recipe with rows beside it, a model without rows; what the recipe holds."""
    path = Path(target)
    if path.is_file() and path.suffix in ROW_SUFFIXES:
        model = data or "MODEL"
        raise RecipeError(
            f"{target} holds rows; a model comes first.", fix=f"halfbyte train {typed(model)} {typed(target)}"
        )
    if data is not None:
        if is_recipe(target):
            raise RecipeError(f"{target} is a recipe and names its own data; {data} is one argument too many.")
        return recipe_from(target, data, overrides, START)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        raise RecipeError(f"{path} is a run folder.", fix=f"halfbyte train {typed(path)} --resume")
    if not is_recipe(target) and not path.is_file():
        raise RecipeError(
            f"{target} is not a recipe (.yaml), and no data is given to train a model on.",
            fix=f"halfbyte train {typed(target)} DATA.jsonl, or write a recipe with `halfbyte init`",
        )
    of_run = path.name in ("recipe.yaml", "repeat.yaml") and is_run(path.parent)
    return load_recipe(path, overrides, of_run=of_run)


def to_tune(loaded: Loaded, within: str) -> Loaded:
    """The recipe of a search for settings: in a folder of its own, `within` a time if none is given."""
    recipe, update = loaded.recipe, dict[str, object]()
    if loaded.origins["output"].kind != "set":
        update["output"] = f"{recipe.output}-tune"
    if recipe.train.within is None:
        update["train"] = recipe.train.model_copy(update={"within": within})
    return loaded._replace(recipe=recipe.model_copy(update=update))


def to_resume(target: str, overrides: Sequence[str] = ()) -> Loaded:
    """The recipe of a run folder, or of the run that a recipe file names. Raises RecipeError: there is no such run."""
    path, given = Path(target), None
    if path.is_file():
        given = as_begun(load_recipe(path, overrides))
        path = Path(given.recipe.output)
    if not (path / "recipe.yaml").is_file():
        raise RecipeError(
            f"{path} is not a run folder: it has no recipe.yaml.",
            fix="halfbyte train RUN --resume, with the folder that train made",
        )
    loaded = given or load_recipe(path / "recipe.yaml", overrides, of_run=True)
    update: dict[str, object] = {"output": str(path)}  # it may have been moved or copied since its recipe was written
    if given is None and loaded.origins["data.eval"].kind == "default":  # from before rows were held out by themselves
        update["data"] = loaded.recipe.data.model_copy(update={"eval": "none"})
    return loaded._replace(recipe=loaded.recipe.model_copy(update=update))


def as_begun(loaded: Loaded) -> Loaded:
    """A recipe that leaves its number format or its rate open, with those that its run has begun with, if there is a
    run."""
    recipe, file = loaded.recipe, Path(loaded.recipe.output) / "recipe.yaml"
    if AUTO not in (recipe.quant.type, recipe.train.learning_rate) or not file.is_file():
        return loaded
    begun, why = load_recipe(file, of_run=True).recipe, "the run has begun with it"
    if recipe.train.learning_rate == AUTO:
        loaded = with_rate(loaded, begun.train.learning_rate, why)
    return with_type(loaded, begun.quant.type, why) if recipe.quant.type == AUTO else loaded


def with_rate(loaded: Loaded, rate: float | Literal["auto"], why: str) -> Loaded:
    """A recipe with another learning rate. `why`: who chose it."""
    train = loaded.recipe.train.model_copy(update={"learning_rate": rate})
    origins = {**loaded.origins, "train.learning_rate": Origin("auto", why)}
    return loaded._replace(recipe=loaded.recipe.model_copy(update={"train": train}), origins=origins)


def with_type(loaded: Loaded, name: str, why: str) -> Loaded:
    """A recipe in another number format, with that format's own defaults. `why`: who chose it."""
    recipe = loaded.recipe.model_copy(update={"quant": loaded.recipe.quant.in_type(name)})
    fields = {"quant.type": why, **{f"quant.{field}": f"of quant.type {name}" for field in UNSET}}
    return loaded._replace(
        recipe=recipe, origins={**loaded.origins, **{f: Origin("auto", w) for f, w in fields.items()}}
    )


# What may be another than in training where an adapter is used: where the base lies (its passport knows another one),
# and what rows are read, and how.
USABLE = ("model", "quant.placement", "data.", "eval.", "train.per_device_eval_batch_size")
USABLE_ALONE = ("model", "revision", "quant.", "vectors.", "trust_remote_code", "allow_pickle", *USABLE[2:])  # no run's


def to_use(file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a finished run. Where it was trained an integration was installed that need not be here. Raises
    RecipeError: a value is set that an adapter has been trained with."""
    _check_usable(overrides, USABLE)
    return load_recipe(file, ["train.report_to=none", *overrides], of_run=True).recipe


def to_use_alone(model: str, overrides: Sequence[str] = (), own: Sequence[str] = ()) -> Loaded:
    """The recipe of a model that is used without a run: of a base alone, or of the base of an adapter. `own` are
    overrides that need not be among those that a user may give."""
    _check_usable(overrides, USABLE_ALONE)
    return recipe_from(model, NO_ROWS, ["data.eval=none", *own, *overrides])


def _check_usable(overrides: Sequence[str], names: tuple[str, ...]) -> None:
    if strange := [text for text in overrides if not text.startswith(names)]:
        raise RecipeError(
            f"--set {strange[0]}: an adapter is used with the values that it was trained with; allowed here: "
            f"{', '.join(name + '*' * name.endswith('.') for name in names)}."
        )


def check_new(path: Path, another: str = "halfbyte init NAME.yaml") -> None:
    """A RecipeError where a file is there already."""
    if path.exists():
        raise RecipeError(f"{path} exists and is not overwritten.", fix=f"name another file: {another}")


def write_new(path: Path, text: str, another: str = "halfbyte init NAME.yaml") -> None:
    """Write a recipe. Raises RecipeError: the file exists, or cannot be written."""
    check_new(path, another)
    try:
        path.write_text(text)
    except OSError as error:
        if path.is_file():
            path.unlink()  # the beginning of a recipe, on a full disk
        raise RecipeError(f"{path} cannot be written: {error.strerror}.") from error


def is_recipe(target: str) -> bool:
    return Path(target).suffix in (".yaml", ".yml")
