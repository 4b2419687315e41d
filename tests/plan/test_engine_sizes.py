"""Sizes that the plan repeats, since it imports no torch, are those of the engine."""

from __future__ import annotations

import pytest

from halfbyte.layers import attention, loss, packing
from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu.integer import products as integer
from halfbyte.plan import job, memory, timing


def test_the_plan_counts_the_chunks_that_the_engine_makes() -> None:
    assert (memory.LOGITS_CHUNK, memory.LOGITS_ROWS) == (loss.CHUNK, packing.ROWS)
    assert (memory.LOGITS_CHUNK32, memory.CARD_LOGITS_CHUNK) == (loss.CHUNK32, loss.CARD_CHUNK)
    assert (memory.SCORES_BYTES, memory.SCORES_ROWS) == (attention.SCORES_BYTES, attention.ROWS)
    assert job.FILLED_TO == packing.ROWS
    assert 1 + memory.KEPT_SHARE == pool.KEPT_SHARE


def test_the_plan_counts_integer_products_as_they_are_made() -> None:
    assert (memory.INTEGER_ROWS, memory.INTEGER_SUMS) == (integer.LEAST_ROWS, integer.SUMS)
    assert timing.INTEGERS_PAY == integer.PAYS


def test_the_plan_counts_the_blocks_of_rows_of_the_attention_kernel() -> None:
    tasks = pytest.importorskip("halfbyte.layers.kernels.cpu.attention.tasks")
    assert timing.BLOCK_ROWS == tasks.TALL
