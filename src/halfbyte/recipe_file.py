"""A recipe as text: read it with `--set` on top, report every problem with its line, write it, write a commented one.

Source: YAML 1.1 through PyYAML's safe loader; precedence is `--set` > recipe > default.
Cost: one parse of a small file.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from halfbyte.errors import RecipeError
from halfbyte.fields import LORA_FIELDS, LORA_REFUSED, TRAIN_FIELDS, TRAIN_REFUSED, FieldInfo, shown
from halfbyte.recipe import SECTIONS, Loaded, Origin, Recipe, leaves, unusual

_REFUSED = {"lora": LORA_REFUSED, "train": TRAIN_REFUSED}
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
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from error
    values, lines = _parse(text, str(path))
    return _build(values, lines, overrides, path)


def recipe_from(model: str, data: str, overrides: Sequence[str] = ()) -> Loaded:
    """A recipe of defaults for a model and a file of rows, as `halfbyte train MODEL DATA.jsonl` uses it."""
    name = f"{Path(model.partition('@')[0]).name.removesuffix('.gguf')}-{Path(data).stem}"
    values = {"model": model, "data": {"train": data}, "output": f"runs/{name}"}
    loaded = _build(values, {}, overrides, None)
    given = {"model", "data.train", "output"}
    origins = {
        field: Origin("command", "") if field in given and origin.kind == "recipe" else origin
        for field, origin in loaded.origins.items()
    }
    return loaded._replace(origins=origins)


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, every value written out but those that are not set; loading it gives an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True), sort_keys=False, width=110)


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
    found = []
    for field in (table[name] for name in names):
        usual = f"; usual: {field.recommended}" if field.recommended else ""
        mark = "# " if field.default is None else ""
        value = "[lm_head]" if field.default is None else shown(field.default)
        found.append(f"  {mark}{field.name}: {value}    # {field.what}{usual}")
    return found


def _described(section: str, skip: Sequence[str] = ()) -> list[str]:
    fields = SECTIONS[section].model_fields
    found = []
    for name, field in fields.items():
        if name not in skip:
            value = "[]" if field.default == () else shown(field.default)
            found.append(f"  {name}: {value}    # {field.description}")
    return found


def _scalar(value: str) -> str:
    return yaml.safe_dump(value, width=1000).splitlines()[0].strip()


def _siblings(path: Path) -> list[Path]:
    try:
        return [p for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    except OSError:
        return []


def _parse(text: str, name: str) -> tuple[dict[str, Any], dict[str, int]]:
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
    _walk(node, "", lines, problems)
    if problems:
        raise RecipeError(problems, where=name)
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{name}: not YAML: {str(error).splitlines()[0]}.") from error
    return values, lines


def _walk(node: yaml.MappingNode, prefix: str, lines: dict[str, int], problems: list[str]) -> None:
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        line = key.start_mark.line + 1
        if dotted in lines:
            problems.append(f"line {line}: {dotted} is given twice, first in line {lines[dotted]}")
        lines[dotted] = line
        if isinstance(value, yaml.MappingNode):
            _walk(value, f"{dotted}.", lines, problems)


def _build(values: dict[str, Any], lines: dict[str, int], overrides: Sequence[str], path: Path | None) -> Loaded:
    problems: list[str] = []
    given = {dotted: Origin("recipe", "") for dotted in _dotted(values)}
    merged = _copy(values)
    for override in overrides:
        dotted, equals, text = override.partition("=")
        dotted = dotted.strip()
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if not equals or not dotted:
            problems.append(f"--set {override}: must be FIELD=VALUE, such as lora.r=32")
            continue
        if not _put(merged, dotted.split("."), value):
            problems.append(f"--set {override}: {dotted} lies inside a value that is not a section")
            continue
        for name in [dotted, *(f"{dotted}.{inner}" for inner in _dotted(value))]:
            given[name] = Origin("set", "")
            lines = {k: v for k, v in lines.items() if k != name}
    where = str(path) if path is not None else None
    _split_revision(merged)
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        found = [_message(item, lines, given) for item in _first_of_each(error.errors(include_url=False))]
        problems += [line for text in dict.fromkeys(found) for line in text.split("\n")]
        raise RecipeError(problems, where=where, fix=_fix(problems, path)) from error
    if problems:
        raise RecipeError(problems, where=where)
    origins = {field: given.get(field, Origin("default", "")) for field, _ in leaves(recipe)}
    recipe, origins = _feed_dtype(recipe, origins)
    return Loaded(recipe, origins, unusual(recipe), path)


def _fix(problems: list[str], path: Path | None) -> str | None:
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


def _split_revision(values: dict[str, Any]) -> None:
    model = values.get("model")
    if not isinstance(model, str) or "@" not in model or Path(model).exists() or values.get("revision") is not None:
        return
    name, _, revision = model.rpartition("@")
    if name and revision:
        values["model"], values["revision"] = name, revision


def _dotted(values: Any, prefix: str = "") -> list[str]:
    if not isinstance(values, Mapping):
        return []
    found = []
    for key, value in values.items():
        found.append(f"{prefix}{key}")
        found += _dotted(value, f"{prefix}{key}.")
    return found


def _copy(values: Any) -> Any:
    return {k: _copy(v) for k, v in values.items()} if isinstance(values, dict) else values


def _put(values: dict[str, Any], keys: list[str], value: Any) -> bool:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            return False
        values = inner
    values[keys[-1]] = value
    return True


def _first_of_each(items: list[Any]) -> list[Any]:
    """One problem a field: a union of types reports the same value once for each of them."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for item in items:
        key = (_field_of([str(part) for part in item["loc"]]), "" if item["loc"] else str(item.get("ctx")))
        if key not in seen:
            kept.append(item)
            seen.add(key)
    return kept


def _message(item: Any, lines: Mapping[str, int], given: Mapping[str, Origin]) -> str:
    """One of pydantic's problems in our words: line, field, what was found, what is allowed."""
    location = [str(part) for part in item["loc"]]
    dotted = _field_of(location)
    line = lines.get(dotted)
    lead = f"line {line}: " if line is not None else "--set " if _was_set(dotted, given) else ""
    kind, found, context = item["type"], item.get("input"), item.get("ctx", {})
    got = f", got {_show(found)}"
    if kind == "extra_forbidden":
        return lead + _unknown(location)
    if kind == "missing":
        return f"{dotted} is required: {_description(dotted)}"
    if kind == "value_error":
        text = str(context.get("error", item["msg"]))
        if not location or "\n" in text or text.startswith(("lora.", "train.", "data.", "quant.")):
            return "\n".join(f"{lead}{part}" for part in text.split("\n"))
        return f"{lead}{dotted} {text}{'' if 'got' in text or 'cannot be' in text else got}"
    limits = {"greater_than_equal": ("ge", ">="), "greater_than": ("gt", ">"), "less_than": ("lt", "<")}
    if kind in limits:
        key, sign = limits[kind]
        return f"{lead}{dotted} must be {sign} {context[key]:g}{got}"
    if kind == "literal_error":
        return f"{lead}{dotted} must be {str(context['expected']).replace(chr(39), '')}{got}"
    wanted = {
        "int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "dict": "a mapping",
        "model": "a section with fields of its own", "tuple": "a list", "finite": "a finite number",
    }  # fmt: skip
    for start, words in wanted.items():
        if kind.startswith(start) and kind != "string_too_short":
            return f"{lead}{dotted} must be {words}{got}"
    return f"{lead}{dotted}: {item['msg']}{got}"


def _field_of(location: list[str]) -> str:
    """The dotted field of a pydantic location, without the names of union members and list positions behind it."""
    for end in range(len(location), 0, -1):
        *outer, name = location[:end]
        section = SECTIONS.get(".".join(outer))
        if section is not None and (name in section.model_fields or end == len(location)):
            return ".".join(location[:end])
    return ".".join(location)


def _was_set(dotted: str, given: Mapping[str, Origin]) -> bool:
    return dotted in given and given[dotted].kind == "set"


def _unknown(location: list[str]) -> str:
    """An unknown key: refused for a reason, or a typo with the nearest name."""
    *outer, name = location
    section = ".".join(outer)
    dotted = ".".join(location)
    reason = _REFUSED.get(section, {}).get(name)
    if reason is not None:
        return f"{dotted} is not supported: {reason}"
    fields = [*SECTIONS[section].model_fields]
    elsewhere = [f"{other}.{name}".lstrip(".") for other, model in SECTIONS.items() if name in model.model_fields]
    if elsewhere:
        return f"{dotted} is not a field; did you mean {elsewhere[0]}?"
    near = difflib.get_close_matches(name, fields, 1, 0.6)
    if near:
        return f"{dotted} is not a field; did you mean {'.'.join([*outer, near[0]])}?"
    return f"{dotted} is not a field; {section or 'a recipe'} has {', '.join(fields)}"


def _description(dotted: str) -> str:
    *outer, name = dotted.split(".")
    section: type[BaseModel] = SECTIONS[".".join(outer)]
    return str(section.model_fields[name].description)


def _show(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else shown(value)
    return text if len(text) <= 60 else text[:57] + "..."
