"""LoRA's products, dropout inside, against products in fp64 with the mask by its definition in numpy."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from halfbyte.layers import lora_linear
from halfbyte.layers.kernels import cpu, dropout
from halfbyte.layers.kernels.cpu import lora_products, tiles
from tests.dropout_masks import mask

# where numba works, on processors that have the instructions
KERNELS: dict[torch.dtype, Any] = {}
if cpu.enabled() and tiles.available():
    KERNELS[torch.bfloat16] = import_module("halfbyte.layers.kernels.cpu.lora.bf16").PRODUCTS
if cpu.enabled() and tiles.available32():
    KERNELS[torch.float32] = import_module("halfbyte.layers.kernels.cpu.lora.fp32").PRODUCTS
if not KERNELS:
    pytest.skip("needs AVX2 or AVX512-BF16, and numba", allow_module_level=True)
dtypes = pytest.mark.parametrize("dtype", KERNELS)

SHAPES = [(1, 32, 2), (13, 64, 16), (97, 576, 16), (513, 96, 8), (1100, 192, 34), (24, 1536, 64)]
# from a number to the next, where a product rounds once more at its end; rounding of an addition in fp32
EPS, SUM = {torch.bfloat16: 2.0**-7, torch.float32: 0.0}, 2.0**-24


def given(n: int, d: int, r: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n + d + r)
    return tuple(torch.randn(*shape, generator=draw).to(dtype) for shape in ((n, d), (r, d), (n, r)))  # type: ignore[return-value]


def seeds(n: int) -> list[int | dropout.TokenSeed]:
    keys = dropout.token_keys(np.arange(n), seed=3, step=4)
    return [12345, dropout.TokenSeed(torch.from_numpy(keys), site=7)]


def near(got: Tensor, wanted: Tensor, sizes: Tensor, terms: int, eps: float) -> None:
    """Sums of `terms` exact products in fp32, in any order, of these sizes in all; then one rounding."""
    off = (got.double() - wanted).abs()
    assert bool((off <= eps / 2 * wanted.abs() + terms * SUM * sizes + 1e-30).all()), float(off.max())


@dtypes
@pytest.mark.parametrize("p", [0.0, 0.05, 0.6])
@pytest.mark.parametrize(("n", "d", "r"), SHAPES)
def test_products_are_those_of_the_dropped_numbers(n: int, d: int, r: int, p: float, dtype: torch.dtype) -> None:
    (x, a, dh), lora, eps = given(n, d, r, dtype), KERNELS[dtype], EPS[dtype]
    assert lora_products(x, a)
    for seed in seeds(n):
        keep = mask(n, d, p, seed)
        assert not p or n * d < 1000 or abs(float(keep.mean()) - (1 - p)) < 5 * (p / (n * d)) ** 0.5
        dropped, a64, dh64 = x.double() * keep, a.double(), dh.double()
        near(lora.down(x, a, p, seed), dropped @ a64.T, dropped.abs() @ a64.abs().T, d, eps)
        near(lora.gradient(dh, x, p, seed), dh64.T @ dropped, dh64.abs().T @ dropped.abs(), n, 0.0)
        near(lora.up(dh, a, p, seed), (dh64 @ a64) * keep, dh64.abs() @ a64.abs(), r, eps)


@dtypes
def test_a_sum_over_rows_does_not_depend_on_the_threads(dtype: torch.dtype) -> None:
    (x, _, dh), lora = given(2000, 96, 16, dtype), KERNELS[dtype]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(lora.gradient(dh, x, 0.1, 9))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], one) for one in found[1:])


@dtypes
def test_what_is_not_finite_is_not_hidden(dtype: torch.dtype) -> None:
    (x, a, dh), lora = given(40, 64, 16, dtype), KERNELS[dtype]
    x[3, 5], dh[7, 2] = float("nan"), float("inf")
    assert lora.down(x, a, 0.0, 0)[3].isnan().all()
    assert lora.gradient(dh, x, 0.0, 0)[:, 5].isnan().all()
    assert not lora.up(dh, a, 0.0, 0)[7].isfinite().any()


@dtypes
@pytest.mark.parametrize(("d", "r"), [(576, 15), (80, 16), (576, 66)])
def test_other_shapes_are_the_librarys(d: int, r: int, dtype: torch.dtype) -> None:
    if r == 15 and dtype == torch.float32:
        pytest.skip("only bf16 is multiplied in pairs")
    x, a, dh = given(40, d, r, dtype)
    assert not lora_products(x, a)
    h, stored = lora_linear.lora_down(x, a, 0.2, 11)
    seen = mask(40, d, 0.2, 11).to(dtype)
    assert stored is None
    torch.testing.assert_close(h, (x * seen) @ a.T)
    torch.testing.assert_close(lora_linear.lora_gradient(dh, x, a, 0.2, 11, None), dh.T @ (x * seen))
    torch.testing.assert_close(lora_linear.lora_up(dh, a, 0.2, 11, None), (dh @ a) * seen)


@dtypes
def test_the_mask_of_a_kernel_is_the_definition(dtype: torch.dtype) -> None:
    """Of `dropout.keep_mask`, in numpy, number by number."""
    x = torch.ones(30, 32, dtype=dtype)
    seed = seeds(30)[1]
    eye = torch.eye(32, dtype=dtype)
    assert np.array_equal(KERNELS[dtype].down(x, eye, 0.3, seed).bool().numpy(), mask(30, 32, 0.3, seed).bool().numpy())


@dtypes
@pytest.mark.parametrize("name", ["down", "gradient", "up"])
def test_a_wrong_product_is_seen_at_the_start_and_not_used(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (x, a, _), lora = given(40, 64, 16, dtype), KERNELS[dtype]
    assert lora_products(x, a)
    own = getattr(lora, name)

    def wrong(*args: object) -> Tensor:
        made: Tensor = own(*args)
        made[3, 1] += 0.05 * made.float().abs().amax().to(made.dtype)
        return made

    monkeypatch.setattr(lora, name, wrong)
    cpu.works.cache_clear()
    try:
        assert not lora_products(x, a)
        assert "of LoRA is wrong by our kernel on this machine" in caplog.text
    finally:
        monkeypatch.undo()
        cpu.works.cache_clear()
    assert lora_products(x, a)
