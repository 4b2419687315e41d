"""peak.py: no micro-batch of a run is larger than what is planned for."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data import pack
from halfbyte.plan import Rows, peak
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
    assert max(later, default=0) <= peak.later_tokens(here, tokens)
