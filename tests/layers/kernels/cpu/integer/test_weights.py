"""Weights from their codes against the format's definition in numpy, and the transform's matrices in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from halfbyte.layers import lora_linear
from halfbyte.layers.kernels import cpu
from halfbyte.layers.kernels.cpu import tiles
from halfbyte.layers.kernels.cpu.integer import products as integer
from halfbyte.quant.number_format import Codes, Nested
from tests.layers.kernels.cpu.integer.test_products import layer_of
from tests.layers.kernels.cpu.integer.test_rounding import check, filled, whole

if not cpu.available(torch.zeros(1)) or not tiles.has("avx512f"):
    pytest.skip("needs numba and AVX-512", allow_module_level=True)
from halfbyte.layers.kernels.cpu.integer import rounding, weights
from halfbyte.quant import four_bit_cpu as kernels

SHAPES = [(5, 64, 64), (16, 192, 64), (33, 576, 32), (48, 1536, 256), (1, 16, 16), (20, 1024, 1024)]
VALUES = {  # bitsandbytes, `get_4bit_type`
    "nf4": [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
            -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
            0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    "fp4": [n / 12 for n in (0, 0.0625, 8, 12, 4, 6, 2, 3, -0.0, -0.0625, -8, -12, -4, -6, -2, -3)],
}  # fmt: skip


def drawn(kind: str, o: int, d: int, block: int, dtype: torch.dtype, *, nested: bool = False) -> tuple[Codes, Tensor]:
    """Codes, and the weight that they stand for; nested scales are in blocks of 4."""
    draw = np.random.default_rng(o + d)
    codes, scales = draw.integers(16, size=(o * d,)), draw.random(o * d // block, np.float32) + np.float32(0.01)
    held, outer = scales, None
    if nested:
        held = draw.integers(256, size=len(scales)).astype(np.uint8)
        inner, wide = draw.random(256, np.float32), draw.random(-(-len(scales) // 4), np.float32)
        outer = Nested(torch.from_numpy(inner), torch.from_numpy(wide), 4, 0.25)
        scales = inner[held] * wide.repeat(4)[: len(held)] + np.float32(0.25)
    packed = (codes[::2] << 4 | codes[1::2]).astype(np.uint8)
    values = np.array(VALUES[kind], np.float32)
    weight = torch.from_numpy(values[codes] * scales.repeat(block)).to(dtype).view(o, d)
    given = (torch.from_numpy(each) for each in (packed, held, values))
    return Codes(*given, (o, d), block, dtype, outer), weight


def made(rows: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, width, dtype=torch.int8), torch.empty(rows)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize(("o", "d", "block"), SHAPES)
def test_codes_are_decoded_mixed_and_rounded(
    o: int, d: int, block: int, kind: str, dtype: torch.dtype, nested: bool
) -> None:
    codes, weight = drawn(kind, o, d, block, dtype, nested=nested)
    assert torch.equal(kernels.write(codes, torch.empty_like(weight)), weight)
    assert kernels.takes(codes)
    rows = weights.rows(codes, share=0.25, out=made(o, d))
    check(*rows, weight.double() @ whole(d, far=True).T, 0.25)
    groups = weights.groups(codes, share=0.5, out=made(rounding.padded_width(o), d))
    check(*groups, whole(o, far=False) @ filled(weight.T).T, 0.5)
    # the same bits as by way of a matrix in memory
    for ours, known in ((rows, rounding.rows(weight, share=0.25)), (groups, rounding.groups(weight, share=0.5))):
        assert all(map(torch.equal, ours, known))


def test_scales_that_are_not_finite_are_not_hidden() -> None:
    codes, _ = drawn("nf4", 16, 128, 64, torch.bfloat16)
    codes.packed[:] = 0xFF
    codes.scales[3], codes.scales[8] = float("nan"), float("inf")
    weight = kernels.write(codes, torch.empty(16, 128, dtype=torch.bfloat16)).view(32, 64)
    assert weight.isfinite().all(1).tolist() == [i not in (3, 8) for i in range(32)]
    _, steps = weights.rows(codes, out=made(16, 128))
    assert steps.isfinite().tolist() == [i not in (1, 4) for i in range(16)]
    _, steps = weights.groups(codes, out=made(16, 128))
    assert not steps.isfinite().any()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_layer_gives_the_same_bits_by_its_codes_and_by_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(kind, 72, 192, torch.bfloat16)
    integer.set_products([layer], integer.Products())
    assert isinstance(lora_linear.integer_weight(layer, torch.bfloat16), Codes)
    x, dy = torch.randn(9, 192).bfloat16(), torch.randn(9, 72).bfloat16()
    found = []
    for by_codes in (True, False):
        monkeypatch.setattr(integer, "takes", lambda codes, dtype, now=by_codes: now)
        given = x.clone().requires_grad_()
        y = lora_linear.frozen_linear(given, layer)
        y.backward(dy)
        found.append((y.detach(), given.grad))
    assert all(map(torch.equal, *found))


def test_what_the_kernels_do_not_take() -> None:
    for shape, block, dtype in (((4, 96), 64, torch.float32), ((4, 64), 8, torch.float32), ((4, 64), 64, torch.half)):
        codes = Codes(torch.zeros(1, dtype=torch.uint8), torch.zeros(1), torch.zeros(16), shape, block, dtype)
        assert not kernels.takes(codes)
    assert not isinstance(lora_linear.integer_weight(layer_of("nf4", 8, 40, torch.float32), torch.float32), Codes)
    other = layer_of("nf4", 8, 64, torch.bfloat16)
    assert not isinstance(lora_linear.integer_weight(other, torch.float32), Codes)


@pytest.mark.parametrize("name", ["rows", "groups"])
def test_a_wrong_number_is_seen_before_the_first_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(weights, name)

    def wrong(codes: Codes, *, share: float = 1.0, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q, steps = right(codes, share=share, out=out)
        q[-1, -1] += 1
        return q, steps

    assert weights.fault() is None
    monkeypatch.setattr(weights, name, wrong)
    assert "rounded to other numbers" in (weights.fault() or "")
    cpu.works.cache_clear()
    try:
        layer = layer_of("nf4", 16, 64, torch.float32)
        assert not isinstance(lora_linear.integer_weight(layer, torch.float32), Codes)
    finally:
        cpu.works.cache_clear()
