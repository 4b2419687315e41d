"""The chat templates of Qwen3, Qwen3.5, SmolLM3, gpt-oss, GLM, DeepSeek and Granite themselves, word for word.

They are read, where they are, from HALFBYTE_TEMPLATES: the folder `models/templates` of a clone of llama.cpp (of
July 2026), which has them as it serves them: DeepSeek-R1-Distill-Qwen's and QwQ's with its own `enable_thinking`,
SmolLM3's as Unsloth repaired it, the others as their makers publish them. A row is the prompt from which the model
answers and what it then writes; where it cannot be, the row and the template are named and refused.
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
OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}
# File -> how the template takes thoughts, as its text says: by key, in the text as it is, or not at all (none: it cuts
# them out of every turn); the arguments that it is asked with.
FILES: dict[str, tuple[str, tuple[dict[str, Any], ...]]] = {
    "Qwen-Qwen3-0.6B": ("key", ({}, OFF)),
    "Qwen-QwQ-32B": ("text", ({}, ON)),
    "Qwen3.5-4B": ("key", ({}, OFF)),
    "HuggingFaceTB-SmolLM3-3B": ("text", ({}, OFF)),
    "openai-gpt-oss-120b": ("key", ({}, {"reasoning_effort": "low"})),
    "GLM-4.6": ("key", ({}, OFF)),
    "GLM-4.7-Flash": ("key", ({}, OFF)),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("none", ({}, ON)),
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": ("none", ({},)),
    "deepseek-ai-DeepSeek-V3.1": ("none", ({}, {"thinking": True})),
    "deepseek-ai-DeepSeek-V3.2": ("key", ({}, {"thinking": True})),
    "ibm-granite-granite-3.3-2B-Instruct": ("text", ({}, {"thinking": True})),
    "ibm-granite-granite-4.0": ("text", ({},)),
    "ibm-granite-granite-4.1": ("text", ({},)),
}
# What a model writes before its words where the template begins an answer without thoughts otherwise than it asks for
# one: nothing behind `<think></think>`, and the end of the thoughts behind `<think>`.
BEHIND = {"<think></think>": "", "<think>\n</think>": "", "<think>": "</think>"}
ENDS = ("<|im_end|>", "<|return|>", "<｜end▁of▁sentence｜>", "<|end_of_text|>", "<|endoftext|>")
U1, U2 = ChatMessage("user", "why red"), ChatMessage("user", "and blue")
CASES = [
    pytest.param(name, args, form, turns, id=f"{name}-{args}-{form}-{turns}")
    for name, (_, every) in FILES.items()
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


def encoded_or_refused(tokenizer: Any, row: Row, data: Any) -> tuple[Any, str]:
    """The example of a row, or why it is refused."""
    try:
        encoded = encode([row], tokenizer, data)
    except DataError as error:
        return None, error.message
    for finding in gates.check(encoded, None, tokenizer, data, embedding_rows=10_000):
        if finding.gate == "thoughts" and finding.level == "refused":
            return None, str(finding)
    return encoded.examples[0], ""


def marks_of(template: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.findall(r"<[|｜][^|｜<>'\"]{1,40}[|｜]>", template)))


def with_template(name: str, make_byte_level: Any) -> tuple[Any, str, str]:
    """A tokenizer with a template and its marks, the template, and the mark at the end of a turn."""
    path = FOLDER / f"{name}.jinja"
    if not path.is_file():
        pytest.skip("HALFBYTE_TEMPLATES names no folder with it (models/templates of llama.cpp)")
    template = path.read_text(encoding="utf-8")
    marks = marks_of(template)
    end = next((mark for mark in ENDS if mark in marks), "</s>")
    tokenizer = make_byte_level(template, eos=end, special=(*marks, end), plain=("<think>", "</think>"))
    return tokenizer, template, end


@pytest.mark.parametrize(("name", "args", "form", "turns"), CASES)
def test_labels_are_what_the_template_writes_when_the_model_answers(
    tmp_path: Path, make_byte_level: Any, make_data: Any, name: str, args: dict[str, Any], form: str, turns: int
) -> None:
    tokenizer, template, end = with_template(name, make_byte_level)
    (tmp_path / f"{name}.jinja").write_text(template, encoding="utf-8")
    where = str(tmp_path / f"{name}.jinja")
    data = make_data(chat_template=where, template_args=args, max_length=4096)
    takes, is_there = FILES[name][0], form != "none"
    answer, first = (thinks(*words, form) for words in (("it is red", "let me see"), ("cup", "hm")))
    talk = [U1, answer] if turns == 1 else [U1, first, U2, answer]
    example, why = encoded_or_refused(tokenizer, Row("t.jsonl:1", tuple(talk)), data)
    taken = takes if is_there else "none"
    as_taken = [thinks(*words, taken).to_template() for words in (("cup", "hm"), ("it is red", "let me see"))]
    asked = [U1.to_template(), *([as_taken[0], U2.to_template()] if turns == 2 else [])]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **args)
    whole = tokenizer.apply_chat_template([*asked, as_taken[1]], tokenize=False, **args)
    begins = whole.startswith(prompt)
    at_end = re.search(r"(<think>\s*)?(</think>\s*)?$", prompt)
    marks = at_end.group() if at_end else ""
    impossible = is_there and ("</think>" in marks or takes == "none")
    if impossible or (marks.strip() == "<think>" and not begins and "</think>" not in whole):
        assert "t.jsonl:1" in why and where in why
        return
    assert why == ""
    rest = whole[len(prompt) :].rstrip() if begins else f"{BEHIND[marks]}it is red"
    rest = rest if end in rest else rest + end
    assert labelled_texts(tokenizer, example) == [rest]
    assert tokenizer.decode(example.input_ids).rstrip() == prompt + rest, (
        "answers are asked for behind this very prompt"
    )
    assert begins or (form == "none" and "it is red" in whole)
    assert not is_there or "let me see" in rest


@pytest.mark.parametrize(("name", "args"), [(name, args) for name, (_, every) in FILES.items() for args in every])
def test_an_earlier_turn_is_trained_behind_its_own_prompt_or_by_its_words_alone(
    tmp_path: Path, make_byte_level: Any, make_data: Any, name: str, args: dict[str, Any]
) -> None:
    """Turns without thoughts under mask assistant. GLM 4.7 writes `</think>` before an old turn and asks behind
    `<think>`: a mark that no prompt leads to is read, and not learned."""
    tokenizer, template, end = with_template(name, make_byte_level)
    (tmp_path / "template.jinja").write_text(template, encoding="utf-8")
    data = make_data(
        chat_template=str(tmp_path / "template.jinja"), template_args=args, max_length=4096, mask="assistant"
    )
    talk = (U1, ChatMessage("assistant", "cup"), U2, ChatMessage("assistant", "it is red"))
    example, why = encoded_or_refused(tokenizer, Row("t.jsonl:1", talk), data)
    if why:
        assert "<think>" in why and "t.jsonl:1" in why
        return
    earlier, _ = labelled_texts(tokenizer, example)
    prompt = tokenizer.apply_chat_template([U1.to_template()], tokenize=False, add_generation_prompt=True, **args)
    row = tokenizer.decode(example.input_ids)
    assert row.startswith(prompt + earlier) or earlier.startswith("cup")
    assert earlier.partition("cup")[2] in ("", end, f"{end}\n") or earlier.endswith(marks_of(template))
