"""Calls of tools in what a model writes: found whole, and never sent in part."""

from __future__ import annotations

import json
from typing import Any

import pytest

from halfbyte.serving.http import app
from halfbyte.serving.http.answers import Choice, Form, tool_calls
from halfbyte.writing.text import TextChunk
from tests.serving import served

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (CALL, [("weather", {"city": "Oslo"})]),
        (
            f"Let me look. {CALL}{CALL.replace('Oslo', 'Bergen')}",
            [("weather", {"city": c}) for c in ("Oslo", "Bergen")],
        ),
        (CALL.removesuffix("</tool_call>"), [("weather", {"city": "Oslo"})]),
        (CALL.replace('"name"', '"title"'), []),
        (CALL + "<tool_call>{broken}</tool_call>", []),
        ("no call at all", []),
    ],
)
def test_calls_are_found_whole_or_not_at_all(text: str, wanted: list[tuple[str, dict[str, str]]]) -> None:
    found = [call["function"] for call in tool_calls(text)]
    assert [(each["name"], json.loads(each["arguments"])) for each in found] == wanted


def streamed(pieces: list[str]) -> list[Any]:
    form = Form(served.two().by_name["first"], chat=True, calls=True)
    choice, chunks = Choice(), list[Any]()
    for number, text in enumerate(pieces):
        piece = TextChunk(0, text, number + 1, finish="stop" if number == len(pieces) - 1 else None)
        choice.add(piece)
        chunks += app._events(form, 0, piece, choice)
    return [(chunk["choices"][0]["delta"], chunk["choices"][0]["finish_reason"]) for chunk in chunks]


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_stream_sends_what_is_before_a_call_and_then_the_call(size: int) -> None:
    text = f"Looking <b>up</b>: {CALL}"
    sent = streamed([text[i : i + size] for i in range(0, len(text), size)])
    assert "".join(delta.get("content", "") for delta, _ in sent) in ("Looking <b>up</b>: ", "")
    calls = [delta["tool_calls"] for delta, _ in sent if "tool_calls" in delta]
    assert [[call["function"]["name"] for call in each] for each in calls] == [["weather"]]
    assert sent[-1] == ({}, "tool_calls")


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_what_only_looks_like_a_call_is_sent(size: int) -> None:
    text = "a < b, <tool_box> and <tool_call>{broken}"
    sent = streamed([text[i : i + size] for i in range(0, len(text), size)])
    assert "".join(delta.get("content", "") for delta, _ in sent) == text
    assert sent[-1] == ({}, "stop")
