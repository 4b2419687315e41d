"""Other people's clients, as they are, against the server: LangChain, LiteLLM, instructor in each mode, Ollama's.

A tiny random model: what is valid is so by the grammar; where a client leaves it to the model, a text is dictated to
it. They are in the extra `clients`; without it these are skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import pytest
import torch
from pydantic import BaseModel, ConfigDict, Field

from halfbyte.serving.engine import Engine
from halfbyte.serving.http.service import Service
from tests.serving import served
from tests.serving.http.test_app import Running

pytestmark = pytest.mark.slow  # make test-slow installs the clients
TALK: Any = [{"role": "user", "content": "red"}]


class Trip(BaseModel):
    """A trip."""

    model_config = ConfigDict(extra="forbid")

    town: Literal["Oslo", "Bergen"]
    days: int = Field(ge=1, le=9)


class Paint(BaseModel):
    """A colour."""

    model_config = ConfigDict(extra="forbid")

    colour: Literal["red", "blue"]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    made = Running(Engine(served.talkative()))
    yield made
    made.end()


def chat_model(running: Running, **options: Any) -> Any:
    return pytest.importorskip("langchain_openai").ChatOpenAI(
        model="first", base_url=f"{running.url}/v1", api_key="none", max_retries=0, **options
    )


@pytest.mark.parametrize("responses", [False, True])
@pytest.mark.parametrize(
    ("method", "strict"),
    [
        ("function_calling", None),
        ("function_calling", True),
        ("json_schema", None),
        ("json_schema", True),
        ("json_mode", None),
    ],
)
def test_langchains_structured_output(running: Running, method: str, strict: bool | None, responses: bool) -> None:
    model = chat_model(running, use_responses_api=responses)
    schema = Trip
    if method == "json_mode":  # any object: whether it is whole is the model's to decide
        raw = model.bind(max_tokens=40).with_structured_output(schema, method=method, include_raw=True).invoke("red")
        assert raw["raw"].text.startswith("{")
        return
    options = {} if strict is None else {"strict": strict}
    assert isinstance(model.with_structured_output(schema, method=method, **options).invoke("red"), Trip)


@pytest.mark.parametrize("responses", [False, True])
def test_langchains_tools_whole_and_streamed(running: Running, responses: bool) -> None:
    model = chat_model(running, use_responses_api=responses)
    bound = model.bind_tools([Trip, Paint], tool_choice="any", parallel_tool_calls=False)
    bound = bound.bind(temperature=0)
    (call,) = bound.invoke("red").tool_calls
    (Trip if call["name"] == "Trip" else Paint).model_validate(call["args"])
    whole: Any = None
    for chunk in bound.stream("red"):
        whole = chunk if whole is None else whole + chunk
    assert [(one["name"], one["args"]) for one in whole.tool_calls] == [(call["name"], call["args"])]
    strict = model.bind_tools([Trip], tool_choice="Trip", strict=True).invoke("red")
    Trip.model_validate(strict.tool_calls[0]["args"])
    from langchain_core.messages import HumanMessage, ToolMessage

    talk = [HumanMessage("red"), strict, ToolMessage("rain", tool_call_id=strict.tool_calls[0]["id"])]
    assert (
        model.bind_tools([Trip], tool_choice="none").bind(max_tokens=3).invoke(talk).usage_metadata["output_tokens"]
        <= 3
    )
    text = model.bind(max_tokens=8, temperature=0)
    assert "".join(chunk.text for chunk in text.stream("red")) == text.invoke("red").text


# These send a schema, which a grammar keeps: whatever the model would write, the answer is one.
KEPT = ["TOOLS", "TOOLS_STRICT", "FUNCTIONS", "JSON_O1", "JSON_SCHEMA", "RESPONSES_TOOLS",
        "RESPONSES_TOOLS_WITH_INBUILT_TOOLS"]  # fmt: skip


@pytest.mark.parametrize("mode", KEPT)
def test_instructors_modes_that_send_a_schema(running: Running, mode: str) -> None:
    instructor = pytest.importorskip("instructor")
    client = instructor.from_openai(running.client(), mode=instructor.Mode[mode])
    options: Any = {"max_output_tokens": 400} if "RESPONSES" in mode else {"max_tokens": 400}
    made = client.chat.completions.create(model="first", messages=TALK, response_model=Trip, max_retries=0, **options)
    assert isinstance(made, Trip)


@dataclass
class Dictation:
    """A `Constraint` under which a model writes one text, if what the request asks for allows it."""

    tokens: list[int]
    inner: Any = None

    def allowed(self, size: int) -> torch.Tensor:
        only = torch.zeros(size, dtype=torch.bool)
        only[self.tokens[0]] = True
        return only if self.inner is None else only & self.inner.allowed(size)

    def take(self, token: int) -> bool:
        self.tokens.pop(0)
        whole = self.inner is not None and self.inner.take(token)
        return whole or not self.tokens


def dictate(monkeypatch: pytest.MonkeyPatch, text: str) -> list[Any]:
    """Have a model write `text` to what comes, as one that does what it is asked. Returns the requests that came."""
    came, conversation = list[Any](), Service.conversation

    async def with_text(service: Service, asked: Any) -> Any:
        came.append(asked)
        ask, form = await conversation(service, asked)
        tokens = list(ask.model.tokenizer(text, add_special_tokens=False)["input_ids"])
        return replace(ask, grammar=cast(Any, Dictation(tokens, ask.grammar))), form

    monkeypatch.setattr(Service, "conversation", with_text)
    return came


TRIP = '{"town": "Oslo", "days": 3}'


@pytest.mark.parametrize(
    ("mode", "answer"), [("JSON", TRIP), ("MD_JSON", f"Here it is:\n```json\n{TRIP}\n```\nEnjoy your trip!")]
)
def test_instructors_modes_that_only_tell_the_model_of_the_schema(
    running: Running, mode: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON asks for some object, MD_JSON for nothing; the schema is in the prompt. So a model has to follow it."""
    instructor = pytest.importorskip("instructor")
    client = instructor.from_openai(running.client(), mode=instructor.Mode[mode])
    came = dictate(monkeypatch, answer)
    made = client.chat.completions.create(
        model="first", messages=TALK, response_model=Trip, max_retries=0, max_tokens=400
    )
    assert (made.town, made.days) == ("Oslo", 3)
    assert (came[0].response_format is not None and came[0].response_format.type == "json_object") == (mode == "JSON")


def test_instructors_parallel_tools(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends tools with `tool_choice: auto`: whether they are called is the model's choice."""
    instructor = pytest.importorskip("instructor")
    calls = [("Trip", TRIP), ("Paint", '{"colour": "red"}')]
    text = "\n".join(f'<tool_call>\n{{"name": "{name}", "arguments": {body}}}\n</tool_call>' for name, body in calls)
    client = instructor.from_openai(running.client(), mode=instructor.Mode.PARALLEL_TOOLS)
    dictate(monkeypatch, text)
    made = client.chat.completions.create(
        model="first", messages=TALK, response_model=Iterable[Trip | Paint], max_tokens=400, max_retries=0
    )
    assert [one.model_dump() for one in made] == [{"town": "Oslo", "days": 3}, {"colour": "red"}]


def test_instructors_partial_answers(running: Running) -> None:
    instructor = pytest.importorskip("instructor")
    streaming = instructor.from_openai(running.client(), mode=instructor.Mode.TOOLS)
    parts = streaming.chat.completions.create_partial(model="first", messages=TALK, response_model=Trip, max_tokens=400)
    assert Trip.model_validate(list(parts)[-1].model_dump())


def test_litellm(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network when it is imported
    litellm = pytest.importorskip("litellm")
    server = {"model": "openai/first", "api_base": f"{running.url}/v1", "api_key": "none"}
    options: Any = {**server, "messages": TALK, "seed": 1}
    made = litellm.completion(**options, tools=[served.WEATHER], tool_choice="required", parallel_tool_calls=False)
    Trip.model_validate_json(made.choices[0].message.tool_calls[0].function.arguments)
    chunks = list(litellm.completion(
        **options, tools=[served.WEATHER], tool_choice=served.NAMED, stream=True, top_k=5, min_p=0.01,
    ))  # fmt: skip
    built = litellm.stream_chunk_builder(chunks)
    Trip.model_validate_json(built.choices[0].message.tool_calls[0].function.arguments)
    text = litellm.completion(**options, response_format=Trip).choices[0].message.content
    Trip.model_validate_json(text)
    answer = litellm.responses(**server, input="red", max_output_tokens=16)
    assert answer.usage.output_tokens <= 16


def test_litellm_as_to_ollama(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends JSON without saying so."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")
    options: Any = {"model": "ollama_chat/first", "api_base": running.url, "messages": TALK, "seed": 1}
    Trip.model_validate_json(litellm.completion(**options, response_format=Trip).choices[0].message.content)
    brief = {**options, "max_tokens": 6, "temperature": 0}
    whole = litellm.completion(**brief).choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(**brief, stream=True)) == whole
    assert litellm.completion(**brief, tools=[served.WEATHER]).usage.completion_tokens <= 6


def test_ollamas_client(running: Running) -> None:
    ollama = pytest.importorskip("ollama")
    client = ollama.Client(host=running.url)
    assert [one.model for one in client.list().models] == ["first", served.BASE]
    assert "tools" in client.show("first").capabilities
    made = client.chat("first", TALK, format=Trip.model_json_schema(), options={"seed": 1})
    Trip.model_validate_json(made.message.content)
    parts = list(client.chat("first", TALK, stream=True, options={"num_predict": 6, "temperature": 0}))
    whole = client.chat("first", TALK, options={"num_predict": 6, "temperature": 0})
    assert "".join(part.message.content or "" for part in parts) == whole.message.content and parts[-1].done
    assert client.chat("first", TALK, tools=[served.WEATHER], options={"num_predict": 5}).done_reason in (
        "stop",
        "length",
    )
    with pytest.raises(ollama.ResponseError, match="there is no model 'third'"):
        client.chat("third", TALK)
