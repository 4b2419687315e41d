"""Parts of a row that are masked or count for more or less: by the row itself, by its messages, by patterns.

The reference labels characters by hand, and gives a token the least weight of its characters but for white space.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data import gates
from halfbyte.data.encoding import encode as encoding
from halfbyte.data.encoding.encoder import Encoder
from halfbyte.data.encoding.examples import IGNORED, Examples
from halfbyte.data.encoding.render import Renderer
from halfbyte.data.reading import formats
from halfbyte.data.reading.formats import Row
from halfbyte.data.reading.problems import BadRow
from halfbyte.errors import DataError, RecipeError
from halfbyte.training.preview import show_row
from tests import tiny_run
from tests.data.conftest import CHATML
from tests.data.in_memory import encode

TOOLS = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + (m['content'] | tojson if m['role'] == 'tool' "
TOOLS += (
    "else m['content']) + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
)
TOOLS += "{% endif %}"


@pytest.fixture(scope="module")
def tokenizer(make_byte_level: Any) -> Any:
    return make_byte_level(CHATML, eos="<|im_end|>")


def row_of(data: Any, *messages: dict[str, Any]) -> Row:
    parse = formats.parser("messages", data, ("messages",))
    return parse("t.jsonl:1", {"messages": list(messages)})


def weighed(tokenizer: Any, row: Row, data: Any) -> list[tuple[str, float]]:
    """Runs of labelled tokens that count for the same, as text without spaces, and what each of their tokens counts
    for."""
    (example,) = encode([row], tokenizer, data).examples
    runs: list[tuple[list[int], float]] = []
    before = None
    for at, label in enumerate(example.labels):
        weight = None if label == IGNORED else example.weights[at] if example.weights else 1.0
        if weight is not None:
            runs[-1][0].append(label) if weight == before else runs.append(([label], weight))
        before = weight
    return without_spaces([(tokenizer.decode(ids), weight) for ids, weight in runs])


def without_spaces(runs: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """As a space may be a token of its own; runs of nothing else are left out."""
    bare = [("".join(text.split()), weight) for text, weight in runs]
    return [
        ("".join(text for text, _ in group), weight)
        for weight, group in ((w, [*g]) for w, g in groupby((r for r in bare if r[0]), key=lambda run: run[1]))
    ]


U, A = {"role": "user", "content": "why red?"}, {"role": "assistant", "content": "I am fine. it is 48 clips"}
MESSAGES: list[Any] = [
    ("completion", (U, {**A, "weight": 0.5}), [("I am fine. it is 48 clips<|im_end|>", 0.5)]),
    ("assistant", (U, {**A, "weight": 0}, U, A), [("I am fine. it is 48 clips<|im_end|>", 1.0)]),
    ("assistant", (U, {**A, "weight": 2}, U, A), [(A["content"] + "<|im_end|>", w) for w in (2.0, 1.0)]),
    ("assistant", (U, {**A, "train": False, "weight": 3}, U, A), [(A["content"] + "<|im_end|>", 1.0)]),
    ("completion", ({**U, "train": True}, A), [("why red?", 1.0), (A["content"] + "<|im_end|>", 1.0)]),
    ("completion", ({**U, "train": True, "weight": 0.25}, A), [("why red?", 0.25), (A["content"] + "<|im_end|>", 1.0)]),
    ("completion", ({**U, "weight": 1}, A), [(A["content"] + "<|im_end|>", 1.0)]),
    (
        "completion",  # what the details leave out is not trained, and the end of the turn is
        (U, {**A, "train_detail": [{"begin_offset": 11, "end_offset": 12, "train": True}]}),
        [(" it", 1.0), ("<|im_end|>", 1.0)],
    ),
    (
        "completion",
        (U, {**A, "train": False, "train_detail": [{"begin_offset": 17, "end_offset": 18, "weight": 3}]}),
        [(" 48", 3.0)],
    ),
    (
        "completion",
        (U, {"role": "assistant", "content": [
            {"type": "text", "text": "I am fine.", "train": False}, {"type": "text", "text": " it is"},
            {"type": "text", "text": " 48", "weight": 2}, {"type": "text", "text": " clips"}]}),
        [(" it is", 1.0), (" 48", 2.0), (" clips<|im_end|>", 1.0)],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("mask", "talk", "wanted"), MESSAGES)
def test_a_message_or_a_part_of_it_counts_for_what_the_row_says(
    tokenizer: Any, make_data: Any, mask: str, talk: Any, wanted: list[tuple[str, float]]
) -> None:
    data = make_data(mask=mask, max_length=4096)
    assert weighed(tokenizer, row_of(data, *talk), data) == without_spaces(wanted)


def test_a_tool_result_is_trained_where_the_row_says_so(tokenizer: Any, make_data: Any) -> None:
    data = make_data(max_length=4096)
    told = {"role": "tool", "content": "48 clips"}
    assert weighed(tokenizer, row_of(data, U, told, A), data) == without_spaces([(A["content"] + "<|im_end|>", 1.0)])
    told["train"] = True  # type: ignore[assignment]
    assert weighed(tokenizer, row_of(data, U, told, A), data)[0][0].startswith("48clips")
    part = {**told, "train_detail": [{"begin_offset": 0, "end_offset": 1}]}
    assert weighed(tokenizer, row_of(data, U, part, A), data)[0][0].startswith("48I")


PATTERNS: list[Any] = [
    ({r"\d+": 0}, [("I am fine. it is", 1.0), (" clips<|im_end|>", 1.0)]),
    ({r"it is (\d+)": 4}, [("I am fine. it is", 1.0), (" 48", 4.0), (" clips<|im_end|>", 1.0)]),
    ({"fine": 2, "am fine": 0.25}, [("I", 1.0), (" am", 0.25), (" fine", 0.5), (". it is 48 clips<|im_end|>", 1.0)]),
    ({"(?s)it is.*": 0}, [("I am fine.", 1.0), ("<|im_end|>", 1.0)]),
    ({"why": 0, "nowhere(x)?": 0}, [(A["content"] + "<|im_end|>", 1.0)]),
]  # fmt: skip


@pytest.mark.parametrize(("weights", "wanted"), PATTERNS)
def test_patterns_weigh_what_is_trained(
    tokenizer: Any, make_data: Any, weights: dict[str, float], wanted: list[tuple[str, float]]
) -> None:
    """Never the prompt, and never the end of a turn; several multiply."""
    data = make_data(max_length=4096, weights=weights)
    assert weighed(tokenizer, row_of(data, U, A), data) == without_spaces(wanted)


def test_plain_rows_and_a_tokenizer_that_cannot_be_cut(
    make_byte_level: Any, make_sentence_piece: Any, make_data: Any
) -> None:
    data = make_data(max_length=4096, weights={"sold": 0, "clips": 2})
    for make in (make_byte_level, make_sentence_piece):
        tokenizer = make()
        asked = Row("t:1", prompt="Natalia sold", completion=" clips and sold clips")
        runs = weighed(tokenizer, asked, data)
        assert [text.strip() for text, weight in runs if weight == 2.0] == ["clips", "clips"]
        assert "sold" not in "".join(text for text, _ in runs) and runs[-1][0].endswith("</s>")
        text = weighed(tokenizer, Row("t:1", text="Natalia sold clips"), data)
        assert ("clips", 2.0) in [(text.strip().removesuffix("</s>"), weight) for text, weight in text]


def test_a_slow_tokenizer_is_refused(tokenizer: Any, make_data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(weights={"it": 0})
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(DataError, match="need a fast tokenizer"):
        encode([row_of(data, U, A)], tokenizer, data)


def test_parts_that_a_template_rewrites_and_mask_all_are_refused(make_byte_level: Any, make_data: Any) -> None:
    tokenizer = make_byte_level(TOOLS, eos="<|im_end|>")
    told = {"role": "tool", "content": 'a "48"', "train_detail": [{"begin_offset": 3, "end_offset": 4}]}
    data = make_data(max_length=4096)
    with pytest.raises(DataError, match=r"messages\[1\]: the chat template changes its text"):
        encode([row_of(data, U, told, A)], tokenizer, data)
    every = make_data(mask="all", max_length=4096)
    with pytest.raises(DataError, match=r"data.mask all trains every token alike, and messages\[1\] has weights"):
        encode([row_of(every, U, {**A, "weight": 0.5})], tokenizer, every)
    with pytest.raises(DataError, match="not one token is labelled"):
        encode([row_of(data, U, {**A, "weight": 0})], tokenizer, data)


def test_rows_that_are_compared_take_no_weights(tokenizer: Any, make_data: Any) -> None:
    better, worse = row_of(make_data(), U, {**A, "weight": 0.5}), row_of(make_data(), U, {**A, "content": "no"})
    with pytest.raises(DataError, match="weights of messages or parts are for"):
        encode([Row("t:1", messages=better.messages, rejected=worse)], tokenizer, make_data(max_length=4096))


def test_a_refused_row_leaves_the_texts_of_others_alone(tokenizer: Any, make_data: Any) -> None:
    """A pair with weights between two without: these are what they are without it."""
    data = make_data(max_length=4096)
    talks = [("red", "no", {}), ("blue", "never", {"weight": 0.5}), ("green", "not at all", {})]
    rows = [
        Row(
            f"t:{n}",
            messages=row_of(data, U, {**A, "content": better, **more}).messages,
            rejected=row_of(data, U, {**A, "content": worse}),
        )
        for n, (better, worse, more) in enumerate(talks)
    ]
    part, tally = Encoder(tokenizer, data).encode(rows)
    assert tally.refused.count == 1 and "t:1: weights of messages" in tally.refused.first()
    assert [*Examples([part])] == [*encode([rows[0], rows[2]], tokenizer, data).examples]


def test_a_weight_of_one_everywhere_says_nothing(tokenizer: Any, make_data: Any) -> None:
    """Such rows may be compared, and need no fast tokenizer."""
    data = make_data(max_length=4096, mask="assistant")
    row = row_of(data, {**U, "weight": 0}, {**A, "weight": 1}, U, {**A, "weight": 1.0})
    assert Renderer(tokenizer, data).render(row).weights is None
    one, none = ((U, {**A, **more}) for more in ({"weight": 1}, {}))
    worse = row_of(data, U, {**A, "content": "no"})
    pairs = [Row("t:1", messages=row_of(data, *talk).messages, rejected=worse) for talk in (one, none)]
    assert [*encode(pairs[:1], tokenizer, data).examples] == [*encode(pairs[1:], tokenizer, data).examples]


BAD: list[Any] = [
    ({**A, "weight": -1}, "messages[1].weight: a number from 0 on is needed, got the number -1"),
    ({**A, "weight": True}, "messages[1].weight: a number from 0 on is needed, got true or false"),
    ({**A, "weight": float("nan")}, "messages[1].weight: a number from 0 on is needed"),
    ({**A, "train": 1}, "messages[1].train: true or false is needed"),
    ({**A, "train_detail": [{"begin_offset": 0}]}, "messages[1].train_detail[0]: begin_offset and end_offset within 0"),
    ({**A, "train_detail": [{"begin_offset": 0, "end_offset": 25}]}, "within 0 to 24 are needed"),
    ({**A, "train_detail": 3}, "messages[1].train_detail[0]"),
]


@pytest.mark.parametrize(("message", "what"), BAD)
def test_what_no_weight_is_names_its_field(make_data: Any, message: Any, what: str) -> None:
    with pytest.raises(BadRow) as raised:
        row_of(make_data(), U, message)
    assert what in str(raised.value)


def test_what_a_recipe_refuses(tmp_path: Path) -> None:
    for weights in ({"(": 0}, {"a": -1}, {"a": "x"}, "a"):
        with pytest.raises(RecipeError, match="must be a mapping of regular expressions to numbers"):
            tiny_run.recipe(tmp_path, data__weights=weights)
    with pytest.raises(RecipeError, match=r"data.weights is not read with data.packing stream"):
        tiny_run.recipe(tmp_path, data__weights={"a": 0}, data__packing="stream", data__format="text")
    with pytest.raises(RecipeError, match=r"data.weights is for train.method sft"):
        tiny_run.recipe(tmp_path, data__weights={"a": 0}, train__method="dpo", data__max_length=64)


def test_they_are_counted_shown_and_kept(tmp_path: Path, tokenizer: Any, make_data: Any) -> None:
    rows = [row_of(make_data(), U, A), row_of(make_data(), U, {**A, "content": "no"})]
    data = make_data(max_length=4096, weights={r"\d+": 0.5})
    encoded = encode(rows, tokenizer, data)
    assert encoded.label_weights is not encoded.labelled and encoded.tally.weighed == 1
    first, second = encoded.examples
    assert (
        first.label_weight
        == encoded.label_weights[0]
        == encoded.labelled[0] - 0.5 * sum(w == 0.5 for w in first.weights)
    )
    assert second.label_weight == encoded.label_weights[1] == encoded.labelled[1] and not second.weights
    shown = show_row(first, 1, tokenizer)
    assert "".join(p.text for p in shown.pieces if p.weight == 0.5).strip() == "48"
    found = {f.gate: f for f in gates.check(encoded, None, tokenizer, data, embedding_rows=10_000)}
    assert "and count for" in found["labels"].found and found["labels"].level == "ok"
    none = make_data(max_length=4096, weights={"nowhere": 0})
    found = {
        f.gate: f for f in gates.check(encode(rows, tokenizer, none), None, tokenizer, none, embedding_rows=10_000)
    }
    assert found["labels"].level == "warning" and "finds nothing" in found["labels"].found


def test_the_cache_keeps_them(tmp_path: Path, make_data: Any) -> None:
    file = tiny_run.rows(tmp_path / "rows.jsonl", 1100)
    data = make_data(train=str(file), weights={"red": 0.5, "blue": 0})
    again = [encoding.encode(str(file), tiny_run.tokenizer(), data).examples for _ in range(2)]
    assert again[0][:50] == again[1][:50] and any(0.5 in e.weights for e in again[1][:50])
    plain = encoding.encode(str(file), tiny_run.tokenizer(), make_data(train=str(file)))
    assert plain.label_weights is plain.labelled
