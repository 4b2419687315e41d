"""What accelerate's `load_and_quantize_model` does on this machine, and what ours does: the reasons for having one.

Each test shows both. Where upstream changes, the first half fails, and the trap can be struck from the list.
Source: `accelerate/utils/bnb.py`, `accelerate/utils/modeling.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate.utils import BnbQuantizationConfig
from accelerate.utils import load_and_quantize_model as theirs
from accelerate.utils.bnb import get_keys_to_not_convert, replace_with_bnb_layers
from torch import nn

import halfbyte
from tests.base.modules.helpers import Encoder, empty, made, output, quantised, save

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*stay as they are, being no plain linear layers"),
    pytest.mark.filterwarnings("ignore:float16 was asked for"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens on a machine without a card"),
]
IN_4_BITS: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "fp32"}
ON_CPU = {"first": "cpu", "norm": "cpu", "last": "cpu"}


class Stack(nn.Module):
    """As simple as accelerate needs it to get through."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x)))


def stack() -> Stack:
    with torch.device("meta"):
        return Stack()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    module = Stack()
    nn.init.normal_(module.norm.weight)
    return save(module, tmp_path / "stack")


def config(**values: Any) -> BnbQuantizationConfig:
    return BnbQuantizationConfig(**{**IN_4_BITS, **values})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(made("encoder"), tmp_path / "weights")


def test_1_a_machine_without_a_card(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="No GPU"):
        theirs(made("encoder"), config())
    with pytest.raises(RuntimeError, match="No GPU"):
        theirs(empty("encoder"), config(), weights_location=folder)
    assert quantised(halfbyte.load_and_quantize_model(made("encoder"), config()))
    assert quantised(halfbyte.load_and_quantize_model(empty("encoder"), config(), weights_location=folder))


def test_2_modules_on_the_cpu_are_quantised(weights: Path) -> None:
    for device_map in ({"": "cpu"}, "auto"):
        with pytest.raises(ValueError, match="dispatched on the CPU or the disk"):
            theirs(stack(), config(), weights, device_map)
    left = theirs(stack(), config(skip_modules=[]), weights, ON_CPU)
    assert not quantised(left) and type(left.first) is nn.Linear  # every entry of the map joins the skipped ones
    eight = {"load_in_8bit": True, "skip_modules": []}
    with pytest.raises((AssertionError, RuntimeError)):  # `.to(0)`
        theirs(stack(), BnbQuantizationConfig(**eight), weights, {"": "cpu"})
    for device_map in ({"": "cpu"}, "auto", ON_CPU):
        for asked in (config(), BnbQuantizationConfig(**eight)):
            held = halfbyte.load_and_quantize_model(stack(), asked, weights, device_map)
            assert set(quantised(held)) == {"first", "last"}


def test_3_the_callers_configuration_is_not_changed(weights: Path) -> None:
    asked = config(skip_modules=["first"], keep_in_fp32_modules=["norm"])
    theirs(stack(), asked, weights, ON_CPU)
    assert asked.skip_modules == ["first", "first", "norm", "last", "norm"]
    asked = config(skip_modules=["first"], keep_in_fp32_modules=["norm"])
    before = dict(vars(asked), skip_modules=["first"], keep_in_fp32_modules=["norm"])
    assert set(quantised(halfbyte.load_and_quantize_model(stack(), asked, weights, ON_CPU))) == {"last"}
    assert vars(asked) == before
    asked = config()
    halfbyte.load_and_quantize_model(stack(), asked, weights, ON_CPU)
    assert asked.skip_modules is None and asked.keep_in_fp32_modules is None


def test_4_the_last_child_is_no_output_layer(folder: Path) -> None:
    """With the stack of layers as the last child nothing in it is quantised."""
    assert "layers" in get_keys_to_not_convert(Encoder())
    replaced = replace_with_bnb_layers(made("encoder"), config(), get_keys_to_not_convert(Encoder()))
    names = [name for name, m in replaced.named_modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert names == ["mixer.0", "mixer.2"]
    held = halfbyte.load_and_quantize_model(empty("encoder"), config(), folder)
    assert {f"layers.{n}.{leaf}" for n in range(3) for leaf in ("up", "down")} <= set(quantised(held))
    assert "output" not in quantised(held)  # which is tied


def test_5_modules_in_fp32_with_bf16_around_them(weights: Path) -> None:
    values = {"torch_dtype": "bf16", "bnb_4bit_compute_dtype": "bf16", "keep_in_fp32_modules": ["norm"]}
    upstream = theirs(stack(), config(skip_modules=[], **values), weights, ON_CPU)
    assert upstream.norm.weight.dtype == torch.bfloat16
    held = halfbyte.load_and_quantize_model(stack(), config(**values), weights, ON_CPU)
    assert held.norm.weight.dtype == torch.float32 and held.first.bias.dtype == torch.bfloat16
    torch.manual_seed(0)
    nn.init.normal_(wanted := (module := Stack()).norm.weight)
    assert module is not held and torch.equal(held.norm.weight, wanted)
    assert held(torch.randn(3, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_6_subclasses_of_linear_may_never_be_called(folder: Path) -> None:
    """nn.MultiheadAttention takes the weight of its out_proj."""
    upstream: Any = replace_with_bnb_layers(made("encoder"), config(), ["output", "embedding"])
    assert isinstance(upstream.layers[0].attention.out_proj, bnb.nn.Linear4bit)
    for module in upstream.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.to("cpu")  # quantises
    with pytest.raises((RuntimeError, TypeError, AttributeError)):
        output(upstream, "encoder")
    held: Any = halfbyte.load_and_quantize_model(empty("encoder"), config(), folder)
    assert isinstance(held.layers[0].attention.out_proj, nn.Linear)
    assert not isinstance(held.layers[0].attention.out_proj, bnb.nn.Linear4bit)
    assert output(held, "encoder").isfinite().all()


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.unproj = nn.ModuleList([nn.Linear(64, 64)]), nn.ModuleList([nn.Linear(64, 64)])
        self.norm, self.normalised = nn.LayerNorm(64), nn.Linear(64, 64)


def test_7_a_part_of_a_name_is_not_the_name() -> None:
    upstream = replace_with_bnb_layers(Named(), config(), ["proj"])
    assert [n for n, m in upstream.named_modules() if isinstance(m, bnb.nn.Linear4bit)] == ["normalised"]
    with pytest.raises(RuntimeError, match="No GPU"):  # it gets as far as casting
        theirs(module := Named(), config(torch_dtype="bf16", keep_in_fp32_modules=["norm"]))
    assert module.normalised.weight.dtype == torch.float32
    held = halfbyte.load_and_quantize_model(Named(), config(skip_modules=["proj"]))
    assert set(quantised(held)) == {"unproj.0", "normalised"}
    held = halfbyte.load_and_quantize_model(Named(), config(torch_dtype="bf16", keep_in_fp32_modules=["norm"]))
    assert set(quantised(held)) == {"proj.0", "unproj.0", "normalised"}


def test_8_layers_of_other_kinds_and_weights_that_stay_floats() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

    gpt2 = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=70, n_positions=32)
    assert not quantised(replace_with_bnb_layers(GPT2LMHeadModel(gpt2), config(), ["lm_head"]))
    assert len(quantised(halfbyte.load_and_quantize_model(GPT2LMHeadModel(gpt2), config()))) == 4

    upstream: Any = replace_with_bnb_layers(made("llama"), config(), [])
    assert upstream.model.layers[0].mlp.up_proj.weight.dtype == torch.float32  # until it is moved
    held: Any = halfbyte.load_and_quantize_model(made("llama"), config())
    assert held.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 70,
    }
    moe = MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_key_value_heads=2, **sizes))
    plain: Any = replace_with_bnb_layers(moe, config(), [])
    assert plain.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.float32  # and nothing is said
    held = halfbyte.load_and_quantize_model(MixtralForCausalLM(moe.config), config())
    assert held.model.layers[0].mlp.experts.gate_up_proj.dtype == torch.uint8
