"""A recipe as text: read it with `--set` on top, report every problem with its line, write it, write a commented one.

Source: YAML 1.1 through PyYAML's safe loader; precedence is `--set` > recipe > default.
Cost: one parse of a small file.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pydantic import ValidationError

from halfbyte.errors import RecipeError
from halfbyte.recipe.fields import LORA_FIELDS, TRAIN_FIELDS, FieldInfo, shown
from halfbyte.recipe.messages import Problem, field_of, first_of_each, sentences, unusual
from halfbyte.recipe.schema import SECTIONS, Loaded, Origin, Recipe, leaves

if TYPE_CHECKING:
    from halfbyte.types import Document

_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_INIT_SHOWN = {
    "lora": ("r", "lora_alpha", "target_modules", "lora_dropout", "bias", "use_rslora", "use_dora", "modules_to_save"),
    "train": (
        "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate",
        "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "eval_strategy", "save_steps",
        "report_to",
    ),
}  # fmt: skip


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Read a recipe file; `overrides` are `a.b=c` and win over it.

    Raises:
        RecipeError: every problem at once, with its line in the file.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in _siblings(path)], 1)
        hint = f"; did you mean {path.with_name(near[0])}?" if near else "."
        raise RecipeError(f"there is no recipe {path}{hint}", fix=f"halfbyte init {path} writes one") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {getattr(error, 'strerror', error)}.") from error
    values, lines = _parse(text, str(path))
    return _build(values, lines, overrides, path)


def recipe_from(model: str, data: str, overrides: Sequence[str] = ()) -> Loaded:
    """A recipe of defaults for a model and a file of rows, as `halfbyte train MODEL DATA.jsonl` uses it."""
    rows = re.sub(r"[^\w.-]+", "-", Path(data).stem).strip("-")  # a glob or a hub dataset is no name of a folder
    name = f"{Path(model.partition('@')[0]).name.removesuffix('.gguf') or 'model'}-{rows}"
    values = {"model": model, "data": {"train": data}, "output": f"runs/{name}"}
    loaded = _build(values, {}, overrides, None)
    given = {"model", "data.train", "output"}
    origins = {
        field: Origin("command", "") if field in given and origin.kind == "recipe" else origin
        for field, origin in loaded.origins.items()
    }
    return loaded._replace(origins=origins)


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, with every value that is not null by default; loading it gives an equal recipe."""
    values = recipe.model_dump(mode="json")
    for section, model in SECTIONS.items():
        inner = values
        for name in section.split(".") if section else ():
            inner = inner[name]
        for name, field in model.model_fields.items():
            if inner[name] is None and field.default is None:
                del inner[name]
    return yaml.safe_dump(values, sort_keys=False, width=110, allow_unicode=True)


def init_template(model: str, data: str) -> str:
    """The commented recipe that `halfbyte init` writes. It loads as it is."""
    parts = [
        "# A halfbyte recipe. Every field, with what it does: docs/recipe.md and docs/lora.md",
        "# Check it before training:  halfbyte train THIS_FILE --dry-run",
        f"model: {_scalar(model)}    # {Recipe.model_fields['model'].description}",
        "quant:",
        *_described("quant"),
        "lora:    # the names are those of peft.LoraConfig",
        *_lines(LORA_FIELDS, _INIT_SHOWN["lora"]),
        "data:",
        f"  train: {_scalar(data)}    # {SECTIONS['data'].model_fields['train'].description}",
        f"  # eval: test.jsonl    # {SECTIONS['data'].model_fields['eval'].description}",
        "  # fields: {prompt: question, completion: answer}    # the names of your columns",
        *_described("data", skip=("train", "eval", "fields", "chat_template")),
        "train:    # the names are those of transformers.TrainingArguments",
        *_lines(TRAIN_FIELDS, _INIT_SHOWN["train"]),
        f"output: runs/{Path(data).stem}    # {Recipe.model_fields['output'].description}",
    ]
    return "\n".join(parts) + "\n"


def _lines(table: Mapping[str, FieldInfo], names: Sequence[str]) -> list[str]:
    lines = []
    for field in (table[name] for name in names):
        usual = f"; usual: {field.recommended}" if field.recommended else ""
        mark = "# " if field.default is None else ""
        value = "[lm_head]" if field.default is None else shown(field.default)
        lines.append(f"  {mark}{field.name}: {value}    # {field.what}{usual}")
    return lines


def _described(section: str, skip: Sequence[str] = ()) -> list[str]:
    fields = ((name, field) for name, field in SECTIONS[section].model_fields.items() if name not in skip)
    return [f"  {name}: {shown(field.default)}    # {field.description}" for name, field in fields]


def _scalar(value: str) -> str:
    return yaml.safe_dump(value, width=1000).splitlines()[0].strip()


def _siblings(path: Path) -> list[Path]:
    try:
        return [p for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return []


def _parse(text: str, name: str) -> tuple[Document, dict[str, int]]:
    """YAML text to nested dicts and the line of each dotted key."""
    problems: list[str] = []
    lines: dict[str, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{name}:{where} not YAML: {problem}.") from error
    if node is None:
        raise RecipeError(f"{name} is empty.", fix="halfbyte init NAME.yaml writes a recipe to start from")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
        raise RecipeError(
            f"{name} holds {kind}; a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}.",
            fix="halfbyte init NAME.yaml writes a recipe to start from",
        )
    _walk(node, "", lines, problems, ())
    if problems:
        raise RecipeError(problems, where=name)
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{name}: not YAML: {problem}.") from error
    return values, lines


def _walk(
    node: yaml.MappingNode, prefix: str, lines: dict[str, int], problems: list[str], outer: tuple[yaml.Node, ...]
) -> None:
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEY_TAGS:
            shown_key = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            problems.append(f"line {line}: a key must be text, got {shown_key}")
            continue
        dotted = f"{prefix}{key.value}"
        if dotted in lines:
            problems.append(f"line {line}: {dotted} is given twice, first in line {lines[dotted]}")
        lines[dotted] = line
        if value in (*outer, node):
            problems.append(f"line {line}: {dotted} holds itself")
        elif isinstance(value, yaml.MappingNode):
            _walk(value, f"{dotted}.", lines, problems, (*outer, node))


def _build(values: Document, lines: dict[str, int], overrides: Sequence[str], path: Path | None) -> Loaded:
    problems: list[str] = []
    given = {dotted: Origin("recipe", f"line {lines[dotted]}" if dotted in lines else "") for dotted in _dotted(values)}
    merged = _copy(values)
    for override in overrides:
        for dotted in _set(merged, override, problems):
            given[dotted] = Origin("set", "")
            lines = {k: v for k, v in lines.items() if k != dotted}
    where = str(path) if path is not None else None
    if _split_revision(merged):
        given["revision"] = given["model"]
    _fill_sections(merged)
    recipe, mistakes = _validate(merged)
    problems += [text for item in mistakes for text in sentences(item, lines, given)]
    if problems or recipe is None:
        raise RecipeError(list(dict.fromkeys(problems)), where=where, fix=_fix(problems))
    origins = {field: given.get(field, Origin("default", "")) for field, _ in leaves(recipe)}
    recipe, origins = _feed_dtype(recipe, origins)
    return Loaded(recipe, origins, unusual(recipe), path)


def _set(values: Document, override: str, problems: list[str]) -> list[str]:
    """Put one `a.b=c` into the values; a section's mapping is merged. Returns the dotted fields that it set."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        value = text
    if not equals or not dotted:
        problems.append(f"--set {override}: must be FIELD=VALUE, such as lora.r=32")
        return []
    put: list[str] = []
    for name, inner in _spread(dotted, value):
        if _is_text(name) and value is not None and not isinstance(inner, (str, dict, list)):
            inner = text.strip()  # a name such as 2024 is not meant as a number
        if not _put(values, name.split("."), inner):
            problems.append(f"--set {override}: {name} is inside a value that is not a section")
            continue
        put += [name, *(f"{name}.{key}" for key in _dotted(inner))]
        put += [".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)]
    return [name for name in put if name not in SECTIONS]


def _spread(dotted: str, value: object) -> list[tuple[str, object]]:
    if dotted in SECTIONS and isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _spread(f"{dotted}.{key}", inner)]
    return [(dotted, value)]


def _is_text(dotted: str) -> bool:
    outer, _, name = dotted.rpartition(".")
    field = SECTIONS[outer].model_fields.get(name) if outer in SECTIONS else None
    return field is not None and (dotted in ("data.train", "data.eval") or field.annotation in (str, str | None))


def _fill_sections(values: Document) -> None:
    """A section whose every line is commented out is an empty one, not null."""
    for section in SECTIONS:
        outer, _, name = section.rpartition(".")
        inside = values.get(outer) if outer else values
        if name and isinstance(inside, dict) and name in inside and inside[name] is None:
            inside[name] = {}


def _validate(values: Document) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, or every problem: of single fields, then of the other fields together, with the bad ones left out."""
    try:
        return Recipe.model_validate(values), []
    except ValidationError as error:
        mistakes = first_of_each(error.errors(include_url=False))
    bad = {field_of([str(part) for part in item["loc"]]) for item in mistakes if item["loc"]}
    if not bad:
        return None, mistakes
    rest = _copy(values)
    for dotted in bad:
        _remove(rest, dotted.split("."))
    rest.setdefault("model", "unknown")
    rest.setdefault("data", {}).setdefault("train", "unknown")
    try:
        Recipe.model_validate(rest)
    except ValidationError as error:
        together = [item for item in error.errors(include_url=False) if item["type"] == "together"]
        for item in together:
            kept = [(fields, text) for fields, text in item["ctx"]["problems"] if not bad & _with_sections(fields)]
            mistakes.append({**item, "ctx": {"problems": kept}})
    return None, mistakes


def _with_sections(fields: Sequence[str]) -> set[str]:
    return {*fields, *(name.rpartition(".")[0] for name in fields)}


def _remove(values: Document, keys: list[str]) -> None:
    for key in keys[:-1]:
        inner = values.get(key)
        if not isinstance(inner, dict):
            return
        values = inner
    values.pop(keys[-1], None)


def _fix(problems: list[str]) -> str | None:
    if any("is required" in p for p in problems):
        return "halfbyte init NAME.yaml writes a recipe with every required field"
    return None


def _feed_dtype(recipe: Recipe, origins: dict[str, Origin]) -> tuple[Recipe, dict[str, Origin]]:
    """`train.bf16` and `train.fp16` feed `quant.compute_dtype`; they never reach a Trainer's autocast."""
    asked = "bf16" if recipe.train.bf16 else "fp16" if recipe.train.fp16 else None
    if asked is None or recipe.quant.compute_dtype != "auto":
        return recipe, origins
    quant = recipe.quant.model_copy(update={"compute_dtype": asked})
    origins = {**origins, "quant.compute_dtype": Origin("auto", f"train.{asked} is true")}
    return recipe.model_copy(update={"quant": quant}), origins


def _split_revision(values: Document) -> bool:
    """`org/name@revision` -> model and revision. Not for a path that exists. Returns whether it was split."""
    model = values.get("model")
    if not isinstance(model, str) or "@" not in model or values.get("revision") is not None or _exists(model):
        return False
    name, _, revision = model.rpartition("@")
    if name and revision:
        values["model"], values["revision"] = name, revision
    return bool(name and revision)


def _exists(model: str) -> bool:
    return os.path.exists(os.path.expanduser(model))  # False, not an error, for a name that no path can have


def _dotted(values: object, prefix: str = "") -> list[str]:
    if not isinstance(values, Mapping):
        return []
    return [name for key, inner in values.items() for name in (f"{prefix}{key}", *_dotted(inner, f"{prefix}{key}."))]


def _copy(values: Document) -> Document:
    """Nested mappings, each a copy of its own also where YAML aliases share one."""
    return {key: _copy(inner) if isinstance(inner, dict) else inner for key, inner in values.items()}


def _put(values: Document, keys: list[str], value: object) -> bool:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            return False
        values = inner
    values[keys[-1]] = value
    return True
