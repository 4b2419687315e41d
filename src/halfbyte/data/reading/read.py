"""Rows, one after another, out of everything that a recipe names; and every row that cannot be used, named.

Why: nothing is dropped here. Rows that were read are the rows that are used and the rows that are reported, and a bad
one does not hide the others: all are collected before an error is raised.
What: records come in chunks, of which each can be understood without the others, by another process too.
Source: `files` finds, `records` reads, `formats` understands.
Cost: one pass; one chunk in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.data.reading import records
from halfbyte.data.reading.files import Source, find
from halfbyte.data.reading.formats import Format, Row, detect_format, parser
from halfbyte.data.reading.problems import BadRow, Problems
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from halfbyte.recipe.data import Data

CHUNK_ROWS = 1024  # enough for a tokenizer to be fast, few enough to stay small
CHUNK_BYTES = 4_000_000  # large rows come in smaller chunks


@dataclass(frozen=True)
class Chunk:
    """Neighbouring records of one source, not yet understood."""

    source: Source
    records: list[tuple[int, records.Unparsed]]
    format: Format | None
    """None as long as no record was good, so that the format is not known."""
    keys: tuple[str, ...] = ()
    """Of the source's first good record."""


@dataclass
class Understood:
    """What a chunk holds: `len(rows) + problems.count` is the number of its records."""

    rows: list[Row] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)


class Reader:
    """The good rows of all sources, or chunks of records; what was seen is in its attributes afterwards.

    Attributes:
        rows: records seen, good and bad.
        used: good ones.
        problems: the bad ones; `rows == used + problems.count`.
        formats: of each source: the format, and why it was taken for that.
    """

    def __init__(self, sources: Sequence[Source], data: Data) -> None:
        self.sources = list(sources)
        self._data = data
        self.rows = self.used = 0
        self.problems = Problems()
        self.formats: dict[str, tuple[Format, str]] = {}

    def __iter__(self) -> Iterator[Row]:
        for chunk in self.chunks():
            found = understand(chunk, self._data)
            self.saw(len(found.rows), found.problems)
            yield from found.rows

    def chunks(self) -> Iterator[Chunk]:
        """Records in chunks. Whoever understands one says with `saw` what was in it.

        Raises:
            DataError: a source without rows, that cannot be read, or whose format cannot be told.
        """
        for source in self.sources:
            before = self.rows
            known: tuple[Format, tuple[str, ...]] | None = None
            for group in _groups(records.unparsed(source)):
                self.rows += len(group)
                known = known or self._known(source, group)
                yield Chunk(source, group, *(known or (None,)))
            if self.rows == before:
                raise records.no_rows(source)

    def saw(self, used: int, problems: Problems) -> None:
        self.used += used
        self.problems.merge(problems)

    def check(self) -> None:
        """
        Raises:
            DataError: rows that cannot be used: all of them, the first 20 in full.
        """
        if self.problems:
            raise DataError(self.problems.listing(f"{self.problems.count:,} of {self.rows:,} rows cannot be used"))

    def _known(self, source: Source, group: list[tuple[int, records.Unparsed]]) -> Any:
        """The format and the keys of the first good record, if there is one."""
        for number, found in group:
            record = records.parsed(found)
            if not isinstance(record, BadRow):
                self.formats[source.label] = detect_format(record, self._data, full_name(source, number))
                return self.formats[source.label][0], tuple(record)
        return None


def understand(chunk: Chunk, data: Data) -> Understood:
    """The rows of a chunk, and what is wrong with those that cannot be used."""
    made = Understood()
    parse = parser(chunk.format, data, chunk.keys) if chunk.format is not None else None
    for number, found in chunk.records:
        record = records.parsed(found)
        try:
            if isinstance(record, BadRow):
                raise record
            if parse is None:
                raise ValueError("a good record tells the format")
            made.rows.append(parse(chunk.source.where(number), record))
        except BadRow as bad:
            made.problems.add(f"{full_name(chunk.source, number)}: {bad}")
    return made


def full_name(source: Source, number: int) -> str:
    return f"{source.path.parent / source.where(number)}"


def read_rows(names: Path | str | Sequence[str], data: Data) -> list[Row]:
    """Every row of what `data.train` or `data.eval` names, in memory.

    Columns that the format does not name are free to be there.

    Raises:
        DataError: no such file, a folder, no rows, a format that cannot be told, or bad rows: all of them, the first
            20 in full.
    """
    reader = Reader(find(names), data)
    rows = list(reader)
    reader.check()
    return rows


def _groups(found: Iterable[tuple[int, records.Unparsed]]) -> Iterator[list[tuple[int, records.Unparsed]]]:
    group: list[tuple[int, records.Unparsed]] = []
    nbytes = 0
    for item in found:
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
