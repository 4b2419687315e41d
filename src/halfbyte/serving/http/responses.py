"""OpenAI's `/v1/responses`: the part of it that is text and tools.

What: a request is put as one of chat; what comes back is items, whole or as events. Nothing is stored, so each request
has its whole conversation.
Source: the `openai` package, 3.57: types/responses.
"""

import secrets
import time
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as Http
from starlette.responses import Response
from starlette.routing import Route

from halfbyte.serving.engine import Ask
from halfbyte.serving.http import wire
from halfbyte.serving.http.answers import Choice, usage
from halfbyte.serving.http.refusal import Refusal, naming
from halfbyte.serving.http.service import Service, as_events
from halfbyte.serving.tools import CallForm
from halfbyte.types import Document
from halfbyte.writing.text import TextChunk

# What chat's fields are called here.
_NAMES = {"max_tokens": "max_output_tokens", "reasoning_effort": "reasoning.effort", "messages": "input",
          "response_format": "text.format"}  # fmt: skip


class _InputText(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    type: Literal["input_text", "output_text", "text"]
    text: str


class _InputItem(BaseModel):
    """As it was answered, or as a client writes it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] = "user"
    content: str | list[_InputText] | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = ""
    output: str | list[_InputText] = ""


class _FlatTool(wire.Function):
    type: Literal["function"]
    name: str = ""  # of none that is a function; else chat refuses it


class _FlatChoice(wire.Strict):
    type: Literal["function"]
    name: str


class _FlatFormat(wire.Schema):
    type: Literal["text", "json_object", "json_schema"]
    name: str = ""


class _TextOptions(wire.Strict):
    format: _FlatFormat | None = None


class _Reasoning(wire.Strict):
    effort: str | None = None


class ResponsesRequest(wire.Unused):
    model: str
    input: str | Annotated[list[_InputItem], Field(min_length=1)]
    instructions: str | None = None
    stream: bool | None = None
    stream_options: wire.StreamOptions | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[_FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | _FlatChoice | None = None
    parallel_tool_calls: bool | None = None
    text: _TextOptions | None = None
    reasoning: _Reasoning | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    truncation: Literal["disabled"] | None = None

    def as_chat(self) -> wire.ChatRequest:
        """Raises Refusal: a value that chat would not take either."""
        choice: object = self.tool_choice
        if isinstance(choice, _FlatChoice):
            choice = {"type": "function", "function": {"name": choice.name}}
        form, wanted = None if self.text is None else self.text.format, None
        if form is not None:
            schema = {"name": form.name, "schema": form.schema_, "strict": form.strict}
            wanted = {"type": form.type, "json_schema": schema if form.type == "json_schema" else None}
        document = self.model_dump(include={"model", "temperature", "top_p", "parallel_tool_calls"}) | {
            "messages": self._messages(),
            "max_tokens": self.max_output_tokens,
            "tools": [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools or ()],
            "tool_choice": choice,
            "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
            "response_format": wanted,
        }
        return wire.read(wire.ChatRequest, document)

    def _messages(self) -> list[Document]:
        given = [_InputItem(content=self.input)] if isinstance(self.input, str) else self.input
        messages: list[Document] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        for item in given:
            if item.type == "function_call":  # belongs to the assistant's turn
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
                messages[-1].setdefault("tool_calls", []).append(call)
            elif item.type == "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            elif item.type == "message":
                messages.append({"role": item.role, "content": _text(item.content)})
        return messages


def _text(content: str | list[_InputText] | None) -> str:
    return content if isinstance(content, str) else "".join(piece.text for piece in content or ())


def routes(service: Service) -> list[Route]:
    return [Route("/v1/responses", partial(respond, service), methods=["POST"])]


async def respond(service: Service, http: Http) -> Response:
    asked = wire.read(ResponsesRequest, await http.body())
    with naming(_NAMES):
        ask, form = await service.conversation(asked.as_chat())
    reply = ResponsesReply(asked, ask, form)
    return await service.answer(http, [ask], reply, partial(as_events, named=True) if asked.stream else None)


@dataclass
class ResponsesReply:
    """The items of a response: messages and calls, in their order."""

    asked: ResponsesRequest
    ask: Ask
    form: CallForm | None
    items: list[Document] = field(default_factory=list)
    count: int = 0
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(16)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.choice = Choice(self.form)

    def begin(self) -> list[Document]:
        return [
            self._event(f"response.{kind}", response=self._response("in_progress"))
            for kind in ("created", "in_progress")
        ]

    def add(self, number: int, chunk: TextChunk) -> list[Document]:
        events: list[Document] = []
        for part in self.choice.add(chunk):
            if part.name:
                call = self.choice.calls[part.number]
                events += self._closed()
                events += self._opened(
                    {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": ""}
                )
            elif part.text:
                if not self.items or self.items[-1]["type"] != "message":
                    events += self._closed()
                    events += self._opened({"type": "message", "role": "assistant", "content": []})
                self.items[-1]["content"][0]["text"] += part.text
                events.append(self._of_text("delta", delta=part.text))
            else:
                self.items[-1]["arguments"] += part.arguments
                events.append(self._of_item("function_call_arguments.delta", delta=part.arguments))
        return events

    def end(self) -> list[Document]:
        closed = self._closed()
        response = self.whole()
        return [*closed, self._event(f"response.{response['status']}", response=response)]

    def whole(self) -> Document:
        for item in self.items:
            item["status"] = "completed"
        if self.choice.finish != "length":
            return self._response("completed") | {"completed_at": int(time.time())}
        if self.items:
            self.items[-1]["status"] = "incomplete"
        return self._response("incomplete") | {"incomplete_details": {"reason": "max_output_tokens"}}

    def failed(self, refusal: Refusal) -> Document:
        return self._event("error", **{name: refusal.body["error"][name] for name in ("code", "message", "param")})

    def _opened(self, item: Document) -> list[Document]:
        kind = "msg" if item["type"] == "message" else "fc"
        self.items.append({"id": f"{kind}_{secrets.token_hex(16)}", "status": "in_progress", **item})
        events = [self._whole_item("added")]
        if item["type"] == "message":
            self.items[-1]["content"].append({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
            part = dict(self.items[-1]["content"][0])
            events.append(self._of_item("content_part.added", content_index=0, part=part))
        return events

    def _closed(self) -> list[Document]:
        """The end of the item that is open, if one is."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return []
        item = self.items[-1]
        item["status"] = "completed"
        if item["type"] == "message":
            part = dict(item["content"][0])
            events = [
                self._of_text("done", text=part["text"]),
                self._of_item("content_part.done", content_index=0, part=part),
            ]
        else:
            events = [self._of_item("function_call_arguments.done", arguments=item["arguments"], name=item["name"])]
        return [*events, self._whole_item("done")]

    def _whole_item(self, kind: str) -> Document:
        last = len(self.items) - 1
        return self._event(f"response.output_item.{kind}", output_index=last, item=deepcopy(self.items[last]))

    def _of_text(self, kind: str, **more: object) -> Document:
        return self._of_item(f"output_text.{kind}", content_index=0, logprobs=[], **more)

    def _of_item(self, kind: str, **more: object) -> Document:
        return self._event(f"response.{kind}", output_index=len(self.items) - 1, item_id=self.items[-1]["id"], **more)

    def _event(self, kind: str, **more: object) -> Document:
        self.count += 1
        return {"type": kind, "sequence_number": self.count - 1, **more}

    def _response(self, status: str) -> Document:
        asked, counts = self.asked, usage(len(self.ask.prompt), self.choice.tokens)
        names = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens", "total_tokens": "total_tokens"}
        details = {"input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                   "output_tokens_details": {"reasoning_tokens": 0}}  # fmt: skip
        form = None if asked.text is None or asked.text.format is None else asked.text.format
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": None,
            "incomplete_details": None, "instructions": asked.instructions, "metadata": asked.metadata or {},
            "model": self.ask.model.name, "output": deepcopy(self.items),
            "parallel_tool_calls": asked.parallel_tool_calls is not False, "previous_response_id": None,
            "temperature": self.ask.params.temperature, "top_p": self.ask.params.top_p,
            "max_output_tokens": asked.max_output_tokens, "store": False, "truncation": "disabled",
            "tool_choice": asked.tool_choice.model_dump() if isinstance(asked.tool_choice, _FlatChoice)
                           else asked.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "text": {"format": {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)},
            "usage": None if status == "in_progress" else {names[n]: v for n, v in counts.items()} | details,
        }  # fmt: skip
