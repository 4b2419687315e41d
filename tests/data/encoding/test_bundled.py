"""Bundled chat templates with tools: by name, in the tokenizer's tokens, the same in training and in generation."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.data.encoding import chatml
from halfbyte.data.reading.formats import Row
from halfbyte.errors import DataError
from halfbyte.inference.generate import chat_ids
from tests.data.encoding.test_families import CHAIN, SEVERAL, THOUGHT_AND_TOOLED, TOOLS
from tests.data.in_memory import encode

NAMES = ("chatml-tools", "qwen-tools", "llama3-tools")
TALKS = {"chain": CHAIN, "several": SEVERAL, "thoughts": THOUGHT_AND_TOOLED}


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", NAMES)
def test_generation_starts_from_the_tokens_that_were_trained(
    make_byte_level: Any, make_data: Any, name: str, talk: str
) -> None:
    """Up to each assistant turn, what `generate` and `serve` hand to the model is how a row that ends there begins."""
    tokenizer, messages = make_byte_level(None, eos="<|im_end|>"), TALKS[talk]
    data = make_data(chat_template=name, max_length=10_000)
    turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
    rows = [Row(f"t:{i}", messages=messages[: i + 1], tools=tuple(TOOLS)) for i in turns]
    examples = encode(rows, tokenizer, data).examples
    tokenizer.chat_template = chatml.chat_template(tokenizer, data)
    for i, example in zip(turns, examples, strict=True):
        prompt = chat_ids(tokenizer, [m.to_template() for m in messages[:i]], TOOLS)
        ids, labels = list(example.input_ids), list(example.labels)
        assert ids[: len(prompt)] == prompt == list(example.prompt_ids)
        assert set(labels[: len(prompt)]) == {-100} and labels[len(prompt)] == ids[len(prompt)]


def test_a_template_without_tools_gets_the_bundled_one(make_byte_level: Any, templates: Any) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    asked = [{"role": "user", "content": "Rain?"}]
    for own, name in ((templates.chatml, "chatml-tools"), (templates.llama3, "chatml-tools")):
        tokenizer = make_byte_level(own)
        assert chatml.with_tools(tokenizer) == chatml.bundled(name, tokenizer)
        text = tokenizer.decode(chat_ids(tokenizer, asked, tools))
        assert '"name": "weather"' in text and "<tool_call>" in text
        assert "weather" not in tokenizer.decode(chat_ids(tokenizer, asked))
    marks = chatml.BUNDLED["llama3-tools"]
    llama = make_byte_level(templates.llama3, special=marks)
    assert chatml.with_tools(llama) == chatml.bundled("llama3-tools", llama)
    assert chatml.with_tools(make_byte_level(templates.gemma, special=("<start_of_turn>",))) is None
    reads = "{{ tools }}"
    assert chatml.with_tools(make_byte_level(reads)) == reads
    assert chatml.with_tools(make_byte_level({"default": templates.chatml, "tool_use": reads})) == reads


def test_tokens_that_are_not_there(make_byte_level: Any, make_data: Any) -> None:
    tokenizer = make_byte_level(None, special=())
    with pytest.raises(DataError, match=r"llama3-tools writes <\|start_header_id\|>.* which this tokenizer has not"):
        chatml.chat_template(tokenizer, make_data(chat_template="llama3-tools"))
    with pytest.raises(DataError, match="chatml, chatml-tools, qwen-tools, llama3-tools"):
        chatml.chat_template(tokenizer, make_data(chat_template="chatml-tool"))


def test_marks_that_are_new_stand_in_the_template(make_byte_level: Any, make_data: Any) -> None:
    tokenizer = make_byte_level(None, special=())
    data = make_data(chat_template="chatml-tools")
    rows = len(tokenizer) + 8
    notice = chatml.install(tokenizer, data, embedding_rows=rows, tied=False).notice
    assert notice.startswith("chatml-tools, as data.chat_template says: <|im_start|> is a new token; a turn ends with")
    text = tokenizer.apply_chat_template([m.to_template() for m in CHAIN], tools=TOOLS, tokenize=False)
    assert "<|im_end|>" not in text and '"a": 1}}\n</tool_call></s>\n<|im_start|>tool\n' in text
    assert chatml.chat_template(tokenizer, data) == tokenizer.chat_template
