"""A mixture of experts out of a GGUF file: its stacks are quantised expert by expert, as those of a folder are."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch

from halfbyte.base import load
from halfbyte.models.gguf import convert
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.quant.stack import ExpertStack
from halfbyte.recipe.schema import Quant
from halfbyte.system import device
from tests.models.gguf.test_architectures import written


@pytest.mark.parametrize("name", ["mixtral", "qwen3moe", "gpt-oss", "deepseek2-v3"])
def test_experts_of_a_gguf_are_held_in_four_bits(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(convert, "say", lambda stage: None)
    file, reference = written(tmp_path, name)
    (tmp_path / "out").mkdir()
    convert.convert(file, tmp_path / "out")
    quant = Quant(type="nf4", double_quant=False, compute_dtype="bf16")
    checkpoint = Checkpoint(tmp_path / "out", name, None, "gguf")
    base = load.open_base(checkpoint, quant, device.detect())
    assert base.origin.startswith("store ")
    expected = dict(reference.named_parameters())
    stacks = {key: value for key, value in base.model.named_parameters() if isinstance(value, ExpertStack)}
    assert len(stacks) == sum("experts" in key and value.ndim == 3 for key, value in expected.items()) >= 2
    for key, stack in stacks.items():
        weight = expected[key][3].bfloat16()
        packed, state = bnb.quantize_4bit(weight.reshape(-1, 64), blocksize=64, quant_type="nf4")
        held = bnb.dequantize_4bit(packed, state).reshape(weight.shape)
        assert torch.equal(stack.expert(3, torch.bfloat16), held)
