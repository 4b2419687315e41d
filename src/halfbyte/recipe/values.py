"""Kinds of values that a recipe's fields take, each with its refusal in words of ours. No torch; pydantic."""

import importlib.util
import os
import re
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer

from halfbyte.recipe import fields
from halfbyte.recipe.data import Int, Whole, false_is, is_list_of_names, is_name_or_list, must
from halfbyte.system.words import seconds_of


def regex(value: object) -> object:
    """A text among names of modules is a regular expression over full names."""
    if isinstance(value, str):
        if re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", value):
            raise ValueError(f"must be a list: write [{value}]")
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"must be a list of names or a regular expression ({error})") from None
    return value


def is_path(model: str) -> bool:
    return os.path.exists(os.path.expanduser(model))  # False, not an error, for a name that no path can have


def is_span(value: object) -> bool:
    return isinstance(value, str) and seconds_of(value) is not None


def init(value: object) -> object:
    if isinstance(value, str):
        reason = next((why for name, why in fields.INIT_REFUSED.items() if value.lower().startswith(name)), None)
        if reason is not None:
            raise ValueError(f"cannot be {value!r}: {reason}")
    if not isinstance(value, bool) and value not in fields.INIT_NAMES:
        raise ValueError(f"must be true, false, {', '.join(fields.INIT_NAMES[:-1])} or {fields.INIT_NAMES[-1]}")
    return value


def one_of(
    allowed: Collection[str] | Callable[[], Collection[str]], refused: Mapping[str, str] = MappingProxyType({}),
    ends: Collection[str] = (),
) -> BeforeValidator:  # fmt: skip
    """One of a few words, which a function may give when it is asked; a word that is refused says why. `ends`: of these
    also NAME_word."""

    def check(value: object) -> object:
        words = allowed() if callable(allowed) else allowed
        if isinstance(value, str) and value in refused:
            raise ValueError(f"cannot be {value!r}: {refused[value]}")
        if not isinstance(value, str) or not (value in words or value.endswith(tuple(f"_{end}" for end in ends))):
            raise ValueError(f"must be one of {', '.join(words)}")
        return value

    return BeforeValidator(check)


def integrations(value: object) -> object:
    """`none`, `all`, or names of integrations whose library is here."""
    if value is None or value in ("none", "all", [], ["none"], (), ("none",)):
        return value if value == "all" else "none"
    names = (value,) if isinstance(value, str) else value
    if not is_list_of_names(names) or not set(names) <= set(fields.INTEGRATIONS):
        raise ValueError(f"must be none, all, or a list of {', '.join(sorted(fields.INTEGRATIONS))}")
    for name in names:
        if not any(importlib.util.find_spec(module) for module in fields.INTEGRATIONS[name]):
            raise ValueError(f"names {name}, which is not installed: pip install {fields.INTEGRATIONS[name][0]}")
    return tuple(names)


def settings(value: object) -> object:
    """Named numbers and words. YAML 1.1 reads 1e-5, without a point, as text."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError("must be a mapping of names to values, such as {num_cycles: 2}")
    return {key: _read_number(inner) if isinstance(inner, str) else inner for key, inner in value.items()}


def _read_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def assigns(value: object) -> object:
    return isinstance(value, str) and re.fullmatch(r"\s*\w+\s*=[^,=]+(,\s*\w+\s*=[^,=]+)*", value)


def _whole_or_share(value: float) -> float:
    """Steps, or below 1 a share of all steps, as TrainingArguments reads them."""
    if value < 1:
        return value
    if value != int(value):
        raise ValueError("must be a whole number of steps, or a share of all steps below 1")
    return int(value)


Float = Annotated[float, must("a number", lambda v: not isinstance(v, bool))]
Bool = Annotated[bool, Field(strict=True)]
Count = Annotated[Int, Field(ge=1)]
Index = Annotated[Int, Field(ge=0)]
Seed = Annotated[Whole, Field(ge=0, lt=2**32)]
Steps = Annotated[Float, AfterValidator(_whole_or_share), PlainSerializer(lambda v: v, int | float)]  # 2, not 2.0
OffIsNo = false_is("no")
_LIKE = "list of names, such as [q_proj, v_proj]"
Names = Annotated[tuple[str, ...], must(f"a {_LIKE}", lambda v: v == () or is_list_of_names(v))]
NamesOrNone = Annotated[Names, BeforeValidator(lambda v: () if v in (None, []) else v)]
NamesOrText = Annotated[str | tuple[str, ...], must(f"a name, a regular expression or a {_LIKE}", is_name_or_list)]
Modules = Annotated[NamesOrText, AfterValidator(regex)]
_NONE_OR_TEXT = must(f"a name, a regular expression or a {_LIKE}", lambda v: v in ((), []) or is_name_or_list(v))
ModulesOrNone = Annotated[str | tuple[str, ...], _NONE_OR_TEXT, AfterValidator(regex)]
