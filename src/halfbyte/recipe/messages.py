"""What to tell the writer of a recipe: errors as plain sentences, the nearest name for an unknown one, warnings.

Why: pydantic says "Input should be greater than or equal to 1" of a place in its own tree of unions; a person wants the
line, the field, what was found and what is allowed.
Cost: none; nothing heavy is imported.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pydantic import BaseModel

from halfbyte.recipe.fields import ELSEWHERE, LORA_REFUSED, NOT_NEEDED, TRAIN_FIELDS, TRAIN_REFUSED, shown
from halfbyte.recipe.schema import SECTIONS, Origin, Recipe

Problem: TypeAlias = Mapping[str, Any]
"""One error as pydantic lists it: type, loc, msg, input, ctx."""
_REFUSED = {"lora": LORA_REFUSED, "train": TRAIN_REFUSED}


def first_of_each(items: Sequence[Problem]) -> list[Problem]:
    """One problem a field: a union of types reports the same value once for each of them."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for item in items:
        key = (field_of([str(part) for part in item["loc"]]), "" if item["loc"] else str(item.get("ctx")))
        if key not in seen:
            kept.append(item)
            seen.add(key)
    return kept


def sentences(item: Problem, lines: Mapping[str, int], given: Mapping[str, Origin]) -> list[str]:
    """Pydantic's problem in our words; contradictions are several."""
    if item["type"] != "together":
        return [_message(item, lines, given)]
    said = []
    for fields, text in item["ctx"]["problems"]:
        line = next((lines[name] for name in fields if name in lines), None)
        said.append(text if line is None else f"line {line}: {text}")
    return said


def _message(item: Problem, lines: Mapping[str, int], given: Mapping[str, Origin]) -> str:
    """One problem: line, field, what was found, what is allowed."""
    location = [str(part) for part in item["loc"]]
    dotted = field_of(location)
    line = lines.get(dotted)
    lead = f"line {line}: " if line is not None else "--set " if _was_set(dotted, given) else ""
    kind, context = item["type"], item.get("ctx", {})
    got = f", got {_show(item.get('input'))}"
    if kind == "extra_forbidden":
        return lead + _unknown(location)
    if kind == "missing":
        return f"{dotted} is required: {_description(dotted)}"
    if kind == "value_error":
        text = str(context["error"])
        return f"{lead}{dotted} {text}{got if text.startswith('must') else ''}"
    limits = {"greater_than_equal": ("ge", ">="), "greater_than": ("gt", ">"), "less_than": ("lt", "<")}
    if kind in limits:
        key, sign = limits[kind]
        return f"{lead}{dotted} must be {sign} {_plain(context[key])}{got}"
    if kind == "literal_error":
        return f"{lead}{dotted} must be {str(context['expected']).replace(chr(39), '')}{got}"
    wanted = {
        "int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "dict": "a mapping",
        "model": "a section with fields of its own", "tuple": "a list", "finite": "a finite number",
    }  # fmt: skip
    if kind == "string_too_short":
        return f"{lead}{dotted} must not be empty"
    for start, words in wanted.items():
        if kind.startswith(start):
            return f"{lead}{dotted} must be {words}{got}"
    return f"{lead}{dotted}: {item['msg']}{got}"


def _plain(limit: float) -> str:
    return str(int(limit)) if limit == int(limit) else str(limit)


def field_of(location: list[str]) -> str:
    """The dotted field of a pydantic location, without the names of union members and list positions behind it."""
    for end in range(len(location), 0, -1):
        *outer, name = location[:end]
        section = SECTIONS.get(".".join(outer))
        if section is not None and (name in section.model_fields or end == len(location)):
            return ".".join(location[:end])
    return ".".join(location)


def _was_set(dotted: str, given: Mapping[str, Origin]) -> bool:
    return any(o.kind == "set" and f"{name}.".startswith(f"{dotted}.") for name, o in given.items())


def _unknown(location: list[str]) -> str:
    """An unknown key: refused for a reason, or a typo with the nearest name."""
    *outer, name = location
    section = ".".join(outer)
    dotted = ".".join(location)
    fields = [*SECTIONS[section].model_fields] if section in SECTIONS else []
    own = _REFUSED.get(section, {})
    elsewhere = [f"{other}.{name}".lstrip(".") for other, model in SECTIONS.items() if name in model.model_fields]
    if elsewhere and name not in own:
        return f"{dotted} is not a field; did you mean {elsewhere[0]}?"
    for refused in (own, *_REFUSED.values()):
        if name in refused:
            return f"{dotted} is not supported: {refused[name]}"
    if name in ELSEWHERE:
        return f"{dotted} is not a field; write {ELSEWHERE[name]}"
    if name in NOT_NEEDED:
        return f"{dotted} is not needed: {NOT_NEEDED[name]}"
    near = difflib.get_close_matches(name, fields, 1, 0.6)
    if near:
        return f"{dotted} is not a field; did you mean {'.'.join([*outer, near[0]])}?"
    return f"{dotted} is not a field; {section or 'a recipe'} has {', '.join(fields)}"


def _description(dotted: str) -> str:
    *outer, name = dotted.split(".")
    section: type[BaseModel] = SECTIONS[".".join(outer)]
    return str(section.model_fields[name].description)


def _show(value: object) -> str:
    text = repr(value) if isinstance(value, str) else shown(value)
    return text if len(text) <= 60 else text[:57] + "..."


def unusual(recipe: Recipe) -> tuple[str, ...]:
    """Values outside the ranges that usually serve, and values that others leave unread. They are allowed."""
    lora, said = recipe.lora, []
    if not 8 <= lora.r <= 64:
        said.append(f"lora.r {lora.r} is outside the usual 8 to 64")
    if lora.lora_alpha != 2 * lora.r and not lora.use_rslora:
        said.append(f"lora.lora_alpha {lora.lora_alpha:g} is not the usual 2 x r = {2 * lora.r}")
    if not 0.05 <= lora.lora_dropout <= 0.1:
        said.append(f"lora.lora_dropout {lora.lora_dropout:g} is outside the usual 0.05 to 0.1")
    train = recipe.train
    unread = {
        "num_train_epochs": train.max_steps > 0 and f"max_steps {train.max_steps}",
        "warmup_steps": train.lr_scheduler_type == "constant" and "lr_scheduler_type constant",
        "save_steps": train.save_strategy != "steps" and f"save_strategy {train.save_strategy}",
        "run_name": train.report_to == "none" and "report_to none",
        "eval_steps": recipe.data.eval is None and "no data.eval",
        **dict.fromkeys(
            ("adam_beta1", "adam_beta2", "adam_epsilon"), "adamw" not in train.optim and f"optim {train.optim}"
        ),
    }
    for name, beside in unread.items():
        if beside and getattr(train, name) != TRAIN_FIELDS[name].default:
            said.append(f"train.{name} is not read with {beside}")
    return tuple(said)
