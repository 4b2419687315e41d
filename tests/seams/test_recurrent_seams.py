"""What `layers/recurrent.py` stands on: recurrent layers are handed lengths, and hold what the kernels read."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn
from transformers import masking_utils

from halfbyte.layers import recurrent
from halfbyte.layers.packed_attention import NAME, PackingError, no_mask, register
from halfbyte.proofs.packing import prove_packing
from halfbyte.upstream.transformers import RECURRENT_LENGTHS
from tests import small_models

DELTA = {"conv1d", "A_log", "dt_bias", "num_k_heads", "num_v_heads", "head_k_dim", "activation"}
STATE_SPACE = {
    "conv1d", "A_log", "dt_bias", "D", "in_proj", "out_proj", "norm", "intermediate_size", "conv_dim", "num_heads",
    "n_groups", "ssm_state_size", "time_step_limit", "activation",
}  # fmt: skip
HOLDS = {
    recurrent._ShortConvMixer: {"conv", "in_proj", "out_proj"},
    recurrent._DeltaMixer: DELTA,
    recurrent._StateSpaceMixer: STATE_SPACE,
}


@pytest.mark.parametrize("kind", ["lfm2", "lfm2_moe", "qwen3_next", "qwen3_5_text", "olmo_hybrid", "granitemoehybrid",
                                  "bamba", "falcon_h1", "nemotron_h", "zamba2"])  # fmt: skip
def test_recurrent_layers_are_handed_lengths(kind: str) -> None:
    model, seen = small_models.build(kind).eval(), []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args or (kwargs["hidden_states"],), kwargs))

    known = [m for m in model.modules() if recurrent._kind(m) is not None]
    for module in known:
        module.register_forward_pre_hook(note, with_kwargs=True)
    holds = [all(hasattr(m, name) for name in HOLDS[recurrent._kind(m)]) for m in known]
    ids, starts = torch.arange(3, 9)[None], torch.tensor([0, 6], dtype=torch.int32)
    register()
    model.set_attn_implementation(NAME)
    with torch.no_grad(), suppress(ValueError, RuntimeError, PackingError):  # torch's own delta rule refuses lengths
        model(input_ids=ids, attention_mask=no_mask("cpu"), cu_seq_lens_q=starts, use_cache=False)
    assert known and seen
    handed = [
        len(args) == 1 and args[0].shape[:2] == (1, 6)
        and kwargs.get("cu_seq_lens_q") is starts and kwargs.get("attention_mask") is None
        for args, kwargs in seen
    ]  # fmt: skip
    if RECURRENT_LENGTHS.there:
        assert all(holds) and all(handed)
    elif not (all(holds) and all(handed)):  # then the proof at start sees that texts are not kept apart
        assert prove_packing(model, 12).layout != "cu_seq_lens"


@pytest.mark.skipif(not RECURRENT_LENGTHS.there, reason=RECURRENT_LENGTHS.reason or "there")
def test_a_four_dimensional_mask_is_none_for_a_recurrent_layer() -> None:
    embedded = torch.zeros(1, 6, 8)
    assert masking_utils.create_recurrent_attention_mask(None, embedded, no_mask("cpu")) is None
