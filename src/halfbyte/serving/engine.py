"""The one thread that owns the model: takes what is asked out of a bounded queue, and writes all texts side by side.

Who waits is served in the order of coming. A text that ends, or whose client is gone, leaves its place at once to the
next. Pieces go to the event loop that asked.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.inference import decode
from halfbyte.serving.grammar import Grammar
from halfbyte.serving.lanes import Forward, Lane, lane_for
from halfbyte.serving.models import Models, Named
from halfbyte.serving.text import Piece, Text, Wish

TOKENS_AT_ONCE = 2048  # of prompts in one forward, but for a longer one
GATHERED_S = 0.04  # new text is sent so often at most, but for an answer's first and last: each sending costs 1 ms
_log = logging.getLogger(__name__)


class Full(HalfbyteError):
    """The queue has no room. `after_s`: when to come again."""

    def __init__(self, after_s: int) -> None:
        self.after_s = after_s
        super().__init__("all places of the queue are taken.", fix=f"ask again in {after_s} s")


class Stopping(HalfbyteError):
    """The server ends, and takes nothing new."""


@dataclass(eq=False)
class Ask:
    """Up to `n` texts after one prompt. What comes back is read from `pieces`: pieces, or an exception as the last."""

    model: Named
    prompt: Sequence[int]
    wish: Wish
    n: int = 1
    grammar: Grammar | None = None
    pieces: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    gone: bool = False
    came: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    texts: list[Text] = field(default_factory=list)


class Engine:
    """Args: waiting: most texts that may wait for a place. pack: read prompts that wait together in one forward, which
    takes half of the time; their answers may then differ in what rounding decides, with what was read beside them.
    Without it an answer is, to the bit, that of `generate`, whatever else is being written."""

    def __init__(self, models: Models, waiting: int = 128, *, pack: bool = False) -> None:
        self.models, self.most_waiting, self.pack = models, waiting, pack
        with torch.no_grad():
            self.lane, self.why = lane_for(models)
        self.slow: Lane | None = None
        self.queue: deque[Ask] = deque()
        self.of: dict[Text, Ask] = {}
        self.lanes: dict[Text, Lane] = {}
        self.prompt_tokens = self.written_tokens = self.steps = 0
        self.alive, self.failed = True, ""
        self._changed = threading.Condition()
        self._draining = self._ending = False
        self._each_s = 1.0  # of a text, lately
        self._gathered: list[tuple[Ask, Piece | Exception]] = []
        self._sent_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="halfbyte-engine", daemon=True)

    # ---------------------------------------------------------- the event loop
    def start(self) -> None:
        """From the event loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, asks: Sequence[Ask]) -> None:
        """Take all of them or none.

        Raises:
            Full: there is no room for all. Stopping: nothing new is taken.
        """
        with self._changed:
            if self._draining or not self.alive:
                raise self._stopping()
            texts = sum(ask.n for ask in asks)
            free = self.models.places - len(self.of)  # also where others that came just now wait for them
            if self.waiting + texts > self.most_waiting + free:
                rounds = math.ceil((self.waiting + 1) / self.models.places)
                raise Full(min(60, max(1, math.ceil(rounds * self._each_s))))
            self.queue.extend(asks)
            self._changed.notify()

    def leave(self, ask: Ask) -> None:
        """The client is gone: its texts end at the next step. Nothing happens where they have ended."""
        with self._changed:
            ask.gone = True
            if ask in self.queue:
                self.queue.remove(ask)
            self._changed.notify()

    def drain(self) -> None:
        """Refuse what waits and what comes; go on with what is being written."""
        with self._changed:
            self._draining = True
            waiting, self.queue = list(self.queue), deque()
            self._changed.notify()
        for ask in waiting:
            self._post([(ask, self._stopping())])

    def end(self) -> None:
        """Stop the thread; what is being written ends with an error. Returns when it is over."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _stopping(self) -> Stopping:
        return Stopping(f"the engine has failed: {self.failed}." if self.failed else "the server is ending.")

    @property
    def waiting(self) -> int:
        return sum(ask.n for ask in tuple(self.queue))

    @property
    def running(self) -> int:
        return len(self.of)

    # --------------------------------------------------------------- the thread
    def _run(self) -> None:
        try:
            self._write()
        except BaseException as error:  # of any kind: without this thread nothing will be written any more
            self.failed = type(error).__name__
            _log.exception("the engine has failed")
        self.alive = False
        self.drain()
        self._fail(self._stopping())

    def _write(self) -> None:
        with torch.no_grad():
            while True:
                with self._changed:
                    while not (self._ending or self.queue or self.of):
                        self._changed.wait()
                    if self._ending:
                        break
                try:
                    self._free_gone()
                    while chosen := self._next():
                        self._begin(chosen)
                    if self.of:
                        self._step()
                except Exception as error:  # of the model or of a library: no text is lost without a word
                    _log.exception("a step failed")
                    self._fail(error)

    def _next(self) -> list[Ask]:
        """The first of those that wait, with others of its adapter, as far as there is room for them."""
        with self._changed:
            room = self.models.places - len(self.of)
            if not self.queue or self.queue[0].n > room:
                return []
            first, chosen, tokens = self.queue[0], list[Ask](), 0
            together = self.pack and self.lane.together and self.slow is None
            for ask in tuple(self.queue):
                fits = ask.n <= room and (not chosen or tokens + len(ask.prompt) <= TOKENS_AT_ONCE)
                if ask.model.adapter == first.model.adapter and fits and (together or not chosen):
                    chosen.append(ask)
                    room, tokens = room - ask.n, tokens + len(ask.prompt)
            for ask in chosen:
                self.queue.remove(ask)
                ask.texts = [Text.begun(ask.model, ask.wish, i, self._grammar(ask, i)) for i in range(ask.n)]
                self.of.update(dict.fromkeys(ask.texts, ask))
            return chosen

    @staticmethod
    def _grammar(ask: Ask, index: int) -> Grammar | None:
        return ask.grammar if index == 0 or ask.grammar is None else ask.grammar.copy()

    def _begin(self, asks: list[Ask]) -> None:
        """Read prompts; their first tokens come with the next step."""
        prompts, texts = [ask.prompt for ask in asks], [ask.texts for ask in asks]
        lane, now = self.slow or self.lane, time.monotonic()
        self.lanes.update(dict.fromkeys([text for own in texts for text in own], lane))
        try:
            lane.begin(asks[0].model.adapter, prompts, texts)
        except decode.Slower as why:  # found on a longer prompt than those that were proven
            _log.warning(f"from now on answers come from the model's own forward: {why}")
            lane = self.slow = Forward(self.models)
            self.lanes.update(dict.fromkeys([text for own in texts for text in own], lane))
            lane.begin(asks[0].model.adapter, prompts, texts)
        for ask in asks:
            ask.begun = now
            self.prompt_tokens += len(ask.prompt)

    def _step(self) -> None:
        sent: list[tuple[Ask, Piece | Exception]] = []
        for lane in {id(lane): lane for lane in self.lanes.values()}.values():
            for text, row in lane.step():
                self._take(text, row, sent)
        self.steps += 1
        self._gather(sent)

    def _take(self, text: Text, row: torch.Tensor, sent: list[tuple[Ask, Piece | Exception]]) -> None:
        ask = self.of.get(text)
        if ask is None:  # its neighbour has failed
            return
        self.written_tokens += 1
        try:
            piece = text.take(row)
        except (FloatingPointError, RuntimeError) as error:
            sent.append((ask, error))
            for own in [own for own in ask.texts if own in self.of]:
                self._leave(own)
            return
        if piece is not None:
            sent.append((ask, piece))
            if piece.finish is not None:
                self._each_s += 0.1 * (time.monotonic() - ask.begun - self._each_s)
                self._leave(text)

    def _leave(self, text: Text) -> None:
        del self.of[text]
        if (lane := self.lanes.pop(text, None)) is not None:
            lane.leave(text)

    def _free_gone(self) -> None:
        for text in [text for text, ask in self.of.items() if ask.gone]:
            self._leave(text)

    def _fail(self, error: Exception) -> None:
        for ask in set(self.of.values()):
            self._send([(ask, error)])
        for text in list(self.of):
            self._leave(text)

    def _gather(self, sent: list[tuple[Ask, Piece | Exception]]) -> None:
        """Send them, with those before, where it is time, or an answer begins or ends; else keep them for a while."""
        some = [piece for _, piece in sent]
        at_once = any(isinstance(one, Exception) or one.tokens == 1 or one.finish is not None for one in some)
        if at_once or time.monotonic() - self._sent_at >= GATHERED_S:
            self._send(sent)
        else:
            self._gathered += sent

    def _send(self, sent: list[tuple[Ask, Piece | Exception]]) -> None:
        sent, self._gathered, self._sent_at = self._gathered + sent, [], time.monotonic()
        self._post(_joined(sent))

    def _post(self, sent: list[tuple[Ask, Piece | Exception]]) -> None:
        """To the event loop; from any thread."""
        if sent and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, sent)


def _joined(sent: list[tuple[Ask, Piece | Exception]]) -> list[tuple[Ask, Piece | Exception]]:
    """Pieces of one text as one."""
    made: list[tuple[Ask, Piece | Exception]] = []
    at: dict[tuple[Ask, int], int] = {}
    for ask, piece in sent:
        if isinstance(piece, Exception):
            made.append((ask, piece))
            continue
        n = at.setdefault((ask, piece.index), len(made))
        if n == len(made):
            made.append((ask, piece))
        else:
            before = made[n][1]
            assert isinstance(before, Piece)
            made[n] = ask, before.with_next(piece)
    return made


def _deliver(sent: list[tuple[Ask, Piece | Exception]]) -> None:
    for ask, piece in sent:
        ask.pieces.put_nowait(piece)
