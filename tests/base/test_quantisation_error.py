"""What a GGUF loses a second time: told when its store is built, and equal to what bitsandbytes itself loses."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.base import quantisation_error
from halfbyte.base.store import shelf, supply
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.recipe.schema import Quant


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).bfloat16()


def wanted(folder: Path, model: LlamaForCausalLM, quant: Quant, kind: str | None) -> shelf.StoreSpec:
    model.save_pretrained(folder)
    if kind is not None:
        (folder / "halfbyte.json").write_text(json.dumps({"type": kind}))
    checkpoint = Checkpoint(folder, "m.gguf", None, "gguf" if kind is not None else "folder")
    return shelf.StoreSpec(checkpoint, model.config, quant, torch.bfloat16)


def again(weight: torch.Tensor, quant: Quant) -> torch.Tensor:
    """A weight through bitsandbytes' own functions."""
    if quant.type == "int8":
        codes, scales, _ = bnb.int8_vectorwise_quant(weight.half())
        return (codes.float() * scales[:, None] / 127).to(weight.dtype)
    packed, state = bnb.quantize_4bit(weight.reshape(-1, 64), blocksize=64, quant_type=quant.type)
    return bnb.dequantize_4bit(packed, state).reshape(weight.shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_what_is_lost_is_told_once_the_store_is_built(tmp_path: Path, model: LlamaForCausalLM, kind: str) -> None:
    quant = Quant(type=kind, **({} if kind == "int8" else {"double_quant": True}))
    asked = wanted(tmp_path, model, quant, "Q4_K")
    matrices = [value.data for name, value in model.named_parameters() if "_proj" in name]
    lost = sum(float((again(m, quant).double() - m.double()).square().sum()) for m in matrices)
    whole = sum(float(m.double().square().sum()) for m in matrices)
    error, count = quantisation_error.sampled_error(asked)
    assert count == sum(m.numel() for m in matrices)  # they are smaller than a sample
    assert error == pytest.approx((lost / whole) ** 0.5, rel=1e-6)

    told: list[tuple[str, str]] = []
    tell = quantisation_error.tell_gguf_error(asked, supply.Tell(note=lambda label, said: told.append((label, said))))
    assert not told and tell.built is not None
    tell.built()
    ((label, said),) = told
    assert label == "gguf" and said.startswith(f"its weights are in Q4_K; {kind} changes them by {100 * error:.2f}%")


@pytest.mark.parametrize("kind", [None, "F16"])
def test_nothing_is_told_of_a_source_that_has_lost_nothing(
    tmp_path: Path, model: LlamaForCausalLM, kind: str | None
) -> None:
    tell = supply.Tell()
    assert quantisation_error.tell_gguf_error(wanted(tmp_path, model, Quant(), kind), tell) is tell
