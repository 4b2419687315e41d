"""Tools and structured answers through the official client: whatever the weights are, calls are what was offered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from halfbyte.serving import engine
from halfbyte.serving.engine import Engine
from tests.serving import served
from tests.serving.http.test_app import Running, asked

TOOLS = [served.WEATHER, served.PAINT]


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    made = Running(Engine(served.talkative()))
    yield made
    made.end()


def valid(call: Any) -> str:
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert arguments.keys() == {"town", "days"} and arguments["town"] in ("Oslo", "Bergen")
        assert 1 <= arguments["days"] <= 9
    else:
        assert call.function.name == "paint" and arguments in ({"colour": "red"}, {"colour": "blue"})
    return str(call.function.name)


def create(running: Running, **options: Any) -> Any:
    given: Any = {"model": "first", "messages": asked("red"), "tools": TOOLS, "max_tokens": 600, "seed": 3}
    return running.client().chat.completions.create(**given | options)


NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_call_that_has_to_be_is_one_of_those_offered(running: Running, choice: Any, parallel: bool) -> None:
    many = []
    options = {"tool_choice": choice, "parallel_tool_calls": parallel, "temperature": 1.5, "max_tokens": 3000}
    for seed in range(3):
        made = create(running, **options, seed=seed)
        (answer,) = made.choices
        names = [valid(call) for call in answer.message.tool_calls]
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        assert len({call.id for call in answer.message.tool_calls}) == len(names)
        many.append(len(names))
        if choice == NAMED:
            assert names == ["weather"]
    assert max(many) == 1 or (parallel and choice == "required")


def test_a_stream_has_a_name_first_and_then_pieces_of_arguments(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "GATHERED_S", 0.0)
    options = {"tool_choice": "required", "parallel_tool_calls": False}
    whole = create(running, **options).choices[0].message.tool_calls[0].function
    chunks = list(create(running, **options, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    first, *pieces = deltas
    assert (first.function.name, first.function.arguments, first.index) == (whole.name, "", 0) and first.id
    assert all(piece.function.name is None and piece.id is None and piece.index == 0 for piece in pieces)
    assert "".join(piece.function.arguments for piece in pieces) == whole.arguments
    assert len(pieces) > 1 and chunks[-1].choices[0].finish_reason == "tool_calls"
    with running.client().chat.completions.stream(
        model="first", messages=asked("red"), tools=TOOLS, max_tokens=600, seed=3, **options
    ) as stream:
        final = stream.get_final_completion().choices[0].message.tool_calls
    assert final is not None and final[0].function.arguments == whole.arguments


def test_strict_tools_are_followed_where_a_call_is_begun(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is free text up to a mark; after it only calls that were offered."""
    strict = [{**tool, "function": tool["function"] | {"strict": True}} for tool in TOOLS]
    tokens = running.engine.models.by_name["first"].tokenizer("<tool_call>")["input_ids"]
    bias = {str(token): 30.0 for token in tokens}
    seen = 0
    for seed in range(6):
        made = create(running, tools=strict, parallel_tool_calls=False, logit_bias=bias, seed=seed, max_tokens=400)
        message = made.choices[0].message
        if made.choices[0].finish_reason == "tool_calls":
            seen += len([valid(call) for call in message.tool_calls])
    free = create(running, tools=strict, tool_choice="none", max_tokens=5).choices[0]
    assert free.message.tool_calls is None and free.finish_reason in ("stop", "length")
    auto = create(running, tools=strict, max_tokens=5).choices[0]
    assert auto.finish_reason in ("stop", "length") and seen >= 0


def test_a_conversation_goes_on_after_a_call(running: Running) -> None:
    message = create(running, tool_choice=NAMED).choices[0].message
    talk = [*asked("red"), message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}]
    longer = create(running, messages=talk, max_tokens=3)
    without = create(running, messages=talk, max_tokens=3, tools=openai.NOT_GIVEN)
    assert longer.usage.prompt_tokens > without.usage.prompt_tokens > len(served.prompt("red"))


def test_an_answer_is_of_its_schema_or_a_call(running: Running) -> None:
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"enum": ["red", "blue"]}, "strict": True},
    }
    for seed in range(5):
        message = create(running, response_format=form, parallel_tool_calls=False, seed=seed).choices[0].message
        assert [valid(call) for call in message.tool_calls or ()] or json.loads(message.content) in ("red", "blue")


def test_llamas_form_is_written_and_read(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = running.engine.models.by_name["first"].tokenizer
    template = '{{ tools | tojson }}{# {"name": function name, "parameters": ...} #}' + tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", template)
    calls = create(running, tool_choice="required", temperature=1.5).choices[0].message.tool_calls
    assert [valid(call) for call in calls]


def test_a_tokenizer_that_speaks_no_bundled_template_has_no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfbyte.serving.http.service.with_tools", lambda tokenizer: None)
    made = Running(Engine(served.two()))
    try:
        with pytest.raises(openai.BadRequestError, match="neither the chat template of first nor a bundled one"):
            create(made)
    finally:
        made.end()
