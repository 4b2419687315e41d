"""Sizes that the plan repeats, since it imports no torch, are those of the engine."""

from __future__ import annotations

from halfbyte.layers import block_attention, loss, packing
from halfbyte.memory import step


def test_the_plan_counts_the_chunks_that_the_engine_makes() -> None:
    assert (step.LOGITS_CHUNK_BYTES, step.LOGITS_ROWS) == (loss.CHUNK_BYTES, packing.ROWS)
    assert (step.SCORES_BYTES, step.SCORES_ROWS) == (block_attention.SCORES_BYTES, block_attention.ROWS)
