"""Blocks of plain text: every token once, each text for itself, labels as the texts had them."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data.blocks import Blocks, stream
from halfbyte.data.collate import collate
from halfbyte.data.encoding.examples import IGNORED, Examples, TokenizedRow, batch
from halfbyte.data.reading.formats import Row
from halfbyte.errors import DataError
from tests.data.in_memory import encode


def texts(lengths: list[int]) -> Examples:
    """Texts of these lengths, no token twice, in two batches."""
    made, at = [], 0
    for n, length in enumerate(lengths, start=1):
        made.append(TokenizedRow(list(range(at, at + length)), [(1, length)] if length > 1 else [], f"t:{n}", [], ""))
        at += length
    half = len(made) // 2
    return Examples([batch(made[:half]), batch(made[half:])])


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12), size=st.integers(2, 50))
def test_every_token_once_and_each_text_for_itself(lengths: list[int], size: int) -> None:
    blocks = Blocks(texts(lengths), size)
    found = list(blocks)
    assert list(chain.from_iterable(b.input_ids for b in found)) == list(range(sum(lengths)))
    assert [len(b.input_ids) for b in found] == blocks.lengths().tolist()
    assert all(n == size for n in blocks.lengths()[:-1]) and 1 <= blocks.lengths()[-1] <= size
    assert [sum(t >= 0 for t in b.labels) for b in found] == blocks.labelled().tolist()
    begins = {sum(lengths[:n]) for n in range(len(lengths))}
    for block in found:
        own = {block.input_ids[0]} | (begins & set(block.input_ids))
        assert {block.input_ids[s] for s in block.starts} == own, "a piece begins where a text does, or the block"
        assert sum(block.pieces) == len(block.input_ids)
        assert [t for t, label in zip(block.input_ids, block.labels, strict=True) if label == IGNORED] == sorted(own)
    assert blocks[-1] == found[-1] and blocks[:2] == found[:2]


def test_names_and_edges() -> None:
    blocks = Blocks(texts([3, 3, 10]), 4)
    assert [b.where for b in blocks] == ["t:1 to t:2", "t:2 to t:3", "t:3", "t:3"]
    assert [b.starts for b in blocks] == [(0, 3), (0, 2), (0,), (0,)]
    with pytest.raises(IndexError):
        blocks[4]


def test_a_batch_of_blocks_keeps_their_texts_apart() -> None:
    blocks = Blocks(texts([3, 3, 10]), 4)
    made = collate([blocks[0], blocks[1]])
    assert made["cu_seq_lens_q"].tolist() == [0, 3, 4, 6, 8]
    assert made["position_ids"][0].tolist() == [0, 1, 2, 0, 0, 1, 0, 1]
    assert made["labels"][0].tolist() == [-100, 1, 2, -100, -100, 5, -100, 7]
    assert made["max_length_q"] == 3


def test_texts_end_with_their_end_token_and_may_be_longer_than_a_block(make_byte_level: Any, make_data: Any) -> None:
    tokenizer = make_byte_level()
    data = make_data(max_length=8, packing="stream", format="text")
    said = ["one two three four five six seven", "eight", "nine ten"]
    encoded = encode([Row(f"t:{n}", text=text) for n, text in enumerate(said)], tokenizer, data)
    blocks = stream(encoded, data.max_length)
    ids = [t for b in blocks.examples for t in b.input_ids]
    assert tokenizer.decode(ids) == "".join(f"{text}{tokenizer.eos_token}" for text in said)
    assert blocks.texts == 3 and blocks.tally is encoded.tally and max(blocks.lengths) == 8
    assert blocks.stats.tokens == encoded.stats.tokens


def test_other_rows_are_refused(make_byte_level: Any, make_data: Any) -> None:
    with pytest.raises(DataError) as error:
        encode([Row("t:1", prompt="a", completion="b")], make_byte_level(), make_data(packing="stream"))
    assert str(error.value) == (
        "data.packing stream is for plain text, and the rows are conversations or prompts.\n"
        "  fix: data.packing: rows, or data.format: text"
    )


def test_columns_are_those_of_the_rows_also_of_a_part_of_a_batch() -> None:
    whole, part = texts([4, 2, 9]).batches, texts([5, 6, 7, 8, 1, 3]).batches[1].slice(1, 2)
    examples = Examples([*whole, part])
    assert examples.lengths().tolist() == [len(e.input_ids) for e in examples] == [4, 2, 9, 1, 3]
    assert examples.labelled().tolist() == [sum(t >= 0 for t in e.labels) for e in examples]
    assert [examples.ids(i).tolist() for i in range(5)] == [list(e.input_ids) for e in examples]
