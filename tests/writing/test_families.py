"""Texts by the tape are transformers' greedy ones, for every family that `layers/decoding/layer.py` has names for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from halfbyte.layers.decoding.layer import PARTS
from halfbyte.layers.decoding.tape import isa
from halfbyte.proofs.packing import prove_packing
from halfbyte.writing.places import FastPathUnavailable
from halfbyte.writing.sampling import SamplingParams
from halfbyte.writing.text import Text
from halfbyte.writing.writer import Writer
from tests import small_models

pytestmark = pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")
PROMPTS, TOKENS, TOGETHER = 20, 12, 4
# Llama's own names are tested in test_writer.py; here each way in which others differ.
CHANGES: dict[str, dict[str, Any]] = {
    "falcon": {"num_kv_heads": None},
    "granitemoehybrid": {"num_local_experts": 0},
    "bamba": {"attn_layer_indices": [1]},
}


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 14, (PROMPTS,), generator=draw).tolist()
    return [torch.randint(3, small_models.VOCAB, (n,), generator=draw).tolist() for n in lengths]


def by_the_model(model: Any, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(TOKENS):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", PARTS)
def test_greedy_texts_are_the_models_own(kind: str) -> None:
    model = small_models.build(kind, **CHANGES.get(kind, {})).eval()
    with torch.no_grad():
        prove_packing(model, alone=True)  # as `generate` does: windows are read off the masks
        writer, texts = Writer(model, TOGETHER, 32), [Text(prompt, SamplingParams(TOKENS), ()) for prompt in prompts()]
        for first in range(0, PROMPTS, TOGETHER):
            some = texts[first : first + TOGETHER]
            writer.insert(some)
            while not all(text.ended for text in some):
                writer.step()
        assert [text.tokens for text in texts] == [by_the_model(model, text.prompt) for text in texts]


def test_a_variant_that_is_not_written_is_said() -> None:
    model = small_models.build("opt", do_layer_norm_before=False)
    with pytest.raises(FastPathUnavailable, match="OPTForCausalLM is not built like Llama"), torch.no_grad():
        Writer(model, 1, 32)
