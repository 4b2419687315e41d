"""`quantize_model` on mixtures: experts in few bits, as transformers computes the dequantised weights.

The reference is that of `tests/base/test_experts.py`: transformers' eager experts on weights that numpy dequantised.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import halfbyte
from halfbyte.errors import BaseModelError
from halfbyte.quant.stack import ExpertStack
from tests import plain_peft, small_models
from tests.base.test_experts import TOLERANCE, reference, saved

IDS = torch.arange(3, 40)[None]


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def held(model: nn.Module) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, ExpertStack)}


def agrees(model: Any, folder: Path) -> None:
    with torch.no_grad():
        got, wanted = model(input_ids=IDS).logits, reference(folder, model)(input_ids=IDS).logits
    torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "qwen2_moe"])
@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_loaded_mixture_computes_what_its_dequantised_weights_do(kind: str, quant: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing large stays in 16 bits
        model = halfbyte.quantize_model(loaded(folder), quant=quant, dtype="fp32")
    plain = loaded(folder)
    stacks = held(model)
    assert stacks.keys() == {n for n, p in plain.named_parameters() if p.ndim == 3}
    bits = 8 if quant == "int8" else 4
    assert all(p.data.nbytes * 8 == bits * plain.get_parameter(n).numel() for n, p in stacks.items())
    routers = [
        n for n, p in model.named_parameters() if n.endswith(("mlp.gate.weight", "router.weight", "expert_gate.weight"))
    ]
    assert routers and all(model.get_parameter(n).is_floating_point() for n in routers)
    agrees(model, folder)


def test_from_a_file_onto_the_disk(tmp_path: Path) -> None:
    """From a file under the model's own names into a module without memory, one layer of it in a mapped file."""
    folder = saved("mixtral", tmp_path / "model", fused=True)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model = halfbyte.quantize_model(
        empty.eval(),
        folder,
        dtype="fp32",
        device_map={"": "cpu", "model.layers.1": "disk"},
        offload_folder=tmp_path / "disk",
    )
    assert len(held(model)) == 2 * len(model.model.layers)
    agrees(model, folder)


def test_lora_on_it_learns_what_plain_peft_learns(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path)
    model = halfbyte.quantize_model(loaded(folder), dtype="fp32")
    exact, names = reference(folder, model), ["q_proj", "v_proj"]
    rows = plain_peft.texts((5, 40, 23), small_models.VOCAB)
    loss, grads = plain_peft.learn(plain_peft.adapt(exact, names), rows)
    got_loss, got = plain_peft.learn(plain_peft.adapt(model, names), rows)
    assert abs(got_loss - loss) <= TOLERANCE * loss
    assert plain_peft.apart(got, grads) <= TOLERANCE


def test_experts_that_share_blocks_or_are_named_stay(tmp_path: Path) -> None:
    odd = saved("mixtral", tmp_path / "odd", intermediate_size=33, hidden_size=32)
    with pytest.warns(UserWarning, match=r"experts\.down_proj"):  # 33 x 32 is not whole blocks of 64
        model = halfbyte.quantize_model(loaded(odd), dtype="fp32")
    assert not any("down_proj" in name for name in held(model))
    model = halfbyte.quantize_model(loaded(saved("mixtral", tmp_path / "b")), skip_modules=["gate_up_proj"])
    assert held(model) and not any("gate_up_proj" in name for name in held(model))


def test_experts_that_transformers_merges_name_the_two_ways(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with pytest.raises(BaseModelError, match="load it with from_pretrained and quantise the loaded module"):
        halfbyte.quantize_model(empty, folder)
