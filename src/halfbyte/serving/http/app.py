"""The HTTP application: OpenAI's chat, completions and models; health, metrics, and a small page.

A client that hangs up frees its place at the next token. An answer that takes longer than its time is an error, in a
stream its last event.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.routing import Route

from halfbyte.errors import DataError
from halfbyte.inference.generate import chat_ids
from halfbyte.serving import grammar
from halfbyte.serving.engine import Ask, Engine, Full, Stopping
from halfbyte.serving.http import wire
from halfbyte.serving.http.answers import CALL, Choice, Form, Json, tool_calls
from halfbyte.serving.http.gauges import Gauges
from halfbyte.serving.http.wire import ChatRequest, CompletionRequest, Refusal, Request
from halfbyte.serving.models import ServedModel
from halfbyte.types import Document
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import TextChunk

WEB = Path(__file__).parent / "web"
PING_S, SEND_S = 15, 60.0
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_PAGE = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
_Result = TypeVar("_Result")


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

    async def aside(self, work: Callable[[], _Result]) -> _Result:
        """Words to tokens, and schemas, in a thread; what is wrong with them is the client's."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.words, work)
        except DataError as error:
            raise Refusal(400, error.message, code="invalid_value") from None

    def check_length(self, model: ServedModel, characters: int) -> None:
        """Refuse, before it is tokenised, what has more characters than the longest tokens could hold."""
        if characters > self.engine.models.context.tokens * model.longest_token:
            raise self._too_long(f"the prompt has {characters:,} characters")

    def _too_long(self, what: str) -> Refusal:
        tokens = self.engine.models.context.tokens
        return Refusal(400, f"{what}; prompt and answer may have {tokens:,} tokens here.", param="messages",
                       code="context_length_exceeded")  # fmt: skip

    def params(
        self, asked: Request, prompt: Sequence[int], max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        places, left = self.engine.models.places, self.engine.models.context.left(len(prompt))
        if (max_tokens or 1) > left:
            answer = "" if max_tokens is None else f" and the answer up to {max_tokens:,}"
            raise self._too_long(f"the prompt has {len(prompt):,} tokens{answer}")
        if not prompt:
            raise Refusal(400, "the prompt is empty.", code="invalid_value")
        if (asked.n or 1) > places:
            raise Refusal(400, f"n: at most {places} texts are written at once here.", code="invalid_value", param="n")
        temperature, top_p = (1.0 if value is None else value for value in (asked.temperature, asked.top_p))
        return SamplingParams(max_tokens or left, temperature, top_p, asked.seed, asked.stops, logprobs)

    def submit(self, asks: Sequence[Ask]) -> None:
        try:
            self.engine.submit(asks)
        except Full as full:
            raise Refusal(429, str(full), kind="rate_limit_error", code="queue_full",
                          headers={"Retry-After": str(full.after_s)}) from None  # fmt: skip
        except Stopping as ending:
            raise _failed(ending) from None

    async def chat(self, http: Http) -> Response:
        asked = wire.read(ChatRequest, await http.body())
        model = self.model_named(asked.model)
        messages = [message.for_template() for message in asked.messages]
        self.check_length(model, sum(len(message["content"]) for message in messages))
        tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]
        tools = [] if asked.tool_choice == "none" else tools
        if tools and "tools" not in str(model.tokenizer.chat_template):
            raise Refusal(400, f"the chat template of {model.name} has no place for tools.", param="tools",
                          code="unsupported_parameter")  # fmt: skip
        prompt = await self.aside(partial(chat_ids, model.tokenizer, messages, tools or None))
        likely = (asked.top_logprobs or 0) if asked.logprobs else None
        params = self.params(asked, prompt, asked.max_completion_tokens or asked.max_tokens, likely)
        schema = asked.response_format.schema_wanted if asked.response_format is not None else None
        constraint = None
        if schema is not None:
            vocabulary = self.engine.models.vocabulary
            constraint = await self.aside(partial(grammar.of_schema, model, vocabulary, schema))
        ask = Ask(model, prompt, params, asked.n or 1, constraint)
        return await self.answer(http, asked, [ask], Form(model, chat=True, likely=likely, calls=bool(tools)))

    async def complete(self, http: Http) -> Response:
        asked = wire.read(CompletionRequest, await http.body())
        model = self.model_named(asked.model)
        asks = []
        if len(asked.prompts) * (asked.n or 1) > self.engine.models.places:
            raise Refusal(400, f"prompt: at most {self.engine.models.places} texts in a request.", param="prompt",
                          code="invalid_value")  # fmt: skip
        for given in asked.prompts:
            if isinstance(given, str):
                self.check_length(model, len(given))
                prompt = await self.aside(partial(_tokens, model, given))
            else:
                prompt = given
                if any(not 0 <= token < self.engine.models.vocabulary for token in prompt):
                    raise Refusal(400, "prompt: a token is none of the model's.", code="invalid_value", param="prompt")
            params = self.params(asked, prompt, asked.max_tokens or 16, asked.logprobs)
            asks.append(Ask(model, prompt, params, asked.n or 1))
        return await self.answer(http, asked, asks, Form(model, chat=False, likely=asked.logprobs))

    async def answer(self, http: Http, asked: Request, asks: list[Ask], form: Form) -> Response:
        self.submit(asks)
        if asked.stream:
            events = self.events(asks, form, usage=asked.with_usage)
            return EventSourceResponse(events, ping=PING_S, send_timeout=SEND_S, sep="\n")
        collected = asyncio.ensure_future(self._collected(asks))
        gone = asyncio.ensure_future(_gone(http))
        try:
            await asyncio.wait({collected, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not collected.done():
                return Response(status_code=499)  # nobody reads it
            choices = collected.result()
        finally:
            for task in (collected, gone):
                task.cancel()
            self._leave(asks)
        return Json(form.whole(choices, sum(len(ask.prompt) for ask in asks)))

    async def _collected(self, asks: list[Ask]) -> list[Choice]:
        choices = [Choice() for ask in asks for _ in range(ask.n)]
        async for number, chunk in self._arriving(asks):
            choices[number].add(chunk)
        return choices

    async def events(self, asks: list[Ask], form: Form, *, usage: bool) -> AsyncIterator[dict[str, str]]:
        """The answer as server-sent events. Closed when the client is gone, and then its texts end."""
        choices = [Choice() for ask in asks for _ in range(ask.n)]
        try:
            if form.chat:
                for index in range(len(choices)):
                    yield _event(form.chunk(index, {"role": "assistant", "content": ""}))
            async for number, chunk in self._arriving(asks):
                choice = choices[number]
                choice.add(chunk)
                for event in _events(form, number, chunk, choice):
                    yield _event(event)
            if usage:
                prompt = sum(len(ask.prompt) for ask in asks)
                yield _event(form.last(prompt, sum(choice.tokens for choice in choices)))
        except Refusal as refusal:
            yield _event(refusal.body)
        finally:
            self._leave(asks)
        yield {"data": "[DONE]"}

    async def _arriving(self, asks: list[Ask]) -> AsyncIterator[tuple[int, TextChunk]]:
        """(number of the choice, what is new of it), until all have ended."""
        left, first = sum(ask.n for ask in asks), True
        try:
            async with asyncio.timeout(self.answer_s):
                arriving = _merged(asks) if len(asks) > 1 else _of_one(asks[0])
                async for number, chunk in arriving:
                    if isinstance(chunk, Exception):
                        raise _failed(chunk)
                    if first:
                        self.gauges.first(asks[0])
                        first = False
                    left -= chunk.finish is not None
                    yield number, chunk
                    if not left:
                        break
        except TimeoutError:
            raise Refusal(504, f"the answer took longer than {self.answer_s:g} s.", code="time_limit",
                          kind="server_error", headers={"X-Should-Retry": "false"}) from None  # fmt: skip
        self.gauges.whole(asks)

    def _leave(self, asks: list[Ask]) -> None:
        for ask in asks:
            self.engine.leave(ask)

    async def models(self, http: Http) -> Response:
        return Json({"object": "list", "data": [self._model(one) for one in self.engine.models.by_name.values()]})

    async def model(self, http: Http) -> Response:
        return Json(self._model(self.model_named(http.path_params["name"])))

    def _model(self, one: ServedModel) -> Document:
        models = self.engine.models
        parent = None if one.adapter is None else models.base
        owner = {"id": one.name, "object": "model", "created": 0, "owned_by": "halfbyte"}
        return owner | {"parent": parent, "max_model_len": models.context.tokens}

    async def health(self, http: Http) -> Response:
        alive = self.engine.alive
        return Json({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def metrics(self, http: Http) -> Response:
        return Response(self.gauges.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, http: Http) -> Response:
        name, kind = _PAGE[http.url.path]
        body = (WEB / name).read_bytes()
        return Response(body, media_type=kind, headers={"Content-Security-Policy": _POLICY})


def application(service: Service) -> Starlette:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            service.engine.end()
            service.words.shutdown(cancel_futures=True)

    async def refused(http: Http, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        service.gauges.refused(error)
        return Json.of(error)

    async def unknown(http: Http, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return Json.of(Refusal(error.status_code, f"{http.method} {http.url.path[:200]}: {error.detail}"))

    async def failed(http: Http, error: Exception) -> Response:
        return Json.of(Refusal(500, "the server has failed; its log says why.", kind="server_error"))

    routes = [
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/v1/completions", service.complete, methods=["POST"]),
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.model),
        Route("/health", service.health),
        Route("/metrics", service.metrics),
        *(Route(path, service.page) for path in _PAGE),
    ]
    handlers = {Refusal: refused, HTTPException: unknown, Exception: failed}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


def _events(form: Form, number: int, chunk: TextChunk, choice: Choice) -> list[Document]:
    """What new text becomes. Where tools are offered, a call is told when it is whole."""
    if not form.chat:
        return [form.chunk(number, chunk.text, chunk.logprobs, chunk.finish)]
    text, finish = chunk.text, chunk.finish
    events = []
    if form.calls:
        before = choice.text[: len(choice.text) - len(chunk.text)]
        text = _outside_call(before, choice.text, ended=finish is not None)
        calls = tool_calls(choice.text) if finish is not None else []
        if calls:
            text, finish = "", None
            numbered = [{"index": i, **call} for i, call in enumerate(calls)]
            events = [form.chunk(number, {"tool_calls": numbered}), form.chunk(number, {}, (), "tool_calls")]
    if text or chunk.logprobs:
        events.insert(0, form.chunk(number, {"content": text}, chunk.logprobs))
    return [*events, form.chunk(number, {}, (), finish)] if finish is not None else events


def _outside_call(before: str, now: str, *, ended: bool) -> str:
    """What may be sent of a text that has grown: nothing of a call, nor of what may be the beginning of its mark."""

    def safe(text: str) -> int:
        at = text.find(CALL)
        if at >= 0:
            return at
        return next((len(text) - n for n in range(len(CALL) - 1, 0, -1) if text.endswith(CALL[:n])), len(text))

    return now[safe(before) : len(now) if ended else safe(now)]


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


async def _gone(http: Http) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _tokens(model: ServedModel, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("the prompt has half a surrogate pair, which is no text.") from None
    return list(model.tokenizer(text)["input_ids"])


def _event(document: Document) -> dict[str, str]:
    return {"data": json.dumps(document)}


def _failed(error: Exception) -> Refusal:
    if isinstance(error, Stopping):
        headers = {"Retry-After": "10"}
        return Refusal(503, error.message, kind="server_error", code="stopping", headers=headers)
    return Refusal(500, f"the answer has failed: {type(error).__name__}; the server's log says more.",
                   kind="server_error", code="failed")  # fmt: skip
