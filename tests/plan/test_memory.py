"""plan/memory.py: no micro-batch of a run is larger than what is planned for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data import pack
from halfbyte.plan import Rows, memory
from halfbyte.system.device import Device
from tests.plan.test_choose import cards, job


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=4, max_size=60), st.integers(1, 3), st.integers(60, 300))
def test_no_later_micro_batch_of_a_step_has_more_tokens_than_planned(
    lengths: list[int], batch: int, tokens: int
) -> None:
    """Rows go into the first micro-batch that has room, so what a step has beyond it bounds the others."""
    rows = np.array(lengths)
    here = job(cards(24), rows=Rows(lengths), train__per_device_train_batch_size=batch, train__num_train_epochs=1)
    run = pack.Steps(rows, rows, here.rows_per_step, here.steps, here.recipe.train.seed, tokens, None)
    later = [int(rows[list(taken)].sum()) for step in run for taken in step.micro_batches[1:]]
    assert max(later, default=0) <= memory.later_tokens(here, tokens)


@pytest.mark.parametrize(
    ("dtype", "isa", "copies"),
    [("fp32", "avx2", 0), ("fp32", "asimd", 2), ("bf16", "avx512_bf16", 0), ("bf16", "avx2", 3)],
)
def test_scores_are_planned_where_attention_is_no_single_kernel(dtype: str, isa: str, copies: int) -> None:
    """Two rows of 300 tokens, 9 heads: S and dP in fp32, and in 16 bits both once more."""
    device = Device("cpu", (isa,), 2, 64 * 10**9, 64 * 10**9)
    here = job(device, rows=Rows((300, 300)), quant__compute_dtype=dtype)
    scores = memory.scores_bytes(here, memory.MicroBatch((300, 300), 600))
    assert scores == copies * 2 * 4 * 9 * 300 * 300
