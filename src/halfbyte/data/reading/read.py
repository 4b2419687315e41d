"""Every row of what a recipe names, one after another, and every row that cannot be used, by its name.

Why: no row is dropped in silence, and a bad row does not hide the next one: all are collected before one error
is raised.
What: records come in chunks. A chunk can be understood without the others, also by another process.
Source: `files` finds, `records` reads, `formats` understands.
Cost: one pass; one chunk in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from halfbyte.data.reading import records
from halfbyte.data.reading.files import RowSource
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

    source: RowSource
    records: list[tuple[int, records.Unparsed]]
    format: Format | None
    """None before the source's first good record, which tells the format."""
    keys: tuple[str, ...] = ()
    """The keys of the source's first good record."""


@dataclass
class Understood:
    """What a chunk holds: `len(rows) + problems.count` is the number of its records."""

    rows: list[Row] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)


class Reader:
    """The good rows of all sources, or chunks of records; the counts are in its attributes afterwards.

    Attributes:
        rows: records seen, good and bad.
        used: good ones.
        problems: the bad ones; `rows == used + problems.count`.
        formats: of each source: the format, and why it was taken for that.
    """

    def __init__(self, sources: Sequence[RowSource], data: Data) -> None:
        self.sources = list(sources)
        self._data = data
        self.rows = self.used = 0
        self.problems = Problems()
        self.formats: dict[str, tuple[Format, str]] = {}

    def __iter__(self) -> Iterator[Row]:
        for chunk in self.chunks():
            understood = understand(chunk, self._data)
            self.saw(len(understood.rows), understood.problems)
            yield from understood.rows

    def chunks(self) -> Iterator[Chunk]:
        """Records in chunks. The caller understands each one and reports with `saw` what was in it.

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

    def _known(
        self, source: RowSource, group: list[tuple[int, records.Unparsed]]
    ) -> tuple[Format, tuple[str, ...]] | None:
        """The format and the keys of the first good record, if there is one."""
        for number, raw in group:
            record = records.parsed(raw)
            if not isinstance(record, BadRow):
                self.formats[source.label] = detect_format(record, self._data, full_name(source, number))
                return self.formats[source.label][0], tuple(record)
        return None


def understand(chunk: Chunk, data: Data) -> Understood:
    """The rows of a chunk, and what is wrong with the records that are none."""
    understood = Understood()
    parse = parser(chunk.format, data, chunk.keys) if chunk.format is not None else None
    for number, raw in chunk.records:
        record = records.parsed(raw)
        try:
            if isinstance(record, BadRow):
                raise record
            if parse is None:
                raise ValueError("a good record tells the format")
            understood.rows.append(parse(chunk.source.where(number), record))
        except BadRow as bad:
            understood.problems.add(f"{full_name(chunk.source, number)}: {bad}")
    return understood


def full_name(source: RowSource, number: int) -> str:
    return f"{source.path.parent / source.where(number)}"


def _groups(numbered: Iterable[tuple[int, records.Unparsed]]) -> Iterator[list[tuple[int, records.Unparsed]]]:
    group: list[tuple[int, records.Unparsed]] = []
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
