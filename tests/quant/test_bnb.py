"""The doors to bitsandbytes: which tensor is held how, and layers that stay trainable after an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn import modules as bnb_modules

from halfbyte.errors import BaseModelError
from halfbyte.models.tensors import TensorSpec
from halfbyte.quant import bnb as codec
from halfbyte.quant import formats, policy
from halfbyte.quant.dequantise import dequantised
from halfbyte.recipe.schema import Quant
from tests import tiny
from tests.base.store.helpers import opened

needs_avx512_bf16 = pytest.mark.skipif(
    not bnb_modules.has_avx512bf16(), reason="only CPUs with AVX512-BF16 repack 4-bit weights"
)


def layer(dtype: torch.dtype, compute: torch.dtype, *, double: bool = True, features: int = 64) -> Any:
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(
        features, 128, bias=False, compute_dtype=compute, compress_statistics=double, quant_type="nf4"
    )
    weight = torch.randn(128, features, dtype=dtype)
    made.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double, quant_type="nf4", module=made
    ).to("cpu")
    return made


def spec(name: str, role: Any, shape: tuple[int, ...] = (128, 64)) -> TensorSpec:
    return TensorSpec(name=name, shape=shape, dtype="BF16", role=role, layer=0)


@pytest.mark.parametrize(
    ("name", "pattern", "wanted"),
    [
        ("model.layers.0.mlp.down_proj.weight", "down_proj", True),
        ("model.layers.0.mlp.down_proj.weight", "mlp.down_proj", True),
        ("model.layers.0.mlp.down_proj.weight", "down", False),
        ("model.layers.10.mlp.down_proj.weight", "layers.1", False),
        ("model.layers.1.mlp.down_proj.weight", "layers.1", True),
        ("lm_head.weight", "lm_head", True),
    ],
)
def test_patterns_match_whole_dotted_parts(name: str, pattern: str, wanted: bool) -> None:
    assert policy.matches(name, (pattern,)) is wanted


def test_the_policy() -> None:
    matrix, head = spec("a.q_proj.weight", "linear"), spec("lm_head.weight", "head")
    for role, kind in {
        "linear": "quantised",
        "expert": "quantised",
        "embedding": "compute",
        "head": "compute",
        "norm": "compute",
    }.items():
        assert policy.encoding(spec("x.weight", role), Quant()) == kind
    assert policy.encoding(matrix, Quant(type="none")) == "compute"
    assert policy.encoding(matrix, Quant(skip_modules=("q_proj",))) == "compute"
    assert policy.encoding(matrix, Quant(skip_modules=("q_proj",), fp32_modules=("q_proj",))) == "fp32"
    assert policy.encoded_bytes(head, Quant(), 2) == 128 * 64 * 2
    assert policy.encoded_bytes(head, Quant(fp32_modules=("lm_head",)), 2) == 128 * 64 * 4


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("features", [64, 100, 1024])
def test_bytes_of_a_4bit_matrix_are_those_of_bitsandbytes(double: bool, features: int) -> None:
    made = layer(torch.bfloat16, torch.bfloat16, double=double, features=features)
    expected = policy.encoded_bytes(spec("a.weight", "linear", (128, features)), Quant(double_quant=double), 2)
    assert codec.resident_bytes(made) == expected


def test_a_tied_weight_is_counted_once() -> None:
    tied, apart = (tiny.model("llama", changes={"tie_word_embeddings": tie}) for tie in (True, False))
    assert codec.resident_bytes(apart) - codec.resident_bytes(tied) == 256 * 64 * 4


@needs_avx512_bf16
@pytest.mark.parametrize("double", [True, False])
def test_settling_unpacks_what_an_eval_forward_packed(double: bool) -> None:
    made = layer(torch.bfloat16, torch.bfloat16, double=double)
    before, weight = made.weight.data.clone(), dequantised(made).clone()
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        made.eval()(x)
    assert made.weight.quant_state.packing_format_for_cpu
    formats.settle(torch.nn.Sequential(made))
    assert not getattr(made.weight.quant_state, "packing_format_for_cpu", False)
    assert torch.equal(made.weight.data.flatten(), before.flatten())
    assert (dequantised(made) - weight).norm() / weight.norm() < 5e-3  # scales came back from bf16
    with torch.no_grad():
        made.eval()(x)
    assert not getattr(made.weight.quant_state, "packing_format_for_cpu", False)


def test_a_layer_that_nobody_quantised_is_named() -> None:
    """As transformers leaves a new head of a 4-bit base: bitsandbytes' class around a plain parameter."""
    new = layer(torch.bfloat16, torch.bfloat16)
    new.weight = torch.nn.Parameter(torch.zeros(3, 64))
    with pytest.raises(BaseModelError, match="the checkpoint has no weights of score, which") as told:
        formats.settle(torch.nn.ModuleDict({"body": layer(torch.bfloat16, torch.bfloat16), "score": new}))
    assert "llm_int8_skip_modules=['score']" in str(told.value.fix)


def test_a_safe_layer_has_the_same_gradient_after_an_evaluation() -> None:
    made = layer(torch.bfloat16, torch.bfloat16)
    formats.settle(torch.nn.Sequential(made))
    found = []
    for _ in range(2):
        x = torch.ones(4, 64, dtype=torch.bfloat16, requires_grad=True)
        made.train()(x).float().square().sum().backward()
        found.append(x.grad)
        with torch.no_grad():
            made.eval()(x)
    assert torch.equal(found[0], found[1])


def test_forward_and_backward_use_one_weight() -> None:
    """bitsandbytes alone dequantises the backward to the checkpoint's fp16, whatever the forward computes in."""

    def both(made: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.eye(64, requires_grad=True)
        out = made.train()(x)  # (64, O): the weight that the forward used
        (gradient,) = torch.autograd.grad(out, x, torch.eye(128)[:64])  # rows of the weight that the backward used
        return out.T[:64].detach(), gradient

    stock, ours = (layer(torch.float16, torch.float32) for _ in range(2))
    forward, backward = both(stock)
    assert stock.weight.quant_state.dtype == torch.float16
    assert not torch.equal(forward, backward)
    codec.set_compute_dtype(torch.nn.Sequential(ours), torch.float32)
    forward, backward = both(ours)
    assert torch.equal(forward, backward)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_plain_subclasses_of_linear_are_quantised_too(kind: str, tmp_path: Path) -> None:
    model = tiny.model("falcon", changes={"bias": True}, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 11)[None]
    quant = {"skip_modules": ("dense_4h_to_h",), "compute_dtype": "bf16"}
    made = opened(tmp_path, use_store=False, type=kind, **quant).model
    names = [name for name, _ in codec.linears_4bit(made)]
    assert len(names) == 3 * tiny.LAYERS and not any("dense_4h_to_h" in n for n in names)
    assert all(module.bias is not None for _, module in codec.linears_4bit(made))
    with torch.no_grad():
        before, after = (m(input_ids=ids).logits for m in (model, made))
    assert 0 < (after - before).norm() / before.norm() < 0.6
    assert made.quantization_method == made.config.quantization_config.quant_method == "bitsandbytes"
    plain = opened(tmp_path, use_store=False, type="none", **quant).model
    assert codec.linears_4bit(plain) == []
