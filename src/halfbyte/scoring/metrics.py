"""The metrics of written answers: each gives a row's score from the expected text and the answer.

Why: which one fits depends on the task: a label, a calculation, a form.
Source: normalising as in SQuAD's evaluation script (lower case, no punctuation, no articles, single spaces); the number
after `####` is GSM8K's convention.
"""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from halfbyte.errors import DataError, RecipeError
from halfbyte.recipe.evaluation import METRICS, Eval

Scores = dict[str, float | None]
"""Of one row by name; None where the row has nothing to compare with."""
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
_MOST_FIELDS = 24  # of which each gets a line of its own


@dataclass(frozen=True)
class Metric:
    """A metric as a recipe asks for it.

    Args:
        score: (expected, answer) -> its scores of a row.
        parts: names of what else `score` gives.
        yes_no: its values are 0 and 1, so that an exact test can be made.
    """

    name: str
    score: Callable[[str, str], Scores]
    parts: tuple[str, ...] = ()
    yes_no: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.parts)


def of(settings: Eval, names: Sequence[str], expected: Sequence[str]) -> list[Metric]:
    """Metrics by their names, for rows with these expected answers; `choice`, which needs a model, is left out.

    Raises:
        DataError: a metric that has nothing to compare with in any of the rows. RecipeError: its setting is missing.
    """
    if names and not expected:
        raise DataError(
            f"no row asks for an answer (they are plain text), so there is no {names[0]}.",
            fix="score the loss alone: --metric loss",
        )
    return [_BUILDERS[name](settings, expected) for name in names if name in _BUILDERS]


def check(settings: Eval, names: Sequence[str]) -> None:
    """What can be told without rows: names, and settings that a metric needs. Raises RecipeError."""
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise RecipeError(f"there is no metric {unknown[0]}; known: loss, perplexity, {', '.join(METRICS)}.")
    if "regex" in names and not settings.pattern:
        raise RecipeError(
            "the metric regex needs a pattern (eval.pattern), and there is none.",
            fix=r"--set 'eval.pattern=answer is (\d+)'",
        )


# ------------------------------------------------------------------ one answer
def exact(expected: str, text: str) -> bool:
    return expected.strip() == text.strip()


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and repeated white space."""
    plain = _PUNCTUATION.sub("", unicodedata.normalize("NFKC", text).lower())
    return " ".join(word for word in plain.split() if word not in ("a", "an", "the"))


def number_after(mark: str, text: str) -> Decimal | None:
    """The first number behind the mark; thousands may be parted by commas."""
    _, found, rest = text.partition(mark)
    number = _NUMBER.search(rest) if found else None
    try:
        return Decimal(number[0].replace(",", "")) if number else None
    except InvalidOperation:  # pragma: no cover  the expression lets nothing else through
        return None


def found_by(pattern: re.Pattern[str], text: str) -> str | None:
    """What the first match says: its first group, or all of it."""
    match = pattern.search(text)
    if match is None:
        return None
    return (match[1] or "" if pattern.groups else match[0]).strip()


def as_json(text: str) -> tuple[bool, object]:
    """Whether it is JSON (without NaN and infinities), and its value."""
    try:
        return True, json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False, None


def _refuse(name: str) -> None:
    raise ValueError(name)


def same(a: object, b: object) -> bool:
    """Whether two JSON values are the same: true is not 1, and 1 is 1.0."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# -------------------------------------------------------------------- builders
def _exact(settings: Eval, expected: Sequence[str]) -> Metric:
    return Metric("exact_match", lambda e, text: {"exact_match": float(exact(e, text))})


def _normalized(settings: Eval, expected: Sequence[str]) -> Metric:
    return Metric("normalized_match", lambda e, text: {"normalized_match": float(normalized(e) == normalized(text))})


def _number(settings: Eval, expected: Sequence[str]) -> Metric:
    mark = settings.mark
    nothing = f"not one of the {len(expected):,} expected answers has a number after the mark {mark!r}"
    fix = "say what stands before the number: --set 'eval.mark=Answer:'"
    return _extracted("number", lambda text: number_after(mark, text), expected, nothing, fix)


def _regex(settings: Eval, expected: Sequence[str]) -> Metric:
    check(settings, ["regex"])
    pattern = re.compile(settings.pattern or "")
    nothing = f"eval.pattern {settings.pattern!r} matches not one of the {len(expected):,} expected answers"
    fix = r"a pattern that does: --set 'eval.pattern=answer is (\d+)'"
    return _extracted("regex", lambda text: found_by(pattern, text), expected, nothing, fix)


def _extracted(name: str, what: Callable[[str], object], expected: Sequence[str], nothing: str, fix: str) -> Metric:
    """Whether an answer has the same of something as the expected one; rows that expect none are left out. DataError,
    saying `nothing`, where no row does."""

    def score(wanted: str, text: str) -> Scores:
        value = what(wanted)
        return {name: None if value is None else float(what(text) == value)}

    if all(what(e) is None for e in expected):
        raise DataError(f"the metric {name}: {nothing}; the first one: {_short(expected[0])}.", fix=fix)
    return Metric(name, score)


def _valid(settings: Eval, expected: Sequence[str]) -> Metric:
    return Metric("json_valid", lambda e, text: {"json_valid": float(as_json(text)[0])})


def _fields(settings: Eval, expected: Sequence[str]) -> Metric:
    objects = [value for ok, value in map(as_json, expected) if ok and isinstance(value, dict)]
    if not objects:
        raise DataError(
            f"the metric json_fields: not one of the {len(expected):,} expected answers is a JSON object; the first "
            f"one: {_short(expected[0])}.",
            fix="another metric: --metric exact_match",
        )
    known = list(dict.fromkeys(key for value in objects for key in value))
    wanted = settings.json_fields or tuple(known)
    if missing := [name for name in wanted if name not in known]:
        raise DataError(
            f"the metric json_fields: no expected answer has the field {missing[0]!r} (eval.json_fields); there are "
            f"{', '.join(known)}.",
        )
    parts = tuple(f"json_fields.{name}" for name in wanted) if len(wanted) <= _MOST_FIELDS else ()

    def score(right: str, text: str) -> Scores:
        _, value = as_json(right)
        _, given = as_json(text)
        if not isinstance(value, dict):
            return {"json_fields": None, **dict.fromkeys(parts)}
        found = given if isinstance(given, dict) else {}
        each = {n: float(n in found and same(found[n], value[n])) for n in wanted if n in value}
        own = {f"json_fields.{name}": each.get(name) for name in wanted} if parts else {}
        return {"json_fields": sum(each.values()) / len(each) if each else None, **own}

    return Metric("json_fields", score, parts, yes_no=False)


_BUILDERS: dict[str, Callable[[Eval, Sequence[str]], Metric]] = {
    "exact_match": _exact,
    "normalized_match": _normalized,
    "number": _number,
    "regex": _regex,
    "json_valid": _valid,
    "json_fields": _fields,
}


def _short(text: str, most: int = 80) -> str:
    return repr(text if len(text) <= most else f"{text[: most - 3]}...")
