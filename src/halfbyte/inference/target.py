"""What `eval`, `generate` and `chat` are given: a run, an adapter alone, or a base alone. No torch."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.data.reading import read
from halfbyte.data.reading.files import IsFolder
from halfbyte.errors import AdapterError, DataError, RunError, SourceError, typed
from halfbyte.models.sources import hub, lookup, pypi
from halfbyte.models.sources.checkpoint import no_config
from halfbyte.plan import number_format
from halfbyte.recipe.adapter import read_config
from halfbyte.recipe.adapter_folder import ADAPTER_FILES, HEAD, read_passport, recipe_around
from halfbyte.recipe.command import to_use, to_use_alone
from halfbyte.recipe.data import Sources
from halfbyte.recipe.schema import Lora, Recipe
from halfbyte.recipe.task import CAUSAL_LM, CLASSIFY, TAG
from halfbyte.runs.folder import RunFolder


@dataclass(frozen=True)
class Target:
    """`adapter` is None for a base alone; `run` is None where there is no run folder. `assumed`: what is to be told of
    an adapter that does not say in which number format its base was."""

    path: Path
    recipe: Recipe
    adapter: Path | None = None
    run: RunFolder | None = None
    assumed: str | None = None


def find(path: Path, overrides: Sequence[str] = (), tasks: Collection[str] = (CAUSAL_LM,)) -> Target:
    """What a name stands for: a run folder, a PEFT folder, or a model that is on this machine. Raises RunError: it is
    none of them, or none of these `tasks`. RecipeError: a value is set that must stay. AdapterError: it names no
    base."""
    subject = _find(path, overrides)
    if (task := subject.recipe.task) not in tasks:
        fix = f"halfbyte chat {typed(path)}" if task == CAUSAL_LM else f"halfbyte predict {typed(path)} ROWS.csv"
        raise RunError(f"{path} is of task {task}, which this is not for.", fix=fix)
    return subject


def _find(path: Path, overrides: Sequence[str]) -> Target:
    if not (path / "recipe.yaml").is_file():
        if (path / ADAPTER_FILES[1]).is_file():
            return _adapter(path, overrides)
        if _is_base(path):
            base = pypi.MODELS.get(str(path))
            embeds = (path / "modules.json").is_file() or (base is not None and base.suffix == ".zip")
            more = ["task=embed"] if embeds else []  # sentence-transformers' form
            return Target(path, number_format.settle(to_use_alone(str(path), overrides, more)).recipe)
        if any(path.glob("*.gguf")):
            raise no_config(path, str(path))
        if path.suffix == ".gguf":
            lookup.look(to_use_alone(str(path), overrides).recipe)
    run = RunFolder.open(path)
    return Target(path, to_use(run.recipe, overrides), run.adapter, run)


def rows_kept(run: Path) -> Path:
    """The file of the held-out rows that a run has kept; of a checkpoint, its run's."""
    recipe = recipe_around(run)
    return RunFolder(run if recipe is None else recipe.parent).held_out


def held_out(recipe: Recipe, run: Path, data: Path | None) -> Sources | None:
    """The rows that `halfbyte eval` scores: `data`, else the recipe's own; None for those that the run has kept. Raises
    DataError: there are none."""
    names = data or recipe.data.eval_names
    if not names and rows_kept(run).is_file():
        return None
    if not names:
        fix = f"halfbyte eval {typed(run)} --data ROWS.jsonl"
        raise DataError("the run has no held-out rows (data.eval).", fix=fix)
    try:
        read.look(names, recipe.data)
    except IsFolder as folder:
        if data is None or folder.fix is None:
            raise
        fix = f"halfbyte eval {typed(run)} --data {typed(folder.pattern)}"
        raise DataError(folder.message, fix=fix) from None
    except DataError as error:
        if not (error.fix or "").startswith("--set train."):
            raise
        fix = f"rows of the kind that was trained on: halfbyte eval {typed(run)} --data ROWS.jsonl"
        raise DataError(error.message, fix=fix) from None
    return names


def _adapter(path: Path, overrides: Sequence[str]) -> Target:
    config = read_config(path)
    if (file := recipe_around(path)) is not None:
        return Target(path, to_use(file, overrides), path)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base and not any(text.startswith("model=") for text in overrides):
        raise AdapterError(f"{path / ADAPTER_FILES[1]} names no base.", fix="say which it is: --set model=MODEL")
    named = [f"revision={revision}"] if revision and hub.HUB_ID.fullmatch(str(base)) else []
    if (passport := read_passport(path)) is not None:  # on a base as it was trained on, talked to as it was
        trained = passport["belongs_to"]
        values = {f"quant.{name}": value for name, value in trained["quant"].items()}
        values |= {"data.chat_template": trained["chat_template"]} if trained["chat_template"] else {}
        named += [f"{name}={json.dumps(value)}" for name, value in values.items()]
    task = {"SEQ_CLS": CLASSIFY, "TOKEN_CLS": TAG}.get(str(config.get("task_type")))
    if task is not None:
        if not (path / HEAD).is_dir():
            what = f"{path} has a head that a script has saved, and no names of its labels."
            raise AdapterError(what, fix=f"open it with PEFT in that script; or train with --set task={task}")
        named += [f"task={task}"]
    recipe = number_format.settle(to_use_alone(str(base), overrides, named)).recipe
    lora = Lora.model_validate({name: config[name] for name in ("r", "bias", "use_dora") if name in config})
    assumed = None
    if passport is None and not any(text.startswith("quant.type=") for text in overrides):
        assumed = f"{path} does not say in which number format its base was: it is used on {recipe.quant.type}; "
        assumed += "--set quant.type=none, fp4 or int8 where it was another"
    return Target(path, recipe.model_copy(update={"lora": lora}), path, assumed=assumed)


def _is_base(path: Path) -> bool:
    """Whether it is a model that needs no download: a folder, a GGUF file, a packaged name, a cached hub id."""
    name = str(path)
    if path.exists():
        return (path / "config.json").is_file() or (path.suffix == ".gguf" and path.is_file())
    return name in pypi.MODELS or (hub.HUB_ID.fullmatch(name) is not None and _is_cached(name))


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    repo, _, revision = name.partition("@")
    try:
        return isinstance(try_to_load_from_cache(repo, "config.json", revision=revision or None), str)
    except (ValueError, SourceError):
        return False
