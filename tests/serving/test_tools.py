"""Calls of tools in what a model writes: the same parts however the text is cut, and a grammar that allows no other."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from halfbyte.errors import DataError
from halfbyte.serving.http.answers import Choice
from halfbyte.serving.tools import LLAMA, MARKED, CallForm, CallRules, constraint, form_of, grammar
from halfbyte.writing.text import TextChunk
from tests import tiny_run

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OTHER = '<tool_call>{"arguments": {"city": "}{"}, "name": "weather"}</tool_call>'  # held until it is whole
PLAIN = '{"name": "weather", "parameters": {"city": "Oslo"}}'


def read(form: CallForm, text: str, cuts: list[int], finish: Any = "stop") -> tuple[Choice, list[Any]]:
    """A text that comes in pieces, and its parts."""
    choice, parts = Choice(form), list[Any]()
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    for number, (start, end) in enumerate(pairwise(edges), 1):
        parts += choice.add(TextChunk(0, text[start:end], number, finish=finish if end == len(text) else None))
    return choice, parts


@pytest.mark.parametrize(
    ("form", "text", "calls", "said"),
    [
        (MARKED, CALL, ["Oslo"], ""),
        (MARKED, f"Let me look. \n{CALL}\n{CALL.replace('Oslo', 'Bergen')}\n", ["Oslo", "Bergen"], "Let me look."),
        (MARKED, CALL.removesuffix("</tool_call>"), ["Oslo"], ""),
        (MARKED, OTHER + CALL, ["}{", "Oslo"], ""),
        (MARKED, CALL.replace("Oslo", 'a \\" } </tool_call> \\\\'), ['a " } </tool_call> \\'], ""),
        (MARKED, CALL.replace('{"city": "Oslo"}', '"{\\"city\\": \\"Oslo\\"}"'), ["Oslo"], ""),
        (MARKED, CALL.replace('"name"', '"title"'), [], CALL.replace('"name"', '"title"')),
        (MARKED, CALL + "<tool_call>{broken}</tool_call>", ["Oslo"], "<tool_call>{broken}</tool_call>"),
        (MARKED, "a < b, <tool_box> and <tool_call>{broken}", [], "a < b, <tool_box> and <tool_call>{broken}"),
        (MARKED, CALL.replace('"weather"', '""'), [], CALL.replace('"weather"', '""')),
        (MARKED, CALL.replace('"weather"', '"\\x"'), [], CALL.replace('"weather"', '"\\x"')),
        (MARKED, CALL.replace('"weather"', "5"), [], CALL.replace('"weather"', "5")),
        (MARKED, "no call at all \n", [], "no call at all \n"),
        (LLAMA, PLAIN, ["Oslo"], ""),
        (LLAMA, f"{PLAIN}; {PLAIN.replace('Oslo', 'Bergen')}", ["Oslo", "Bergen"], ""),
        (LLAMA, '{"name": "Ann", "age": 5}', [], '{"name": "Ann", "age": 5}'),
        (LLAMA, '{"nam": 5} and more', [], '{"nam": 5} and more'),
        (LLAMA, f"Well, {PLAIN}", [], f"Well, {PLAIN}"),
        (LLAMA, " \n ", [], " \n "),
    ],
)
@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 200), max_size=12))
def test_calls_are_the_same_however_the_text_is_cut(
    form: CallForm, text: str, calls: list[str], said: str, cuts: list[int]
) -> None:
    choice, parts = read(form, text, cuts)
    assert [(call.name, json.loads(call.arguments)) for call in choice.calls] == [
        ("weather", {"city": c}) for c in calls
    ]
    assert choice.text == said == "".join(part.text for part in parts)
    assert choice.finish == ("tool_calls" if calls else "stop")
    for number in range(len(calls)):
        of_it = [part for part in parts if not part.text and part.number == number]
        assert [bool(part.name) for part in of_it] == [True] + [False] * (len(of_it) - 1)


def test_arguments_come_in_pieces_and_a_call_that_is_cut_says_so() -> None:
    choice, parts = read(MARKED, CALL[:-18], list(range(len(CALL))), "length")
    assert sum(bool(part.arguments) for part in parts) > 5
    assert choice.finish == "length" and choice.calls[0].arguments == '{"city": "Os'


def test_a_form_is_that_of_the_template() -> None:
    assert form_of("{{ tools }} <tool_call>{...}</tool_call>") is form_of("nothing of it") is MARKED
    assert form_of('Respond in the format {"name": function name, "parameters": ...}') is LLAMA


def tool(name: str, parameters: Any = None, strict: bool | None = None) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
TOOLS = [tool("get", SCHEMA, True), tool('p"t')]
ONE, TWO = (
    f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    for name, arguments in (("get", '{"x": 5}'), ('p\\"t', "{}"))
)
BARE = '{"name": "get", "parameters": {"x": 5}}'
WRONG = ONE.replace("5", '"5"')


@pytest.mark.parametrize(
    ("form", "rules", "whole", "never"),
    [
        (MARKED, CallRules(TOOLS, must=True), [ONE, TWO, f"{ONE}\n{TWO}"], ["a", WRONG]),
        (MARKED, CallRules(TOOLS, must=True, several=False), [ONE], [f"{ONE}\n"]),
        (MARKED, CallRules(TOOLS), ["", "a<b <tool", f"Well {ONE}", f"{ONE}\n{TWO}"], [WRONG, f"Well {WRONG}"]),
        (MARKED, CallRules(TOOLS, several=False), ["a", ONE], [f"{ONE}\n"]),
        (MARKED, CallRules(TOOLS, schema={"type": "boolean"}), ["true", ONE], ["a"]),
        (MARKED, CallRules(schema={"type": "boolean"}), ["true"], ["a", "<"]),
        (LLAMA, CallRules(TOOLS, must=True), [BARE, f"{BARE}; {BARE}"], ["a", BARE.replace("5", "a")]),
        (LLAMA, CallRules(TOOLS), [BARE, "Well {", ""], ['{"no']),
    ],
)  # fmt: skip
def test_a_grammar_allows_calls_and_nothing_else(
    form: CallForm, rules: CallRules, whole: list[str], never: list[str]
) -> None:
    tokenizer = tiny_run.tokenizer()
    table, text = from_tokenizer(tokenizer), grammar(form, rules)
    assert rules.bound

    def follow(written: str) -> tuple[bool, bool]:
        """Whether each token of it is allowed, and whether it may end there."""
        matcher = LLMatcher(table, text, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer(written, add_special_tokens=False)["input_ids"]
        return all(matcher.consume_token(token) for token in ids), matcher.is_accepting()

    assert [follow(one) for one in whole] == [(True, True)] * len(whole)
    assert [follow(one)[0] for one in never] == [False] * len(never)


def test_a_schema_may_refer_to_parts_of_itself() -> None:
    parts = {"$defs": {"n": {"type": "integer"}}, "type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 2}
    table, text = from_tokenizer(tiny_run.tokenizer()), grammar(MARKED, CallRules([tool("f", parts)], must=True))
    matcher = LLMatcher(table, text, log_level=0)
    call = '<tool_call>\n{"name": "f", "arguments": [1, 2]}\n</tool_call>'
    assert matcher.consume_tokens(tiny_run.tokenizer()(call)["input_ids"]) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (CallRules(schema={"type": "nothing"}), r"response_format: .* cannot be followed: Invalid type: nothing\."),
        (CallRules(TOOLS, schema={"pattern": "("}), r"response_format: .*: regex parse error: .* unclosed group\."),
        (CallRules([*TOOLS, tool("ill", {"anyOf": []})], must=True), r"tools: ill: .* anyOf is empty\."),
    ],
)
@pytest.mark.parametrize("form", [MARKED, LLAMA])
def test_a_schema_that_cannot_be_followed_is_named(form: CallForm, rules: CallRules, said: str) -> None:
    table = from_tokenizer(tiny_run.tokenizer())
    with pytest.raises(DataError) as refused:
        constraint(table, form, rules)
    assert re.fullmatch(said, refused.value.message), refused.value.message


def test_free_text_needs_no_grammar() -> None:
    assert not CallRules([tool("f", SCHEMA)]).bound and not CallRules().bound
