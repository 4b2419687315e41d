"""OpenAI's requests, read strictly.

A field that would change the answer and cannot be followed is refused by name; those that change nothing are taken.
Source: the `openai` package, 3.57: types/chat, types/completion.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import ErrorDetails, from_json

from halfbyte.serving.http.refusal import Refusal
from halfbyte.serving.tools import CallRules
from halfbyte.types import Document
from halfbyte.writing.sampling import SamplingParams

MOST_CHOICES, MOST_STOPS, LONGEST_STOP, MOST_LIKELY = 16, 16, 1024, 20
Penalty = Annotated[float, Field(ge=-2, le=2)]
Asked = TypeVar("Asked", bound="Strict")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Unused(Strict):
    """What changes nothing here. Nothing is stored."""

    user: str | None = None
    metadata: Document | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class Request(Unused):
    """What both kinds of request have."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)] | None = None
    # vLLM's
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None

    @field_validator("stop")
    @classmethod
    def _stops_are_few(cls, stop: str | list[str] | None) -> str | list[str] | None:
        given = [stop] if isinstance(stop, str) else stop or []
        if len(given) > MOST_STOPS or any(len(text) > LONGEST_STOP for text in given):
            raise ValueError(f"at most {MOST_STOPS} strings of at most {LONGEST_STOP:,} characters")
        return stop

    def sampling(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        """As OpenAI has it, a temperature of 1 where none is asked for."""
        return SamplingParams(
            max_tokens,
            1.0 if self.temperature is None else self.temperature,
            self.top_p or 1.0,
            self.seed,
            self.stops,
            logprobs,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=tuple(sorted((self.logit_bias or {}).items())),
        )

    @property
    def stops(self) -> tuple[str, ...]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class _Part(Strict):
    type: Literal["text"]
    text: str


class _CalledFunction(Strict):
    name: str
    arguments: str


class _Call(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _CalledFunction
    index: int | None = None


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[_Call] | None = None
    content: Annotated[str | list[_Part] | None, Field(validate_default=True)] = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    annotations: Annotated[list[Document], Field(max_length=0)] | None = None
    tool_call_id: str | None = None

    @field_validator("content")
    @classmethod
    def _says_something(cls, content: object, info: ValidationInfo) -> object:
        given = info.data
        calls = given.get("role") == "assistant" and given.get("tool_calls")
        if content is None and not calls and {"role", "tool_calls"} <= given.keys():
            raise ValueError("a text or a list of parts is needed; only an assistant's tool_calls need none")
        return content

    def for_template(self) -> Document:
        """As chat templates read it: one text; arguments of calls as objects."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        more = self.model_dump(include={"name", "tool_call_id", "reasoning_content"}, exclude_none=True)
        message: Document = {"role": "system" if self.role == "developer" else self.role, "content": text, **more}
        if self.tool_calls:
            calls = [{"name": c.function.name, "arguments": parsed(c.function.arguments)} for c in self.tool_calls]
            ids = [call.id for call in self.tool_calls]
            message["tool_calls"] = [
                {"type": "function", "function": f, **({"id": i} if i else {})} for f, i in zip(calls, ids, strict=True)
            ]
        return message


class Function(Strict):
    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: Document | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class _Name(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: _Name


class Schema(Strict):
    name: str
    description: str | None = None
    schema_: Document | None = Field(None, alias="schema")
    strict: bool | None = None


class Format(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("json_schema needs json_schema.schema")
        return self

    @property
    def schema_wanted(self) -> Document | None:
        if self.type == "json_object":
            return {"type": "object"}
        return self.json_schema.schema_ if self.json_schema is not None and self.type == "json_schema" else None


class ChatRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    response_format: Format | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: Document | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = [tool.function.name for tool in self.tools or ()]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: there is no tool {self.tool_choice.function.name!r} in tools")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: required needs tools")
        return self

    @property
    def rules(self) -> CallRules:
        """Which calls the answer may have."""
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()] if self.tool_choice != "none" else []
        choice, several = self.tool_choice, self.parallel_tool_calls is not False
        schema = self.response_format.schema_wanted if self.response_format is not None else None
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
            return CallRules(tools, must=True, several=False)
        if choice == "required":
            return CallRules(tools, must=True, several=several)
        return CallRules(tools, several=several, schema=schema)


class CompletionRequest(Request):
    prompt: str | Annotated[list[str] | list[int] | list[list[int]], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return self.prompt


def read(kind: type[Asked], body: bytes | Document) -> Asked:
    """A body, or what has been read already. Raises Refusal: names the field and what is allowed."""
    try:
        return kind.model_validate_json(body) if isinstance(body, bytes) else kind.model_validate(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        if problems[0]["type"] == "json_invalid":
            raise Refusal(400, f"the body is not JSON: {problems[0]['msg']}", code="invalid_json") from None
        there = from_json(body) if isinstance(body, bytes) else body
        places = [tuple(_place(each, there)) for each in problems]
        # of a field that may have several shapes the problem inside of the one that it has
        inside = [i for i, place in enumerate(places) if place[: len(places[0])] == places[0]]
        first = problems[best := max(inside, key=lambda i: len(places[i]))]
        where = ".".join(places[best])
        what = "is not known here" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        code = "unsupported_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        message = f"{where}: {what}{more}" if where else f"{what}{more}"
        raise Refusal(400, message, code=code, param=where or None) from None


_ABSENT = ("missing", "value_error")  # what may be wrong with a field that the request does not have


def _place(problem: ErrorDetails, there: object) -> Iterator[str]:
    """Where a problem is, as the request has it: without the names of pydantic's alternatives."""
    *inside, last = problem["loc"] or ("",)
    for part in (*inside, last):
        if isinstance(there, list) and isinstance(part, int) and part < len(there):
            there = there[part]
        elif isinstance(there, dict) and (part in there or (part == last and problem["type"] in _ABSENT)):
            there = there.get(part)
        else:
            continue
        yield str(part)


def parsed(text: str) -> object:
    """What a text says as JSON; itself where it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text
