"""The file that `predict` writes: begun as JSON lines, gone on with where a call was ended, at last what was asked for.

`OUT.partial` has a first line that names adapter, rows and settings, and a line a row. CSV and Parquet are made of it
in two passes, the first of which finds the columns, in the order in which they appear. In CSV a text is as it is, what
is missing is empty, all else is its JSON. In Parquet a column has the type of its values in JSON; one of several types,
or of a type that Parquet does not hold, is text as in CSV. Nothing is guessed: a date is the text that it was.
Cost: a chunk of rows in memory; each line is read up to three times. No torch.
"""

import csv
import glob
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.data.reading import records
from halfbyte.data.reading.files import IsFolder, RowSource, find
from halfbyte.errors import DataError, typed
from halfbyte.system import files
from halfbyte.types import Document

if TYPE_CHECKING:
    import pyarrow

CHUNK_ROWS = 1024
SUFFIXES = (".jsonl", ".csv", ".parquet")
ERROR = "error"  # in the place of a prediction, where a row cannot be read
INPUT = "input."  # before a column that is called as an answer is
_ANSWER = re.compile(r"(input\.)*(prediction|probabilities|tags|entities|vector|error|p\..*)", re.DOTALL)
_HALF = re.compile("[\ud800-\udfff]")  # of a surrogate pair, which no encoding has
_UNFIT = (ValueError, TypeError, OverflowError, NotImplementedError)  # pyarrow's errors are among them


@dataclass
class Lines:
    """What lines of a partial file hold: rows, of them bad ones, and what is wrong with the first of these."""

    rows: int = 0
    bad: int = 0
    first_error: str | None = None

    def add(self, row: Document) -> None:
        self.rows += 1
        if ERROR in row:
            self.bad, self.first_error = self.bad + 1, self.first_error or row[ERROR]


class _Unfit(Exception):
    """A column, by its name, whose values have no one type that Parquet holds."""


def check(data: Path, out: Path) -> list[RowSource]:
    """The files of rows. Raises DataError: they are not there or cannot be read, or `out` is there, cannot be written
    or is of no known kind."""
    if out.suffix not in SUFFIXES:
        raise DataError(f"{out} must end in {', '.join(SUFFIXES)}.", fix=f"--out {typed(out.with_suffix('.jsonl'))}")
    if out.exists():
        raise DataError(f"{out} exists and is not overwritten.", fix="remove it, or --out ANOTHER")
    try:
        sources = find(str(data))
    except IsFolder as folder:
        fix = folder.fix and f"halfbyte predict RUN {typed(folder.pattern)}"
        raise DataError(folder.message, fix=fix) from None
    if not out.parent.is_dir():
        raise DataError(f"{out}: there is no folder {out.parent}.", fix=f"mkdir -p {typed(out.parent)}")
    if why := files.why_unwritable(out.parent):
        raise DataError(f"{out} cannot be written: {why}.", fix="--out ANOTHER")
    firsts = [next(records.records(source), None) for source in sources]
    if not any(first is not None for first in firsts):
        raise DataError(f"{data} has no rows.")
    return sources


def of_input(row: Document) -> Document:
    """A row's columns: one that is called as an answer is gets another name."""
    return {f"{INPUT}{name}" if _ANSWER.fullmatch(name) else name: value for name, value in row.items()}


def line(row: Document) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(row, default=str).encode() + b"\n"


def goes_on(partial: Path, of: Document) -> Lines:
    """What a partial file has, which is begun where there is none; a line that was cut short is cut off."""
    with partial.open("a+b") as file:
        file.seek(0)
        if not (begin := file.readline()).endswith(b"\n"):
            file.truncate(0)
            file.write(begin := line(of))
        if begin != line(of):
            fix = f"rm {typed(partial)}, or --out ANOTHER"
            raise DataError(f"{partial} is of other rows, of another adapter or of other settings.", fix=fix)
        end, there = len(begin), Lines()
        for one in file:
            if one.endswith(b"\n"):
                end += len(one)
                there.add(json.loads(one))
        file.truncate(end)
    return there


def finish(partial: Path, out: Path) -> None:
    """The lines as the file that was asked for, whole or not at all; a column `p.LABEL` of each probability."""
    files.clear_dead(out.parent, glob.escape(out.name))
    temporary = files.beside(out)
    try:
        {".jsonl": _as_jsonl, ".csv": _as_csv, ".parquet": _as_parquet}[out.suffix](partial, temporary)
        files.put(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    partial.unlink()


def _as_jsonl(partial: Path, path: Path) -> None:
    with partial.open("rb") as lines, path.open("wb") as file:
        lines.readline()
        shutil.copyfileobj(lines, file)


def _as_csv(partial: Path, path: Path) -> None:
    columns = dict.fromkeys(name for chunk in _chunks(partial) for row in chunk for name in row)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for chunk in _chunks(partial):
            table.writerows([_text(row.get(name)) for name in columns] for row in chunk)


def _as_parquet(partial: Path, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    types = _types(partial)
    while True:
        try:
            with pyarrow.parquet.ParquetWriter(path, pyarrow.schema(types.items())) as file:
                for chunk in _chunks(partial):
                    columns = {n: _column(n, [row.get(n) for row in chunk], kind) for n, kind in types.items()}
                    file.write_table(pyarrow.table(columns))
            return
        except _Unfit as unfit:
            types[str(unfit)] = pyarrow.string()


def _types(partial: Path) -> "dict[str, pyarrow.DataType]":
    """Each column, and the type that all its values have."""
    import pyarrow
    import pyarrow.parquet

    types = dict[str, pyarrow.DataType]()
    texts = set[str]()
    for chunk in _chunks(partial):
        for name in dict.fromkeys(name for row in chunk for name in row):
            before = types.setdefault(name, pyarrow.null())
            try:
                kind = before if name in texts else pyarrow.array([row.get(name) for row in chunk]).type
                each = [pyarrow.schema([(name, one)]) for one in (before, kind)]
                types[name] = pyarrow.unify_schemas(each, promote_options="permissive").field(0).type
                if types[name] != before:
                    sample = pyarrow.schema([(name, types[name])])
                    pyarrow.parquet.ParquetWriter(pyarrow.BufferOutputStream(), sample).close()
            except _UNFIT:
                types[name] = pyarrow.string()
                texts.add(name)
    return types


def _column(name: str, values: Sequence[object], kind: "pyarrow.DataType") -> "pyarrow.Array":
    import pyarrow

    try:
        return pyarrow.array([*map(_text, values)] if kind == pyarrow.string() else values, kind)
    except _UNFIT:
        raise _Unfit(name) from None


def _text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _chunks(partial: Path) -> Iterator[list[Document]]:
    with partial.open("rb") as lines:
        rows = map(_row, islice(lines, 1, None))
        while chunk := list(islice(rows, CHUNK_ROWS)):
            yield chunk


def _row(one: bytes) -> Document:
    """A line with a column for each probability; half of a surrogate pair is the text of its escape."""
    row = json.loads(one)
    if b"\\ud" in one:
        row = json.loads(_HALF.sub(lambda half: f"\\\\u{ord(half[0]):x}", json.dumps(row, ensure_ascii=False)))
    every = row.pop("probabilities", {})
    return {**row, **{f"p.{name}": p for name, p in every.items()}}
