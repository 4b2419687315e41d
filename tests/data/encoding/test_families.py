"""Masks on twelve families' chat templates equal a reference that renders by hand and labels token by token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.data.encoding.examples import IGNORED
from halfbyte.data.reading.formats import ChatMessage, Row
from tests.data.encoding.families import FAMILIES, Family, reference
from tests.data.in_memory import encode

MASKS = ("completion", "assistant", "all")
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"a": "integer"}}}]


def said(role: str, content: str, train: bool = True, **more: Any) -> ChatMessage:
    if "thinking" in more:
        more["reasoning_content"] = more["thinking"]
    return ChatMessage(role, content, train, more)


def call(number: int, *, content: str = "", train: bool = True, **given: Any) -> ChatMessage:
    made = {"id": f"call{number:05}", "type": "function", "function": {"name": "add", "arguments": given}}
    return said("assistant", content, train, tool_calls=[made])


def result(number: int, content: str) -> ChatMessage:
    return said("tool", content, tool_call_id=f"call{number:05}")


ONE = (said("user", "Hello there"), said("assistant", "I am fine."))
TWO = (*ONE, said("user", "and what is the answer?"), said("assistant", "48 clips\n\nin May"))
SPACED = (said("user", " Hi\n"), said("assistant", "\n  fine \n\n"), said("user", "b "), said("assistant", " 7\n"))
ECHO = (said("user", "a"), said("assistant", "a"), said("user", "a"), said("assistant", "a"))
UNTRAINED = (*TWO[:1], said("assistant", "no", train=False), *TWO[2:], said("user", "c"), said("assistant", "d"))
TOOLED = (said("user", "1 + 2?"), call(1, a=1, b='é "x"'), result(1, "3"), said("assistant", "It is 3."))
TOOLED_TWICE = (*TOOLED, said("user", "And 3 + 4?"), call(2, a=3), result(2, "7"), said("assistant", "7, of course."))
CHAIN = (said("user", "q"), call(1, a=1), result(1, "3"), call(2, a=2), result(2, "5"), said("assistant", "5"))
ENDS_WITH_A_CALL = (said("user", "1 + 2?"), call(1))
THOUGHT = (
    said("user", "a"),
    said("assistant", "yes", thinking="hm"),
    said("user", "b"),
    said("assistant", "no", thinking="oh"),
)
THOUGHT_IN_TEXT = (
    said("user", "a"), said("assistant", "<think>\nhm\n</think>\n\nyes"), said("user", "b"), said("assistant", "no"),
)  # fmt: skip
THOUGHT_AND_TOOLED = (
    said("user", "a"), said("assistant", "", thinking="call it", tool_calls=TOOLED[1].more["tool_calls"]),
    result(1, "3"), said("assistant", "", thinking="again", tool_calls=call(2, a=2).more["tool_calls"]), result(2, "5"),
    said("assistant", "5", thinking="so 5"),
)  # fmt: skip
THEN_ASKED_AGAIN = (*THOUGHT_AND_TOOLED, said("user", "sure?"), said("assistant", "yes", thinking="yes"))

TWO_CALLS = call(1, a=1, b=[2, None]).more["tool_calls"] + call(2, a={"é": "x"}).more["tool_calls"]
SEVERAL = (
    said("user", "q"), said("assistant", "Both.", tool_calls=TWO_CALLS), result(1, "3"), result(2, '{"n": 5}'),
    said("assistant", "8"), said("user", "again"), said("assistant", "", tool_calls=TWO_CALLS),
)  # fmt: skip
ONE_CALL_A_TURN = ("llama3", "mistral", "gpt_oss")

PLAIN = {"one": ONE, "two": TWO, "spaced": SPACED, "echo": ECHO, "untrained": UNTRAINED}
WITH_TOOLS = {"tooled": TOOLED, "twice": TOOLED_TWICE, "chain": CHAIN, "ends with a call": ENDS_WITH_A_CALL}
WITH_THOUGHTS = {
    "thought": THOUGHT, "in text": THOUGHT_IN_TEXT, "tooled": THOUGHT_AND_TOOLED, "asked again": THEN_ASKED_AGAIN,
}  # fmt: skip


def cases() -> list[Any]:
    found = []
    for family in FAMILIES.values():
        talks = [(n, t, None) for n, t in PLAIN.items()]
        talks += [(f"system {n}", (said("system", "Be brief."), *t), None) for n, t in PLAIN.items()]
        if family.tools:
            talks += [(f"tools {n}", t, TOOLS) for n, t in WITH_TOOLS.items()]
            talks += [(f"tools, system {n}", (said("system", "Be brief."), *t), TOOLS) for n, t in WITH_TOOLS.items()]
        if family.tools and family.name not in ONE_CALL_A_TURN:
            talks += [("several calls", SEVERAL, TOOLS)]
        if family.thinks:
            talks += [
                (f"thoughts {n}", t, TOOLS if "t" in n[:1] or n == "asked again" else None)
                for n, t in WITH_THOUGHTS.items()
                if n != "in text" or family.name not in ("gpt_oss", "qwen-tools")  # as it takes them (test_thoughts.py)
            ]
        found += [pytest.param(family, t, tools, id=f"{family.name}-{n}") for n, t, tools in talks]
    return found  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(make_byte_level: Any) -> dict[str, Any]:
    return {
        f.name: make_byte_level(f.template, eos=f.eos, bos=f.bos, special=f.special, plain=f.plain)
        for f in FAMILIES.values()
    }


@pytest.mark.parametrize(("family", "talk", "tools"), cases())
def test_masks_equal_the_reference(
    tokenizers: Any, make_data: Any, family: Family, talk: Sequence[ChatMessage], tools: Any
) -> None:
    tokenizer = tokenizers[family.name]
    row = Row("t.jsonl:1", messages=tuple(talk), tools=None if tools is None else tuple(tools))
    whole = "".join(text for text, _ in family.write(talk, tools))
    rendered = tokenizer.apply_chat_template([m.to_template() for m in talk], tools=tools, tokenize=False)
    assert whole == rendered, "the reference does not write what the template writes"
    for mask in MASKS:
        if mask == "completion" and not talk[-1].train:
            continue
        (example,) = encode([row], tokenizer, make_data(mask=mask, max_length=10_000)).examples
        ids, labels = reference(family, talk, tools, mask, tokenizer)
        assert tokenizer.decode(example.input_ids) == tokenizer.decode(ids) == whole
        assert (list(example.input_ids), list(example.labels)) == (ids, labels), mask
        assert len(example.prompt_ids) < len(ids)


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=24).filter(
    lambda t: t.strip() and "<|" not in t and "[" not in t and "think" not in t
)
THOUGHT_OR_NONE = st.one_of(st.none(), WORDS)


@st.composite
def talks(draw: Any) -> list[ChatMessage]:
    """Conversations of one to three turns, some of them with a system message, thoughts, or turns not to train."""
    talk = [said("system", draw(WORDS))] if draw(st.booleans()) else []
    turns = draw(st.integers(1, 3))
    for turn in range(turns):
        thought = draw(THOUGHT_OR_NONE)
        more = {} if thought is None else {"thinking": thought}
        train = turn == turns - 1 or draw(st.integers(0, 3)) > 0
        talk += [said("user", draw(WORDS)), said("assistant", draw(WORDS), train, **more)]
    return talk


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_labelled_is_what_was_said_and_its_end(tokenizers: Any, make_data: Any, name: str) -> None:
    """Decoded, the labelled tokens are the assistant's words and the end token; under mask all, the whole text."""
    family, tokenizer = FAMILIES[name], tokenizers[name]

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(talk=talks(), mask=st.sampled_from(MASKS))
    def check(talk: list[ChatMessage], mask: str) -> None:
        if not family.thinks:
            talk = [ChatMessage(m.role, m.content, m.train) for m in talk]
        (example,) = encode([Row("x:1", tuple(talk))], tokenizer, make_data(mask=mask, max_length=100_000)).examples
        pieces = family.write(talk, None)
        last = len(talk) - 1
        owned = [t for t, i in pieces if i is not None and talk[i].train and (mask == "assistant" or i == last)]
        runs = ["".join(t for t, _ in pieces)] if mask == "all" else owned
        found = [
            tokenizer.decode([i for i, _ in run])
            for labelled, run in itertools.groupby(
                zip(example.input_ids, example.labels, strict=True), key=lambda pair: pair[1] != IGNORED
            )
            if labelled
        ]
        if mask == "all":
            first = tokenizer.decode(example.input_ids[:1])
            assert [first + f for f in found] == runs
        else:
            assert found == runs
        assert all(a in (IGNORED, b) for a, b in zip(example.labels, example.input_ids, strict=True))
        assert tokenizer.pad_token_id not in example.labels

    check()
