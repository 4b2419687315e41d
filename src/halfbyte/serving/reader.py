"""A model that only reads, for many clients: all texts that wait share forwards.

Each turn takes what has come meanwhile, in that order and up to `AT_ONCE` texts, in one thread that owns the model; who
asks during a turn waits for its end. A request that cannot be read fails alone: the others of its turn are read again.
"""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.encoding.examples import Example
from halfbyte.errors import DataError, first_line
from halfbyte.inference import vectors
from halfbyte.inference.load import Opened
from halfbyte.layers import heads
from halfbyte.models.context import context_of
from halfbyte.objectives.labels import Labels
from halfbyte.recipe.adapter_folder import folder_of
from halfbyte.recipe.task import CLASSIFY, EMBED
from halfbyte.serving.engine import Full, Stopping

_log = logging.getLogger(__name__)
AT_ONCE = 256  # texts of a turn, but for a request that has more
Texts = Sequence[tuple[str, ...] | list[int]]
Values = NDArray[np.float32]
Read = tuple[Values, int]


class TextReader:
    """Args: waiting: most requests that may wait for the end of a turn."""

    def __init__(self, opened: Opened, name: str, waiting: int) -> None:
        self.opened, self.name = opened, name
        context = context_of(opened.model.config)
        self.most_tokens = min(opened.recipe.data.max_length, context.tokens if context is not None else 10**9)
        self.vocabulary = int(opened.model.config.get_text_config().vocab_size)
        self.labels = Labels.at(folder_of(opened.run)) if opened.recipe.task == CLASSIFY else Labels()
        self._waiting, self._draining = waiting, False
        self._queue: list[tuple[Texts, asyncio.Future[Read]]] = []
        self._turns: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "halfbyte-reader")

    async def read(self, texts: Texts) -> Read:
        """What is read of texts, of pairs, or of tokens, (n, numbers), and how many tokens they have. Raises Full:
        too many wait. Stopping: nothing new is taken. DataError: a text is too long, or empty."""
        if self._draining:
            raise Stopping("the server is ending.")
        if self._turns is not None and len(self._queue) >= self._waiting:
            raise Full(1)
        answer: asyncio.Future[Read] = asyncio.get_running_loop().create_future()
        self._queue.append((texts, answer))
        if self._turns is None:
            self._turns = asyncio.create_task(self._take_turns())
        return await answer

    def drain(self) -> None:
        """Refuse what comes; what waits is still read."""
        self._draining = True

    async def _take_turns(self) -> None:
        while self._queue:
            turn = [self._queue.pop(0)]
            while self._queue and sum(len(texts) for texts, _ in [*turn, self._queue[0]]) <= AT_ONCE:
                turn.append(self._queue.pop(0))
            every = await asyncio.get_running_loop().run_in_executor(self._thread, self._answers, [t for t, _ in turn])
            for (_, answer), value in zip(turn, every, strict=True):
                if answer.done():  # who asked is gone
                    continue
                answer.set_exception(value) if isinstance(value, Exception) else answer.set_result(value)
        self._turns = None

    def _answers(self, turn: Sequence[Texts]) -> list[Read | Exception]:
        try:
            every = [self._rows(texts) for texts in turn]
            rows = [row for some in every if not isinstance(some, DataError) for row in some]
            values, answers = iter(self._read(rows) if rows else ()), list[Read | Exception]()
            for some in every:
                if not isinstance(some, DataError):
                    tokens = sum(len(row.input_ids) for row in some)
                    answers.append((np.stack([next(values) for _ in some]), tokens))
                else:
                    answers.append(some)
            return answers
        except Exception as error:  # of the model or of a library
            if len(turn) > 1:
                return [answer for texts in turn for answer in self._answers([texts])]
            _log.exception(f"a request of {len(turn[0])} texts has failed: {type(error).__name__}: {first_line(error)}")
            return [error]

    def _read(self, rows: list[Example]) -> Values:
        """Vectors of unit length, or a head's scores."""
        if self.opened.recipe.task == EMBED:
            return vectors.unit(vectors.of_rows(self.opened, rows))
        return vectors.read(self.opened, rows, heads.scores)

    def _rows(self, every: Texts) -> list[Example] | DataError:
        texts = [text for text in every if isinstance(text, tuple)]
        try:
            of_texts = iter(vectors.rows_of(self.opened, texts, whole=True) if texts else ())
        except DataError as error:
            return error
        rows = [next(of_texts) if isinstance(one, tuple) else vectors.row(one) for one in every]
        wrong = next((n for row in rows if not 0 < (n := len(row.input_ids)) <= self.most_tokens), None)
        what = f"a text has {wrong} tokens, and 1 to {self.most_tokens:,} are read here."
        return rows if wrong is None else DataError(what)
