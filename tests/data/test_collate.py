"""The batch is its examples end to end, and no prediction crosses from one into the next."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening

from halfbyte.data.collate import Batches, StepDataset, collate
from halfbyte.data.encoding.examples import Example
from halfbyte.data.pack import Step


def example(start: int, length: int, labelled: int, where: str = "x.jsonl:1") -> Example:
    ids = tuple(range(start, start + length))
    return Example(ids, (-100,) * (length - labelled) + ids[length - labelled :], where, ids[: length - labelled], "")


A, B, C = example(10, 4, 2), example(20, 1, 0), example(30, 3, 2)


def test_against_the_collator_of_transformers() -> None:
    ours = collate([A, B, C])
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=True)(
        [{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in (A, B, C)]
    )
    for key in ("input_ids", "position_ids", "labels", "cu_seq_lens_q", "cu_seq_lens_k"):
        assert torch.equal(ours[key], theirs[key]), key
        assert ours[key].dtype == theirs[key].dtype, key
    for key in ("max_length_q", "max_length_k"):
        assert ours[key] == theirs[key] == 4


def test_keep_and_targets_are_the_predictions() -> None:
    batch = collate([A, B, C])
    assert batch["keep"].tolist() == [1, 2, 5, 6]
    assert batch["targets"].tolist() == [12, 13, 31, 32]
    assert batch["keep"].dtype == batch["targets"].dtype == torch.int64
    logits = torch.randn(8, 40)
    shifted = torch.nn.functional.cross_entropy(logits[:-1], batch["labels"][0, 1:], reduction="sum")
    kept = torch.nn.functional.cross_entropy(logits[batch["keep"]], batch["targets"], reduction="sum")
    assert torch.allclose(shifted, kept)


def test_a_label_on_a_first_token_is_never_predicted() -> None:
    every = Example((7, 8), (7, 8), "x.jsonl:1", (7,), "")
    batch = collate([every, every])
    assert batch["labels"].tolist() == [[-100, 8, -100, 8]]
    assert batch["keep"].tolist() == [0, 2]
    assert every.labels == (7, 8)


def test_a_micro_batch_without_labels_has_no_targets() -> None:
    batch = collate([B, B])
    assert batch["keep"].shape == batch["targets"].shape == (0,)


def test_step_dataset() -> None:
    steps = [Step(0, ((0, 2), (1,)), 4, 8, 4, 8), Step(1, ((2,),), 2, 3, 2, 3)]
    data = StepDataset([A, B, C], steps)
    assert len(data) == 2
    item = data[0]
    assert item["step"] is steps[0]
    assert [p["input_ids"].tolist() for p in item["micro_batches"]] == [[[10, 11, 12, 13, 30, 31, 32]], [[20]]]
    assert sum(p["targets"].numel() for p in item["micro_batches"]) == steps[0].labelled_tokens
    with pytest.raises(IndexError):
        data[2]


def test_eval_micro_batches() -> None:
    batches = Batches([A, B, C], [(0,), (1, 2)])
    assert [b["input_ids"].tolist() for b in batches] == [[[10, 11, 12, 13]], [[20, 30, 31, 32]]]
    assert len(batches) == 2 and batches.of([1])["input_ids"].tolist() == [[20]]


def test_nothing_to_collate() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        collate([])
