"""From names of files to rows as tokens: from the cache, or read, rendered and tokenised now, many rows on every core.

What: chunks of records are encoded one after another and written to the cache as they come, so memory does not grow
with the rows. Up to `ALONE_CHUNKS` chunks are encoded in this process; more, by helper processes on every core, as
rendering a template is Python, which threads would not do faster. A helper is this module run as a program: it reads
chunks from a pipe and writes their tokens to another, so nothing of the caller's own script runs again. Results come in
the order of the chunks. The chunk of a helper that ends early (killed for lack of memory) is encoded here.
Cost: see `encoder`, divided by the cores where rows are many. A helper takes two to three seconds to start, 150 MB, and
`AHEAD` chunks in memory.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import IO

import pyarrow as pa

from halfbyte.data.encoding import token_cache
from halfbyte.data.encoding.encoder import EncodedChunk, EncodedRows, Encoder
from halfbyte.data.encoding.examples import Examples
from halfbyte.data.encoding.tally import Tally
from halfbyte.data.reading import files
from halfbyte.data.reading.read import Chunk, Reader
from halfbyte.errors import HalfbyteError
from halfbyte.recipe.data import Data, Sources
from halfbyte.types import Tokenizer

ALONE_CHUNKS = 32  # thirty thousand rows, ten seconds: where starting helpers begins to pay
MAX_HELPERS = 8  # more would wait for the one process that reads and writes
AHEAD = 3  # chunks under way for each helper
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def encode(names: Sources, tokenizer: Tokenizer, data: Data, *, cores: int = 1) -> EncodedRows:
    """Rows as tokens. The same ones, in the same order, whatever `cores` is. Raises DataError: names that stand for
    nothing; all rows that cannot be read; else all that cannot be encoded."""
    name = token_cache.key(names, tokenizer, data)
    cached = token_cache.load(name) if name else None
    if cached is not None:
        return cached
    try:
        with token_cache.CacheWriter(name) as writer:
            return writer.finish(_run(names, tokenizer, data, cores, writer.add))
    except OSError:  # the cache cannot be written: once more, in memory
        batches: list[pa.RecordBatch] = []
        tally = _run(names, tokenizer, data, cores, batches.append)
        return EncodedRows(Examples(batches), tally)


def _run(names: Sources, tokenizer: Tokenizer, data: Data, cores: int, keep: Callable[[pa.RecordBatch], None]) -> Tally:
    reader, encoder = Reader(files.find(names), data), Encoder(tokenizer, data)
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
