"""LoRA's part and integer sums in one pass: against the definition in fp64, and the bits of one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.layers.kernels import cpu, dropout
from halfbyte.layers.kernels.cpu import tiles
from halfbyte.layers.kernels.cpu.integer import products as integer
from halfbyte.layers.kernels.dropout import LoraPart
from halfbyte.layers.lora_linear import lora_linear
from tests.dropout_masks import mask
from tests.layers.kernels.cpu.integer.test_products import layer_of

if not cpu.available(torch.zeros(1)) or not tiles.available():
    pytest.skip("needs numba and AVX512-BF16", allow_module_level=True)
from halfbyte.layers.kernels.cpu.integer import rounding, sums
from halfbyte.layers.kernels.cpu.lora.bf16 import PRODUCTS

SHAPES = [(1, 2, 32), (13, 6, 192), (24, 16, 224), (61, 64, 576)]


def drawn(n: int, r: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """LoRA's factors, sums, and the steps of rows and columns."""
    draw = torch.Generator().manual_seed(n)
    left, right = (torch.randn(s, generator=draw).bfloat16() for s in ((n, r), (r, d)))
    made = torch.randint(-(10**6), 10**6, (n, d), generator=draw, dtype=torch.int32)
    return left, right, made, torch.rand(n, generator=draw) * 1e-6, torch.rand(d, generator=draw)


def in_pieces(y: Tensor, made: Tensor, rows: Tensor, columns: Tensor | None, lora: LoraPart, piece: int) -> None:
    right = sums.pairs(lora.right)
    for first in range(0, len(y), piece):
        part = slice(first, first + piece)
        sums.onto(y[part], made[part], rows[part], columns, lora, right, first)


@pytest.mark.parametrize("columns", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize(("n", "r", "d"), SHAPES)
def test_both_parts_are_added_and_rounded(n: int, r: int, d: int, keyed: bool, p: float, columns: bool) -> None:
    left, right, made, rows, across = drawn(n, r, d)
    seed: Any = dropout.TokenSeed(torch.arange(3, 3 + n, dtype=torch.int32), 5) if keyed else 11
    by, y = across if columns else None, torch.empty(n, d).bfloat16()
    in_pieces(y, made, rows, by, LoraPart(left, right, 0.7, p, seed), 7)
    small = 0.7 * (left.double() @ right.double()) * (mask(n, d, p, seed) if p else 1)
    wanted = small + made.double() * rows.double()[:, None] * (across.double() if columns else 1)
    # bf16 rounds LoRA's part and the sum; fp32 sums of R products, of numbers below 5
    most = 2**-8 * small.abs() + 2**-8 * wanted.abs() * 1.01 + 2**-23 * (25 * r + 4)
    assert bool(((y.double() - wanted).abs() <= most).all())


@pytest.mark.parametrize(("n", "r", "d"), SHAPES)
def test_the_bits_are_those_of_one_after_the_other(n: int, r: int, d: int) -> None:
    left, right, made, rows, across = drawn(n, r, d)
    for lora, by in ((LoraPart(left, right, 1.0, 0.3, 11), None), (LoraPart(left, right, 1.0), across)):
        y = torch.empty(n, d).bfloat16()
        in_pieces(y, made, rows, by, lora, 12)
        other = PRODUCTS.up(left, right, lora.p, 11)
        rounding.onto(other, made, rows, by, add=True)
        assert torch.equal(y, other)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_layer_gives_the_same_bits_with_and_without(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    n, d, o, r = 61, 192, 96, 6
    layer = layer_of("nf4", o, d, torch.bfloat16)
    integer.set_products([layer], integer.Products())
    x, dy, a, b = (torch.randn(*s) for s in ((n, d), (n, o), (r, d), (o, r)))
    monkeypatch.setattr(integer, "LEAST_ROWS", 7)
    monkeypatch.setattr(integer, "SUMS", 1)
    found = []
    for takes in (integer.takes_lora, lambda lora: False):
        monkeypatch.setattr(integer, "takes_lora", takes)
        given = [x.bfloat16().requires_grad_(), a.clone().requires_grad_(), b.clone().requires_grad_()]
        torch.manual_seed(3)
        y = lora_linear(given[0], layer, given[1], given[2], 0.7, p)
        y.backward(dy.bfloat16())
        found.append([y.detach(), *(g.grad for g in given)])
    assert all(map(torch.equal, *found))


def test_what_the_kernel_does_not_take() -> None:
    half, whole = torch.zeros(3, 4).bfloat16(), torch.zeros(4, 64).bfloat16()
    assert integer.takes_lora(LoraPart(half, whole))
    for left, right in ((half.float(), whole), (half, whole[:3]), (half, whole[:, :40]), (half, whole[:0])):
        assert not integer.takes_lora(LoraPart(left, right))


def test_a_wrong_number_is_seen_before_the_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sums.onto

    def wrong(y: Tensor, *args: Any) -> None:
        right(y, *args)
        y[-1, -1] += 1

    assert sums.fault() is None
    monkeypatch.setattr(sums, "onto", wrong)
    cpu.works.cache_clear()
    try:
        assert not integer.takes_lora(LoraPart(torch.zeros(3, 4).bfloat16(), torch.zeros(4, 64).bfloat16()))
    finally:
        cpu.works.cache_clear()
