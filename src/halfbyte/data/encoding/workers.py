"""Processes that tokenise beside this one: rendering a template is Python, so threads alone would not do it faster.

Why: two million rows are ten minutes of one core. Each worker is `python -m halfbyte.data.encoding.workers`,
which reads chunks of records from a pipe and writes their tokens to another; nothing of the caller's own script runs
again, as it would with `multiprocessing`. Results come in the order of the chunks, as from one process alone.
Cost: two to three seconds to start, so small data never starts them; about 150 MB each, and `AHEAD` chunks in memory.
A helper that ends early (killed for lack of memory) is done without: its chunk is encoded here.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, TYPE_CHECKING

from halfbyte.data.encoding.encoder import Encoder, Part
from halfbyte.data.reading.read import Chunk

if TYPE_CHECKING:
    from halfbyte.recipe.data import Data
    from halfbyte.types import Tokenizer

MOST = 8  # helpers: more would wait for the one process that reads and writes
AHEAD = 3  # chunks under way for each helper
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class Helpers:
    """So many helpers, as a context.

    Args:
        encoder: of this process, for the chunks of a helper that ended early.
    """

    def __init__(self, count: int, tokenizer: Tokenizer, data: Data, encoder: Encoder) -> None:
        self._encoder, self._alone = encoder, threading.Lock()
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes] | None] = queue.SimpleQueue()
        self._all: list[subprocess.Popen[bytes]] = []
        self._new: set[subprocess.Popen[bytes]] = set()
        self._count = count
        self._setting = b""
        # a tokenizer that is code of its own may not be handed to another process; then this one does all
        with contextlib.suppress(pickle.PicklingError, AttributeError, TypeError):
            self._setting = pickle.dumps((tokenizer, data))

    def __enter__(self) -> Helpers:
        path = os.pathsep.join(p for p in sys.path if p)
        for _ in range(self._count):
            if not self._setting:
                self._idle.put(None)
                continue
            try:
                helper = subprocess.Popen(
                    [sys.executable, "-m", "halfbyte.data.encoding.workers"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path},
                )
            except OSError:  # no memory, or no more processes: this one does its share
                self._idle.put(None)
                continue
            self._all.append(helper)
            self._new.add(helper)
            self._idle.put(helper)
        return self

    def __exit__(self, *raised: object) -> None:
        for helper in self._all:
            with contextlib.suppress(OSError):
                _pipe(helper.stdin).close()
        for helper in self._all:
            helper.kill()
            helper.wait()
            _pipe(helper.stdout).close()

    def parts(self, chunks: Iterable[Chunk], only_read: Callable[[], bool]) -> Generator[Part]:
        """What `Encoder.part` makes of each chunk, in their order. `only_read` is asked as each is handed out."""
        waiting: deque[Future[Part]] = deque()
        with ThreadPoolExecutor(self._count) as threads:
            try:
                for chunk in chunks:
                    waiting.append(threads.submit(self._ask, chunk, only_read()))
                    if len(waiting) == AHEAD * self._count:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                threads.shutdown(cancel_futures=True)

    def _ask(self, chunk: Chunk, only_read: bool) -> Part:
        helper = self._idle.get()
        try:
            if helper is not None:
                if helper in self._new:
                    self._new.remove(helper)
                    _pipe(helper.stdin).write(self._setting)
                pickle.dump((chunk, only_read), _pipe(helper.stdin), pickle.HIGHEST_PROTOCOL)
                _pipe(helper.stdin).flush()
                part: Part = pickle.load(_pipe(helper.stdout))
                return part
        except (OSError, EOFError, pickle.UnpicklingError):
            helper = None
        finally:
            self._idle.put(helper)
        with self._alone:
            return self._encoder.part(chunk, only_read=only_read)


def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("a helper is started with pipes")
    return pipe


def help_out(chunks: IO[bytes], parts: IO[bytes]) -> None:
    """Encode what comes until nothing more does."""
    encoder = Encoder(*pickle.load(chunks))
    while True:
        try:
            chunk, only_read = pickle.load(chunks)
        except EOFError:
            return
        pickle.dump(encoder.part(chunk, only_read=only_read), parts, pickle.HIGHEST_PROTOCOL)
        parts.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that reads from here
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    with contextlib.suppress(BrokenPipeError):
        help_out(sys.stdin.buffer, answers)
