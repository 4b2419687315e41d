"""What a saved adapter says of some rows: how the model is run for it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.data.encoding.examples import IGNORED, Example
from halfbyte.models import structure
from halfbyte.proofs.adapter import compare_logits, keep_logits, logits_at
from tests import tiny


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_no_key_and_value_is_kept(kind: str) -> None:
    """The plan has no line for a cache: of a 7B and a row of 4,096 tokens it is 2 GB, beside the optimiser's state."""
    model, caches = tiny.model(kind), list[Any]()
    structure.body(structure.causal_lm(model)).register_forward_hook(
        lambda module, args, output: caches.append(output.past_key_values)
    )
    assert logits_at(model, [1, 2, 3, 4], [1, 3]).shape[0] == 2
    assert caches == [None]


def test_of_a_long_row_a_part_is_kept_and_read_again(tmp_path: Path) -> None:
    """A forward of whole rows of 8,192 tokens, six of them at the end of a run, took longer than its steps."""
    model, kept = tiny.model("llama").requires_grad_(False), tmp_path / "proof.json"
    ids = tuple(number % 50 for number in range(3000))
    labels = tuple(IGNORED if number < 2000 else ids[number] for number in range(3000))
    keep_logits(kept, model, [Example(ids, labels, "rows.jsonl:1", (), "")], nullcontext(), torch.float32)
    (row,) = json.loads(kept.read_text())["rows"]
    assert tuple(row["ids"]) == ids[2000 - 512 : 2000 + 512]
    assert [row["ids"][at + 1] for at in row["at"]] == [tokens[0] for tokens in row["tokens"]]
    assert min(row["at"]) == 511
    assert compare_logits(kept, model).difference == 0
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "down_proj" in name).mul_(2)
    assert compare_logits(kept, model).difference > 0


def test_texts_of_one_row_are_kept_each_alone(tmp_path: Path) -> None:
    """A model of 40 positions could not say what a row of three texts of 20 tokens is as one."""
    model, kept = tiny.model("gpt2", changes={"n_positions": 40}).requires_grad_(False), tmp_path / "proof.json"
    ids = tuple(number % 50 for number in range(60))
    labels = tuple(ids[number] if number % 20 > 15 else IGNORED for number in range(60))
    keep_logits(kept, model, [Example(ids, labels, "", (), "", starts=(0, 20, 40))], nullcontext(), torch.float32)
    rows = json.loads(kept.read_text())["rows"]
    assert [tuple(row["ids"]) for row in rows] == [ids[:20], ids[20:40], ids[40:]]
    assert compare_logits(kept, model).difference == 0
