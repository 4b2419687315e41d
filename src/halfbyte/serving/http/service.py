"""From a request to an answer: the one way on which every API meets the engine.

What: a conversation becomes an ask, with its length, sampling, template and grammar checked. It is answered whole, or
as a stream, which begins when its texts have their places: who waits can still be refused.
A client that hangs up frees its place at the next token. An answer that takes longer than its time is an error, in a
stream its last event.
"""

import asyncio
import inspect
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from sse_starlette import EventSourceResponse
from starlette.requests import Request as Http
from starlette.responses import Response

from halfbyte.data.encoding.chatml import with_tools
from halfbyte.errors import DataError
from halfbyte.inference.generate import chat_ids
from halfbyte.serving import tools
from halfbyte.serving.engine import Ask, Engine, Full, Stopping, Unloaded
from halfbyte.serving.http.answers import Reply
from halfbyte.serving.http.refusal import Json, Refusal, check_tokens
from halfbyte.serving.http.wire import ChatRequest, Request
from halfbyte.serving.models import ServedModel
from halfbyte.types import Document, Tokenizer
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import TextChunk

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Gauges:
    """Figures for Prometheus, in a registry of their own; no label holds what a client has written."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self._answers = Counter("halfbyte_answers", "Requests answered whole", ["model"], registry=registry)
        self._refused = Counter("halfbyte_refused", "Requests refused or failed", ["status"], registry=registry)
        self._first = Histogram(
            "halfbyte_first_token_seconds", "From asking to the first token", registry=registry, buckets=_SECONDS
        )
        self._whole = Histogram(
            "halfbyte_answer_seconds", "From asking to the end", registry=registry, buckets=_SECONDS
        )
        for name, what, read in (
            ("running", "Texts being written", lambda: engine.running),
            ("waiting", "Texts that wait for a place", lambda: engine.waiting),
            ("places", "Most texts at once", lambda: engine.models.places),
            ("prompt_tokens_total", "Tokens of prompts read", lambda: engine.prompt_tokens),
            ("written_tokens_total", "Tokens written", lambda: engine.written_tokens),
            ("steps_total", "Steps of all texts together", lambda: engine.steps),
        ):
            Gauge(f"halfbyte_{name}", what, registry=registry).set_function(read)

    def first(self, ask: Ask) -> None:
        self._first.observe(time.monotonic() - ask.came)

    def whole(self, asks: Sequence[Ask]) -> None:
        self._answers.labels(asks[0].model.name).inc()
        self._whole.observe(time.monotonic() - asks[0].came)

    def refused(self, error: Refusal) -> None:
        self._refused.labels(str(error.status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


PING_S, SEND_S = 15, 60.0
_Result = TypeVar("_Result")
Encode = Callable[[AsyncIterator[Document]], Response]
"""Documents to a stream of one API."""


class Gone(Exception):
    """The client has hung up; nobody reads an answer."""


@dataclass
class Service:
    """What the routes share. answer_s: seconds that an answer may take, waiting included."""

    engine: Engine
    gauges: Gauges
    answer_s: float = 600.0
    words: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "halfbyte-words"))

    def model_named(self, name: str) -> ServedModel:
        model = self.engine.models.by_name.get(name)
        if model is None:
            known = ", ".join(self.engine.models.by_name)
            raise Refusal(404, f"there is no model {name[:200]!r}; there are {known}.", code="model_not_found",
                          param="model")  # fmt: skip
        return model

    # -------------------------------------------------------------- what is asked
    async def conversation(self, asked: ChatRequest) -> tuple[Ask, tools.CallForm | None]:
        """The ask of a conversation, and the form of the calls that its answer may have."""
        model, rules = self.model_named(asked.model), asked.rules
        prompt, template = await self.prompt(asked, model)
        likely = (asked.top_logprobs or 0) if asked.logprobs else None
        params = self.params(asked, prompt, asked.max_completion_tokens or asked.max_tokens, likely)
        form = tools.form_of(template) if rules.tools else None
        constraint = None
        if rules.bound:
            of = partial(tools.table_of, model, self.engine.models.vocabulary)
            constraint = await self.aside(lambda: tools.constraint(of(), form or tools.MARKED, rules))
        return Ask(model, prompt, params, asked.n or 1, constraint), form

    async def prompt(self, asked: ChatRequest, model: ServedModel) -> tuple[list[int], str]:
        """A conversation's tokens up to its answer, and the template that has made them."""
        messages, rules = [message.for_template() for message in asked.messages], asked.rules
        self.check_length(model, sum(len(message["content"]) for message in messages), "messages")
        template = str((with_tools(model.tokenizer) if rules.tools else model.tokenizer.chat_template) or "")
        if rules.tools and not template:
            raise Refusal(400, f"neither the chat template of {model.name} nor a bundled one takes tools here.",
                          param="tools", code="unsupported_parameter")  # fmt: skip
        variables = _variables(asked, template, model.tokenizer)
        work = partial(chat_ids, model.tokenizer, messages, rules.tools or None, variables)
        return await self.aside(work), template

    async def aside(self, work: Callable[[], _Result]) -> _Result:
        """Words to tokens, and schemas, in a thread; what is wrong with them is the client's."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.words, work)
        except DataError as error:
            raise Refusal(400, error.message, code="invalid_value") from None

    def check_length(self, model: ServedModel, characters: int, param: str = "prompt") -> None:
        """Refuse, before it is tokenised, what has more characters than the longest tokens could hold."""
        if characters > self.engine.models.context.tokens * model.longest_token:
            raise self._too_long(f"the prompt has {characters:,} characters", param)

    def _too_long(self, what: str, param: str) -> Refusal:
        tokens = self.engine.models.context.tokens
        return Refusal(400, f"{what}; prompt and answer may have {tokens:,} tokens here.", param=param,
                       code="context_length_exceeded")  # fmt: skip

    def params(
        self, asked: Request, prompt: Sequence[int], max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        models = self.engine.models
        left = models.context.left(len(prompt))
        if (max_tokens or 1) > left:
            answer = "" if max_tokens is None else f" and the answer up to {max_tokens:,}"
            param = "messages" if isinstance(asked, ChatRequest) else "prompt"
            raise self._too_long(f"the prompt has {len(prompt):,} tokens{answer}", param)
        if not prompt:
            raise Refusal(400, "the prompt is empty.", code="invalid_value")
        if (asked.n or 1) > models.places:
            raise Refusal(400, f"n: at most {models.places} texts are written at once here.", code="invalid_value",
                          param="n")  # fmt: skip
        check_tokens("logit_bias", asked.logit_bias or (), models.vocabulary)
        return asked.sampling(max_tokens or left, logprobs)

    # ---------------------------------------------------------------- the answer
    async def answer(self, http: Http, asks: list[Ask], reply: Reply, encode: Encode | None) -> Response:
        """As a stream of documents, encoded, or whole."""
        try:
            self.engine.submit(asks)
        except (Full, Stopping, Unloaded) as error:
            raise failed(error) from None
        with ExitStack() as leaving:
            leaving.callback(self._leave, asks)
            await _unless_gone(http, self._placed(asks))
            if encode is not None:
                leaving.pop_all()  # who reads them leaves then
                return encode(self._documents(asks, reply))
            await _unless_gone(http, self._read(asks, reply))
            return Json(reply.whole())

    async def _placed(self, asks: list[Ask]) -> None:
        """Until all have their places. Raises Refusal: the server ends before that, or the time is over."""
        async with self._time_limit(asks):
            for ask in asks:
                if isinstance(chunk := await ask.chunks.get(), Exception):
                    raise failed(chunk)

    async def _read(self, asks: list[Ask], reply: Reply) -> None:
        async for number, chunk in self._arriving(asks):
            reply.add(number, chunk)

    async def _documents(self, asks: list[Ask], reply: Reply) -> AsyncIterator[Document]:
        """Closed when the client is gone, and then its texts end."""
        try:
            for document in reply.begin():
                yield document
            async for number, chunk in self._arriving(asks):
                for document in reply.add(number, chunk):
                    yield document
            for document in reply.end():
                yield document
        except Refusal as refusal:
            yield reply.failed(refusal)
        finally:
            self._leave(asks)

    async def _arriving(self, asks: list[Ask]) -> AsyncIterator[tuple[int, TextChunk]]:
        """(number of the text, what is new of it), until all have ended."""
        left, first = sum(ask.n for ask in asks), True
        async with self._time_limit(asks):
            arriving = _merged(asks) if len(asks) > 1 else _of_one(asks[0])
            async for number, chunk in arriving:
                if isinstance(chunk, Exception):
                    raise failed(chunk)
                if first:
                    self.gauges.first(asks[0])
                    first = False
                left -= chunk.finish is not None
                yield number, chunk
                if not left:
                    break
        self.gauges.whole(asks)

    @asynccontextmanager
    async def _time_limit(self, asks: list[Ask]) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.answer_s - (time.monotonic() - asks[0].came)):
                yield
        except TimeoutError:
            raise Refusal(504, f"the answer took longer than {self.answer_s:g} s.", code="time_limit",
                          kind="server_error", headers={"X-Should-Retry": "false"}) from None  # fmt: skip

    def _leave(self, asks: list[Ask]) -> None:
        for ask in asks:
            self.engine.leave(ask)


def as_events(documents: AsyncIterator[Document], last: str | None = None, *, named: bool = False) -> Response:
    """Server-sent events. last: the data of one after all. named: each by its type."""

    async def events() -> AsyncIterator[dict[str, str]]:
        async for document in documents:
            yield {**({"event": document["type"]} if named else {}), "data": json.dumps(document)}
        if last is not None:
            yield {"data": last}

    return EventSourceResponse(events(), ping=PING_S, send_timeout=SEND_S, sep="\n")


async def _unless_gone(http: Http, work: Coroutine[object, object, None]) -> None:
    """Raises Gone: the client hangs up before it is done."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        working.result()
    finally:
        for task in (working, gone):
            task.cancel()


async def _gone(http: Http) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _of_one(ask: Ask) -> AsyncIterator[tuple[int, TextChunk | Exception]]:
    while True:
        chunk = await ask.chunks.get()
        yield (0 if isinstance(chunk, Exception) else chunk.index), chunk


async def _merged(asks: list[Ask]) -> AsyncIterator[tuple[int, TextChunk | Exception]]:
    """Of several asks, whichever comes first."""
    waiting = {asyncio.ensure_future(ask.chunks.get()): number for number, ask in enumerate(asks)}
    try:
        while True:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, chunk = waiting.pop(task), task.result()
                waiting[asyncio.ensure_future(asks[number].chunks.get())] = number
                first = sum(ask.n for ask in asks[:number])
                yield first + (0 if isinstance(chunk, Exception) else chunk.index), chunk
    finally:
        for task in waiting:
            task.cancel()


def _variables(asked: ChatRequest, template: str, tokenizer: Tokenizer) -> Mapping[str, object]:
    """Of the chat template: those that it reads, and none that are arguments of the call. `reasoning_effort` is one; as
    "none" it also is `enable_thinking: false`, which other templates read."""
    given = dict(asked.chat_template_kwargs or {})
    taken = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in given:
        if name in taken or not re.search(rf"\b{re.escape(name)}\b", template):
            where = f"chat_template_kwargs.{name[:100]}"
            raise Refusal(400, f"{where}: the chat template of {asked.model} does not read it.", code="invalid_value",
                          param="chat_template_kwargs")  # fmt: skip
    if asked.reasoning_effort is not None:
        effort: Document = {"reasoning_effort": asked.reasoning_effort}
        if asked.reasoning_effort == "none":
            effort["enable_thinking"] = False
        read = {name: value for name, value in effort.items() if name in template}
        if not read and asked.reasoning_effort != "none":
            raise Refusal(400, f"reasoning_effort: the chat template of {asked.model} does not read it.",
                          code="unsupported_parameter", param="reasoning_effort")  # fmt: skip
        given = read | given
    return given


def failed(error: Exception) -> Refusal:
    if isinstance(error, Full):
        headers = {"Retry-After": str(error.after_s)}
        return Refusal(429, str(error), kind="rate_limit_error", code="queue_full", headers=headers)
    if isinstance(error, Stopping):
        headers = {"Retry-After": "10"}
        return Refusal(503, error.message, kind="server_error", code="stopping", headers=headers)
    if isinstance(error, Unloaded):
        return Refusal(404, error.message, code="model_not_found", param="model")
    return Refusal(500, f"the answer has failed: {type(error).__name__}; the server's log says more.",
                   kind="server_error", code="failed")  # fmt: skip
