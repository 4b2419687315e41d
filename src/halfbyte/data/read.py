"""Rows, one after another, out of everything that a recipe names; and every row that cannot be used, named.

Why: nothing is dropped here. Rows that were read are the rows that are used and the rows that are reported, and a bad
one does not hide the others: all are collected before an error is raised.
Source: `files` finds, `records` reads, `formats` understands.
Cost: one pass; one row in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.data import records
from halfbyte.data.files import Source, find
from halfbyte.data.formats import Format, Parser, Row, detect_format, parser
from halfbyte.data.problems import BadRow, Problems
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from halfbyte.recipe_data import Data


class Reader:
    """An iterator over the good rows of all sources; what it saw is in its attributes afterwards.

    Attributes:
        rows: records seen, good and bad.
        used: good ones, which were yielded.
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
        for source in self.sources:
            before = self.rows
            yield from self._of(source)
            if self.rows == before:
                raise records.no_rows(source)

    def check(self) -> None:
        """
        Raises:
            DataError: rows that cannot be used: all of them, the first 20 in full.
        """
        if self.problems:
            raise DataError(self.problems.listing(f"{self.problems.count:,} of {self.rows:,} rows cannot be used"))

    def _of(self, source: Source) -> Iterator[Row]:
        parse: Parser | None = None
        for number, record in records.read(source):
            self.rows += 1
            try:
                if isinstance(record, BadRow):
                    raise record
                if parse is None:
                    parse = self._parser(source, number, record)
                row = parse(source.where(number), record)
            except BadRow as bad:
                self.problems.add(f"{source.path.parent / source.where(number)}: {bad}")
                continue
            self.used += 1
            yield row

    def _parser(self, source: Source, number: int, record: Mapping[str, Any]) -> Parser:
        where = f"{source.path.parent / source.where(number)}"
        self.formats[source.label] = detect_format(record, self._data, where)
        return parser(self.formats[source.label][0], self._data, record)


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
