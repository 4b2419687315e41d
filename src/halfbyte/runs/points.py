"""Where a run goes on: its newest whole checkpoint, and whether recipe and rows are those that it was trained with.

Why: a resumed run ends as it would have ended, or says why it cannot. What it was trained with is kept in each
checkpoint's manifest, since recipe and files can be edited between two processes.
Cost: the hashes of one checkpoint's files (1 GB/s); no torch.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

from halfbyte.errors import RunError, typed
from halfbyte.recipe.adapter_folder import is_adapter
from halfbyte.recipe.fields import GOES_ON, MAY_CHANGE, REWARDED, shown
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.schema import Recipe, leaves
from halfbyte.runs.folder import RunFolder, read_json
from halfbyte.system import files
from halfbyte.types import Document

FORMAT_VERSION = 1
MANIFEST, BEST = "manifest.json", "best"
CAUSAL_LM = "causal_lm"


@dataclass(frozen=True)
class Point:
    """A checkpoint to go on from. `trained` is what the run was trained with, as `trained_with` makes it; empty where
    it was not kept. `passed_over` says of each newer checkpoint what is damaged."""

    path: Path
    step: int
    trained: Document
    passed_over: tuple[str, ...]

    @property
    def objective(self) -> str:
        return str(self.trained.get("objective", CAUSAL_LM))

    def changes(self, recipe: Recipe) -> dict[str, tuple[object, object]]:
        """Fields with another value than the run was trained with: (the run's, the recipe's)."""
        was, now = self.trained.get("recipe", {}), _values(recipe)
        return {name: (was[name], now[name]) for name in now if name in was and was[name] != now[name]}


def trained_with(recipe: Recipe, objective: str, rows: Document, belongs: Document) -> Document:
    """What a checkpoint keeps beside its files; of the objective its name, where it is not the usual one.

    Args:
        rows: of `train` and `eval`, each with `rows` and `digest`, or null.
        belongs: base, quantiser, tokenizer and chat template, as `adapters.passport` makes it.
    """
    other = {} if objective == CAUSAL_LM else {"objective": objective}
    return {"recipe": _values(recipe), "rows": rows, "belongs_to": belongs, **other}


def _values(recipe: Recipe) -> Document:
    """Every field by its dotted name, as JSON gives it back."""
    return json.loads(json.dumps(dict(leaves(recipe)), default=str))


def damage(path: Path, *, hashes: bool = False) -> str | None:
    """What is wrong with a checkpoint's files, by their sizes and, if asked, their sha256; None if nothing is."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT_VERSION:
            return f"{MANIFEST} is of another version"
        if not files.is_sealed(manifest) or not manifest["files"]:
            return f"{MANIFEST} is not as it was written"
        for name, entry in manifest["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != entry["bytes"]:
                return f"{name} has another size"
            if hashes and _sha256(path / name, (path / name).stat().st_mtime_ns) != entry["sha256"]:
                return f"{name} has another sha256"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    return None


# Where things are, and how a machine computes; what is read there is compared by its digests.
NOT_COMPARED = frozenset(
    {"output", "model", "data.train", "data.eval", "quant.placement", "quant.compute_dtype",
     "train.max_tokens_per_micro_batch", "train.gradient_checkpointing"}
)  # fmt: skip


def values_that_train(recipe: Recipe) -> Document:
    """What of a recipe must be the same in every process that trains it."""
    return {"recipe": {name: value for name, value in _values(recipe).items() if name not in NOT_COMPARED}}


@cache
def _sha256(path: Path, changed_ns: int) -> str:
    """Of a file as it was last changed then: the command line and the run both ask before they go on."""
    return files.sha256(path)


def is_whole(path: Path, *, hashes: bool = False) -> bool:
    """Whether a checkpoint has every file of its manifest at its full size (and, if asked, with its sha256)."""
    return damage(path, hashes=hashes) is None


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def every(folder: Path) -> list[Path]:
    """Checkpoints of a run, whole or not, oldest first."""
    return sorted((p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()), key=step_of)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return [path for path in every(folder) if is_whole(path)]


def newest(folder: Path) -> Point | None:
    """The newest checkpoint whose every hash is right; None if there is none yet; a RunError if all are damaged."""
    damaged: list[str] = []
    for path in reversed(every(folder)):
        wrong = damage(path, hashes=True)
        if wrong is None:
            manifest = json.loads((path / MANIFEST).read_text())
            return Point(path, step_of(path), manifest.get("trained") or {}, tuple(damaged))
        damaged.append(f"{path.name} ({wrong})")
    if not damaged:
        return None
    raise RunError(
        f"no whole checkpoint to resume from in {folder}; found only damaged ones: {', '.join(sorted(damaged))}.",
        fix="start again with another `output:` (`--set output=runs/NAME`)",
    )


def check_best(folder: Path) -> None:
    """Raises RunError: the best adapter so far of a run's checkpoints is not as it was written."""
    best = folder / BEST
    if (best / MANIFEST).is_file() and (wrong := damage(best, hashes=True)) is not None:
        raise RunError(
            f"the best adapter so far, {best}, is damaged: {wrong}.",
            fix=f"rm -r {typed(best)}: the adapter is then the best of those that follow, else the last step's",
        )


def check_recipe(point: Point, recipe: Recipe) -> None:
    """Raises RunError: the recipe would train otherwise than the run has. Names these fields, and what may change."""
    free = (MAY_CHANGE | GOES_ON) - (REWARDED if recipe.train.draws else set())
    changes = point.changes(recipe).items()
    strange = {name: values for name, values in changes if name not in free and not _is_moved(name, *values)}
    if strange:
        listed = "\n".join(f"  - {name}: {shown(a)} in the run, {shown(b)} asked" for name, (a, b) in strange.items())
        of_train = sorted(name.removeprefix("train.") for name in free if name.startswith("train."))
        raise RunError(
            f"the run {recipe.output} was trained until step {point.step} with other values:\n{listed}\n"
            f"  What may change: data.train and data.eval (the same rows elsewhere), quant.placement, lora.save_dtype; "
            f"under train: {', '.join(of_train)}",
            fix=_new_run(recipe) + _from_its_weights(point, recipe, {name: now for name, (_, now) in strange.items()}),
        )


def _new_run(recipe: Recipe) -> str:
    command = f"halfbyte train {typed(f'{recipe.output}/recipe.yaml')} --output runs/NAME"
    return f"put back what the run had; or start a new run: {command}"


def _from_its_weights(point: Point, recipe: Recipe, asked: Document) -> str:
    """What to add to the command of a new run for the weights of this one, where they allow what is asked."""
    if not all(name.startswith(("train.", "data.")) for name in asked):
        return ""
    run = recipe.output
    return f"; from its weights, add {from_weights(recipe, run if is_adapter(run) else point.path, asked)}"


def from_weights(recipe: Recipe, adapter: str | Path, asked: Mapping[str, object] = MappingProxyType({})) -> str:
    """What a command adds to begin a run of this recipe with an adapter's weights, and with other values."""
    values = {"lora.adapter": adapter, **asked}
    if recipe.lora.target_modules == "all-linear":  # the adapter has them by their names
        values["lora.target_modules"] = "auto"
    return " ".join(f"--set {typed(f'{name}={shown(x)}')}" for name, x in values.items())


def _is_moved(name: str, was: object, now: object) -> bool:
    """Whether this is the same model in another place."""
    return name == "model" and Path(str(was)).name == Path(str(now)).name


def check_objective(point: Point, recipe: Recipe, objective: str) -> None:
    """Refuse to go on with another objective (RunError)."""
    if point.objective != objective:
        was = f"the run {recipe.output} was trained until step {point.step} with the objective {point.objective}"
        raise RunError(f"{was}, and now {objective} is asked for.", fix=_new_run(recipe))


def check_rows(point: Point, recipe: Recipe, rows: Document) -> None:
    """Raises RunError: the run was trained on other rows; held-out rows may be added or left out."""
    was = point.trained.get("rows", {})
    for name in ("train", "eval"):
        a, b = was.get(name), rows[name]
        if a is None or b is None or a == b:
            continue
        what = f"{a['rows']:,} rows, now {b['rows']:,} rows" if a["rows"] != b["rows"] else f"{a['rows']:,} other rows"
        since = f"data.{name} ({shown(getattr(recipe.data, name))}) has changed since step {point.step}"
        raise RunError(f"{since} of the run {recipe.output}: it was {what}.", fix=_new_run(recipe))


def complete(recipe: Recipe) -> Document | None:
    """The report of a run that is finished, where nothing asks for more; None where there is something to do. Raises
    RunError: more is asked for, and no whole checkpoint is left."""
    run = RunFolder(Path(recipe.output))
    report = read_json(run.report)
    if not report or not (run.adapter / "adapter_config.json").is_file():
        return None
    point = None
    with contextlib.suppress(RunError):  # all are damaged
        point = newest(run.checkpoints)
    if point is None:  # the recipe of the run says what it was trained with
        known = _values(load_recipe(run.recipe, of_run=True).recipe) if run.recipe.is_file() else {}
        began = Point(run.path, report["steps"], {"recipe": known}, ())
    else:
        began = point
        check_recipe(point, recipe)
    done = recipe.train.max_steps == report["steps"]  # whatever epochs say, or early stopping
    changes = began.changes(recipe)
    if done or not (more := {name: now for name, (_, now) in changes.items() if name in GOES_ON}):
        return report
    if point is None:
        what = f"the run {run.path} is complete, with {report['steps']:,} steps, and has no checkpoint to go on from."
        raise RunError(what, fix=f"a new run from its weights: {another_run(recipe, more)}")
    return None


def another_run(recipe: Recipe, asked: Mapping[str, object] = MappingProxyType({})) -> str:
    """The command of a new run from the weights of a finished one, with other values."""
    run = recipe.output
    command = f"halfbyte train {typed(f'{run}/recipe.yaml')} --output {typed(f'{run}-2')}"
    return f"{command} {from_weights(recipe, f'{run}/adapter', asked)}"
