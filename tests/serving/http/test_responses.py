"""`/v1/responses` through the official client, whole and as events."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from halfbyte.serving import engine
from tests.serving import served
from tests.serving.http.test_app import Running, wanted
from tests.serving.http.test_app import running as running
from tests.serving.http.test_tools import running as tools_server

talkative = tools_server
FLAT: Any = [{"type": "function", **tool["function"]} for tool in (served.WEATHER, served.PAINT)]


def test_a_text_whole_and_as_events(running: Running) -> None:
    client, right = running.client(), wanted("first", "a large round box", 20)
    made = client.responses.create(model="first", input="a large round box", temperature=0, max_output_tokens=20)
    assert made.output_text == right and made.model == "first" and made.usage is not None
    assert made.usage.input_tokens == len(served.prompt("a large round box"))
    assert made.status == ("incomplete" if made.usage.output_tokens == 20 else "completed")
    events = list(client.responses.create(
        model="first", input=[{"role": "user", "content": [{"type": "input_text", "text": "a large round box"}]}],
        temperature=0, max_output_tokens=20, stream=True,
    ))  # fmt: skip
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == f"response.{made.status}"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == right
    order = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
             "output_item.done"]  # fmt: skip
    assert list(dict.fromkeys(kinds[2:-1])) == [f"response.{kind}" for kind in order]
    assert events[-1].response.output[0].content[0].text == right


def test_calls_whole_as_events_and_their_results(talkative: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "GATHERED_S", 0.0)
    client = talkative.client()
    options: Any = {"model": "first", "input": "red", "tools": FLAT, "parallel_tool_calls": False, "temperature": 0,
                    "tool_choice": {"type": "function", "name": "weather"}}  # fmt: skip
    made = client.responses.create(**options)
    (call,) = made.output
    assert call.type == "function_call" and call.name == "weather" and made.status == "completed"
    assert json.loads(call.arguments)["town"] in ("Oslo", "Bergen")
    events = list(client.responses.create(**options, stream=True))
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments and len(pieces) > 1
    with client.responses.stream(**options) as stream:
        (again,) = stream.get_final_response().output
    assert again.arguments == call.arguments
    talk = [{"role": "user", "content": "red"}, call,
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]  # fmt: skip
    longer = client.responses.create(
        model="first", instructions="be short", input=talk, tools=FLAT, tool_choice="none", max_output_tokens=2
    )
    assert longer.usage is not None and longer.usage.input_tokens > len(served.prompt("red"))


def test_a_schema_is_followed(talkative: Running) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["red", "blue"]}, "strict": True}}
    made = talkative.client().responses.create(model="first", input="red", text=form)
    assert json.loads(made.output_text) in ("red", "blue")


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "previous_response_id: is not known here"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "tools.0.type"),
        ({"input": []}, "input", "input"),
        ({"temperature": 3}, "temperature", "temperature"),
        ({"max_output_tokens": 9000}, "input", "128 tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens", "- max_output_tokens: "),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort", "- reasoning.effort: the chat template"),
    ],
)
def test_what_cannot_be_answered_is_refused(running: Running, change: Any, param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as error:
        running.client().responses.create(**{"model": "first", "input": "red", **change})
    assert (error.value.param or "").startswith(param)
