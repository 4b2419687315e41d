"""The metrics of written answers: each gives a row's score from the expected text and the answer.

A new one is a function and a line: the function in `BUILDERS`, the line in `recipe.evaluation.METRICS`. Everything else
(recipe, `halfbyte eval -m`, intervals, sheet, pages) goes by these two tables.
Why: which one fits depends on the task: a label, a calculation, a form.
Source: normalising as in SQuAD's evaluation script (lower case, no punctuation, no articles, single spaces); the number
after `####` is GSM8K's convention.
"""

import json
import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from halfbyte.data.reading.problems import shorten
from halfbyte.errors import DataError, RecipeError
from halfbyte.recipe.evaluation import METRICS, Eval

Scores = dict[str, float | None]
"""A row's scores by name; None where the row has nothing to compare with."""
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]")
_MAX_FIELDS = 24  # up to so many, each JSON field has a score of its own
_MAX_CHOICES = 64  # answers that are taken from the rows


@dataclass(frozen=True)
class Metric:
    name: str
    score: Callable[[str, str], Scores]  # (expected, answer) -> its scores of a row
    parts: tuple[str, ...] = ()  # names of what else `score` gives
    yes_no: bool = True  # its values are 0 and 1, so that an exact test can be made

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.parts)


def of(settings: Eval, names: Sequence[str], expected: Sequence[str]) -> list[Metric]:
    """Metrics by their names, of what stands behind the thoughts, for rows with these expected answers; `choice`, which
    needs a model, is only checked. Raises DataError: a metric that has nothing to compare with in any of the rows.
    RecipeError: its setting is missing."""
    if names and not expected:
        raise DataError(
            f"no row asks for an answer (they are plain text), so there is no {names[0]}.",
            fix="score the loss alone: --metric loss",
        )
    if "choice" in names:
        choices(settings, expected)
    spoken = [without_thoughts(text) for text in expected]
    return [_of_spoken(BUILDERS[name](settings, spoken)) for name in names if name in BUILDERS]


def _of_spoken(metric: Metric) -> Metric:
    return replace(metric, score=lambda e, text: metric.score(without_thoughts(e), without_thoughts(text)))


def check(settings: Eval, names: Sequence[str]) -> None:
    """Raise a RecipeError for an unknown metric, or one whose setting is missing; needs no rows."""
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise RecipeError(f"there is no metric {unknown[0]}; known: loss, perplexity, {', '.join(METRICS)}.")
    if "regex" in names and not settings.pattern:
        raise RecipeError(
            "the metric regex needs a pattern (eval.pattern), and there is none.",
            fix=r"--set 'eval.pattern=answer is (\d+)'",
        )


def choices(settings: Eval, expected: Sequence[str]) -> tuple[str, ...]:
    """The choices of every row: those of the recipe, or else the answers that the rows expect. Raises DataError: an
    expected answer that is not among them, or as many answers as rows."""
    if settings.choices is None:
        answers = tuple(dict.fromkeys(expected))
        if not 1 < len(answers) <= min(_MAX_CHOICES, max(2, len(expected) // 2)):
            raise DataError(
                f"the metric choice needs choices, and there are none: {len(expected):,} rows expect {len(answers):,} "
                "different answers.",
                fix="--set 'eval.choices=[good, bad]'",
            )
        return answers
    strange = next((answer for answer in expected if answer not in settings.choices), None)
    if strange is not None:
        raise DataError(
            f"the metric choice: the expected answer {strange!r} is not among eval.choices "
            f"({', '.join(settings.choices)})."
        )
    return settings.choices


# ------------------------------------------------------------------ one answer
def without_thoughts(text: str) -> str:
    """What follows `</think>`; nothing where an answer ends in the middle of its thoughts."""
    _, mark, answer = text.rpartition("</think>")
    return answer.strip() if mark else "" if text.lstrip().startswith("<think>") else text


def exact(expected: str, text: str) -> bool:
    return expected.strip() == text.strip()


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and repeated white space."""
    plain = _PUNCTUATION.sub("", unicodedata.normalize("NFKC", text).lower())
    return " ".join(word for word in plain.split() if word not in ("a", "an", "the"))


def number_after(mark: str, text: str) -> Decimal | None:
    """The first number behind the mark; thousands may be parted by commas."""
    _, separator, rest = text.partition(mark)
    number = _NUMBER.search(rest) if separator else None
    return Decimal(number[0].replace(",", "")) if number else None


def first_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The first match's first group, or all of it where the pattern has no group."""
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
Builder = Callable[[Eval, Sequence[str]], Metric]
"""From the recipe's settings and the expected answers of all rows to the metric."""


def of_answer(name: str, score: Callable[[str, str], float], *, yes_no: bool = True) -> Builder:
    """A metric that has no settings: `score` of (expected, answer) is a row's value."""
    return lambda settings, expected: Metric(name, lambda e, text: {name: float(score(e, text))}, yes_no=yes_no)


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
    return _extracted("regex", lambda text: first_match(pattern, text), expected, nothing, fix)


def _extracted(name: str, extract: Callable[[str], object], expected: Sequence[str], nothing: str, fix: str) -> Metric:
    """Whether the same is extracted from an answer as from the expected one; rows without it are left out. Raises
    DataError: nothing is extracted from any expected answer; `nothing` says so."""

    def score(right: str, text: str) -> Scores:
        value = extract(right)
        return {name: None if value is None else float(extract(text) == value)}

    if all(extract(e) is None for e in expected):
        raise DataError(f"the metric {name}: {nothing}; the first one: {shorten(expected[0], 80)!r}.", fix=fix)
    return Metric(name, score)


def _json_fields(settings: Eval, expected: Sequence[str]) -> Metric:
    objects = [value for ok, value in map(as_json, expected) if ok and isinstance(value, dict)]
    if not objects:
        raise DataError(
            f"the metric json_fields: not one of the {len(expected):,} expected answers is a JSON object; the first "
            f"one: {shorten(expected[0], 80)!r}.",
            fix="another metric: --metric exact_match",
        )
    known = list(dict.fromkeys(key for value in objects for key in value))
    names = settings.json_fields or tuple(known)
    if missing := [name for name in names if name not in known]:
        raise DataError(
            f"the metric json_fields: no expected answer has the field {missing[0]!r} (eval.json_fields); there are "
            f"{', '.join(known)}."
        )
    parts = tuple(f"json_fields.{name}" for name in names) if len(names) <= _MAX_FIELDS else ()

    def score(right: str, text: str) -> Scores:
        _, value = as_json(right)
        _, given = as_json(text)
        if not isinstance(value, dict):
            return {"json_fields": None, **dict.fromkeys(parts)}
        fields = given if isinstance(given, dict) else {}
        each = {n: float(n in fields and same(fields[n], value[n])) for n in names if n in value}
        by_field = {f"json_fields.{name}": each.get(name) for name in names} if parts else {}
        return {"json_fields": sum(each.values()) / len(each) if each else None, **by_field}

    return Metric("json_fields", score, parts, yes_no=False)


BUILDERS: dict[str, Builder] = {
    "exact_match": of_answer("exact_match", exact),
    "normalized_match": of_answer("normalized_match", lambda e, text: normalized(e) == normalized(text)),
    "number": _number,
    "regex": _regex,
    "json_valid": of_answer("json_valid", lambda e, text: as_json(text)[0]),
    "json_fields": _json_fields,
}
