"""The one thread that owns the model: takes what is asked out of a bounded queue, and writes all texts side by side.

Who waits is served in the order of coming. A text that ends, or whose client is gone, leaves its place at once to the
next. Chunks of text go to the event loop that asked.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from halfbyte.errors import HalfbyteError
from halfbyte.serving.models import Models, ServedModel, writer_for
from halfbyte.serving.tools import Grammar
from halfbyte.writing.places import FastPathUnavailable
from halfbyte.writing.plain import PlainWriter
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Detokenizer, Text, TextChunk, TextWriter

GATHERED_S = 0.04  # new text is sent so often at most, but for an answer's first and last: each sending costs 1 ms
_log = logging.getLogger(__name__)


class Full(HalfbyteError):
    """The queue has no free place. `after_s`: when to come again."""

    def __init__(self, after_s: int) -> None:
        self.after_s = after_s
        super().__init__("all places of the queue are taken.", fix=f"ask again in {after_s} s")


class Stopping(HalfbyteError):
    """The server ends, and takes nothing new."""


class Unloaded(HalfbyteError):
    """The adapter that was asked is not here any more."""


@dataclass(eq=False)
class Ask:
    """Up to `n` texts after one prompt. What comes back is read from `chunks`: one without a token when they have their
    places, then those with text; or an exception as the last."""

    model: ServedModel
    prompt: Sequence[int]
    params: SamplingParams
    n: int = 1
    grammar: Grammar | None = None
    chunks: asyncio.Queue[TextChunk | Exception] = field(default_factory=asyncio.Queue)
    gone: bool = False
    came: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    texts: list[Text] = field(default_factory=list)

    def begin(self) -> None:
        model, grammar = self.model, self.grammar
        self.texts = [
            Text(
                self.prompt, self.params, model.stop_ids, adapter=model.adapter, index=i,
                detokenizer=Detokenizer(model.tokenizer), constraint=grammar.copy() if grammar and i else grammar,
            )
            for i in range(self.n)
        ]  # fmt: skip
        self.begun = time.monotonic()


Sent = list[tuple[Ask, TextChunk | Exception]]
Change = Callable[[Models], tuple[Models, TextWriter, str]]


class Engine:
    """Args: waiting: most texts that may wait for a place. pack: read prompts that wait together in one forward, which
    takes half of the time; their answers may then differ in what rounding decides, with what was read beside them.
    Without it an answer is, to the bit, that of `generate`, whatever else is being written."""

    def __init__(self, models: Models, waiting: int = 128, *, pack: bool = False) -> None:
        self.models = models
        self.max_waiting, self.pack = waiting, pack
        with torch.no_grad():
            writer, self.why = writer_for(models)
        self.writers: list[TextWriter] = [writer]
        """The last one reads what comes; one before it writes what it has begun."""
        self.queue: deque[Ask] = deque()
        self.changes: deque[tuple[Future[None], Change]] = deque()
        self.ask_of: dict[Text, Ask] = {}
        self.prompt_tokens = self.written_tokens = self.steps = 0
        self.alive, self.failed = True, ""
        self._changed = threading.Condition()
        self._draining = self._ending = False
        self._each_s = 1.0  # of a text, lately
        self._gathered: Sent = []
        self._sent_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="halfbyte-engine", daemon=True)

    # ---------------------------------------------------------- the event loop
    def start(self) -> None:
        """From the event loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, asks: Sequence[Ask]) -> None:
        """Take all of them or none. Raises Full: there are too few places for all. Stopping: nothing new is taken.
        Unloaded: an adapter has gone."""
        with self._changed:
            if self._draining or not self.alive:
                raise self._stopping()
            if gone := next((ask for ask in asks if not self._moved(ask)), None):
                raise Unloaded(f"there is no model {gone.model.name!r} any more.")
            texts = sum(ask.n for ask in asks)
            free = self.models.places - len(self.ask_of)  # also where others that came just now wait for them
            if self.waiting + texts > self.max_waiting + free:
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
            changes, self.changes = self.changes, deque()
            self._changed.notify()
        for future, _ in changes:
            if future.set_running_or_notify_cancel():
                future.set_exception(self._stopping())
        self._post([(ask, self._stopping()) for ask in waiting])

    def change(self, work: Change) -> Future[None]:
        """Other models, from when what is being written is written; who asks meanwhile waits. The future has the
        exceptions of `work`, which leaves everything as it was then."""
        future: Future[None] = Future()
        with self._changed:
            if self._draining or not self.alive:
                raise self._stopping()
            self.changes.append((future, work))
            self._changed.notify()
        return future

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
        return len(self.ask_of)

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
                    while not (self._ending or self.queue or self.ask_of or self.changes):
                        self._changed.wait()
                    if self._ending:
                        break
                try:
                    for text in [text for text, ask in self.ask_of.items() if ask.gone]:
                        self._remove(text)
                    if self.changes and not self.ask_of:
                        self._change()
                    while not self.changes and (asks := self._next()):
                        self._insert(asks)
                    if self.ask_of:
                        self._step()
                except Exception as error:  # of the model or of a library: no text is lost without a word
                    _log.exception("a step failed")
                    self._fail(error)

    def _change(self) -> None:
        with self._changed:
            if not self.changes:  # the server has begun to end
                return
            future, work = self.changes.popleft()
        if not future.set_running_or_notify_cancel():  # who asked is gone
            return
        try:
            self.models, writer, self.why = work(self.models)
        except Exception as error:
            future.set_exception(error)
            return
        self.writers = [writer]
        with self._changed:
            gone = [ask for ask in self.queue if not self._moved(ask)]
            self.queue = deque(filter(self._moved, self.queue))
        self._post([(ask, Unloaded(f"there is no model {ask.model.name!r} any more.")) for ask in gone])
        future.set_result(None)

    def _moved(self, ask: Ask) -> bool:
        """Move it to the model that now has the name of the one that was asked; whether there is one."""
        ask.model = self.models.by_name.get(ask.model.name, ask.model)
        return ask.model.name in self.models.by_name

    def _next(self) -> list[Ask]:
        """The first of those that wait; with `pack` also others of its adapter, as far as there are places."""
        with self._changed:
            free = self.models.places - len(self.ask_of)
            if not self.queue or self.queue[0].n > free:
                return []
            adapter, chosen = self.queue[0].model.adapter, list[Ask]()
            for ask in tuple(self.queue):
                if ask.model.adapter == adapter and ask.n <= free and (self.pack or not chosen):
                    chosen.append(ask)
                    free -= ask.n
            for ask in chosen:
                self.queue.remove(ask)
                ask.begin()
                self.ask_of.update(dict.fromkeys(ask.texts, ask))
        self._post([(ask, TextChunk(0, "", 0)) for ask in chosen])
        return chosen

    def _insert(self, asks: list[Ask]) -> None:
        """Read prompts; their first tokens come with the next step."""
        texts = [text for ask in asks for text in ask.texts]
        try:
            self.writers[-1].insert(texts)
        except FastPathUnavailable as why:  # found on a longer prompt than those that were proven
            _log.warning(f"from now on answers come from the model's own forward: {why}")
            self.writers.append(PlainWriter(self.models.model, self.models.using))
            self.writers[-1].insert(texts)
        self.prompt_tokens += sum(len(ask.prompt) for ask in asks)

    def _step(self) -> None:
        sent: Sent = []
        for writer in self.writers:
            for text in writer.step():
                self._take(text, sent)
        self.steps += 1
        self._gather(sent)

    def _take(self, text: Text, sent: Sent) -> None:
        ask = self.ask_of.get(text)
        if ask is None:  # another text of its ask has failed
            return
        self.written_tokens += 1
        if text.error is not None:
            sent.append((ask, text.error))
            for other in ask.texts:
                self._remove(other)
        elif (chunk := text.chunk()) is not None:
            sent.append((ask, chunk))
            if chunk.finish is not None:
                self._each_s += 0.1 * (time.monotonic() - ask.begun - self._each_s)
                self._remove(text)

    def _remove(self, text: Text) -> None:
        self.ask_of.pop(text, None)
        for writer in self.writers:
            writer.remove(text)

    def _fail(self, error: Exception) -> None:
        self._send([(ask, error) for ask in set(self.ask_of.values())])
        for text in list(self.ask_of):
            self._remove(text)

    def _gather(self, sent: Sent) -> None:
        """Send them, with those before, where it is time, or an answer begins or ends; else keep them for a while."""
        at_once = any(isinstance(one, Exception) or one.tokens == 1 or one.finish is not None for _, one in sent)
        if at_once or time.monotonic() - self._sent_at >= GATHERED_S:
            self._send(sent)
        else:
            self._gathered += sent

    def _send(self, sent: Sent) -> None:
        sent, self._gathered = self._gathered + sent, []
        self._sent_at = time.monotonic()
        self._post(_joined(sent))

    def _post(self, sent: Sent) -> None:
        """To the event loop; from any thread."""
        if sent and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, sent)


def _joined(sent: Sent) -> Sent:
    """Chunks of one text as one."""
    joined: dict[tuple[Ask, int | None], TextChunk | Exception] = {}
    for ask, chunk in sent:
        key = ask, chunk.index if isinstance(chunk, TextChunk) else None
        before = joined.get(key)
        joined[key] = before.joined(chunk) if isinstance(before, TextChunk) and isinstance(chunk, TextChunk) else chunk
    return [(ask, chunk) for (ask, _), chunk in joined.items()]


def _deliver(sent: Sent) -> None:
    for ask, chunk in sent:
        ask.chunks.put_nowait(chunk)
