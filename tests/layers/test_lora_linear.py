"""The fused LoRA layer against PEFT's meaning written out in fp64, gradients too, and torch's gradcheck."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from halfbyte.layers.kernels import dropout, pool
from halfbyte.layers.lora_linear import (
    LoraLinear,
    drop,
    frozen_backward,
    frozen_forward,
    frozen_linear,
    frozen_weight,
    lora_linear,
)
from halfbyte.quant.dequantise import FrozenLinear
from tests.layers.decoding.test_block_rows import layer_of


def four_bit(out: int, width: int, *, bias: bool, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(width, out, bias=bias, compute_dtype=dtype, quant_type="nf4")
    dense = nn.Linear(width, out, bias=bias, dtype=dtype)
    layer.load_state_dict(dense.state_dict())
    layer = layer.to("cpu").requires_grad_(False)
    layer.weight.quant_state.dtype = dtype
    layer.support_avx512bf16_for_cpu = False
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(dtype)
    return layer


def parts(n: int, d: int, o: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n + d + o + r)
    x = torch.randn(n, d, generator=draw).to(dtype)
    a, b = torch.randn(r, d, generator=draw) * d**-0.5, torch.randn(o, r, generator=draw) * r**-0.5
    return x, a, b, torch.randn(n, o, generator=draw).to(dtype)


def close(got: Tensor | None, wanted: Tensor | None, tolerance: float) -> None:
    assert got is not None and wanted is not None
    assert got.shape == wanted.shape
    apart = float((got.detach().double() - wanted.detach().double()).norm())
    assert apart <= tolerance * max(float(wanted.detach().double().norm()), 1e-6)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("shape", "d", "o", "r"), [((5, 123), 123, 65, 3), ((1, 1), 64, 64, 8), ((2, 3, 7), 64, 5, 1)])
def test_as_peft_says_it(
    shape: tuple[int, ...], d: int, o: int, r: int, dtype: torch.dtype, tolerance: float, bias: bool, p: float
) -> None:
    n = int(torch.tensor(shape).prod())
    layer = four_bit(o, d, bias=bias, dtype=dtype)
    x, a, b, dy = parts(n, d, o, r, dtype)
    given = [t.clone().requires_grad_() for t in (x.view(*shape, d), a, b)]
    torch.manual_seed(11)
    y = lora_linear(given[0], layer, given[1], given[2], 0.7, p)
    y.backward(dy.view(*shape, o))
    torch.manual_seed(11)
    keep = drop(torch.ones_like(x), p, dropout.draw_seed())[0].double() if p else torch.ones(n, d, dtype=torch.float64)
    wide = [t.double().requires_grad_() for t in (x, a, b)]
    base = wide[0] @ frozen_weight(layer, dtype).double().clone().T
    base = base if layer.bias is None else base + layer.bias.double()
    wanted = base + 0.7 * (wide[0] * keep / (1 - p)) @ wide[1].T @ wide[2].T
    wanted.backward(dy.double())
    assert y.dtype == dtype and given[1].grad is not None and given[1].grad.dtype == torch.float32
    close(y.view(n, o), wanted, tolerance)
    close(given[0].grad.view(n, d), wide[0].grad, tolerance)  # type: ignore[union-attr]
    close(given[1].grad, wide[1].grad, tolerance)
    close(given[2].grad, wide[2].grad, tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_what_a_young_adapter_adds_is_not_rounded_away(bias: bool, p: float) -> None:
    """In bf16, of additions far below half a unit of what they are added to; in mean they must come through whole."""
    n, d, o, r, small = 2048, 64, 128, 8, 2e-4
    layer = four_bit(o, d, bias=bias, dtype=torch.bfloat16)
    x, a, b, dy = parts(n, d, o, r, torch.bfloat16)

    def run(size: float) -> tuple[Tensor, Tensor]:
        given = x.clone().requires_grad_()
        torch.manual_seed(11)
        y = lora_linear(given, layer, a, b * size, 1.0, p)
        y.backward(dy)
        assert given.grad is not None
        return y.detach().double(), given.grad.double()

    torch.manual_seed(11)
    keep = drop(torch.ones_like(x), p, dropout.draw_seed())[0].double() / (1 - p) if p else torch.ones(n, d).double()
    added = (
        (x.double() * keep) @ a.double().T @ (small * b.double()).T,
        (dy.double() @ (small * b.double()) @ a.double()),
    )
    for got, before, wanted in zip(run(small), run(0.0), (added[0], added[1] * keep), strict=True):
        came_through = float(((got - before) * wanted).sum() / wanted.square().sum())
        assert came_through == pytest.approx(1.0, abs=0.15)
        assert float(wanted.abs().mean() / before.abs().mean()) < 2**-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_frozen_layer_without_lora(dtype: torch.dtype, tolerance: float) -> None:
    layer = four_bit(65, 123, bias=True, dtype=dtype)
    x, _, _, dy = parts(5, 123, 65, 1, dtype)
    given, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y = frozen_linear(given, layer)
    y.backward(dy)
    wanted = wide @ frozen_weight(layer, dtype).double().clone().T + layer.bias.double()
    wanted.backward(dy.double())
    close(y, wanted, tolerance)
    close(given.grad, wide.grad, tolerance)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, dtype=torch.float64).requires_grad_(False)
    x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (2, 5), (4, 2)))
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def call(*given: Tensor) -> Any:
        return LoraLinear.apply(*given, layer, 0.7, p, 5)

    assert torch.autograd.gradcheck(call, (x, a, b, bias))
    products = frozen_forward, frozen_backward
    assert torch.autograd.gradcheck(lambda x, bias: FrozenLinear.apply(x, bias, layer, *products), (x, bias))


def test_a_trained_bias_gets_its_gradient() -> None:
    layer = four_bit(6, 64, bias=True, dtype=torch.float32)
    layer.bias.requires_grad_(True)
    x, a, b, dy = parts(3, 64, 6, 2, torch.float32)
    lora_linear(x, layer, a.requires_grad_(), b.requires_grad_(), 1.0, 0.0).backward(dy)
    close(layer.bias.grad, dy.sum(0), 1e-6)


def test_what_is_kept_for_backward_is_x_and_the_rank_sized_part() -> None:
    layer = four_bit(96, 64, bias=False, dtype=torch.bfloat16)
    x, a, b, _ = parts(50, 64, 96, 4, torch.bfloat16)
    x.requires_grad_()
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear(x, layer, a.requires_grad_(), b.requires_grad_(), 1.0, 0.1)
    sizes = sorted(t.numel() for t in kept)
    assert sizes == sorted([x.numel(), 50 * 4, a.numel(), b.numel()])


def test_dropout_repeats_with_torchs_seed_and_is_made_again_in_backward() -> None:
    layer = four_bit(8, 64, bias=False, dtype=torch.bfloat16)
    x, a, b, dy = parts(40, 64, 8, 2, torch.bfloat16)
    grads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        given = a.clone().requires_grad_()
        lora_linear(x, layer, given, b, 1.0, 0.5).backward(dy)
        grads.append(given.grad)
    assert torch.equal(grads[0], grads[1])  # type: ignore[arg-type]
    assert not torch.equal(grads[0], grads[2])  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["nf4", "gguf"])
@pytest.mark.parametrize("lora", [False, True])
def test_what_comes_out_may_be_added_to_in_place(form: str, lora: bool) -> None:
    """Falcon's newer decoder does that; here in tensors so large that they lie in the pool's blocks."""
    if form == "nf4":
        layer = four_bit(64, 64, bias=False, dtype=torch.float32)
    else:
        layer, _ = layer_of("Q4_0", 64, 64)
    x, a, b, dy = parts(600, 64, 64, 4, torch.float32)
    for given in (x, a, b):
        given.requires_grad_()
    assert x.nbytes >= pool.LEAST_BYTES
    grads = []
    for in_place in (False, True):
        y = lora_linear(x, layer, a, b, 0.5, 0.0) if lora else frozen_linear(x, layer)
        y = y.add_(x) if in_place else y + x
        grads.append(torch.autograd.grad(y, (x, a, b) if lora else (x,), dy))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))
