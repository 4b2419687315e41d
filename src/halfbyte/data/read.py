"""Read training rows from JSON lines, and name every row that cannot be used.

Why: a row that is silently dropped or half read is the quietest way to a bad adapter. So nothing is dropped here: each
bad row is an error with its file, line and field, and all of them are collected before one is raised.
Source: two shapes of row, `{"messages": [{"role", "content"}, ...]}` and one column each for prompt and completion.
Cost: one pass over the file; the texts stay in memory.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from halfbyte.errors import DataError

if TYPE_CHECKING:
    from halfbyte.recipe import Data

Format = Literal["messages", "prompt_completion"]

ROLES = ("system", "user", "assistant", "tool")
SHOWN_PROBLEMS = 20

_MESSAGE_KEYS = ("role", "content", "train")
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    train: bool = True
    """False on an assistant message: it is context, and never among the labels."""


@dataclass(frozen=True)
class Row:
    """One example as its file has it: either `messages`, or `prompt` and `completion`."""

    where: str
    """File name and line, `train.jsonl:12`."""
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None


class _BadRow(Exception):
    """What is wrong with one row; caught and collected in this module."""


def read_rows(path: Path | str, data: Data) -> list[Row]:
    """Every row of a JSON lines file.

    UTF-8, with or without a byte order mark; any line ending; blank lines are not rows. Columns that the format does
    not name are free to be there.

    Raises:
        DataError: no such file, a folder, no rows, a format that cannot be told, or bad rows: all of them, the first
            20 in full.
    """
    path = Path(path)
    lines = _lines(path)
    first = next(lines, None)
    if first is None:
        raise DataError(
            f"{path} has no rows.", fix='write one JSON object a line: {"prompt": "...", "completion": "..."}'
        )
    line, raw = first
    if raw.startswith(b"["):
        raise DataError(
            f"{path}:{line} opens a JSON list; one JSON object a line is needed.",
            fix=f"jq -c '.[]' {path} > {path.with_suffix('.jsonl').name}",
        )

    problems: list[str] = []
    rows: list[Row] = []
    parse: Callable[[str, dict[str, Any]], Row] | None = None
    count = 0
    for line, raw in _chain(first, lines):
        count += 1
        try:
            record = _record(raw)
            if parse is None:
                parse = _parser(detect_format(record, data, f"{path}:{line}")[0], data)
            rows.append(parse(f"{path.name}:{line}", record))
        except _BadRow as bad:
            problems.append(f"{path}:{line}: {bad}")
    if problems:
        raise DataError(listing(f"{len(problems):,} of {count:,} rows cannot be used", problems))
    return rows


def detect_format(record: Mapping[str, Any], data: Data, where: str = "the first row") -> tuple[Format, str]:
    """The format of a file and why, told from the recipe or else from the keys of one row.

    Raises:
        DataError: `data.format` is auto and the row has the columns of neither format.
    """
    if data.format != "auto":
        return data.format, "data.format in the recipe"
    columns = data.fields
    if columns.messages in record:
        return "messages", f"auto: {where} has the key {columns.messages!r}"
    if columns.prompt in record and columns.completion in record:
        return "prompt_completion", f"auto: {where} has the keys {columns.prompt!r} and {columns.completion!r}"
    raise DataError(
        f"{where}: cannot tell the format. Needed: the key {columns.messages!r}, or both {columns.prompt!r} and "
        f"{columns.completion!r}; got {_keys(record)}.",
        fix="name the columns, as in --set data.fields.prompt=question --set data.fields.completion=answer",
    )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, its bytes without the ending) of every line that is not blank."""
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.jsonl"))
        raise DataError(
            f"{path} is a folder; a .jsonl file is needed.",
            fix=f"data.train: {path / inside[0]}" if inside else None,
        )
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if number == 1:
                    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                        raise DataError(f"{path} is UTF-16; UTF-8 is needed.", fix=f"iconv -f UTF-16 -t UTF-8 {path}")
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                if raw := raw.strip(b" \t\r\n"):
                    yield number, raw
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        raise DataError(
            f"{path}: no such file.", fix=f"did you mean {path.parent / near[0]}?" if near else "check the path"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _names(folder: Path) -> list[str]:
    try:
        return [p.name for p in folder.iterdir()]
    except OSError:
        return []


def _chain(first: tuple[int, bytes], rest: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    yield first
    yield from rest


def _record(raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadRow(f"not UTF-8 (byte {raw[error.start]:#04x} at {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise _BadRow(f"not JSON ({error.msg} at character {error.colno}): {_shorten(raw.decode('utf-8'))}") from None
    except (ValueError, RecursionError) as error:
        raise _BadRow(f"not JSON that can be read ({error})") from None
    if not isinstance(record, dict):
        raise _BadRow(f"an object is needed, got {_kind(record)}")
    return record


def _parser(format: Format, data: Data) -> Callable[[str, dict[str, Any]], Row]:
    columns = data.fields
    if format == "messages":
        return lambda where, record: Row(where, messages=_messages(record, columns.messages))
    return lambda where, record: Row(
        where,
        prompt=_text(record, columns.prompt, columns.prompt),
        completion=_text(record, columns.completion, columns.completion),
    )


def _messages(record: dict[str, Any], column: str) -> tuple[Message, ...]:
    value = _value(record, column, column)
    if not isinstance(value, list):
        raise _BadRow(f"{column}: a list of messages is needed, got {_kind(value)}")
    messages = tuple(_message(item, f"{column}[{number}]") for number, item in enumerate(value))
    if not any(m.role == "assistant" for m in messages):
        raise _BadRow(f"{column}: no message has the role assistant, so there is nothing to learn from")
    if messages[-1].role != "assistant":
        raise _BadRow(
            f"{column}[{len(messages) - 1}].role: the last message must be of the assistant, got {messages[-1].role!r}"
        )
    return messages


def _message(item: object, field: str) -> Message:
    if not isinstance(item, dict):
        raise _BadRow(f"{field}: an object with role and content is needed, got {_kind(item)}")
    role = _text(item, "role", f"{field}.role")
    if role not in ROLES:
        raise _BadRow(f"{field}.role: one of {', '.join(ROLES)} is needed, got {_shorten(role)!r}{_near(role, ROLES)}")
    content = _text(item, "content", f"{field}.content")
    for key, value in item.items():
        if key not in _MESSAGE_KEYS and value is not None:
            raise _BadRow(f"{field}: {key!r} is not supported; allowed: {', '.join(_MESSAGE_KEYS)}")
    train = item.get("train")
    if train is None:
        return Message(role, content)
    if not isinstance(train, bool):
        raise _BadRow(f"{field}.train: true or false is needed, got {_kind(train)}")
    if train and role != "assistant":
        raise _BadRow(f"{field}.train: only an assistant message can be trained on, this one is {role}")
    return Message(role, content, train)


def _value(record: Mapping[str, Any], key: str, field: str) -> Any:
    if key not in record:
        raise _BadRow(f"{field}: missing; the row has {_keys(record)}{_near(key, record)}")
    return record[key]


def _text(record: Mapping[str, Any], key: str, field: str) -> str:
    value = _value(record, key, field)
    if not isinstance(value, str):
        raise _BadRow(f"{field}: a string is needed, got {_kind(value)}")
    if not value.strip():
        raise _BadRow(f"{field}: empty" if not value else f"{field}: only white space")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _BadRow(f"{field}: half a surrogate pair ({value[error.start]!a}) is not text") from None
    return value


def _kind(value: object) -> str:
    if isinstance(value, list | dict | bool | None):
        return _KINDS[type(value)]
    return f"the number {value}" if isinstance(value, int | float) else f"the string {_shorten(str(value))!r}"


def _keys(record: Mapping[str, Any]) -> str:
    if not record:
        return "no keys"
    shown = ", ".join(repr(_shorten(k, 40)) for k in list(record)[:8])
    return shown if len(record) <= 8 else f"{shown} and {len(record) - 8} more"


def _near(word: str, known: Collection[str]) -> str:
    folded = {k.casefold(): k for k in known}
    match = difflib.get_close_matches(word.casefold(), folded, n=1)
    return f"; did you mean {folded[match[0]]!r}?" if match else ""


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listing(head: str, problems: list[str]) -> str:
    """A heading, and the problems under it: the first 20 in full, the rest counted."""
    shown = "\n".join(f"  - {p}" for p in problems[:SHOWN_PROBLEMS])
    rest = len(problems) - SHOWN_PROBLEMS
    return f"{head}\n{shown}" + (f"\n  ... and {rest:,} more" if rest > 0 else "")
