"""Processes that tokenise beside this one: rendering a template is Python, so threads alone would not do it faster.

Why: two million rows are ten minutes of one core. Each worker is `python -m halfbyte.data.encoding.workers`,
which reads chunks of records from a pipe and writes their tokens to another; nothing of the caller's own script runs
again, as it would with `multiprocessing`. Results come in the order of the chunks, as from one process alone.
Cost: two to three seconds to start, so small data never starts them; about 150 MB each, and `AHEAD` chunks in memory.
A helper that ends early (killed for lack of memory) is done without: its chunk is encoded here.
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
from typing import IO

from halfbyte.data.encoding.encoder import Encoder, Part
from halfbyte.data.reading.read import Chunk
from halfbyte.recipe.data import Data
from halfbyte.types import Tokenizer

MOST = 8  # helpers: more would wait for the one process that reads and writes
AHEAD = 3  # chunks under way for each helper
_ONE_THREAD = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class Helpers:
    """So many helpers, each started and asked by a thread of its own.

    Args:
        encoder: of this process, for the chunks of a helper that ended early.
    """

    def __init__(self, count: int, tokenizer: Tokenizer, data: Data, encoder: Encoder) -> None:
        self._count, self._setting = count, (tokenizer, data)
        self._encoder, self._alone = encoder, threading.Lock()
        self._mine = threading.local()
        self._all: list[subprocess.Popen[bytes]] = []

    def parts(self, chunks: Iterable[Chunk], only_read: Callable[[], bool]) -> Generator[Part]:
        """What `Encoder.part` makes of each chunk, in their order. `only_read` is asked as each is handed out."""
        waiting: deque[Future[Part]] = deque()
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
                [sys.executable, "-m", "halfbyte.data.encoding.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
            self._all.append(helper)
            if helper.stdin and helper.stdout:
                helper.stdin.write(setting)
                self._mine.pipes = helper.stdin, helper.stdout

    def _ask(self, chunk: Chunk, only_read: bool) -> Part:
        if self._mine.pipes:
            chunks, parts = self._mine.pipes
            try:
                pickle.dump((chunk, only_read), chunks, pickle.HIGHEST_PROTOCOL)
                chunks.flush()
                part: Part = pickle.load(parts)  # of our own child  # nosec B301
                return part
            except (OSError, EOFError, pickle.UnpicklingError):
                self._mine.pipes = None
        with self._alone:
            return self._encoder.part(chunk, only_read=only_read)


def help_out(chunks: IO[bytes], parts: IO[bytes]) -> None:
    """Encode what comes until nothing more does."""
    encoder = Encoder(*pickle.load(chunks))  # of the process that started this one  # nosec B301
    while True:
        try:
            chunk, only_read = pickle.load(chunks)  # nosec B301
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
