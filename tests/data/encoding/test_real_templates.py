"""The chat templates of Qwen3, Qwen3.5, SmolLM3, gpt-oss, GLM, DeepSeek and Granite themselves, word for word.

They are read, where they are, from HALFBYTE_TEMPLATES: the folder `models/templates` of a clone of llama.cpp, which
has them all as their makers publish them. What is labelled must be what the template writes behind the prompt from
which the model answers; where it cannot be, the row is refused by name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data import gates
from halfbyte.data.reading.formats import ChatMessage, Row
from halfbyte.errors import DataError
from tests.data.encoding.labelled import labelled_texts
from tests.data.in_memory import encode

FOLDER = Path(os.environ.get("HALFBYTE_TEMPLATES", "/nowhere"))
OFF = {"enable_thinking": False}
# File -> the arguments that it is asked with.
FILES: dict[str, tuple[dict[str, Any], ...]] = {
    "Qwen-Qwen3-0.6B": ({}, OFF),
    "Qwen3.5-4B": ({}, OFF),
    "HuggingFaceTB-SmolLM3-3B": ({}, OFF),
    "openai-gpt-oss-120b": ({}, {"reasoning_effort": "low"}),
    "GLM-4.6": ({}, OFF),
    "GLM-4.7-Flash": ({}, OFF),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ({},),
    "deepseek-ai-DeepSeek-V3.1": ({}, {"thinking": True}),
    "deepseek-ai-DeepSeek-V3.2": ({}, {"thinking": True}),
    "ibm-granite-granite-3.3-2B-Instruct": ({}, {"thinking": True}),
    "ibm-granite-granite-4.0": ({},),
    "ibm-granite-granite-4.1": ({},),
}
ENDS = ("<|im_end|>", "<|return|>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|endoftext|>")
U1, U2 = ChatMessage("user", "why red"), ChatMessage("user", "and blue")
CASES = [
    pytest.param(name, args, form, turns, id=f"{name}-{args}-{form}-{turns}")
    for name, every in FILES.items()
    for args in every
    for form in ("none", "key", "text")
    for turns in (1, 2)
]


def thinks(words: str, thought: str, form: str) -> ChatMessage:
    if form == "none":
        return ChatMessage("assistant", words)
    if form == "text":
        return ChatMessage("assistant", f"<think>\n{thought}\n</think>\n\n{words}")
    return ChatMessage("assistant", words, more=dict.fromkeys(("reasoning_content", "thinking"), thought))


def refused(tokenizer: Any, row: Row, data: Any) -> tuple[list[str], str]:
    """The labelled texts of a row, or why it is refused."""
    try:
        encoded = encode([row], tokenizer, data)
    except DataError as error:
        return [], error.message
    for finding in gates.check(encoded, None, tokenizer, data, embedding_rows=10_000):
        if finding.gate == "thoughts" and finding.level == "refused":
            return [], str(finding)
    return labelled_texts(tokenizer, encoded.examples[0]), ""


@pytest.mark.parametrize(("name", "args", "form", "turns"), CASES)
def test_labels_are_what_the_template_writes_when_the_model_answers(
    make_byte_level: Any, make_data: Any, name: str, args: dict[str, Any], form: str, turns: int
) -> None:
    path = FOLDER / f"{name}.jinja"
    if not path.is_file():
        pytest.skip("HALFBYTE_TEMPLATES names no folder with it (models/templates of llama.cpp)")
    template = path.read_text(encoding="utf-8")
    marks = tuple(dict.fromkeys(re.findall(r"<[|｜][^|｜<>'\"]{1,40}[|｜]>", template)))
    end = next((mark for mark in ENDS if mark in marks), "</s>")
    tokenizer = make_byte_level(template, eos=end, special=(*marks, end), plain=("<think>", "</think>"))
    data = make_data(chat_template=template, template_args=args, max_length=4096)
    answer = thinks("it is red", "let me see", form)
    talk = [U1, answer] if turns == 1 else [U1, thinks("cup", "hm", form), U2, answer]
    found, why = refused(tokenizer, Row("t.jsonl:1", tuple(talk)), data)
    chat = [m.to_template() for m in talk]
    prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True, **args)
    whole = tokenizer.apply_chat_template(chat, tokenize=False, **args)
    print(name, args, form, turns, "|", found, "|", why, "|", repr(prompt[-40:]), "|", repr(whole[-90:]))
    if why:
        assert "t.jsonl:1" in why and form != "none", why
        return
    assert whole.startswith(prompt)
    rest = whole[len(prompt) :].rstrip()
    assert found == [rest if end in rest else rest + end]
    assert form == "none" or "let me see" in found[0]
