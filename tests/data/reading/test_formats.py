"""Five shapes of record become the same rows; what does not fit is named with its field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from halfbyte.data.reading.formats import ChatMessage, Row, detect_format, parser
from halfbyte.data.reading.problems import BadRow

TALK = (ChatMessage("user", "q"), ChatMessage("assistant", "a"))
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def row(record: dict[str, Any], data: Any) -> Row:
    return parser(detect_format(record, data), data, record)("x:1", record)


def said(record: dict[str, Any], data: Any) -> str:
    with pytest.raises(BadRow) as error:
        row(record, data)
    return str(error.value)


MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHARED = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]

SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"messages": MESSAGES}, {}),
    ({"conversations": SHARED}, {}),
    ({"messages": SHARED}, {}),
    ({"conversations": MESSAGES}, {}),
    ({"dialog": MESSAGES}, {"fields": {"messages": "dialog"}}),
    ({"chat": SHARED}, {"fields": {"conversations": "chat"}}),
    ({"messages": [{"who": "user", "said": "q"}, {"who": "assistant", "said": "a"}]},
     {"fields": {"role": "who", "content": "said"}, "format": "messages"}),
    ({"instruction": "q", "input": "", "output": "a"}, {}),
    ({"instruction": "q", "output": "a"}, {}),
    ({"task": "q", "reply": "a"}, {"fields": {"instruction": "task", "output": "reply"}}),
    ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, {}),
    ({"prompt": "q", "completion": MESSAGES[1:]}, {}),
    ({"prompt": MESSAGES[:1], "completion": "a"}, {}),
    ({"asked": MESSAGES[:1], "said": MESSAGES[1:]}, {"fields": {"prompt": "asked", "completion": "said"}}),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, MESSAGES[1]]}, {}),
]  # fmt: skip


@pytest.mark.parametrize(("record", "asked"), SAME)
def test_the_same_talk_in_every_format(make_data: Any, record: dict[str, Any], asked: dict[str, Any]) -> None:
    assert row(record, make_data(**asked)) == Row("x:1", TALK)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"conversations": SHARED}, "sharegpt"),
        ({"conversations": []}, "sharegpt"),
        ({"messages": SHARED}, "sharegpt"),
        ({"messages": [{"role": "user", "from": "a"}]}, "messages"),
        ({"messages": "no list"}, "messages"),
        ({"conversations": MESSAGES}, "messages"),
        ({"messages": MESSAGES, "conversations": SHARED}, "messages"),
        ({"instruction": 1, "output": 1, "text": 1}, "alpaca"),
        ({"text": "a", "id": 1}, "text"),
    ],
)
def test_formats(make_data: Any, record: dict[str, Any], expected: str) -> None:
    assert detect_format(record, make_data()) == expected


def test_alpaca_with_an_input_and_a_system_column(make_data: Any) -> None:
    record = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."}
    assert row(record, make_data()).messages == (
        ChatMessage("system", "Be brief."), ChatMessage("user", "Add.\n\n1 2"), ChatMessage("assistant", "3"),
    )  # fmt: skip
    pair = {"prompt": "q", "completion": "a", "system": "s"}
    assert row(pair, make_data()).messages == (ChatMessage("system", "s"), *TALK)
    assert row({"prompt": "q", "completion": "a", "system": None}, make_data()).prompt == "q"
    twice = {"messages": [{"role": "system", "content": "t"}, *MESSAGES], "system": "s"}
    assert said(twice, make_data()) == "system: the first message is a system message too; which one is meant?"


def test_text(make_data: Any) -> None:
    assert row({"text": "a b"}, make_data()) == Row("x:1", text="a b")
    assert row({"body": "a b"}, make_data(fields={"text": "body"})).text == "a b"
    assert said({"text": ["a"]}, make_data()) == "text: a string is needed, got a list"


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}', {"a": 1, "b": None}])
def test_tool_calls_in_openai_style(make_data: Any, arguments: Any) -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}]
    talk = [
        MESSAGES[0], {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "", "tool_call_id": "c1"}, MESSAGES[1],
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "add"}}]
    for given in (tools, json.dumps(tools)):
        found = row({"messages": talk, "tools": given}, make_data())
        assert found.tools == tuple(tools)
        assert found.messages is not None
        assert found.messages[1] == ChatMessage("assistant", "", more={"tool_calls": [{**CALL, "id": "c1"}]})
        assert found.messages[2].to_template() == {"role": "tool", "content": "", "tool_call_id": "c1"}


def test_a_null_that_a_call_says_itself_stays(make_data: Any) -> None:
    call = {"function": {"name": "add", "arguments": '{"a": null, "b": {"c": null}}'}}
    found = row({"messages": [MESSAGES[0], {"role": "assistant", "tool_calls": [call]}]}, make_data())
    assert found.messages is not None
    said_itself = found.messages[1].more["tool_calls"][0]["function"]["arguments"]
    assert said_itself == {"a": None, "b": {"c": None}}


def test_tool_calls_in_sharegpt(make_data: Any) -> None:
    talk = [
        SHARED[0], {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"}, SHARED[1],
    ]  # fmt: skip
    found = row({"conversations": talk, "system": "s", "tools": "[]"}, make_data())
    assert found.messages == (
        ChatMessage("system", "s"), TALK[0], ChatMessage("assistant", "", more={"tool_calls": [CALL]}),
        ChatMessage("tool", "3"), TALK[1],
    )  # fmt: skip
    assert found.tools is None


def test_thoughts_have_two_names(make_data: Any) -> None:
    for name in ("reasoning_content", "thinking"):
        found = row({"messages": [MESSAGES[0], {**MESSAGES[1], name: "hm"}]}, make_data()).messages
        assert found is not None and found[1].more == {"reasoning_content": "hm", "thinking": "hm"}


@pytest.mark.parametrize(("weight", "train"), [(0, False), (1, True), (None, True)])
def test_openai_weights(make_data: Any, weight: Any, train: bool) -> None:
    found = row({"messages": [MESSAGES[0], {**MESSAGES[1], "weight": weight}]}, make_data()).messages
    assert found is not None and found[1].train is train


def test_of_a_conversational_prompt_nothing_is_trained(make_data: Any) -> None:
    """As TRL does: the loss is that of the completion."""
    later = [{"role": "tool", "content": "3"}, {"role": "assistant", "content": "b"}]
    record = {"prompt": [*MESSAGES, {"role": "user", "content": "r"}], "completion": [*MESSAGES[1:], *later]}
    found = row(record, make_data()).messages
    assert found is not None and [m.content for m in found] == ["q", "a", "r", "a", "3", "b"]
    assert [m.train for m in found if m.role == "assistant"] == [False, True, True]


def test_developer_is_openais_newer_name_of_system(make_data: Any) -> None:
    for record in (
        {"messages": [{"role": "developer", "content": "s"}, *MESSAGES]},
        {"conversations": [{"from": "developer", "value": "s"}, *SHARED]},
    ):
        assert row(record, make_data()).messages == (ChatMessage("system", "s"), *TALK)


@pytest.mark.parametrize(("label", "text"), [(0, "0"), (3, "3"), (-12, "-12")])
def test_a_label_that_is_a_whole_number_is_its_digits(make_data: Any, label: int, text: str) -> None:
    assert row({"prompt": "q", "completion": label}, make_data()).completion == text
    found = row({"instruction": "q", "output": label}, make_data()).messages
    assert found is not None and found[1].content == text


A = MESSAGES[1]
WRONG = [
    ({"messages": [{**A, "tool_calls": {}}]}, "messages[0].tool_calls: a list is needed, got an object"),
    ({"messages": [{**A, "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]},
     "messages[0].tool_calls[0].arguments: JSON is needed, got the string 'x'"),
    ({"messages": [{**A, "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
     "messages[0].tool_calls[0].arguments: an object, or its JSON, is needed, got a list"),
    ({"messages": [{**A, "tool_calls": [{"function": {}}]}]},
     "messages[0].tool_calls[0].name: missing; the row has no keys"),
    ({"messages": [{"role": "user", "content": "q", "thinking": "hm"}, A]},
     "messages[0]: only an assistant thinks, this message is of user"),
    ({"messages": [{**A, "thinking": "a", "reasoning_content": "b"}]},
     "messages[0]: reasoning_content and thinking are two names of one thing, and differ"),
    ({"messages": [{**A, "weight": -0.5}]}, "messages[0].weight: a number from 0 on is needed, got the number -0.5"),
    ({"messages": [{**A, "mood": "good"}]},
     ("messages[0]: 'mood' is not supported; allowed: role, content, train, tool_calls, tool_call_id, name, "
      "reasoning_content, thinking, weight, train_detail")),
    ({"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]},
     "messages[0].content[0]: an object with type text and a text is needed, got an object"),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content: a string is needed, got null"),
    ({"messages": MESSAGES, "tools": "x"}, "tools: JSON is needed, got the string 'x'"),
    ({"messages": MESSAGES, "tools": [1]}, "tools: a list of tools (objects), or its JSON, is needed, got a list"),
    ({"conversations": [{"from": "humn", "value": "q"}, SHARED[1]]},
     ("conversations[0].from: one of human, user, gpt, assistant, chatgpt, bard, bing, model, system, tool, "
      "observation, function_response, function_call, developer is needed, got 'humn'; did you mean 'human'?")),
    ({"conversations": [SHARED[1], SHARED[0]]},
     "conversations[1].from: the last message must be of the assistant, got 'human'"),
    ({"conversations": "q"}, "conversations: a list of messages is needed, got the string 'q'"),
    ({"instruction": "q", "output": 3.5}, "output: a string is needed, got the number 3.5"),
    ({"instruction": "q", "output": [True]}, "output: a string is needed, got a list"),
    ({"prompt": MESSAGES[:1], "completion": MESSAGES[:1]}, "completion: the last message must be of the assistant"),
    ({"prompt": MESSAGES[:1], "completion": []}, "completion: the last message must be of the assistant"),
    ({"prompt": ["q"], "completion": "a"}, "prompt[0]: an object with role and content is needed, got the string 'q'"),
    ({"instruction": "q", "input": [], "output": "a"}, "input: a string is needed, got a list"),
    ({"instruction": "q", "output": " "}, "output: only white space"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "text"), WRONG)
def test_what_does_not_fit_is_named(make_data: Any, record: dict[str, Any], text: str) -> None:
    assert said(record, make_data()) == text
