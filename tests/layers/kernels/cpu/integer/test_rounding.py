"""Mixing, rounding and scaling against matrices of the Hadamard transform written out, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbyte.layers.kernels.cpu import available

if not available(torch.zeros(1)):
    pytest.skip("needs numba", allow_module_level=True)
from halfbyte.layers.kernels.cpu.integer import rounding

WIDTHS = [576, 192, 1536, 344, 37, 22, 16, 8, 1]
DTYPES = [torch.bfloat16, torch.float32]


def hadamard(count: int) -> Tensor:
    """Entry (i, j): -1 to the number of bits that i and j have in common."""
    return torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(count)] for i in range(count)]).double()


def whole(width: int, *, far: bool) -> Tensor:
    """Of a row filled up to whole registers of 16: neighbours are mixed, and if `far` registers as far apart as can be,
    as many as the largest power of two that divides their number, at most 16; before, if those are fewer than 16, and
    three divides their number, those a third apart are mirrored at the plane that is normal to (1, 1, 1)."""
    registers = -(-width // 16)
    if not far:
        return torch.kron(torch.eye(registers).double(), hadamard(16))
    count = next(n for n in (16, 8, 4, 2, 1) if registers % n == 0)
    h = torch.kron(torch.kron(hadamard(count), torch.eye(registers // count).double()), hadamard(16))
    if registers % 3 or count == 16:
        return h
    mirror = torch.eye(3).double() - 2 / 3
    return h @ torch.kron(mirror, torch.eye(registers // 3 * 16).double())


def filled(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.double(), (0, -x.shape[1] % 16))


def check(q: Tensor, steps: Tensor, wanted: Tensor, share: float = 1.0) -> None:
    """Steps are a 127th of the largest; each number is the nearest whole one, up to what fp32 sums round to."""
    assert q.dtype == torch.int8
    largest = wanted.abs().amax(1)
    torch.testing.assert_close(steps.double() / share, largest / 127, rtol=1e-5, atol=0)
    # 8 additions and 2 products in fp32, of numbers up to 127 steps
    assert float((q - wanted / (steps.double() / share)[:, None]).abs().max()) <= 0.5 + 127 * 16 * 2**-24


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_are_mixed_and_rounded(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    factors = torch.rand(rounding.padded_width(width), generator=torch.Generator().manual_seed(1)) + 0.1
    check(*rounding.rows(x, share=0.25), filled(x) @ whole(width, far=True).T, 0.25)
    check(*rounding.rows(x, factors), (filled(x) @ whole(width, far=False).T) * factors.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", WIDTHS)
@pytest.mark.parametrize("width", [40, 7])
def test_rows_are_mixed_with_one_another(rows: int, width: int, dtype: torch.dtype) -> None:
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).to(dtype)
    check(*rounding.groups(w, share=0.5), whole(rows, far=False) @ filled(w.T).T, 0.5)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_transform_is_orthogonal_but_for_its_size(width: int) -> None:
    for far, size in ((True, rounding.square_gain(width)), (False, rounding.MOST)):
        h = whole(width, far=far)
        torch.testing.assert_close(h.T @ h, size * torch.eye(len(h)).double())


def test_zeros_are_zeros_and_what_is_not_finite_is_not_hidden() -> None:
    x = torch.randn(5, 576)
    x[0] = 0
    x[1, 3], x[2, 575], x[3, 0] = float("nan"), float("inf"), -float("inf")
    q, steps = rounding.rows(x)
    assert float(steps[0]) == 0 and not q[0].any() and bool(steps[4].isfinite())
    y = torch.zeros(5, 3)
    rounding.onto(y, torch.ones(5, 3, dtype=torch.int32), steps, torch.ones(3), add=True)
    assert y[[0, 4]].isfinite().all() and not y[1:4].isfinite().any()
    q, steps = rounding.groups(x.T.contiguous())
    assert not steps.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("columns", [True, False])
def test_sums_are_scaled_onto_a_result_and_rounded_once(columns: bool, add: bool, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(2)
    y, sums = torch.randn(7, 37, generator=draw).to(dtype), torch.randint(-(10**6), 10**6, (7, 37), generator=draw)
    sums = sums.to(torch.int32)
    rows, across = torch.rand(7, generator=draw) * 1e-3, torch.rand(37, generator=draw)
    wanted = sums.double() * rows.double()[:, None] * (across.double() if columns else 1) + (y.double() if add else 0)
    rounding.onto(y, sums, rows, across if columns else None, add=add)
    # fp32 rounds the factors, the product and the sum; then comes the result's own rounding
    rounded = torch.finfo(dtype).eps / 2 * wanted.abs() if dtype == torch.bfloat16 else 0
    inside = 4 * 2**-24 * (sums.double() * rows.double()[:, None]).abs() + 2**-23 * wanted.abs()
    assert bool(((y.double() - wanted).abs() <= rounded + inside + 1e-30).all())
