"""Every row of what a recipe names, one after another, and every row that cannot be used, by its name.

Why: no row is dropped in silence, and a bad row does not hide the next one: all are collected before one error
is raised.
What: records come in chunks. A chunk can be understood without the others, also by another process.
Source: `files` finds, `records` reads, `formats` understands.
Cost: one pass; one chunk in memory at a time.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from halfbyte.data.reading import records
from halfbyte.data.reading.files import RowSource, find
from halfbyte.data.reading.formats import Format, Row, detect_format, parser
from halfbyte.data.reading.formats import unread as unread_columns
from halfbyte.data.reading.problems import BadRow, Problems, shorten
from halfbyte.errors import DataError
from halfbyte.recipe.data import Data

CHUNK_ROWS = 1024  # enough for a tokenizer to be fast, few enough to stay small
CHUNK_BYTES = 4_000_000  # large rows come in smaller chunks

Group = list[tuple[int, records.Record]]
Known = tuple[Format, tuple[str, ...]]


@dataclass(frozen=True)
class Chunk:
    """Neighbouring records of one source, not yet understood."""

    source: RowSource
    records: Group
    known: Known | None
    """The format and the keys of the source's first good record; None before it."""


def look(names: str | Path | Sequence[str], data: Data) -> None:
    """Look at the first rows of each file, before anything slower is begun; a hub dataset and a pipe are left alone.

    Raises:
        DataError: names that stand for nothing, a file without rows; if one of the first rows is bad, all that are.
    """
    sources = [source for source in find(names) if source.kind != "hub" and source.path.is_file()]
    for source in sources:
        reader = Reader([source], data)
        if understand(next(reader.chunks()), data)[1]:
            everything = Reader(sources, data)
            for _ in everything:
                pass
            everything.check()


def unread(names: str | Path | Sequence[str], data: Data) -> list[str]:
    """Of each file, in words: its format, and the columns that nothing is read from; told from its first rows."""
    notes = []
    for source in find(names):
        if source.kind != "hub" and source.path.is_file():
            known = next(Reader([source], data).chunks()).known
            if known is not None and (columns := unread_columns(known[0], data, known[1])):
                listed = ", ".join(shorten(column) for column in columns)
                notes.append(f"{source.path.name} is read as {known[0]}; not read of it: {listed}")
    return notes


def columns(names: str | Path | Sequence[str]) -> tuple[str, ...]:
    """The keys of the first record that can be read; none where there is none, or only a hub dataset."""
    for source in find(names):
        for _, raw in islice(records.records(source), CHUNK_ROWS) if source.kind != "hub" else ():
            with contextlib.suppress(BadRow):
                return tuple(records.parse(raw))
    return ()


class Reader:
    """The good rows of all sources, or chunks of records. Counts `rows` seen, good and bad; the bad are `problems`."""

    def __init__(self, sources: Sequence[RowSource], data: Data) -> None:
        self._sources, self._data = sources, data
        self.rows = 0
        self.problems = Problems()

    def __iter__(self) -> Iterator[Row]:
        for chunk in self.chunks():
            rows, problems = understand(chunk, self._data)
            self.problems.update(problems)
            yield from rows

    def chunks(self) -> Iterator[Chunk]:
        """Records in chunks. The caller understands each one, and adds what is wrong with it to `problems`.

        Raises:
            DataError: a source without rows, that cannot be read, or whose format cannot be told.
        """
        for source in self._sources:
            before = self.rows
            known: Known | None = None
            for group in _groups(records.records(source)):
                self.rows += len(group)
                known = known or self._known(source, group)
                yield Chunk(source, group, known)
            if self.rows == before:
                fix = 'write one JSON object a line: {"prompt": "...", "completion": "..."}'
                raise DataError(f"{source.path} has no rows.", fix=fix)

    def check(self) -> None:
        """Raise a DataError that names the rows that cannot be used, the first 20 in full."""
        if self.problems:
            raise DataError(self.problems.listing(f"{self.problems.count:,} of {self.rows:,} rows cannot be used"))

    def _known(self, source: RowSource, group: Group) -> Known | None:
        for number, raw in group:
            with contextlib.suppress(BadRow):
                record = records.parse(raw)
                return detect_format(record, self._data, _full_name(source, number)), tuple(record)
        return None


def understand(chunk: Chunk, data: Data) -> tuple[list[Row], Problems]:
    """The rows of a chunk, and what is wrong with the records that are none."""
    rows, problems = list[Row](), Problems()
    parse = parser(chunk.known[0], data, chunk.known[1]) if chunk.known else None
    for number, raw in chunk.records:
        try:
            record = records.parse(raw)
            if parse is not None:  # a good record tells the format
                rows.append(parse(chunk.source.where(number), record))
        except BadRow as bad:
            problems.add(f"{_full_name(chunk.source, number)}: {bad}")
    return rows, problems


def _full_name(source: RowSource, number: int) -> str:
    return f"{source.path.parent / source.where(number)}"


def _groups(numbered: Iterable[tuple[int, records.Record]]) -> Iterator[Group]:
    group: Group = []
    nbytes = 0
    for item in numbered:
        group.append(item)
        nbytes += _nbytes(item[1])
        if len(group) == CHUNK_ROWS or nbytes >= CHUNK_BYTES:
            yield group
            group, nbytes = [], 0
    if group:
        yield group


def _nbytes(value: object) -> int:
    """About how much text a value holds."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_nbytes, value.values()))
    return sum(map(_nbytes, value)) if isinstance(value, list) else 8
