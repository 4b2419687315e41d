"""Thoughts: what is labelled is what each template writes when the model answers; what it would leave out has a gate.

The templates have the behaviour of those of Qwen3, Qwen3.5, GLM 4.5, SmolLM3, Granite 4, gpt-oss and DeepSeek-R1, and
are not their texts. The reference renders by hand of `apply_chat_template`: what a longer conversation adds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte import finetune
from halfbyte.data import gates
from halfbyte.data.encoding import chatml
from halfbyte.data.reading.formats import ChatMessage, Row
from halfbyte.errors import AdapterError, DataError, RecipeError
from halfbyte.export import folder
from halfbyte.inference import load
from halfbyte.inference.generate import chat_ids
from halfbyte.models.sources.lookup import find_model
from tests import tiny_run
from tests.data.encoding.labelled import labelled_texts
from tests.data.in_memory import encode

FILES = Path(__file__).parent / "templates"
LAST = (
    "{%- set ns = namespace(asked=0) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}"
)
PARTS = (
    "{%- set c = m.content %}{%- set t = m.reasoning_content or '' %}"
    "{%- if '</think>' in c %}{%- set t = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{%- set c = c.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
)
# Thinks unless told not to: generation begins inside the block; only what follows the last question keeps its thoughts.
QWEN35 = (
    LAST + "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}" + PARTS
    + "{%- if loop.index0 > ns.asked %}{{- '<think>\n' + t + '\n</think>\n\n' }}{%- endif %}{{- c }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
    "{%- else %}{{- '<think>\n' }}{%- endif %}{%- endif %}"
)  # fmt: skip
GLM = (
    "[gMASK]" + LAST + "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
    + PARTS + "{{- '<think>' + (t.strip() if loop.index0 > ns.asked else '') + '</think>\n' + c.strip() }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{{- '<think></think>' if enable_thinking is defined and not enable_thinking else '' }}{%- endif %}"
)  # fmt: skip
# Asks behind `<think>`, and writes an answer without thoughts, and every old one, behind `</think>` alone.
GLM47 = (
    "[gMASK]" + LAST + "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
    + PARTS + "{{- ('<think>' + t.strip() if t and loop.index0 > ns.asked else '') + '</think>' + c.strip() }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{{- '</think>' if enable_thinking is defined and not enable_thinking else '<think>' }}{%- endif %}"
)  # fmt: skip
# Writes the text as it is, and the mode above it; without thoughts it begins with an empty block.
SMOLLM3 = (
    "{%- set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' %}"
    "{{- '<|im_start|>system\nReasoning Mode: ' + mode + '<|im_end|>\n' }}{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{{- '<think>\n\n</think>\n' if mode == '/no_think' and m.role == 'assistant' else '' }}"
    "{{- m.content.lstrip('\n') + '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}{{- '<think>\n\n</think>\n' if mode == '/no_think' else '' }}{%- endif %}"
)
GRANITE = (
    "{{- '<|im_start|>system\nThink.<|im_end|>\n' if thinking else '' }}{%- for m in messages %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{{- '<|im_start|>assistant\n' if add_generation_prompt else '' }}"
)
R1 = (
    "{%- for m in messages %}{%- set c = m.content.split('</think>')[-1] %}"
    "{{- '<|im_start|>' + m.role + '\n' + c + '<|im_end|>' }}{%- endfor %}"
    "{{- '<|im_start|>assistant\n<think>\n' if add_generation_prompt else '' }}"
)
# Template -> the arguments that it takes.
TEMPLATES: dict[str, tuple[str, tuple[dict[str, Any], ...]]] = {
    "qwen3": ((FILES / "qwen3.jinja").read_text(), ({}, {"enable_thinking": False})),
    "qwen3.5": (QWEN35, ({}, {"enable_thinking": True}, {"enable_thinking": False})),
    "glm": (GLM, ({}, {"enable_thinking": False})),
    "smollm3": (SMOLLM3, ({}, {"enable_thinking": False})),
    "granite": (GRANITE, ({}, {"thinking": True})),
    "gpt-oss": ((FILES / "gpt_oss.jinja").read_text(), ({},)),
    "chatml-tools": ((Path(chatml.__file__).parent / "jinja" / "chatml-tools.jinja").read_text(), ({},)),
}
MARKS = ("<|im_end|>", "<|return|>", "<|end|>", "</s>")
U1, U2 = ChatMessage("user", "why red"), ChatMessage("user", "and blue")


def thinks(words: str, thought: str | None, *, inline: bool = False) -> ChatMessage:
    if thought is None:
        return ChatMessage("assistant", words)
    if inline:
        return ChatMessage("assistant", f"<think>\n{thought}\n</think>\n\n{words}")
    return ChatMessage("assistant", words, more=dict.fromkeys(("reasoning_content", "thinking"), thought))


def labelled(tokenizer: Any, row: Row, data: Any) -> tuple[list[str], Any]:
    encoded = encode([row], tokenizer, data)
    return labelled_texts(tokenizer, encoded.examples[0]), encoded


def written(tokenizer: Any, talk: list[ChatMessage], template: str, args: dict[str, Any]) -> str:
    """What the model itself would have to write for the last message of a conversation, up to its end of turn."""
    chat = [m.to_template() for m in talk]
    prompt = tokenizer.apply_chat_template(
        chat[:-1], chat_template=template, tokenize=False, add_generation_prompt=True, **args
    )
    whole = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **args)
    assert whole.startswith(prompt), "the template begins an answer otherwise than the row"
    rest = whole[len(prompt) :]
    cut = min((rest.index(m) + len(m) for m in MARKS if m in rest), default=len(rest))
    end = max((rest.rindex(m) + len(m) for m in MARKS if m in rest), default=cut)
    return str(rest[:end])


@pytest.fixture(scope="module")
def tokenizer(make_byte_level: Any) -> Any:
    special = (
        "<|im_start|>",
        "<|im_end|>",
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|channel|>",
        "<|return|>",
        "<|call|>",
    )
    return make_byte_level(special=special)


CASES = [
    pytest.param(name, args, inline, id=f"{name}-{args}-{'in text' if inline else 'key'}")
    for name, (_, every) in TEMPLATES.items()
    for args in every
    for inline in (False, True)
]


@pytest.mark.parametrize(("name", "args", "inline"), CASES)
def test_the_labels_are_what_the_template_writes_when_the_model_answers(
    tokenizer: Any, make_data: Any, name: str, args: dict[str, Any], inline: bool
) -> None:
    """Without thoughts where arguments turn them off, else with; the arguments are given to the reference by name."""
    template = TEMPLATES[name][0]
    off = args.get("enable_thinking") is False
    data = make_data(chat_template=template, template_args=args, max_length=4096)
    answer = thinks("it is red", None if off else "let me see", inline=inline)
    for talk in ([U1, answer], [U1, thinks("cup", None if off else "hm"), U2, answer]):
        as_template = [
            *talk[:-1],
            thinks("it is red", None if off else "let me see", inline=name in ("smollm3", "granite")),
        ]
        found, encoded = labelled(tokenizer, Row("t.jsonl:1", tuple(talk)), data)
        assert found == [written(tokenizer, as_template, template, args)]
        assert off or "let me see" in found[0]
        findings = gates.check(encoded, None, tokenizer, data, embedding_rows=10_000)
        assert "thoughts" not in {f.gate for f in findings}


def judged(tokenizer: Any, data: Any, *talks: list[ChatMessage]) -> tuple[str, str]:
    rows = [Row(f"t.jsonl:{n}", tuple(talk)) for n, talk in enumerate(talks, start=1)]
    findings = gates.check(encode(rows, tokenizer, data), None, tokenizer, data, embedding_rows=10_000)
    return next(((f.level, str(f)) for f in findings if f.gate == "thoughts"), ("", ""))


def test_each_fault_names_its_row(tokenizer: Any, make_data: Any) -> None:
    fine = [U1, thinks("cup", "hm")]
    qwen = make_data(chat_template=TEMPLATES["qwen3"][0], mask="assistant")
    level, text = judged(tokenizer, qwen, fine, [U1, thinks("cup", "hm"), U2, thinks("box", "oh")])
    assert (
        level == "refused"
        and "the thoughts of 1 trained messages (t.jsonl:2, messages[1], by data.chat_template)" in text
    )
    for mask in ("completion", "assistant"):
        off = make_data(chat_template=R1.replace("<think>\n", "<think>\n</think>"), mask=mask)
        level, text = judged(tokenizer, off, [U1, thinks("cup", "hm", inline=True)])
        assert level == "refused" and "(t.jsonl:1, messages[1], by data" in text and "data.thoughts: last" in text
    closed = make_data(chat_template=TEMPLATES["qwen3.5"][0], template_args={"enable_thinking": False})
    level, text = judged(tokenizer, closed, [U1, thinks("cup", None)], fine)
    assert level == "refused" and "answers behind, the thoughts of 1 trained messages (t.jsonl:2" in text
    for broken in ("<think>\nhm\n\ncup", "<think>a</think>b</think>c"):
        level, text = judged(tokenizer, qwen, fine, [U1, ChatMessage("assistant", broken)])
        assert level == "refused" and "are no pair (t.jsonl:2, messages[1])" in text
    for empty in ("<think>\n\n</think>\n\ncup", "<think>\n \t\n</think>\n\ncup"):
        level, text = judged(tokenizer, qwen, fine, [U1, ChatMessage("assistant", empty)])
        assert level == "warning" and "thoughts without a word (t.jsonl:2, messages[1])" in text
    assert judged(tokenizer, qwen, fine, [U1, ChatMessage("assistant", "hm\n</think>\n\ncup")]) == ("", ""), "R1's text"


def test_the_policy_for_earlier_thoughts(tokenizer: Any, make_data: Any) -> None:
    talk = Row("t.jsonl:1", (U1, thinks("cup", "hm"), U2, thinks("box", "oh")))
    plain = Row("t.jsonl:1", (U1, thinks("cup", None), U2, thinks("box", None)))
    for name in ("chatml-tools", "smollm3"):
        given = {"chat_template": TEMPLATES[name][0], "mask": "assistant"}
        kept = labelled(tokenizer, talk, make_data(**given))[0]
        assert ["hm" in kept[0], "oh" in kept[1]] == [True, True]
        last = labelled(tokenizer, talk, make_data(**given, thoughts="last"))[0]
        assert last == kept[1:], "the earlier turn is context, without its thoughts"
        assert (
            labelled(tokenizer, talk, make_data(**given, thoughts="strip"))[0]
            == labelled(tokenizer, plain, make_data(**given))[0]
        )
    qwen = make_data(chat_template=TEMPLATES["qwen3"][0], mask="assistant", thoughts="last")
    assert judged(tokenizer, qwen, list(talk.messages or ())) == ("", "")
    with pytest.raises(DataError, match=r"t.jsonl:1: data.chat_template asks for an answer behind <think>, and writes"):
        encode([Row("t.jsonl:1", (U1, thinks("cup", "hm")))], tokenizer, make_data(chat_template=R1, thoughts="strip"))
    off = R1.replace("<think>\n", "<think>\n</think>")
    assert judged(tokenizer, make_data(chat_template=off, thoughts="strip"), [U1, thinks("cup", "hm")]) == ("", "")


def test_arguments_stand_at_the_top_of_the_template(make_byte_level: Any, make_data: Any) -> None:
    args = {"enable_thinking": False, "names": ["a", {"b": None}], "mark": 'it\'s "so"\n'}
    shows = "{{ names[1].b is none }}{{ mark }}{{ enable_thinking }}"
    tokenizer = make_byte_level(shows)
    text = chatml.chat_template(tokenizer, make_data(template_args=args))
    assert text is not None and text.endswith(shows)

    def render(**more: Any) -> str:
        chat = [U1.to_template()]
        return str(tokenizer.apply_chat_template(chat, chat_template=text, tokenize=False, **more))

    assert render() == 'Trueit\'s "so"\nFalse' and render(enable_thinking=1).endswith("1"), "a request is stronger"
    tokenizer.chat_template = text
    assert chatml.chat_template(tokenizer, make_data(template_args=args)) == text, (
        "once, also where it is there already"
    )
    with pytest.raises(DataError, match=r"data\.template_args\.effort: the chat template does not read it"):
        chatml.chat_template(tokenizer, make_data(template_args={"effort": 1}))


def test_arguments_that_are_none(tmp_path: Path) -> None:
    for bad in ({"messages": []}, {"a b": 1}, [1]):
        with pytest.raises(RecipeError, match="must be a mapping of names that the template reads"):
            tiny_run.recipe(tmp_path, data__template_args=bad)


def test_what_a_run_was_given_is_used_wherever_its_adapter_is(tmp_path: Path) -> None:
    """Kept in the passport's template, so that a run, its adapter alone, and a merged model's folder render with it; an
    adapter is refused with other arguments."""
    asks = "{% if tone %}[{{ tone }}]{% endif %}" + tiny_run.CHATML
    given = {"data__chat_template": asks, "data__template_args": {"tone": "old"}, "train__max_steps": 1}
    loaded = tiny_run.recipe(tmp_path, **given)
    finetune.train(loaded)
    run = Path(loaded.recipe.output)
    passport = json.loads((run / "adapter" / "halfbyte.json").read_text())
    top = "{% if tone is not defined %}{% set tone = 'old' %}{% endif %}\n"
    assert passport["belongs_to"]["chat_template"] == top + asks
    assert passport["recipe"]["data.template_args"] == {"tone": "old"}
    asked = [{"role": "user", "content": "red"}]
    for path in (run, run / "adapter"):
        opened = load.open_run(path)
        assert opened.tokenizer.decode(chat_ids(opened.tokenizer, asked)).startswith("[old]<|im_start|>")
        assert opened.tokenizer.decode(chat_ids(opened.tokenizer, asked, variables={"tone": "new"})).startswith("[new]")
    folder.put_tokenizer(tmp_path, run / "adapter", loaded.recipe, find_model(loaded.recipe))
    assert (tmp_path / "chat_template.jinja").read_text() == top + asks
    with pytest.raises(AdapterError, match="chat template: trained with"):
        load.open_run(run / "adapter", overrides=["data.template_args={tone: new}"])


def test_a_mark_that_no_prompt_leads_to_is_read_and_not_learned(tokenizer: Any, make_data: Any) -> None:
    """Of an old turn behind `</think>`, where a model is asked behind `<think>`, the words alone are trained; the last
    turn is laid out as it is asked for. Without thinking both are asked for behind `</think>`."""
    talk = (U1, ChatMessage("assistant", "cup"), U2, ChatMessage("assistant", "it is red"))
    for args, last in (({}, "</think>it is red<|im_end|>"), ({"enable_thinking": False}, "it is red<|im_end|>")):
        data = make_data(chat_template=GLM47, template_args=args, mask="assistant")
        texts, encoded = labelled(tokenizer, Row("t.jsonl:1", talk), data)
        assert texts == ["cup<|im_end|>", last]
        row = tokenizer.decode(encoded.examples[0].input_ids)
        assert "assistant\n</think>cup<|im_end|>" in row and row.endswith(
            f"assistant\n{'' if args else '<think>'}</think>it is red<|im_end|>"
        )
    shown = (U1, thinks("cup", "hm"), U2, thinks("it is red", "let me see"))
    texts, _ = labelled(tokenizer, Row("t.jsonl:1", shown), make_data(chat_template=GLM47))
    assert texts == ["let me see</think>it is red<|im_end|>"]
