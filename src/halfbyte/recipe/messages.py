"""What to tell the writer of a recipe: errors as plain sentences, the nearest name for an unknown one, warnings.

Why: pydantic says "Input should be greater than or equal to 1" of a place in its own tree of unions; a person wants the
line, the field, what was found and what is allowed.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from halfbyte.recipe.fields import ELSEWHERE, LORA_REFUSED, MUST_BE, NOT_NEEDED, TRAIN_REFUSED, shown
from halfbyte.recipe.schema import SECTIONS, Lora, Origin, Recipe, Train
from halfbyte.upstream import peft, transformers

Problem: TypeAlias = Mapping[str, Any]
"""One error as pydantic lists it: type, loc, msg, input, ctx."""
_REFUSED = {"lora": LORA_REFUSED, "train": TRAIN_REFUSED}
# Section -> the fields that the installed library has under the names of the section.
_UPSTREAM = {"lora": peft.lora_fields, "train": transformers.training_fields, "quant": transformers.quantization_fields}


def first_of_each(items: Sequence[Problem]) -> list[Problem]:
    """One problem a field: a union of types reports the same value once for each of them."""
    by_field: dict[tuple[str, str], Problem] = {}
    for item in items:
        by_field.setdefault((field_of(item), "" if item["loc"] else str(item.get("ctx"))), item)
    return [*by_field.values()]


def fields_in(sentence: str) -> list[str]:
    """The fields that a sentence about values that exclude each other names."""
    return re.findall(r"\b(?:model|revision|task|labels|(?:quant|lora|data|train|eval|vectors)\.\w+)\b", sentence)


def sentences(item: Problem, lines: Mapping[str, int], given: Mapping[str, Origin]) -> list[str]:
    """Pydantic's problem in our words, with line and field; contradictions are several."""
    if item["type"] == "together":
        return [
            next((f"line {lines[name]}: " for name in fields_in(text) if name in lines), "") + text
            for text in item["ctx"]["problems"]
        ]
    dotted = field_of(item)
    if item["type"] == "missing":
        outer, _, name = dotted.rpartition(".")
        return [f"{dotted} is required: {SECTIONS[outer].model_fields[name].description}"]
    was_set = any(o.kind == "set" and f"{name}.".startswith(f"{dotted}.") for name, o in given.items())
    lead = f"line {lines[dotted]}: " if dotted in lines else "--set " if was_set else ""
    return [f"{lead}{dotted}{_wrong(item)}"]


def _wrong(item: Problem) -> str:
    """What is wrong with the value of a field, and what is allowed."""
    kind, context = item["type"], item.get("ctx", {})
    value = item.get("input")
    text = repr(value) if isinstance(value, str) else shown(value)
    got = f", got {text if len(text) <= 60 else text[:57] + '...'}"
    if kind == "extra_forbidden":
        return _unknown([str(part) for part in item["loc"]])
    if kind == "value_error":
        return f" {context['error']}{got if str(context['error']).startswith('must') else ''}"
    if kind == "string_too_short":
        return " must not be empty"
    words = next((words for start, words in MUST_BE.items() if kind.startswith(start)), None)
    if words is None:
        return f": {item['msg']}{got}"
    return f" must be {words.format_map(context).replace(chr(39), '')}{got}"


def field_of(item: Problem) -> str:
    """The dotted field of a problem, without the names of union members and list positions behind it."""
    location = [str(part) for part in item["loc"]]
    for end in range(len(location), 0, -1):
        *outer, name = location[:end]
        section = SECTIONS.get(".".join(outer))
        if section is not None and (name in section.model_fields or end == len(location)):
            return ".".join(location[:end])
    return ".".join(location)


def _unknown(location: list[str]) -> str:
    """An unknown key: refused for a reason, or a typo with the nearest name."""
    *outer, name = location
    section = ".".join(outer)
    known = [*SECTIONS[section].model_fields] if section in SECTIONS else []
    refused_here = _REFUSED.get(section, {})
    elsewhere = [f"{other}.{name}".lstrip(".") for other, model in SECTIONS.items() if name in model.model_fields]
    if elsewhere and name not in refused_here:
        return f" is not a field; did you mean {elsewhere[0]}?"
    for refused in (refused_here, *_REFUSED.values()):
        if name in refused:
            return f" is not supported: {refused[name]}"
    if name in ELSEWHERE:
        return f" is not a field; write {ELSEWHERE[name]}"
    if name in NOT_NEEDED:
        return f" is not needed: {NOT_NEEDED[name]}"
    if name in _UPSTREAM.get(section, frozenset)():
        return " is not known to this version of halfbyte; pip install -U halfbyte, or leave it out"
    if near := difflib.get_close_matches(name, known, 1):
        return f" is not a field; did you mean {'.'.join([*outer, near[0]])}?"
    return f" is not a field; {section or 'a recipe'} has {', '.join(known)}"


def unusual(recipe: Recipe) -> tuple[str, ...]:
    """Values outside the ranges that usually serve, and values that others leave unread. They are allowed."""
    lora, warnings = recipe.lora, []
    if not 8 <= lora.r <= 64:
        warnings.append(f"lora.r {lora.r} is outside the usual 8 to 64")
    usual = (2 * lora.r, Lora.model_fields["lora_alpha"].default)  # a default that nobody chose is no news
    if lora.lora_alpha not in usual and not lora.use_rslora:
        warnings.append(f"lora.lora_alpha {lora.lora_alpha:g} is not the usual 2 x r = {usual[0]}")
    if lora.lora_dropout and not 0.05 <= lora.lora_dropout <= 0.1:
        warnings.append(f"lora.lora_dropout {lora.lora_dropout:g} is outside the usual 0.05 to 0.1")
    train = recipe.train
    rate = train.learning_rate
    if "adam" in train.optim and isinstance(rate, float) and not 1e-5 <= rate <= 3e-3:
        warnings.append(f"train.learning_rate {rate:g} is outside the usual 1e-05 to 0.003")
    unread = {
        "num_train_epochs": train.max_steps > 0 and f"max_steps {train.max_steps}",
        "warmup_steps": train.lr_scheduler_type == "constant" and "lr_scheduler_type constant",
        "save_steps": train.save_strategy != "steps" and f"save_strategy {train.save_strategy}",
        "run_name": train.report_to == "none" and "report_to none",
        "early_stopping_threshold": train.early_stopping_patience is None and "no early_stopping_patience",
        "eval_steps": recipe.data.eval == "none" and "data.eval none",
        **dict.fromkeys(
            ("adam_beta1", "adam_beta2", "adam_epsilon"), "adamw" not in train.optim and f"optim {train.optim}"
        ),
    }
    changed = [name for name in unread if getattr(train, name) != Train.model_fields[name].default]
    return (*warnings, *(f"train.{name} is not read with {unread[name]}" for name in changed if unread[name]))
