"""A trained adapter as the start of a new run (`lora.adapter`): rank, targets and the like are read from it.

Source: `adapter_config.json`, as PEFT writes it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from re import _parser as re_parser  # type: ignore[attr-defined]  # the only door to a pattern's parts

from pydantic import ValidationError

from halfbyte.errors import AdapterError, RecipeError, typed
from halfbyte.recipe.adapter_folder import ADAPTER_FILES, MOST_BYTES, folder_of, is_adapter
from halfbyte.recipe.fields import HARMLESS, INIT_REFUSED, LORA_REFUSED, shown
from halfbyte.recipe.schema import Lora, Origin, Recipe
from halfbyte.system import limits
from halfbyte.types import Document

MOST_RANK = 16_384
MOST_PATTERN, MOST_REPEATS = 10_000, 4
# Fields that a new run chooses for itself.
CHOSEN = frozenset({"adapter", "lora_dropout", "init_lora_weights", "task_type", "save_dtype"})


def read_config(folder: Path) -> Document:
    """`adapter_config.json` of an adapter folder; an AdapterError if it is none of LoRA."""
    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise AdapterError(f"{folder} is not an adapter: it has no {' and no '.join(missing)}.")
    path = folder / ADAPTER_FILES[1]
    try:
        config: Document = limits.read_json(path, MOST_BYTES)  # type: ignore[assignment]
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read as JSON: {error}.") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise AdapterError(f"{path} is not the config of a LoRA adapter: its peft_type is {kind!r}.")
    _check_limits(config, path)
    return config


def _check_limits(config: Document, path: Path) -> None:
    """Refuse ranks that no adapter has, which would be allocated before its weights are looked at, and patterns that
    can take for ever on a name."""
    patterns = {name: config.get(name) for name in ("rank_pattern", "alpha_pattern")}
    if any(not isinstance(value, dict | None) for value in patterns.values()):
        raise AdapterError(f"{path}: rank_pattern and alpha_pattern are mappings.")
    ranks = [config.get("r"), *(patterns["rank_pattern"] or {}).values()]
    wrong = [r for r in ranks if r is not None and not (type(r) is int and 0 < r <= MOST_RANK)]
    if wrong:
        raise AdapterError(f"{path}: a rank is a whole number of at most {MOST_RANK:,}, got {str(wrong[0])[:40]}.")
    texts = [config.get(name) for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")]
    texts += [key for value in patterns.values() for key in value or ()]
    explosive = [text for text in texts if isinstance(text, str) and is_explosive(text)]
    if explosive:
        raise AdapterError(
            f"{path}: the pattern {explosive[0][:80]!r} has repeats inside repeats, or more than {MOST_REPEATS} of "
            "them, and could take for ever on a name.",
            fix="write it with a list of names",
        )


def is_explosive(pattern: str) -> bool:
    """Whether a regular expression can take for ever: unbounded repeats within a repeat, or many side by side."""
    try:
        parsed = re_parser.parse(pattern) if len(pattern) <= MOST_PATTERN else None
    except (re.error, RecursionError, OverflowError):
        return False  # whoever compiles it says what is wrong
    if parsed is None:
        return True
    depths = [*_repeats(parsed, 0)]
    return len(depths) > MOST_REPEATS or max(depths, default=0) > 1


def _repeats(node: object, depth: int) -> Iterator[int]:
    """Of each repeat that can be long, how many such it is inside of, itself among them."""
    if isinstance(node, tuple) and len(node) == 2 and str(node[0]).endswith("REPEAT"):
        _, max_times, repeated = node[1]
        inner = depth + (int(max_times) > 10)
        if inner > depth:
            yield inner
        yield from _repeats(repeated, inner)
    elif isinstance(node, list | tuple | re_parser.SubPattern):
        for part in node:
            yield from _repeats(part, depth)


def lora_settings(folder: Path) -> Lora:
    """What an adapter is, as a recipe has it; an AdapterError where it is more than a recipe can have."""
    config = read_config(folder)
    strange = [f"{name} ({why})" for name, why in LORA_REFUSED.items() if config.get(name) and name not in HARMLESS]
    start = str(config.get("init_lora_weights")).lower()
    strange += [f"init_lora_weights {name} ({why})" for name, why in INIT_REFUSED.items() if start.startswith(name)]
    if strange:
        raise AdapterError(f"the adapter {folder} cannot be trained here: it uses {'; '.join(strange)}.")
    values = {name: config[name] for name in Lora.model_fields if config.get(name) is not None and name not in CHOSEN}
    try:
        return Lora.model_validate(values)
    except ValidationError as error:
        name = ".".join(map(str, error.errors()[0]["loc"]))
        raise AdapterError(
            f"{folder / ADAPTER_FILES[1]}: {name} {shown(config.get(name.partition('.')[0]))} is nothing that a "
            "recipe can have."
        ) from error


def apply(recipe: Recipe, origins: dict[str, Origin]) -> tuple[Recipe, dict[str, Origin]]:
    """The recipe with what its `lora.adapter` decides. A missing adapter is reported where it is needed. Raises
    RecipeError: names each field that contradicts the adapter."""
    name = recipe.lora.adapter
    if name is None or not is_adapter(name):
        return recipe, origins
    taken = {field: value for field, value in lora_settings(folder_of(name)) if field not in CHOSEN}
    if problems := dict(_contradictions(recipe.lora, taken, origins)):
        as_it_is = {field: "auto" if field == "target_modules" else shown(taken[field]) for field in problems}
        sets = " ".join(f"--set {typed(f'lora.{field}={value}')}" for field, value in as_it_is.items())
        raise RecipeError([*problems.values()], fix=f"leave these fields out: lora.adapter decides them; or {sets}")
    why = Origin("auto", f"of the adapter {name}")
    changed = {f"lora.{field}" for field, value in taken.items() if getattr(recipe.lora, field) != value}
    recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update=taken)})
    return recipe, {field: why if field in changed else origin for field, origin in origins.items()}


def _contradictions(lora: Lora, taken: Document, origins: dict[str, Origin]) -> Iterator[tuple[str, str]]:
    """Each field that says otherwise, and how."""
    for field, value in taken.items():
        given = getattr(lora, field)
        if origins[f"lora.{field}"].kind in ("default", "auto") or given in (value, "auto"):
            continue
        if isinstance(given, tuple) and isinstance(value, tuple) and set(given) == set(value):
            continue
        yield field, f"lora.{field} is {shown(given)}, and the adapter {lora.adapter} has {shown(value)}"


def base_warning(recipe: Recipe) -> tuple[str, ...]:
    """A warning where the adapter was trained on a base of another name."""
    name = recipe.lora.adapter
    if name is None or not is_adapter(name):
        return ()
    base = str(read_config(folder_of(name)).get("base_model_name_or_path"))
    same = Path(base).name == Path(recipe.model).name
    return () if same else (f"lora.adapter {name} was trained on {base}, and model is {recipe.model}",)
