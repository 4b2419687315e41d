"""The Modelfile: Ollama's grammar and Go's template, each by a reader of its own here, beside the chat template."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from halfbyte.errors import ExportError
from halfbyte.export import ollama
from tests import tiny_run

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + tiny_run.CHATML
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
    "[{{ 'U' if m['role'] == 'user' else 'A' }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[A]{% endif %}"
)
UNSEEN = tiny_run.CHATML.replace("<|im_start|>", "<｜\u00a0\u200d\U000e0067>")  # printable and not
ALTERNATES = "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}"


COMMANDS = ("FROM", "LICENSE", "TEMPLATE", "SYSTEM", "ADAPTER", "PARAMETER", "MESSAGE")


def unquoted(text: str) -> str | None:
    """A value without its quotes, of which nothing inside is an escape; None where they do not end yet."""
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            return text[len(quotes) : -len(quotes)] if text.endswith(quotes) and len(text) >= 2 * len(quotes) else None
    return text


def commands(text: str) -> list[tuple[str, str]]:
    """(command, argument) of a Modelfile by Ollama's rules, character by character: a value ends at the first end of a
    line at which its quotes have ended; what is not printable is dropped, line ends inside quotes are not."""
    found, at = list[tuple[str, str]](), 0
    while at < len(text):
        if text[at] in " \t\r\n":
            at += 1
            continue
        words, parts = text[at:].split(maxsplit=1)[0], ""
        at += len(words) + 1
        name = words
        assert words in COMMANDS
        if words == "PARAMETER":
            (parameter,) = re.findall(r"\A[a-z0-9_]+(?=[ \t])", text[at:])
            name, at = f"PARAMETER {parameter}", at + len(parameter) + 1
        while at < len(text) and not (text[at] in "\r\n" and unquoted(parts.strip()) is not None):
            parts, at = parts + (text[at] if text[at].isprintable() or text[at] in "\t\r\n" else ""), at + 1
        value = unquoted(parts.strip())
        assert value is not None, "the file ends inside quotes"
        found.append((name, value))
    return found


def rendered(go: str, messages: list[dict[str, str]]) -> str:
    """What Go makes of the few actions that are used: strings, `range`, `if eq`, `if ne`, `.Content`."""
    actions = [a.strip("- ") for a in re.findall(r"\{\{(.*?)\}\}(?=\{\{|$)", go, re.DOTALL)]
    assert "".join(f"{{{{{a}}}}}" for a in re.findall(r"\{\{(.*?)\}\}(?=\{\{|$)", go, re.DOTALL)) == go

    def run(first: int, message: dict[str, str] | None, *, live: bool) -> tuple[str, int]:
        out, at, on, done = "", first, live, False
        while at < len(actions):
            action = actions[at]
            if action.startswith("range"):
                inner = [run(at + 1, m, live=True) for m in messages]
                out, at = out + "".join(text for text, _ in inner), inner[0][1]
            elif action.startswith(("if", "else if")):
                if action.startswith("if") and message is None:
                    assert action == 'if ne (index .Messages 0).Role "system"'
                    text, at = run(at + 1, {}, live=messages[0]["role"] != "system")
                    out += text
                    continue
                on = not done and message is not None and message["role"] == json.loads(action.rpartition(" ")[2])
                done, at = done or on, at + 1
            elif action == "end":
                if message and at + 1 < len(actions) and actions[at + 1] == "end":
                    return out, at + 2
                return out, at + 1
            else:
                text = (
                    message["content"]
                    if action == ".Content" and message
                    else ""
                    if action == ".Content"
                    else ast.literal_eval(action)  # whose strings are written as Go's
                )
                out, at = out + (text if on else ""), at + 1
        return out, at

    return run(0, None, live=True)[0]


@pytest.mark.parametrize(
    ("template", "system"),
    [(tiny_run.CHATML, True), (LLAMA3, True), (DEFAULT, True), (NO_SYSTEM, False), (UNSEEN, True)],
)
def test_as_the_chat_template_says(template: str, system: bool, tmp_path: Path) -> None:
    tokenizer = tiny_run.tokenizer(chat_template=template)
    recipe = tiny_run.recipe(tmp_path).recipe
    ollama.write(tmp_path / "Modelfile", "m.gguf", tokenizer, recipe)
    said = commands((tmp_path / "Modelfile").read_text())
    assert said[0] == ("FROM", "./m.gguf") and ("PARAMETER stop", "<|im_end|>") in said
    go = dict(said)["TEMPLATE"]
    talks = [
        [{"role": "user", "content": 'say "hi"\n'}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
    ]
    talks += [[{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]] if system else []
    for talk in talks:
        wanted = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert rendered(go, talk) == wanted


def test_a_file_elsewhere_is_named_by_its_whole_path(tmp_path: Path) -> None:
    """Ollama takes `./x` from the Modelfile's folder, so a path from the root must not begin with a dot."""
    file = tmp_path / "models" / "m.gguf"
    ollama.write(tmp_path / "Modelfile", str(file), tiny_run.tokenizer(), tiny_run.recipe(tmp_path).recipe)
    assert commands((tmp_path / "Modelfile").read_text())[0] == ("FROM", str(file))


def test_a_template_that_does_more_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="does more"):
        ollama.around(tiny_run.tokenizer(), ALTERNATES)
    with pytest.raises(ExportError, match="no chat template"):
        ollama.write(tmp_path / "M", "m", tiny_run.tokenizer(chat_template=None), tiny_run.recipe(tmp_path).recipe)


def test_what_ends_an_answer_is_taken_as_it_stands(tmp_path: Path) -> None:
    for end in ("<｜end▁of▁sentence｜>", 'a"b\\n'):
        special = ("<pad>", "<s>", "</s>", "<|im_start|>", end)
        tokenizer = tiny_run.tokenizer(special, end, tiny_run.CHATML.replace("<|im_end|>", end.replace("\\", "\\\\")))
        ollama.write(tmp_path / "Modelfile", "m.gguf", tokenizer, tiny_run.recipe(tmp_path).recipe, adapter="a.gguf")
        said = commands((tmp_path / "Modelfile").read_text())
        assert said[1] == ("ADAPTER", "./a.gguf") and said[-1] == ("PARAMETER stop", end)
    unseen = tiny_run.tokenizer(("<pad>", "<s>", "</s>", "<|im_start|>", "<\u00a0>"), "<\u00a0>")
    with pytest.raises(ExportError, match="which a Modelfile cannot hold"):
        ollama.write(tmp_path / "Modelfile", "m.gguf", unseen, tiny_run.recipe(tmp_path).recipe)
