"""The labels are the assistant's text and the token that ends its turn, whatever the template does around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.data.reading.formats import ChatMessage, Row
from halfbyte.errors import DataError
from tests.data.in_memory import encode

TALK = (
    ("user", "Hello there"),
    ("assistant", "I am fine."),
    ("user", "and what is the answer?"),
    ("assistant", "48 clips\n\nin May"),
)


def chat(*messages: tuple[str, str], where: str = "t.jsonl:1", untrained: Sequence[int] = ()) -> Row:
    return Row(where, messages=tuple(ChatMessage(r, c, i not in untrained) for i, (r, c) in enumerate(messages)))


def one(row: Row, tokenizer: Any, data: Any) -> Example:
    (example,) = encode([row], tokenizer, data).examples
    return example


def runs(example: Example, tokenizer: Any) -> list[str]:
    """The text of each labelled run of tokens."""
    found: list[list[int]] = []
    before = False
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label != IGNORED:
            assert label == token
            found = [*found, []] if not before else found
            found[-1].append(label)
        before = label != IGNORED
    return [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in found]


def text(ids: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def is_prefix(example: Example) -> bool:
    return example.input_ids[: len(example.prompt_ids)] == example.prompt_ids


# template, what ends a turn, what the model writes before the text
KINDS = [
    ("chatml", "<|im_end|>", ""),
    ("llama3", "<|eot_id|>", ""),
    ("llama2", " </s>", " "),
    ("gemma", "<end_of_turn>", ""),
    ("mistral", "</s>", " "),
    ("headers", "<|im_end|>", ""),
]


@pytest.mark.parametrize(("name", "end", "lead"), KINDS)
def test_labels_by_template(
    make_byte_level: Any, make_data: Any, templates: Any, name: str, end: str, lead: str
) -> None:
    tokenizer = make_byte_level(getattr(templates, name))
    first, last = f"{lead}I am fine.{end}", f"{lead}48 clips\n\nin May{end}"
    example = one(chat(*TALK), tokenizer, make_data())
    assert runs(example, tokenizer) == [last]
    assert is_prefix(example)
    assert example.completion == "48 clips\n\nin May"
    both = one(chat(*TALK), tokenizer, make_data(mask="assistant"))
    assert runs(both, tokenizer) == [first, last]
    rendered = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in TALK], tokenize=False)
    assert text(example.input_ids, tokenizer) == text(both.input_ids, tokenizer) == rendered


@pytest.mark.parametrize("mask", ["completion", "assistant"])
@pytest.mark.parametrize("name", ["llama3", "gemma"])
def test_a_template_that_strips(make_byte_level: Any, make_data: Any, templates: Any, name: str, mask: str) -> None:
    tokenizer = make_byte_level(getattr(templates, name))
    end = "<|eot_id|>" if name == "llama3" else "<end_of_turn>"
    example = one(chat(("user", " Hi\n"), ("assistant", "\n  fine \n\n")), tokenizer, make_data(mask=mask))
    assert runs(example, tokenizer) == [f"fine{end}"]
    assert is_prefix(example)


def test_a_template_that_rewrites_earlier_turns(make_byte_level: Any, make_data: Any, templates: Any) -> None:
    tokenizer = make_byte_level(templates.mistral)
    row = chat(("system", "Be brief."), *TALK)
    example = one(row, tokenizer, make_data(mask="assistant"))
    assert runs(example, tokenizer) == [" I am fine.</s>", " 48 clips\n\nin May</s>"]
    assert is_prefix(example)
    assert text(example.prompt_ids, tokenizer).endswith("[INST] Be brief.\n\nand what is the answer?[/INST]")


def test_thoughts_that_a_template_adds_and_takes_away(make_byte_level: Any, make_data: Any, templates: Any) -> None:
    tokenizer = make_byte_level(templates.qwen3)
    row = chat(("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nyes"), ("user", "b"), ("assistant", "no"))
    encoded = encode([row], tokenizer, make_data(mask="assistant"))
    assert runs(encoded.examples[0], tokenizer) == ["yes<|im_end|>", "<think>\n\n</think>\n\nno<|im_end|>"]
    assert is_prefix(encoded.examples[0])
    assert encoded.tally.messages() == []


def test_a_generation_prompt_that_the_row_does_not_have(make_byte_level: Any, make_data: Any, templates: Any) -> None:
    tokenizer = make_byte_level(templates.reasoner)
    row = chat(("user", "a"), ("assistant", "b"))
    with pytest.raises(DataError, match="the tokenizer's chat template asks for an answer behind <think>, and writes"):
        encode([row], tokenizer, make_data())
    closed = make_byte_level(templates.reasoner.replace("<think>\n", "<think></think>"))
    for mask, learned in (("completion", "b<|im_end|>"), ("all", None)):
        example = one(row, closed, make_data(mask=mask, weights={"b": 0.5}))
        whole = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think></think>b<|im_end|>"
        assert text(example.input_ids, closed).rstrip() == whole and is_prefix(example)
        assert learned is None or runs(example, closed) == [learned]
        weight_of_b = example.weights[len(example.prompt_ids)]
        assert weight_of_b == 0.5


def test_no_end_of_turn_in_the_template(make_byte_level: Any, make_data: Any, templates: Any) -> None:
    tokenizer = make_byte_level(templates.alpaca)
    encoded = encode([chat(*TALK)], tokenizer, make_data(mask="assistant"))
    example = encoded.examples[0]
    assert runs(example, tokenizer) == ["I am fine.", "48 clips\n\nin May</s>"]
    assert text(example.input_ids, tokenizer).endswith("### assistant: 48 clips\n\nin May</s>")
    assert encoded.tally.messages() == [
        "1 row: no end-of-turn token after an earlier assistant turn; only its text is labelled"
    ]
    every = one(chat(*TALK), tokenizer, make_data(mask="all"))
    assert every.labels == (IGNORED, *every.input_ids[1:])
    assert text(every.input_ids, tokenizer) == text(example.input_ids, tokenizer)


def test_an_assistant_who_speaks_first(make_byte_level: Any, make_data: Any, templates: Any) -> None:
    tokenizer = make_byte_level(templates.chatml)
    row = chat(("assistant", "Hello"), *TALK)
    example = one(row, tokenizer, make_data(mask="assistant"))
    assert runs(example, tokenizer) == ["Hello<|im_end|>", "I am fine.<|im_end|>", "48 clips\n\nin May<|im_end|>"]
    alone = one(chat(("assistant", "Hello")), tokenizer, make_data())
    assert runs(alone, tokenizer) == ["Hello<|im_end|>"]
    assert text(alone.prompt_ids, tokenizer) == "<|im_start|>assistant\n"


def test_the_same_text_said_by_both(make_byte_level: Any, make_data: Any, templates: Any) -> None:
    tokenizer = make_byte_level(templates.llama2)
    row = chat(("user", "a"), ("assistant", "a"), ("user", "a"), ("assistant", "a"))
    example = one(row, tokenizer, make_data(mask="assistant"))
    assert runs(example, tokenizer) == [" a </s>", " a </s>"]
    assert text(example.prompt_ids, tokenizer) == "<s>[INST] a [/INST] a </s><s>[INST] a [/INST]"


def test_a_text_that_begins_like_a_header(make_byte_level: Any, make_data: Any, templates: Any) -> None:
    tokenizer = make_byte_level(templates.headers)
    example = one(chat(("user", "a"), ("assistant", "<")), tokenizer, make_data())
    assert runs(example, tokenizer) == ["<<|im_end|>"]
    assert text(example.prompt_ids, tokenizer).endswith("assistant\n")


def test_train_false_is_context_only(make_byte_level: Any, make_data: Any, templates: Any) -> None:
    tokenizer = make_byte_level(templates.chatml)
    example = one(chat(*TALK, untrained=[1]), tokenizer, make_data(mask="assistant"))
    assert runs(example, tokenizer) == ["48 clips\n\nin May<|im_end|>"]
    example = one(chat(*TALK, untrained=[3]), tokenizer, make_data(mask="assistant"))
    assert runs(example, tokenizer) == ["I am fine.<|im_end|>"]
    with pytest.raises(DataError) as error:
        encode([chat(*TALK), chat(*TALK, where="t.jsonl:2", untrained=[3])], tokenizer, make_data())
    assert str(error.value) == (
        "1 of 2 rows cannot be encoded\n"
        "  - t.jsonl:2: not one token is labelled (data.mask completion), so there is nothing to learn from it"
    )


def test_no_token_straddles_the_edge_of_a_label(make_byte_level: Any, make_data: Any, templates: Any) -> None:
    tokenizer = make_byte_level(templates.chatml)
    whole = tokenizer.tokenize("<|im_start|>assistant\n\n fine")
    assert "ĊĊ" in whole  # else this test shows nothing: both line ends as one token
    row = chat(("user", "a"), ("assistant", "\n fine"), ("user", "b"), ("assistant", "\n fine"))
    example = one(row, tokenizer, make_data(mask="assistant"))
    assert runs(example, tokenizer) == ["\n fine<|im_end|>"] * 2
    assert is_prefix(example)


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda t: t.strip())
TURNS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3)


@pytest.mark.parametrize(("name", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>")])
@pytest.mark.parametrize("mask", ["completion", "assistant"])
def test_what_is_labelled_is_what_was_said(
    make_byte_level: Any, make_data: Any, templates: Any, name: str, end: str, mask: str
) -> None:
    tokenizer = make_byte_level(getattr(templates, name))
    data = make_data(mask=mask, max_length=10_000)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(turns=TURNS, system=st.one_of(st.none(), WORDS))
    def check(turns: list[tuple[str, str]], system: str | None) -> None:
        talk = [m for u, a in turns for m in (("user", u), ("assistant", a))]
        example = one(chat(*([("system", system)] if system else []), *talk), tokenizer, data)
        said = [a if name == "chatml" else a.strip() for _, a in turns]
        assert runs(example, tokenizer) == [s + end for s in (said if mask == "assistant" else said[-1:])]
        assert is_prefix(example)
        assert len(example.labels) == len(example.input_ids)

    check()


# --- prompt and completion


def test_prompt_completion_through_a_chat_template(make_byte_level: Any, make_data: Any, templates: Any) -> None:
    tokenizer = make_byte_level(templates.chatml)
    row = Row("t.jsonl:1", prompt="2+2?", completion="4")
    assert one(row, tokenizer, make_data()) == one(chat(("user", "2+2?"), ("assistant", "4")), tokenizer, make_data())


@pytest.mark.parametrize(("mask", "expected"), [("completion", [" fine</s>"]), ("all", ["llo there fine</s>"])])
def test_prompt_completion_without_a_template(make_byte_level: Any, make_data: Any, mask: str, expected: Any) -> None:
    tokenizer = make_byte_level()
    example = one(Row("t.jsonl:1", prompt="Hello there", completion=" fine"), tokenizer, make_data(mask=mask))
    assert text(example.input_ids, tokenizer) == "Hello there fine</s>"
    assert text(example.prompt_ids, tokenizer) == "Hello there"
    assert is_prefix(example)
    if mask == "all":
        assert example.labels == (IGNORED, *example.input_ids[1:])
    else:
        assert runs(example, tokenizer) == expected


@pytest.mark.parametrize("mask", ["completion", "all"])
def test_one_bos_where_the_tokenizer_adds_it(make_sentence_piece: Any, make_data: Any, mask: str) -> None:
    tokenizer = make_sentence_piece()
    example = one(Row("t.jsonl:1", prompt="Hello there", completion=" fine"), tokenizer, make_data(mask=mask))
    joint = tokenizer("Hello there fine").input_ids
    assert joint[0] == tokenizer.bos_token_id
    assert list(example.input_ids) == [*joint, tokenizer.eos_token_id]
    assert is_prefix(example)
    if mask == "all":
        assert example.labels == (IGNORED, *example.input_ids[1:])
    else:
        assert example.labels[: len(example.prompt_ids)] == (IGNORED,) * len(example.prompt_ids)
        assert example.labels[len(example.prompt_ids) :] == example.input_ids[len(example.prompt_ids) :]


@pytest.mark.parametrize("name", ["llama2", "chatml", "gemma"])
def test_a_tokenizer_that_cannot_be_cut(make_sentence_piece: Any, make_data: Any, templates: Any, name: str) -> None:
    tokenizer = make_sentence_piece(getattr(templates, name))
    example = one(chat(*TALK), tokenizer, make_data())
    rendered = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in TALK], tokenize=False)
    assert list(example.input_ids) == tokenizer(rendered, add_special_tokens=False).input_ids
    assert example.input_ids.count(tokenizer.bos_token_id) == rendered.count("<s>")
    end = {"llama2": "</s>", "chatml": "<|im_end|>", "gemma": "<end_of_turn>"}[name]
    assert [r.replace(" ", "") for r in runs(example, tokenizer)] == [f"48clips\n\ninMay{end}"]
    assert is_prefix(example)
    both = one(chat(*TALK), tokenizer, make_data(mask="assistant"))
    assert [r.replace(" ", "") for r in runs(both, tokenizer)] == [f"Iamfine.{end}", f"48clips\n\ninMay{end}"]


# --- the packaged model


def test_smollm2(smollm: Any, make_data: Any) -> None:
    rows = [
        Row(
            f"t.jsonl:{i}",
            prompt=f"What is {i} + {i * 7}?\n\nThink.",
            completion=f"{i} + {i * 7} = {i * 8}\n#### {i * 8}",
        )
        for i in range(200)
    ]
    encoded = encode(rows, smollm, make_data())
    for row, example in zip(rows, encoded.examples, strict=True):
        talk = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion}]
        whole = smollm.apply_chat_template(talk, tokenize=True, return_dict=False)
        assert list(example.input_ids) == whole
        prompt = smollm.apply_chat_template(talk[:1], tokenize=True, return_dict=False, add_generation_prompt=True)
        assert list(example.prompt_ids) == prompt
        assert is_prefix(example)
        assert runs(example, smollm) == [f"{row.completion}<|im_end|>"]
        assert example.labels[-1] == IGNORED  # the line end after the turn
        assert example.where == row.where
    assert encoded.tally.messages() == []


# --- length


def long_rows(tokenizer: Any, make_data: Any) -> list[Row]:
    return [
        Row("t.jsonl:1", prompt="a", completion="b"),
        Row("t.jsonl:2", prompt="a", completion="b" * 50),
        Row("t.jsonl:3", prompt="a" * 50, completion="b"),
    ]


def fit(make_byte_level: Any, make_data: Any, overlong: str) -> EncodedRows:
    tokenizer = make_byte_level()
    rows = long_rows(tokenizer, make_data)
    return encode(rows, tokenizer, make_data(max_length=10, overlong=overlong))


def test_overlong_error(make_byte_level: Any, make_data: Any) -> None:
    with pytest.raises(DataError) as error:
        fit(make_byte_level, make_data, "error")
    assert str(error.value) == (
        "2 of 3 rows are longer than data.max_length 10; the longest has 52 tokens\n"
        "  - t.jsonl:2: 52 tokens\n"
        "  - t.jsonl:3: 52 tokens\n"
        "  fix: data.max_length: 52, or data.overlong: truncate (cut the end off) or skip"
    )


def test_overlong_skip(make_byte_level: Any, make_data: Any) -> None:
    encoded = fit(make_byte_level, make_data, "skip")
    assert [e.where for e in encoded.examples] == ["t.jsonl:1"]
    assert encoded.tally.skipped.shown == ["t.jsonl:2: 52 tokens, over 10", "t.jsonl:3: 52 tokens, over 10"]
    assert encoded.tally.truncated == 0


def test_overlong_truncate(make_byte_level: Any, make_data: Any) -> None:
    encoded = fit(make_byte_level, make_data, "truncate")
    assert [e.where for e in encoded.examples] == ["t.jsonl:1", "t.jsonl:2"]
    cut = encoded.examples[1]
    assert len(cut.input_ids) == len(cut.labels) == 10
    assert list(encoded.labelled) == [2, 9]
    assert encoded.tally.truncated == 1
    assert encoded.tally.skipped.shown == ["t.jsonl:3: 52 tokens, and none of the first 10 is labelled"]


@pytest.mark.parametrize("overlong", ["skip", "truncate"])
def test_no_row_is_left(make_byte_level: Any, make_data: Any, overlong: str) -> None:
    row = Row("t.jsonl:1", prompt="a" * 50, completion="b")
    with pytest.raises(DataError, match=r"no row is left: all 1 have more than data\.max_length 10 tokens"):
        encode([row], make_byte_level(), make_data(max_length=10, overlong=overlong))


def test_stats(make_byte_level: Any, make_data: Any) -> None:
    stats = encode(long_rows(None, make_data), make_byte_level(), make_data()).stats
    assert (stats.rows, stats.tokens, stats.labelled_tokens) == (3, 3 + 52 + 52, 2 + 51 + 2)
    assert (stats.min_length, stats.max_length) == (3, 52)
    assert stats.mean_length == pytest.approx(107 / 3)
    assert stats.labelled_share == pytest.approx(55 / 107)


# --- what cannot be encoded, and what should be known


def test_rows_that_the_template_refuses_are_all_named(make_byte_level: Any, make_data: Any, templates: Any) -> None:
    wrong = (("user", "a"), ("user", "b"), ("assistant", "c"))
    rows = [chat(*TALK), chat(*wrong, where="t.jsonl:2"), chat(*wrong, where="t.jsonl:3")]
    with pytest.raises(DataError) as error:
        encode(rows, make_byte_level(templates.llama2), make_data())
    assert str(error.value) == (
        "2 of 3 rows cannot be encoded\n"
        "  - t.jsonl:2: the chat template refuses it: roles must alternate user/assistant\n"
        "  - t.jsonl:3: the chat template refuses it: roles must alternate user/assistant"
    )


def test_a_template_that_leaves_the_assistant_out(make_byte_level: Any, make_data: Any) -> None:
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"messages\[3\]: the chat template does not write the text of this assistant"):
        encode([chat(*TALK)], make_byte_level(template), make_data())


@pytest.mark.parametrize("mask", ["completion", "assistant", "all"])
@pytest.mark.parametrize("train", [True, False])
def test_a_template_that_leaves_tool_calls_out(
    make_byte_level: Any, make_data: Any, templates: Any, mask: str, train: bool
) -> None:
    """An empty turn would stand where the model called a tool."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    talk = (
        ChatMessage("user", "1 + 2?"), ChatMessage("assistant", "", train, {"tool_calls": [call]}),
        ChatMessage("tool", "3"),
        ChatMessage("assistant", "It is 3."),
    )  # fmt: skip
    with pytest.raises(DataError, match=r"messages\[1\]: the chat template does not write the tool calls"):
        encode([Row("t.jsonl:1", talk)], make_byte_level(templates.chatml), make_data(mask=mask))
    writes = templates.chatml.replace(
        "+ m['content'] +", "+ m['content'] + m['tool_calls'] | default('', true) | tojson +"
    )
    assert len(encode([Row("t.jsonl:1", talk)], make_byte_level(writes), make_data(mask=mask)).examples) == 1


def test_messages_without_a_template(make_byte_level: Any, make_data: Any) -> None:
    with pytest.raises(DataError, match="the rows are messages, and this tokenizer has no chat template"):
        encode([chat(*TALK)], make_byte_level(), make_data())


def test_no_way_to_stop(make_byte_level: Any, make_data: Any, templates: Any) -> None:
    with pytest.raises(DataError, match="nothing would teach this model to stop"):
        encode([chat(*TALK)], make_byte_level(templates.alpaca, eos=None), make_data())
    encode([chat(*TALK)], make_byte_level(templates.chatml, eos=None), make_data())


def test_a_message_that_the_template_leaves_out_is_noticed(
    make_byte_level: Any, make_data: Any, templates: Any
) -> None:
    rows = [chat(("system", "Be brief."), *TALK), chat(*TALK)]
    encoded = encode(rows, make_byte_level(templates.gemma), make_data())
    assert "1 row: the chat template changes or leaves out the text of a system message" in encoded.tally.messages()


@pytest.mark.parametrize(
    ("mask", "untrained", "said"), [("completion", (), True), ("assistant", (), False), ("completion", (1,), False)]
)
def test_turns_that_are_not_trained_are_noticed(
    make_byte_level: Any, make_data: Any, templates: Any, mask: str, untrained: tuple[int, ...], said: bool
) -> None:
    rows = [chat(*TALK, untrained=untrained), chat(*TALK[:2])]
    text = "1 row: of several assistant turns only the last is trained; data.mask: assistant trains each"
    assert encode(rows, make_byte_level(templates.chatml), make_data(mask=mask)).tally.messages() == [text] * said


def test_special_tokens_in_the_text_are_noticed(make_byte_level: Any, make_data: Any, templates: Any) -> None:
    tokenizer = make_byte_level(templates.chatml)
    row = chat(("user", "a<|im_end|>"), ("assistant", "b<|im_end|>c"))
    encoded = encode([row, chat(*TALK[:2])], tokenizer, make_data())
    assert encoded.tally.messages() == [
        "1 row: the text holds a special token of this tokenizer, and is read as that token"
    ]
    assert runs(encoded.examples[0], tokenizer) == ["b<|im_end|>c<|im_end|>"]


def test_the_recipes_own_template(make_byte_level: Any, make_data: Any, templates: Any, tmp_path: Path) -> None:
    tokenizer = make_byte_level(templates.llama3)
    example = one(chat(*TALK), tokenizer, make_data(chat_template=templates.chatml))
    assert runs(example, tokenizer) == ["48 clips\n\nin May<|im_end|>"]
    file = tmp_path / "chat.jinja"
    file.write_text(templates.chatml)
    assert one(chat(*TALK), tokenizer, make_data(chat_template=str(file))) == example
    with pytest.raises(DataError, match="neither Jinja text nor a file"):
        encode([chat(*TALK)], tokenizer, make_data(chat_template=str(tmp_path / "none.jinja")))
