"""The cache of tokenised rows: what was tokenised once is mapped into memory the next time.

Why: seven thousand rows take two seconds to render and tokenise, two million take minutes, and nothing of it changes
between runs.
What: one Arrow file for each content of the rows' files, tokenizer, template and settings; any of them changed is
another file. Written beside its place, batch by batch as rows are encoded, and moved there whole; the last batch has
no rows, and carries what was seen of them. Rows that have no name are written as well, and go with the process.
Cost: a hash of the files (about 1 GB/s; of large ones only once, then a `stat`), 4 bytes a token on disk. The oldest
files go when all take more than `MAX_BYTES`.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Self

import pyarrow as pa

from halfbyte.data.encoding.chatml import chat_template
from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.encoding.examples import SCHEMA, Examples, batch
from halfbyte.data.encoding.tally import Tally
from halfbyte.data.reading.files import find
from halfbyte.errors import DataError
from halfbyte.recipe.data import MIXING, Data, Sources
from halfbyte.runs.folder import read_json
from halfbyte.system import files
from halfbyte.system.libraries import version
from halfbyte.types import Tokenizer

# Counts up when rendering, tokenising or the file's layout changes.
FORMAT = 10
MIN_ROWS = 100  # fewer are tokenised in a tenth of a second
MAX_BYTES = 5_000_000_000
LARGE_BYTES = 64_000_000  # smaller files are hashed in no time
SETTLED_S = 2.0
MAX_FILES = 1000
_TALLY = b"halfbyte.tally"
_ELSEWHERE = {"train", "eval"}  # fields of `data:` that name the rows


def folder() -> Path:
    return files.cache_dir() / "tokens"


def key(names: Sources, tokenizer: Tokenizer, data: Data) -> str | None:
    """The name under which these rows are kept; None for what is not kept: hub datasets, tokenizers that are code.
    Raises DataError: names that no file has."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    sources = find(names)
    if backend is None or any(source.kind == "hub" for source in sources):
        return None
    with contextlib.suppress(DataError):  # a template that cannot be read is an error where it is used
        values = {
            "format": FORMAT,
            "versions": [version(name) for name in ("halfbyte", "transformers", "tokenizers", "jinja2")],
            "files": [
                [str(source.path), source.label, digest(source.path), chat_template(tokenizer, source.read_as(data))]
                for source in sources
            ],
            "read": [
                source.entry and source.entry.model_dump(mode="json", exclude={"path", *MIXING}) for source in sources
            ],
            "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "data": data.model_dump(mode="json", exclude=_ELSEWHERE),
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return None


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, looked up where a large file has not changed since it was hashed.

    Known by its name, size, inode and times of modification and of change, to the nanosecond. The hash of a file that
    changed in the last seconds is not kept: it could change once more within the same tick of the clock.

    Raises:
        DataError: it cannot be read.
    """
    try:
        stat = path.stat()
        if stat.st_size < LARGE_BYTES:
            return files.sha256(path)
        stamp = _stamp(path)
        if stamp in (known := read_json(_digests())):
            return str(known[stamp])
        fresh = files.sha256(path)
        if time.time() - max(stat.st_mtime, stat.st_ctime) >= SETTLED_S and _stamp(path) == stamp:
            known = {**read_json(_digests()), stamp: fresh}
            with contextlib.suppress(OSError):  # a disk that cannot be written keeps nothing
                folder().mkdir(parents=True, exist_ok=True)
                files.write(_digests(), files.as_json(dict(list(known.items())[-MAX_FILES:])))
        return fresh
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _stamp(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_ino} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _digests() -> Path:
    return folder() / "digests.json"


def load(name: str) -> EncodedRows | None:
    """What was kept under `name`, mapped; None if nothing whole is there."""
    path = folder() / f"{name}.arrow"
    try:
        if path.with_suffix(".sha256").read_text(encoding="ascii") != f"{name} {files.sha256(path)}":
            return None
        os.utime(path)  # when it was last of use
    except (OSError, ValueError):
        return None
    return _map(path)


def _map(path: Path) -> EncodedRows | None:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        *batches, _ = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        seen = reader.get_batch_with_custom_metadata(len(batches)).custom_metadata
        tally = Tally.from_json(json.loads(seen[_TALLY]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    return EncodedRows(Examples(batches), tally)


class CacheWriter:
    """Rows as they are encoded: few stay in memory, many go to a file at once. A context; what is not kept is removed.
    `name`: what they are kept under; None to keep them only as long as they are mapped."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._rows = 0
        self._batches: list[pa.RecordBatch] = []  # as long as they are few
        self._partial = folder() / f"{name or 'unnamed'}.{os.getpid()}.partial"
        self._writer: pa.RecordBatchFileWriter | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        with contextlib.suppress(OSError, pa.ArrowException):
            self._open.close()
        with contextlib.suppress(OSError):
            self._partial.unlink(missing_ok=True)

    def add(self, encoded: pa.RecordBatch) -> None:
        """Raise an OSError if the disk is full, or cannot be written."""
        self._rows += encoded.num_rows
        self._batches.append(encoded)
        if self._rows < MIN_ROWS:
            return
        if self._writer is None:
            folder().mkdir(parents=True, exist_ok=True)
            sink = self._open.enter_context(pa.OSFile(str(self._partial), "wb"))
            self._writer = self._open.enter_context(pa.ipc.new_file(sink, SCHEMA))
        for rows in self._batches:
            if rows.num_rows:
                self._writer.write_batch(rows)
        self._batches = []

    def finish(self, tally: Tally) -> EncodedRows:
        """All rows; mapped where they are many, and kept if they have a name. Raises OSError: as `add`."""
        if self._writer is None:
            return EncodedRows(Examples(self._batches), tally)
        self._writer.write_batch(batch([]), custom_metadata={_TALLY: json.dumps(tally.to_json()).encode()})
        self._open.close()
        path = self._partial
        if self._name is not None:
            path = folder() / f"{self._name}.arrow"
            files.write(path.with_suffix(".sha256"), f"{self._name} {files.sha256(self._partial)}".encode())
            files.put(self._partial, path)
        rows = _map(path)
        if rows is None:
            raise OSError("what was written cannot be read back")
        _tidy()
        return rows


def _tidy() -> None:
    """Remove the files that were used longest ago, down to `MAX_BYTES`."""
    cached = sorted((f.stat().st_mtime, f.stat().st_size, f) for f in folder().glob("*.arrow"))
    total = sum(size for _, size, _ in cached)
    for _, size, path in cached[:-1]:
        if total <= MAX_BYTES:
            return
        path.unlink(missing_ok=True)
        path.with_suffix(".sha256").unlink(missing_ok=True)
        total -= size
