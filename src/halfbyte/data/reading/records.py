"""Records out of files: JSON lines, one JSON list, CSV, Parquet, plain text, each also in pieces larger than memory.

Why: a row that is silently dropped or half read is the quietest way to a bad adapter. So every record of a file comes
out as a mapping, or as what is wrong with it, with its line or number; only blank lines are skipped.
Source: RFC 8259 (JSON), RFC 4180 (CSV), pyarrow for Parquet, `datasets` for the hub. UTF-8, with or without a mark.
Cost: one pass; one record, or one batch of Parquet rows, in memory. JSON lines: about 150 MB a second.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from itertools import chain, islice
from typing import IO, TYPE_CHECKING, Any

from halfbyte.data.reading.files import RowSource
from halfbyte.data.reading.problems import BadRow, kind, shorten
from halfbyte.data.reading.starts import check_start, encoded
from halfbyte.errors import DataError, first_line
from halfbyte.system import limits
from halfbyte.types import Document

if TYPE_CHECKING:
    import pyarrow

Record = Document | BadRow | bytes
"""Bytes: one JSON object of a file of JSON lines, to be parsed."""
Numbered = Iterator[tuple[int, Record]]

BOMB_BYTES, BOMB_RATIO = 8_000_000, 100  # from so many bytes on, a gzip file that is so many times smaller is none
MAX_ROW_BYTES = 256_000_000  # a longer line is no row, and would fill the memory
_UNCLOSED = "unexpected end of data"  # the csv module's words
_CHUNK_CHARS = 1 << 20
_BATCH_ROWS = 256
READ_S = 60.0  # for a batch, of a slow disk too
_SAMPLE_BYTES = 1 << 20
# A letter or quotation mark of Windows-1252 (and Latin-1) beside ASCII; a character of several bytes in UTF-8.
_ONE_BYTE = re.compile(rb"[A-Za-z ][\xc0-\xfe]|[\xc0-\xfe][A-Za-z ]|[\x80\x85\x91-\x97][\x20-\x7e]")
_SEVERAL_BYTES = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
_CUT = (EOFError, zlib.error, gzip.BadGzipFile)
csv.field_size_limit(MAX_ROW_BYTES)


def records(source: RowSource) -> Numbered:
    """(number, record or what is wrong with it) of every record; numbers are lines for JSON lines and CSV.

    JSON lines come as bytes, so that another process may parse them.

    Raises:
        DataError: no such file, no permission, another encoding, or a file that is not what its ending says.
    """
    readers = {"jsonl": _lines, "json": _json, "csv": _csv, "parquet": _parquet, "txt": _txt, "hub": _hub}
    try:
        if source.kind not in ("parquet", "hub") and not source.part:
            _check_encoding(source)
        yield from readers[source.kind](source)
    except FileNotFoundError:
        raise DataError(f"{source.path}: no such file.", fix="check the path") from None
    except gzip.BadGzipFile:
        raise DataError(f"{source.path} is not gzip, as its ending says.", fix="take .gz off its name") from None
    except OSError as error:
        raise DataError(f"{source.path} cannot be read: {error.strerror or error}.") from None


def _open(source: RowSource) -> IO[bytes]:
    if not source.gz:
        return source.path.open("rb")
    return io.BufferedReader(_Inflated(gzip.GzipFile(source.path), source), 1 << 20)


class _Inflated(io.RawIOBase):
    """What a gzip file holds, as long as it is not a bomb: rows of text become at most some dozen times as much."""

    def __init__(self, file: gzip.GzipFile, source: RowSource) -> None:
        self.file, self.source = file, source
        self.read_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.file.read1(len(buffer))  # what comes before a damage is not lost with it
        buffer[: len(data)] = data
        self.read_bytes += len(data)
        size = self.source.path.stat().st_size
        if self.read_bytes > max(BOMB_BYTES, BOMB_RATIO * size):
            raise DataError(
                f"{self.source.path}: {size:,} bytes become more than {self.read_bytes:,}: that is no file of rows.",
                fix="unpack it, and look at what it holds",
            )
        return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def _check_encoding(source: RowSource) -> None:
    """Raise a DataError where the first bytes are text in one byte a character: more letters that can be read so than
    characters of several bytes that are UTF-8. What else is wrong with them is told row by row."""
    with contextlib.suppress(*_CUT), _open(source) as file:
        start = check_start(file.read(_SAMPLE_BYTES), source)
        try:
            codecs.getincrementaldecoder("utf-8")().decode(start)
        except UnicodeDecodeError as error:
            if b"\0" in start or len(_ONE_BYTE.findall(start)) <= len(_SEVERAL_BYTES.findall(start)):
                return
            name, code = ("Latin-1", "ISO-8859-1")
            if re.search(rb"[\x80-\x9f]", start):
                name = code = "Windows-1252"
            before, after = start[: error.start].split(b"\n"), start[error.start :].split(b"\n", 1)[0]
            there = (before[-1][-16:] + after[:16]).decode("cp1252", "replace").strip()
            raise encoded(source, f"looks like {name} (line {len(before)}: {there!r})", code) from None


def _single(pairs: list[tuple[str, Any]]) -> Document:
    """An object, none of whose keys is given twice: of two values the first would be lost."""
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise BadRow(f"the key {next(name for name in record if names.count(name) > 1)!r} is given twice")
    return record


_JSON = json.JSONDecoder(object_pairs_hook=_single)


def parse(raw: Record) -> Document:
    """Raises BadRow: what is wrong with the record: it is not UTF-8, not JSON, not an object ..."""
    if isinstance(raw, BadRow):
        raise raw
    if isinstance(raw, dict):
        return raw
    try:
        record = _JSON.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 (byte {raw[error.start]:#04x} at {error.start + 1})") from None
    except json.JSONDecodeError as error:
        why = f"{error.msg} at character {error.colno}"
        if error.msg == "Extra data" and "\r" in error.doc:
            why = "a carriage return alone ends no line; tr '\\r' '\\n' < FILE"
        raise BadRow(f"not JSON ({why}): {shorten(error.doc)}") from None
    except RecursionError:
        raise BadRow("not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise BadRow(f"not JSON that can be read: {first_line(error)}") from None
    if not isinstance(record, dict):
        raise BadRow(f"an object is needed, got {kind(record)}")
    return record


def _lines(source: RowSource) -> Iterator[tuple[int, bytes | BadRow]]:
    """(line number from 1, its bytes without the ending) of every line that is not blank; of a part its first byte."""
    number, (start, stop) = 0, source.part or (0, None)
    with _open(source) as file:
        try:
            if start:  # a line that begins before is not of this part
                file.seek(start - 1)
                _to_end_of_line(file)
            while stop is None or (at := file.tell()) < stop:
                if not (raw := file.readline(MAX_ROW_BYTES)):
                    break
                number = number + 1 if stop is None else at
                if number == 1 or not (number or start):
                    raw = check_start(raw, source)
                if len(raw) >= MAX_ROW_BYTES and not raw.endswith(b"\n"):
                    _to_end_of_line(file)
                    yield number, BadRow(f"longer than {MAX_ROW_BYTES:,} bytes")
                elif raw := raw.strip(b" \t\r\n"):
                    if number == 1 and source.kind == "jsonl" and _opens_list(raw):
                        name = source.path.with_suffix(".jsonl").name
                        raise DataError(
                            f"{source.path}:1 opens a JSON list; one JSON object a line is needed.",
                            fix=f"name it .json, or: jq -c '.[]' {source.path} > {name}",
                        )
                    yield number, raw
        except _CUT as error:
            if isinstance(error, gzip.BadGzipFile) and not number:
                raise
            yield number + 1, BadRow(f"the file is damaged or cut short here: {first_line(error)}")


def _to_end_of_line(file: IO[bytes]) -> None:
    while (rest := file.readline(MAX_ROW_BYTES)) and not rest.endswith(b"\n"):
        pass


def _opens_list(raw: bytes) -> bool:
    """Whether a line is the beginning, or all, of a list of rows."""
    try:
        value = json.loads(raw) if raw.startswith(b"[") else None
    except (ValueError, RecursionError):
        return True
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _json(source: RowSource) -> Numbered:
    """One list of objects; or one object that holds such a list; or JSON lines under another name."""
    with _open(source) as file:
        try:
            start = check_start(file.read(4096), source).lstrip(b" \t\r\n")
        except _CUT:
            start = b"?"  # the line reader says what is wrong
    if start.startswith(b"["):
        yield from _json_list(source)
    else:
        yield from _wrapped(source) or _lines(source)


def _wrapped(source: RowSource) -> list[tuple[int, Record]]:
    """The rows of a file that is one JSON object: of the one list of objects in it, or itself; none for JSON lines."""
    (_, first), *more = [*islice(_lines(source), 2)] or [(0, b"")]
    with contextlib.suppress(BadRow):
        parse(first)
        if more:
            return []
    if isinstance(first, BadRow) or source.path.stat().st_size > MAX_ROW_BYTES:
        return []
    try:
        with _open(source) as file:
            raw = file.read(MAX_ROW_BYTES + 1)
            if len(raw) > MAX_ROW_BYTES:
                return []
            record = parse(raw.removeprefix(b"\xef\xbb\xbf"))
    except (BadRow, *_CUT) as error:
        with contextlib.suppress(ValueError, RecursionError):  # of JSON as a whole a key is given twice
            return [(1, error)] if isinstance(error, BadRow) and json.loads(raw) else []
        return []
    lists = [v for v in record.values() if isinstance(v, list) and v and all(isinstance(item, dict) for item in v)]
    is_row = len(lists) != 1 or {"role", "from", "type"} & set(lists[0][0])  # messages, or tools
    return [(1, record)] if is_row else list(enumerate(lists[0], start=1))


def _item(text: str, position: int) -> tuple[Document | BadRow, int]:
    """The object that begins at a position, or what is wrong with it; and where it ends."""
    try:
        item, end = _JSON.raw_decode(text, position)
        return item if isinstance(item, dict) else BadRow(f"an object is needed, got {kind(item)}"), end
    except BadRow as bad:
        return bad, json.JSONDecoder().raw_decode(text, position)[1]


def _json_list(source: RowSource) -> Numbered:
    """The items of one JSON list, read piece by piece."""
    with _open(source) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", errors="strict", newline="") as file:
        number, text, position, ended = 0, "", 0, False

        def more() -> None:
            nonlocal text, position, ended
            read = file.read(max(_CHUNK_CHARS, len(text) - position))
            ended = not read
            text, position = text[position:] + read, 0

        def next_char() -> str:
            """The next character that is no white space, not taken; empty at the end."""
            nonlocal position
            while True:
                while position < len(text) and text[position] in " \t\r\n":
                    position += 1
                if position < len(text) or ended:
                    return text[position : position + 1]
                more()

        try:
            next_char()
            position += 1  # the opening bracket
            closed = next_char() == "]"
            while not closed:
                number += 1
                while True:
                    try:
                        next_char()
                        item, end = _item(text, position)
                        if end == len(text) and not ended:
                            raise ValueError("a number may go on")
                        break
                    except ValueError as error:
                        if ended or len(text) - position > MAX_ROW_BYTES:
                            why = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
                            yield number, BadRow(f"not JSON ({why}), so the rest of the file cannot be read")
                            return
                        more()
                position = end
                yield number, item
                follows = next_char()
                position += 1
                closed = follows == "]"
                if not closed and follows != ",":
                    got = repr(follows) if follows else "the end of the file"
                    yield number + 1, BadRow(f"a comma or ] is needed, got {got}; the rest cannot be read")
                    return
            position += number == 0
            if rest := next_char():
                yield number + 1, BadRow(f"{rest!r} follows the end of the list, and cannot be read")
        except UnicodeDecodeError as error:
            yield number + 1, BadRow(f"not UTF-8 (byte {error.object[error.start]:#04x}), so the rest cannot be read")
        except RecursionError:
            yield number, BadRow("nested too deeply, so the rest of the file cannot be read")
        except _CUT as error:
            yield number + 1, BadRow(f"the file is damaged or cut short here: {first_line(error)}")


def _csv(source: RowSource) -> Numbered:
    with _open(source) as raw:
        # undecodable bytes come out as lone surrogates, and are found field by field
        file = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
        try:
            head = file.readline()
        except _CUT as error:
            raise DataError(f"{source.path} cannot be read: {first_line(error)}.") from None
        check_start(head.encode("utf-8", "surrogateescape")[:8], source)
        if not head.strip():
            return
        # the header is read by the same reader, since it may itself hold a quoted line end
        rows = csv.reader(chain([head], file), delimiter=max(",;\t|", key=head.count), strict=True)
        try:
            header = [name.strip() for name in next(rows)]
        except csv.Error as error:
            raise DataError(f"{source.path}:1: the header is not CSV: {error}.") from None
        if twice := {name for name in header if header.count(name) > 1}:
            raise DataError(f"{source.path}:1: the column {min(twice)!r} is there twice.", fix="rename one of them")
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows, None)
            except csv.Error as error:
                why = str(error)
                if why == _UNCLOSED:
                    why = f"a quote that this row opens is never closed, so that it goes on to line {rows.line_num}"
                yield line, BadRow(f"not CSV: {why}")
                continue
            except _CUT as error:
                yield line, BadRow(f"the file is damaged or cut short here: {first_line(error)}")
                return
            if row is None:
                return
            if row:
                yield line, _csv_record(header, row)


def _csv_record(header: list[str], row: list[str]) -> Record:
    if len(row) != len(header):
        return BadRow(f"{len(row)} field{'s' * (len(row) != 1)}, and the header has {len(header)}")
    for name, value in zip(header, row, strict=True):
        escaped = next((c for c in value if "\udc80" <= c <= "\udcff"), None)
        if escaped is not None:
            return BadRow(f"{name}: not UTF-8 (byte {ord(escaped) - 0xDC00:#04x})")
    return dict(zip(header, row, strict=True))


def _txt(source: RowSource) -> Numbered:
    """A file is one text, its line ends as in Unix."""
    with _open(source) as file:
        try:
            raw = file.read(MAX_ROW_BYTES)
        except _CUT as error:
            yield 1, BadRow(f"the file is damaged or cut short: {first_line(error)}")
            return
    raw = check_start(raw, source)
    if len(raw) == MAX_ROW_BYTES:
        yield 1, BadRow(f"longer than {MAX_ROW_BYTES:,} bytes; split it into several files")
    elif raw.strip():
        with contextlib.suppress(BadRow):
            parse(raw.split(b"\n", 1)[0])
            raise DataError(
                f"{source.path} holds JSON lines, and its ending says plain text.",
                fix=f"name it {source.path.with_suffix('.jsonl').name}",
            )
        try:
            yield 1, {"text": raw.decode("utf-8").replace("\r\n", "\n")}
        except UnicodeDecodeError as error:
            yield 1, BadRow(f"not UTF-8 (byte {raw[error.start]:#04x} at {error.start + 1})")


def _parquet(source: RowSource) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    number, end = 0, object()
    what = f"{source.path.name}, unpacked,"
    # a few rows at a time: a column can hold one text a million times in a few bytes
    try:
        with limits.limited(what, seconds=READ_S):
            file = pyarrow.parquet.ParquetFile(source.path)
        with file:
            chosen = range(*source.part) if source.part else range(file.num_row_groups)
            number = sum(file.metadata.row_group(i).num_rows for i in range(chosen.start))
            batches = file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[*chosen])
            while True:
                with limits.limited(what, seconds=READ_S):
                    batch = next(batches, end)
                    rows = [] if batch is end else [*_rows_of(batch)]
                if batch is end:
                    return
                for record in rows:
                    number += 1
                    yield number, record
    except limits.TooMuch as error:
        raise DataError(f"{source.path} cannot be read: {error}.") from None
    except (pyarrow.ArrowException, ValueError) as error:  # ValueError: names of columns that are not UTF-8
        if number:
            yield number + 1, BadRow(f"the file is damaged here: {first_line(error)}")
            return
        raise DataError(f"{source.path} is not Parquet that can be read: {first_line(error)}.") from None


def row_groups(source: RowSource) -> list[int]:
    """Bytes of each row group of a Parquet file, unpacked."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(source.path)
        return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source.path} is not Parquet that can be read: {first_line(error)}.") from None


def _rows_of(batch: "pyarrow.RecordBatch") -> Iterator[Record]:
    try:
        yield from batch.to_pylist()
    except (UnicodeDecodeError, ValueError):
        for i in range(batch.num_rows):
            try:
                yield from batch.slice(i, 1).to_pylist()
            except (UnicodeDecodeError, ValueError) as error:
                yield BadRow(f"not UTF-8 text: {first_line(error)}")


def _hub(source: RowSource) -> Numbered:
    from datasets import load_dataset

    arguments = dict(source.hub)
    try:
        dataset = load_dataset(**arguments)
    except Exception as error:  # of any kind: the hub's, a loader's, pyarrow's
        raise DataError(
            f"the dataset {arguments['path']} could not be loaded: {first_line(error)}",
            fix="check its name, split and revision on the hub; HF_HUB_OFFLINE=1 reads only what is cached",
        ) from error
    for number, record in enumerate(dataset, start=1):
        yield number, dict(record)
