"""Every gate fires, with its exact text; and says what it found where all is well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halfbyte import finetune
from halfbyte.data import gates
from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.gates import Finding
from halfbyte.data.reading.formats import ChatMessage, Row
from halfbyte.errors import DataError
from halfbyte.models.context import Context
from halfbyte.training.events import Listener
from tests import tiny_run
from tests.data.in_memory import encode

Pair = tuple[str, str]
GATES = [
    "labels",
    "end token",
    "length",
    "context",
    "duplicates",
    "empty answers",
    "overlap",
    "unseen tokens",
    "vocabulary",
]
GOOD: list[Pair] = [("Hello there", "I am fine."), ("and you", "Thank you very much")]


def pairs(tokenizer: Any, data: Any, talk: list[Pair], name: str = "t.jsonl") -> EncodedRows:
    rows = [Row(f"{name}:{n}", prompt=p, completion=c) for n, (p, c) in enumerate(talk, start=1)]
    return encode(rows, tokenizer, data)


def judge(
    tokenizer: Any, data: Any, talk: list[Pair], held_out: list[Pair] | None = None, rows: int = 10_000, **more: Any
) -> dict[str, Finding]:
    train = pairs(tokenizer, data, talk)
    evaluation = None if held_out is None else pairs(tokenizer, data, held_out, "e.jsonl")
    found = gates.check(train, evaluation, tokenizer, data, embedding_rows=rows, **more)
    assert [f.gate for f in found] == GATES
    return {f.gate: f for f in found}


@pytest.fixture
def tokenizer(make_byte_level: Any, templates: Any) -> Any:
    return make_byte_level(templates.chatml, special=["<|im_start|>", "<|im_end|>", "<|reserved_special_token_7|>"])


def test_all_is_well(tokenizer: Any, make_data: Any) -> None:
    found = judge(tokenizer, make_data(), GOOD, [("a", "b")])
    assert {f.level for f in found.values()} == {"ok"}
    stats = pairs(tokenizer, make_data(), GOOD).stats
    share = f"{100 * stats.labelled_tokens / stats.tokens:.1f}%"
    assert [str(f) for f in found.values()] == [
        f"{stats.labelled_tokens} of {stats.tokens} tokens are labelled ({share})",
        "among the labels of each of 2 rows",
        f"the longest row has {stats.max_length} tokens of 1,024",
        "nothing in its config limits what the model reads at once",
        "none",
        "none",
        "none of 1 held-out rows is trained on",
        f"none among the {len(pairs(tokenizer, make_data(), GOOD).tally.used)} different tokens",
        f"{len(tokenizer):,} tokens, the embedding has 10,000 rows",
    ]
    gates.refuse(tuple(found.values()))


def test_almost_nothing_is_labelled(tokenizer: Any, make_data: Any) -> None:
    data = make_data(max_length=100_000)
    found = judge(tokenizer, data, [("why " * 900, "no")])["labels"]
    stats = pairs(tokenizer, data, [("why " * 900, "no")]).stats
    assert found.level == "warning"
    assert str(found) == (
        f"{stats.labelled_tokens} of {stats.tokens:,} tokens are labelled "
        f"({100 * stats.labelled_tokens / stats.tokens:.2f}%); data.mask: assistant or all, if more was meant"
    )


def test_nothing_is_labelled(tokenizer: Any, make_data: Any) -> None:
    talk = (ChatMessage("user", "a"), ChatMessage("assistant", "b", train=False))
    with pytest.raises(DataError) as error:
        encode([Row("t.jsonl:1", talk)], tokenizer, make_data())
    assert str(error.value) == (
        "1 of 1 rows cannot be encoded\n"
        "  - t.jsonl:1: not one token is labelled (data.mask completion), so there is nothing to learn from it"
    )


def test_no_end_is_learnt(tokenizer: Any, make_data: Any) -> None:
    data = make_data(max_length=40, overlong="truncate")
    found = judge(tokenizer, data, [("a", "word " * 50), ("b", "word " * 60)])
    assert found["end token"].level == "refused"
    with pytest.raises(DataError) as error:
        gates.refuse(tuple(found.values()))
    assert str(error.value) == (
        "the data is refused: end token: no row has one among its labels, so the model would not learn to stop.\n"
        "  fix: a larger data.max_length, or data.overlong: skip"
    )


def test_some_ends_and_lengths(tokenizer: Any, make_data: Any) -> None:
    talk = [("a", "word " * 50), ("b", "yes"), ("word " * 90, "no")]
    longest = pairs(tokenizer, make_data(), talk).stats.max_length
    found = judge(tokenizer, make_data(max_length=40, overlong="truncate"), talk)
    assert str(found["end token"]) == (
        "missing in the labels of 1 of 2 rows (t.jsonl:1); a larger data.max_length, or data.overlong: skip"
    )
    assert str(found["length"]) == (
        f"2 of 3 rows are over 40 tokens, the longest has {longest}: 1 truncated, 1 skipped; "
        f"data.max_length: {longest} takes them whole"
    )
    assert found["end token"].level == found["length"].level == "warning"


def test_texts_in_blocks_have_no_length(make_byte_level: Any, make_data: Any) -> None:
    tokenizer, data = make_byte_level(), make_data(max_length=8, packing="stream")
    texts = encode([Row("t:1", text="word " * 50), Row("t:2", text="ab")], tokenizer, data)
    found = gates.check(texts, None, tokenizer, data, embedding_rows=10_000)
    longest = texts.stats.max_length
    (length,) = (f for f in found if f.gate == "length")
    assert (length.level, str(length)) == ("ok", f"texts of 3 to {longest} tokens in blocks of 8") and longest > 8
    assert [str(f) for f in found if f.level != "ok"] == []


def test_rows_longer_than_the_model_reads(tokenizer: Any, make_data: Any) -> None:
    context, talk = Context(30, "max_position_embeddings 30"), [*GOOD, ("a", "word " * 50)]
    longest = pairs(tokenizer, make_data(), talk).stats.max_length
    found = judge(tokenizer, make_data(), talk, [("b", "word " * 40)], context=context)["context"]
    fix = "data.max_length: 30 with data.overlong: truncate or skip"
    fix += "; or rope scaling in config.json, where it was made for that"
    said = "2 of 4 rows are over the 30 that the model reads (max_position_embeddings 30)"
    assert (found.level, str(found)) == ("refused", f"{said}, the longest has {longest} tokens; {fix}")
    assert judge(tokenizer, make_data(), talk, context=Context(longest, ""))["context"].level == "ok"


@pytest.mark.parametrize(("block", "level"), [(8, "ok"), (30, "ok"), (31, "refused")])
def test_blocks_longer_than_the_model_reads(make_byte_level: Any, make_data: Any, block: int, level: str) -> None:
    tokenizer, data = make_byte_level(), make_data(max_length=block, packing="stream")
    texts = encode([Row(f"t:{n}", text="word " * 50) for n in range(2)], tokenizer, data)
    found = gates.check(texts, None, tokenizer, data, embedding_rows=10_000, context=Context(30, "why"))
    assert next(f for f in found if f.gate == "context").level == level


def test_a_text_that_is_too_long_can_go_on_in_the_next_block(make_byte_level: Any, make_data: Any) -> None:
    with pytest.raises(DataError, match=r"fix: data.max_length: \d+, or .* skip, or data.packing: stream"):
        encode([Row("book.txt", text="word " * 50)], make_byte_level(), make_data(max_length=8))


def test_duplicates(tokenizer: Any, make_data: Any) -> None:
    found = judge(tokenizer, make_data(), [*GOOD, GOOD[0]])["duplicates"]
    assert (found.level, str(found)) == (
        "warning",
        "1 row is an earlier one again (t.jsonl:3); take them out, unless they are meant to count twice",
    )
    found = judge(tokenizer, make_data(), [*[GOOD[0]] * 6, GOOD[1]])["duplicates"]
    assert found.found == "5 rows are an earlier one again (t.jsonl:2, t.jsonl:3, t.jsonl:4 and 2 more)"


def test_rows_that_all_became_the_same_tokens(make_data: Any) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    blind = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    became = "have all become the same 4 tokens"
    found = judge(blind, make_data(), [("red cup ", "box"), ("old tree ", "road"), ("red cup ", "box")])["duplicates"]
    assert (found.level, str(found)) == (
        "refused",
        f"3 rows of different text {became}; check the model's tokenizer: it does not know this text",
    )
    assert judge(blind, make_data(), [("red cup ", "box")] * 3)["duplicates"].level == "warning", "as the file has them"
    assert judge(blind, make_data(), [("red cup ", "box")])["duplicates"].level == "ok"


def test_empty_answers(tokenizer: Any, make_data: Any) -> None:
    found = judge(tokenizer, make_data(), [*GOOD, ("a", "<|im_end|>")])["empty answers"]
    assert (found.level, str(found)) == (
        "warning",
        "1 row has no labelled word, only special tokens (t.jsonl:3); the model would learn to say nothing",
    )


def test_overlap(tokenizer: Any, make_data: Any) -> None:
    found = judge(tokenizer, make_data(), GOOD, [("a", "b"), GOOD[1]])["overlap"]
    assert (found.level, str(found)) == (
        "warning",
        "1 of 2 held-out rows are trained on (e.jsonl:2); the eval loss will look better than it is",
    )
    assert judge(tokenizer, make_data(), GOOD)["overlap"].found == "no rows are held out (data.eval)"


def test_tokens_that_were_never_seen(tokenizer: Any, make_data: Any) -> None:
    name = "<|reserved_special_token_7|>"
    number = tokenizer.convert_tokens_to_ids(name)
    talk = [("a", f"b {name} c {name}")]
    found = judge(tokenizer, make_data(), talk)["unseen tokens"]
    assert found.level == "warning"
    assert found.found == f"2 tokens that the model has never seen ({name} 2 times)"
    assert found.fix == f"lora.trainable_token_indices: [{number}] trains them"
    taught = judge(tokenizer, make_data(), talk, trained=frozenset({number}))["unseen tokens"]
    assert taught.level == "ok" and taught.found.endswith("different tokens, 1 of them trained as new")


def test_unknown_tokens(make_sentence_piece: Any, make_data: Any) -> None:
    tokenizer = make_sentence_piece()
    ((number, count),) = pairs(tokenizer, make_data(), GOOD).tally.used.most_common(1)
    tokenizer.unk_token = name = tokenizer.convert_ids_to_tokens(number)
    found = judge(tokenizer, make_data(), GOOD)["unseen tokens"]
    assert str(found) == (
        f"{count} tokens that the model has never seen ({name} {count} times); the tokenizer cannot write that text"
    )


def test_vocabulary(tokenizer: Any, make_data: Any) -> None:
    size, end = len(tokenizer), tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = judge(tokenizer, make_data(), GOOD, rows=size - 1)["vocabulary"]
    head = f"the tokenizer knows {size} tokens, the embedding has"
    assert (found.level, str(found)) == ("warning", f"{head} {size - 1} rows; no row uses a token beyond them")
    found = judge(tokenizer, make_data(), GOOD, rows=end)["vocabulary"]
    assert (found.level, str(found)) == (
        "refused",
        f"{head} {end} rows, and the rows use <|im_end|> ({end}); use the tokenizer that belongs to this checkpoint",
    )


def test_a_run_tells_and_reports_them(tmp_path: Path) -> None:
    loaded = tiny_run.recipe(tmp_path)
    lines: list[tuple[str, str]] = []

    class Ears(Listener):
        def note(self, label: str, text: str) -> None:
            lines.append((label, text))

    rows = [json.dumps({"prompt": f"red {n % 15}", "completion": "blue"}) for n in range(16)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows), "utf-8")
    report = finetune.train(loaded, listener=Ears()).report
    text = "1 row is an earlier one again (train.jsonl:16); take them out, unless they are meant to count twice"
    assert ("data", f"warning  duplicates     {text}") in lines
    assert [g["gate"] for g in report["data"]["gates"]] == GATES
    assert report["data"]["train"]["rows"] == report["data"]["train"]["used"] == 16
    assert text in report["notices"]


def test_a_run_is_refused(tmp_path: Path) -> None:
    loaded = tiny_run.recipe(tmp_path, data__max_length=12, data__overlong="truncate")
    rows = [json.dumps({"prompt": "r", "completion": f"blue {n} " * 9}) for n in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows), "utf-8")
    with pytest.raises(DataError, match="the data is refused: end token: no row has one among its labels"):
        finetune.train(loaded)
    assert not Path(loaded.recipe.output).exists()
