"""From names of files to rows as tokens: from the cache, or read, rendered and tokenised now, many rows on every core.

What: chunks of records are encoded one after another and written to the cache as they come, so memory does not grow
with the rows. Up to `ALONE_CHUNKS` chunks are encoded in this process; more, by helper processes on every core, as
rendering a template is Python, which threads would not do faster. A helper is this module run as a program: it reads
chunks from a pipe and writes their tokens to another, so nothing of the caller's own script runs again. Results come in
the order of the chunks. The chunk of a helper that ends early (killed for lack of memory) is encoded here.
Cost: see `encoder`, divided by the cores where rows are many. A helper takes two to three seconds to start, 150 MB, and
`AHEAD` chunks in memory.

The cache of tokenised rows: what was tokenised once is mapped into memory the next time.

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
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import IO, Self

import pyarrow as pa

from halfbyte.data.encoding.chatml import chat_template
from halfbyte.data.encoding.encoder import EncodedChunk, EncodedRows, Encoder
from halfbyte.data.encoding.examples import SCHEMA, Examples, batch
from halfbyte.data.encoding.tally import Tally
from halfbyte.data.reading.files import find
from halfbyte.data.reading.read import Chunk, Reader
from halfbyte.errors import DataError, HalfbyteError
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
                [str(source.path), source.label, digest(source.path), chat_template(tokenizer, data.of(source.entry))]
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


ALONE_CHUNKS = 32  # thirty thousand rows, ten seconds: where starting helpers begins to pay
MAX_HELPERS = 8  # more would wait for the one process that reads and writes
AHEAD = 3  # chunks under way for each helper
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def encode(names: Sources, tokenizer: Tokenizer, data: Data, *, cores: int = 1) -> EncodedRows:
    """Rows as tokens. The same ones, in the same order, whatever `cores` is. Raises DataError: names that stand for
    nothing; all rows that cannot be read; else all that cannot be encoded."""
    name = key(names, tokenizer, data)
    cached = load(name) if name else None
    if cached is not None:
        return cached
    try:
        with CacheWriter(name) as writer:
            return writer.finish(_run(names, tokenizer, data, cores, writer.add))
    except OSError:  # the cache cannot be written: once more, in memory
        batches: list[pa.RecordBatch] = []
        tally = _run(names, tokenizer, data, cores, batches.append)
        return EncodedRows(Examples(batches), tally)


def _run(names: Sources, tokenizer: Tokenizer, data: Data, cores: int, keep: Callable[[pa.RecordBatch], None]) -> Tally:
    reader, encoder = Reader(find(names), data), Encoder(tokenizer, data)
    tally = Tally()
    error: HalfbyteError | None = None

    def only_read() -> bool:
        """Whether an error is certain: then the rest is read, to name all that is wrong, and not encoded."""
        return error is not None or bool(reader.problems)

    chunks = reader.chunks()
    first = list(islice(chunks, ALONE_CHUNKS + 1)) if cores > 1 else []
    chunks = chain(first, chunks)
    encoded: Generator[EncodedChunk] = (encoder.encode_chunk(chunk, only_read=only_read()) for chunk in chunks)
    if len(first) > ALONE_CHUNKS:
        encoded = Helpers(min(cores, MAX_HELPERS), tokenizer, data, encoder).encode(chunks, only_read)
    with contextlib.closing(encoded):
        for part in encoded:
            reader.problems.update(part.problems)
            error = error or part.error
            if part.batch is not None and not only_read():
                tally.merge(part.tally)
                keep(part.batch)
    reader.check()
    if error is not None:
        raise error
    tally.check(data)
    return tally


class Helpers:
    """So many helpers, each started and asked by a thread of its own. `encoder`: of this process, for the chunks of a
    helper that ended early."""

    def __init__(self, count: int, tokenizer: Tokenizer, data: Data, encoder: Encoder) -> None:
        self._count, self._setting = count, (tokenizer, data)
        self._encoder, self._alone = encoder, threading.Lock()
        self._mine = threading.local()
        self._all: list[subprocess.Popen[bytes]] = []

    def encode(self, chunks: Iterable[Chunk], only_read: Callable[[], bool]) -> Generator[EncodedChunk]:
        """`Encoder.encode_chunk` of each chunk, in their order. `only_read` is asked as each is handed out."""
        waiting: deque[Future[EncodedChunk]] = deque()
        threads = ThreadPoolExecutor(self._count, initializer=self._start)
        try:
            for chunk in chunks:
                waiting.append(threads.submit(self._ask, chunk, only_read()))
                if len(waiting) == AHEAD * self._count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)
            for helper in self._all:
                with contextlib.suppress(OSError), helper:  # closes its pipes, and waits for it
                    helper.kill()

    def _start(self) -> None:
        """A helper for this thread; none where memory is short or a tokenizer is code that cannot be handed over."""
        self._mine.pipes = None
        with contextlib.suppress(OSError, pickle.PicklingError, AttributeError, TypeError):
            setting = pickle.dumps(self._setting)
            helper = subprocess.Popen(
                [sys.executable, "-m", "halfbyte.data.encoding.encode"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
            self._all.append(helper)
            if helper.stdin and helper.stdout:
                helper.stdin.write(setting)
                self._mine.pipes = helper.stdin, helper.stdout

    def _ask(self, chunk: Chunk, only_read: bool) -> EncodedChunk:
        if self._mine.pipes:
            chunks, answers = self._mine.pipes
            try:
                pickle.dump((chunk, only_read), chunks, pickle.HIGHEST_PROTOCOL)
                chunks.flush()
                encoded: EncodedChunk = pickle.load(answers)  # of our own child  # nosec B301
                return encoded
            except (OSError, EOFError, pickle.UnpicklingError):
                self._mine.pipes = None
        with self._alone:
            return self._encoder.encode_chunk(chunk, only_read=only_read)


def help_out(chunks: IO[bytes], answers: IO[bytes]) -> None:
    """Encode what comes until nothing more does."""
    encoder = Encoder(*pickle.load(chunks))  # of the process that started this one  # nosec B301
    while True:
        try:
            chunk, only_read = pickle.load(chunks)  # nosec B301
        except EOFError:
            return
        pickle.dump(encoder.encode_chunk(chunk, only_read=only_read), answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reads from here
    to_caller = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    with contextlib.suppress(BrokenPipeError):
        help_out(sys.stdin.buffer, to_caller)
