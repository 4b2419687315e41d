"""What is wrong with rows, in words: one bad row, or a list that shows the first ones and counts the rest.

Why: a row that cannot be used is named with its file, line and field, but a million of them must not print a million
lines.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

SHOWN_PROBLEMS, SHOWN_ALIKE = 20, 3
_KINDS = {dict: "an object", list: "a list", bool: "true or false", type(None): "null"}


class BadRow(Exception):
    """What is wrong with one row: field, what was needed, what was found. Collected, never shown alone."""


@dataclass
class Problems:
    """The first `SHOWN_PROBLEMS` texts, and how many there were."""

    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.update(Problems(1, [text]))

    def update(self, later: Self) -> None:
        self.shown += later.shown[: SHOWN_PROBLEMS - len(self.shown)]
        self.count += later.count

    def __bool__(self) -> bool:
        return self.count > 0

    def listing(self, head: str) -> str:
        """A heading, and the problems under it: the first 20 in full, the rest counted. What is wrong with many rows
        alike is said once."""
        rest, alike = self.count - len(self.shown), dict[str, list[str]]()
        for text in self.shown:
            where, colon, why = text.partition(": ")
            alike.setdefault(why if colon else "", []).append(where)
        lines = list[str]()
        for text in self.shown:
            where, _, why = text.partition(": ")
            if len(rows := alike.get(why, [])) <= SHOWN_ALIKE:
                lines.append(text)
            elif where == rows[0]:
                lines.append(f"{some(rows, len(rows))}: {why}")
        return "\n  - ".join([head, *lines]) + (f"\n  ... and {rest:,} more" if rest else "")

    def first(self) -> str:
        """The first few in one line: `a, b, c and 9 more`."""
        return some(self.shown, self.count)


def some(names: Sequence[str], count: int) -> str:
    """The first three of `count` names in one line, the rest counted."""
    return ", ".join(names[:3]) + (f" and {count - 3:,} more" if count > 3 else "")


def value_of(record: Mapping[str, object], key: str, inside: str = "") -> object:
    """What a record has under a key. `inside`: the field that holds the record."""
    if key not in record:
        raise BadRow(f"{inside}{key}: missing; the row has {keys(record)}{near(key, record)}")
    return record[key]


def text_in(record: Mapping[str, object], key: str, inside: str = "") -> str:
    return text_of(value_of(record, key, inside), f"{inside}{key}")


def text_of(value: object, field: str, *, empty: bool = False) -> str:
    """A string that is text, and not blank unless `empty`."""
    if not isinstance(value, str):
        raise BadRow(f"{field}: a string is needed, got {kind(value)}")
    if not empty and not value.strip():
        raise BadRow(f"{field}: empty" if not value else f"{field}: only white space")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{field}: half a surrogate pair ({value[error.start]!a}) is not text") from None
    return value


def kind(value: object) -> str:
    if isinstance(value, list | dict | bool | None):
        return _KINDS[type(value)]
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the string {shorten(value)!r}"
    return f"{type(value).__name__} {shorten(str(value))}"


def keys(record: Mapping[str, object]) -> str:
    if not record:
        return "no keys"
    shown = ", ".join(repr(shorten(str(k), 40)) for k in list(record)[:8])
    return shown if len(record) <= 8 else f"{shown} and {len(record) - 8} more"


def near(word: str, known: Collection[str]) -> str:
    folded = {k.casefold(): k for k in known}
    match = difflib.get_close_matches(word.casefold(), folded, n=1)
    return f"; did you mean {folded[match[0]]!r}?" if match else ""


def shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
