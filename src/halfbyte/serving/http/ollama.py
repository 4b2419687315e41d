"""Ollama's `/api/chat`, `/api/tags`, `/api/show` and `/api/version`, for clients that know no other.

What: a request is put as one of chat, with Ollama's own defaults for what it does not say; lines of JSON go back, calls
whole.
Source: Ollama's docs/api.md; the `ollama` package, 0.6.
"""

import hashlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request as Http
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from halfbyte.data.encoding.chatml import with_tools
from halfbyte.serving.engine import Ask
from halfbyte.serving.http import wire
from halfbyte.serving.http.answers import Choice
from halfbyte.serving.http.refusal import Json, Refusal, naming
from halfbyte.serving.http.service import Service
from halfbyte.serving.models import ServedModel
from halfbyte.serving.tools import CallForm
from halfbyte.system.libraries import version
from halfbyte.types import Document
from halfbyte.writing.text import TextChunk

# What changes nothing here: how Ollama runs its own models.
_IGNORED = frozenset(("num_ctx", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "use_mlock",
                      "low_vram", "numa", "vocab_only"))  # fmt: skip
_AS_CHAT = {"repeat_penalty": "repetition_penalty", "num_predict": "max_tokens"}
_TAKEN = frozenset(("temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty",
                    *_AS_CHAT))  # fmt: skip
# What chat's fields are called here.
_NAMES = {
    "chat_template_kwargs.enable_thinking": "think", "chat_template_kwargs": "think", "reasoning_effort": "think",
    "response_format": "format", **{as_chat: f"options.{name}" for name, as_chat in _AS_CHAT.items()},
    **{name: f"options.{name}" for name in _TAKEN},
}  # fmt: skip
_DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
_STARTED = datetime.now(UTC).isoformat()


class _OllamaFunction(wire.Strict):
    name: str
    arguments: Document = Field(default_factory=dict)
    index: int | None = None


class _OllamaCall(wire.Strict):
    function: _OllamaFunction
    id: str | None = None


class _OllamaMessage(wire.Strict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    images: Annotated[list[str], Field(max_length=0)] | None = None
    tool_calls: list[_OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None

    def as_chat(self) -> Document:
        calls = [
            {"id": call.id, "function": {"name": call.function.name, "arguments": json.dumps(call.function.arguments)}}
            for call in self.tool_calls or ()
        ]
        return {
            "role": self.role, "content": self.content, "name": self.tool_name, "tool_call_id": self.tool_call_id,
            "reasoning_content": self.thinking, "tool_calls": calls or None,
        }  # fmt: skip


class OllamaChat(wire.Strict):
    model: str
    messages: Annotated[list[_OllamaMessage], Field(min_length=1)]
    tools: list[Document] | None = None
    stream: bool = True
    format: Literal["", "json"] | Document | None = None
    options: Document | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: float | str | None = None

    def as_chat(self, model: ServedModel) -> wire.ChatRequest:
        """Raises Refusal: a value that chat would not take either."""
        given = {k: v for k, v in (self.options or {}).items() if v is not None and k not in _IGNORED}
        if unknown := sorted(given.keys() - _TAKEN):
            raise Refusal(
                400, f"options.{unknown[0]}: is not known here", code="unsupported_parameter", param="options"
            )
        if given.get("num_predict", 1) in (-1, -2):
            del given["num_predict"]
        form = None
        if self.format:
            schema = {"type": "object"} if self.format == "json" else self.format
            form = {"type": "json_schema", "json_schema": {"name": "format", "schema": schema}}
        return wire.read(wire.ChatRequest, {
            "model": model.name,
            "messages": [message.as_chat() for message in self.messages],
            "tools": self.tools,
            "response_format": form,
            "reasoning_effort": "none" if self.think is False else None if self.think is True else self.think,
            "chat_template_kwargs": {"enable_thinking": True} if self.think is True else None,
            **_DEFAULTS,
            **{_AS_CHAT.get(name, name): value for name, value in given.items()},
        })  # fmt: skip


class ShowRequest(wire.Strict):
    model: str = ""
    name: str = ""
    verbose: bool | None = None


def routes(service: Service) -> list[Route]:
    return [
        Route("/api/chat", partial(chat, service), methods=["POST"]),
        Route("/api/show", partial(show, service), methods=["POST"]),
        Route("/api/tags", partial(tags, service)),
        Route("/api/version", _version),
    ]


async def chat(service: Service, http: Http) -> Response:
    asked = wire.read(OllamaChat, await http.body())
    with naming(_NAMES):
        ask, form = await service.conversation(asked.as_chat(_named(service, asked.model)))
    return await service.answer(http, [ask], OllamaReply(ask, form), _lines if asked.stream else None)


async def tags(service: Service, http: Http) -> Response:
    return Json({"models": [_described(service, one) for one in service.engine.models.by_name.values()]})


async def show(service: Service, http: Http) -> Response:
    asked = wire.read(ShowRequest, await http.body())
    models, model = service.engine.models, _named(service, asked.model or asked.name)
    family = _family(service)
    return Json({
        "modelfile": "", "parameters": "", "template": str(model.tokenizer.chat_template or ""),
        "modified_at": _STARTED, "details": _details(service),
        "model_info": {"general.architecture": family, f"{family}.context_length": models.context.tokens},
        "capabilities": ["completion", *(["tools"] if with_tools(model.tokenizer) else [])],
    })  # fmt: skip


async def _version(http: Http) -> Response:
    return Json({"version": version("halfbyte")})


def _named(service: Service, name: str) -> ServedModel:
    """Ollama's clients add a tag to names."""
    plain = name.removesuffix(":latest")
    return service.model_named(plain if plain in service.engine.models.by_name else name)


def _described(service: Service, one: ServedModel) -> Document:
    digest = hashlib.sha256(one.name.encode()).hexdigest()
    return {"name": one.name, "model": one.name, "modified_at": _STARTED, "size": 0, "digest": digest,
            "details": _details(service)}  # fmt: skip


def _family(service: Service) -> str:
    return str(service.engine.models.opened.model.config.model_type)


def _details(service: Service) -> Document:
    family, quant = _family(service), service.engine.models.opened.recipe.quant.type
    return {"format": "safetensors", "family": family, "families": [family], "parameter_size": "",
            "parent_model": "", "quantization_level": str(quant)}  # fmt: skip


def _lines(documents: AsyncIterator[Document]) -> Response:
    async def lines() -> AsyncIterator[bytes]:
        async for document in documents:
            yield json.dumps(document).encode() + b"\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


@dataclass
class OllamaReply:
    """Lines of a message as it grows; durations in nanoseconds."""

    ask: Ask
    form: CallForm | None
    first: float = 0.0

    def __post_init__(self) -> None:
        self.choice = Choice(self.form)

    def begin(self) -> list[Document]:
        return []

    def add(self, number: int, chunk: TextChunk) -> list[Document]:
        self.first = self.first or time.monotonic()
        text = "".join(part.text for part in self.choice.add(chunk))
        return [self._line({"content": text}, done=False)] if text else []

    def end(self) -> list[Document]:
        calls = self._calls()
        return [
            *([self._line({"content": "", "tool_calls": calls}, done=False)] if calls else []),
            self._last({"content": ""}),
        ]

    def whole(self) -> Document:
        calls = self._calls()
        return self._last({"content": self.choice.text, **({"tool_calls": calls} if calls else {})})

    def failed(self, refusal: Refusal) -> Document:
        return {"error": str(refusal)}

    def _calls(self) -> list[Document]:
        """Those that are whole: Ollama's arguments are objects."""
        return [{"function": {"name": call.name, "arguments": arguments}} for call in self.choice.calls
                if isinstance(arguments := wire.parsed(call.arguments), dict)]  # fmt: skip

    def _line(self, message: Document, *, done: bool) -> Document:
        message = {"role": "assistant", **message}
        now = datetime.now(UTC).isoformat()
        return {"model": self.ask.model.name, "created_at": now, "message": message, "done": done}

    def _last(self, message: Document) -> Document:
        now, begun = time.monotonic(), self.ask.begun
        return self._line(message, done=True) | {
            "done_reason": "length" if self.choice.finish == "length" else "stop",
            "total_duration": _ns(now - self.ask.came), "load_duration": 0,
            "prompt_eval_count": len(self.ask.prompt), "prompt_eval_duration": _ns(self.first - begun),
            "eval_count": self.choice.tokens, "eval_duration": _ns(now - self.first),
        }  # fmt: skip


def _ns(seconds: float) -> int:
    return max(0, int(seconds * 1e9))
