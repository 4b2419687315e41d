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

from halfbyte.data.reading import columns as kinds
from halfbyte.data.reading import records
from halfbyte.data.reading.files import RowSource, find
from halfbyte.data.reading.formats import TELLING, Row, detect_format
from halfbyte.data.reading.formats import unread as unread_columns
from halfbyte.data.reading.pairs import parser
from halfbyte.data.reading.problems import BadRow, Problems, keys, near, shorten
from halfbyte.errors import DataError, RecipeError, typed
from halfbyte.recipe.data import Data, Fields, Format, Sources
from halfbyte.types import Document

CHUNK_ROWS = 1024  # enough for a tokenizer to be fast, few enough to stay small
CHUNK_BYTES = 4_000_000  # large rows come in smaller chunks
_JSON_ROWS = 'write one JSON object a line: {"prompt": "...", "completion": "..."}'
_CSV_ROWS = "write the columns' names in the first line, as in prompt,completion, then one row a line"
_ROWS = {"jsonl": _JSON_ROWS, "json": _JSON_ROWS, "csv": _CSV_ROWS}

COLUMNAR = ("parquet", "hub")

Group = list[tuple[int, records.Record]]
Known = tuple[Format, tuple[str, ...]]


@dataclass(frozen=True)
class Chunk:
    """Neighbouring records of one source, not yet understood."""

    source: RowSource
    records: Group
    known: Known | None  # the format and the keys of the source's first good record; None before it


def look(names: Sources, data: Data) -> None:
    """Look at the first rows of each file, before anything slower is begun; a hub dataset and a pipe are left alone.

    Raises:
        DataError: names that stand for nothing, a file without rows; if one of the first rows is bad, all that are, but
            of rows that are streamed, whose first window says what is wrong with it.
    """
    reader = Reader(sources := _at_hand(names), data)
    bad = [source for source in sources if understand(next(reader.of(source)), data)[1]]
    if bad and not data.streaming:
        everything = Reader(sources, data)
        for _ in everything:
            pass
        everything.check()


def check_fields(names: Sources, data: Data) -> None:
    """Raise a RecipeError where `data.fields`, or those of an entry, name a column that no file has, by its first row;
    a hub dataset and a pipe may have any."""
    wrong, everywhere = list[str](), dict[str, None]()
    for source in (sources := _at_hand(names)):
        there = dict.fromkeys(columns(str(source.path)))
        wrong += _not_there(source.entry.fields if source.entry else None, there, f"{source.label} has")
        everywhere |= there
    if len(find(names)) == len(sources):
        wrong += _not_there(data.fields, everywhere, "the rows have")
    if wrong:
        raise RecipeError(wrong)


def _not_there(fields: Fields | None, there: Document, have: str) -> list[str]:
    named = fields.model_dump(exclude_defaults=True, include=set(TELLING)).items() if fields and there else ()
    return [
        f"data.fields.{name}: {have} no column {column!r}, but {keys(there)}{near(column, there)}"
        for name, column in named
        if column not in there
    ]


def _at_hand(names: Sources) -> list[RowSource]:
    return [source for source in find(names) if source.kind != "hub" and source.path.is_file()]


def unread(names: Sources, data: Data) -> list[str]:
    """Of each file, in words: its format, and the columns that nothing is read from; told from its first rows."""
    notes, reader = [], Reader(sources := _at_hand(names), data)
    for source in sources:
        known = next(reader.of(source)).known
        if known is not None and (columns := unread_columns(known[0], data.of(source.entry), known[1])):
            listed = ", ".join(shorten(column) or "a column without a name" for column in columns)
            notes.append(f"{source.path.name} is read as {known[0]}; not read of it: {listed}")
    return notes


def columns(names: Sources) -> tuple[str, ...]:
    """The keys of the first record that can be read; none where there is none, or only a hub dataset."""
    for source in find(names):
        for _, record in _documents(islice(records.records(source), CHUNK_ROWS) if source.kind != "hub" else ()):
            return tuple(record)
    return ()


def questions(names: Sources, data: Data) -> Iterator[tuple[str, tuple[object, Document]]]:
    """Of each row its name; its question, a text or messages, and the row as it was read."""
    for source in find(names):
        fields = data.of(source.entry).fields
        for number, record in _documents(records.records(source)):
            talk = record.get(fields.messages)
            if isinstance(talk, list) and talk[-1].get("role") == "assistant":
                talk = talk[:-1]
            yield source.where(number), (talk or record.get(fields.prompt, ""), record)


def likely(name: str) -> tuple[str, str] | None:
    """The columns of a file that seem to ask and to answer, by its first rows."""
    (source,) = find(name)
    documents = [d for _, d in _documents(islice(records.records(source), CHUNK_ROWS))]
    return kinds.likely(documents) if documents else None


def _documents(group: Iterable[tuple[int, records.Record]]) -> Iterator[tuple[int, Document]]:
    """The records that can be read, with their numbers."""
    for number, raw in group:
        with contextlib.suppress(BadRow):
            yield number, records.parse(raw)


class Unclear(DataError):
    """A file of which one column, `asking`, would be trained alone, and another, `answering`, looks like its answer."""

    def __init__(self, path: Path, asking: str, answering: dict[str, list[str]], ways: tuple[str, str]) -> None:
        self.asking, self.answering = asking, next(iter(answering))
        looks = " and ".join(f"{c} ({', '.join(shorten(v, 20) for v in values)})" for c, values in answering.items())
        super().__init__(
            f"{path}: {asking} would be trained on alone, as plain text; {looks} looks like its answer.",
            fix=f"{ways[0]} to learn the answer; or {ways[1]} to learn the text alone",
        )


class Reader:
    """The good rows of all sources, or chunks of records. Counts `rows` seen, good and bad; the bad are `problems`."""

    def __init__(self, sources: Sequence[RowSource], data: Data) -> None:
        self._sources, self._data = sources, data
        self.rows = 0
        self.problems = Problems()

    def __iter__(self) -> Iterator[Row]:
        for source in self._sources:
            yield from self.rows_of(source)

    def rows_of(self, source: RowSource) -> Iterator[Row]:
        for chunk in self.of(source):
            rows, problems = understand(chunk, self._data)
            self.problems.update(problems)
            yield from rows

    def chunks(self) -> Iterator[Chunk]:
        """Records in chunks. The caller understands each one, and adds what is wrong with it to `problems`. Raises
        DataError: a source without rows, that cannot be read, or whose format cannot be told."""
        for source in self._sources:
            yield from self.of(source)

    def of(self, source: RowSource) -> Iterator[Chunk]:
        """The chunks of one source."""
        before = self.rows
        known: Known | None = None
        for group in groups(records.records(source)):
            self.rows += len(group)
            known = known or self._known(source, group)
            yield Chunk(source, group, known)
        if self.rows == before:
            raise DataError(f"{source.path} has no rows.", fix=_ROWS.get(source.kind))

    def check(self) -> None:
        """Raise a DataError that names the rows that cannot be used, the first 20 in full."""
        if self.problems:
            raise DataError(self.problems.listing(f"{self.problems.count:,} of {self.rows:,} rows cannot be used"))

    def _known(self, source: RowSource, group: Group) -> Known | None:
        data, documents = self._data.of(source.entry), _documents(group)
        number, first = next(documents, (0, None))
        if first is None:
            return None
        try:
            shape = detect_format(first, data, _full_name(source, number))
        except DataError as error:
            asking, answering = kinds.likely([first, *(d for _, d in documents)]) or ("question", "answer")
            sets = (
                "--set " + typed(f"data.fields.{n}={c}") for n, c in (("prompt", asking), ("completion", answering))
            )
            entry = self._entry(source, asking, answering)
            how = f"say how this file is read, {entry}" if entry else f"name the columns, as in {' '.join(sets)}"
            raise DataError(error.message, fix=error.fix or how) from None
        text = data.fields.text
        alone = shape == "text" and data.format == "auto"
        if alone and (likely := kinds.answering([first, *(d for _, d in documents)], text)):
            pair = text, next(iter(likely))
            ways = "--set 'data.fields={{prompt: {}, completion: {}}}'".format(*pair), "--set data.format=text"
            if entry := self._entry(source, *pair):
                ways = entry, "with format: text in the place of fields"
            raise Unclear(source.path, text, likely, ways)
        return shape, tuple(first)

    def _entry(self, source: RowSource, asking: str, answering: str) -> str:
        """The list of all sources, with an entry for this one; empty where the others have these two columns as well,
        so that one setting serves them all."""
        others = [str(other.path) for other in self._sources if other is not source]
        if all({asking, answering} <= {*columns(other)} for other in others):
            return ""
        entry = f"{{path: {source.path}, fields: {{prompt: {asking}, completion: {answering}}}}}"
        return f"in data.train or data.eval: [{', '.join([*others[:2], *['...'] * (len(others) > 2), entry])}]"


def understand(chunk: Chunk, data: Data) -> tuple[list[Row], Problems]:
    """The rows of a chunk, and what is wrong with the records that are none."""
    rows, problems = list[Row](), Problems()
    data = data.of(chunk.source.entry)
    parse = parser(chunk.known[0], data, chunk.known[1]) if chunk.known else None
    for number, raw in chunk.records:
        try:
            record = records.parse(raw)
            if chunk.source.kind in COLUMNAR:
                record = {name: _without_nulls(value) for name, value in record.items()}
            if data.format == "labels" and chunk.source.kind == "txt":  # a folder for each label
                record = {data.fields.label: chunk.source.path.parent.name, **record}
            if parse is not None:  # a good record tells the format
                rows.append(parse(chunk.source.where(number), record))
        except BadRow as bad:
            problems.add(f"{_full_name(chunk.source, number)}: {bad}")
    return rows, problems


def _without_nulls(value: object) -> object:
    """A value without the fields that are null in its objects: a columnar file gives each the fields of all others."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _full_name(source: RowSource, number: int) -> str:
    return source.where(number) if source.hub else f"{source.path.parent / source.where(number)}"


def groups(numbered: Iterable[tuple[int, records.Record]]) -> Iterator[Group]:
    """Neighbours, as many as a chunk has."""
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
