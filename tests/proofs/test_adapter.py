"""What a saved adapter says of some rows: how the model is run for it."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.models import structure
from halfbyte.proofs.adapter import logits_at
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
