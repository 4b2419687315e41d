"""LoRA's products, dropout inside, against products in fp64 with the mask by its definition in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from halfbyte.layers import lora_linear
from halfbyte.layers.kernels import cpu, dropout
from halfbyte.layers.kernels.cpu import gate, lora_products, tiles

if not tiles.available():
    pytest.skip("needs AVX512-BF16", allow_module_level=True)
from halfbyte.layers.kernels.cpu import lora

SHAPES = [(1, 32, 2), (13, 64, 16), (97, 576, 16), (513, 96, 8), (1100, 192, 34), (24, 1536, 64)]
EPS, SUM = 2.0**-7, 2.0**-24  # from a number in bf16 to the next; rounding of an addition in fp32


def given(n: int, d: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n + d + r)
    return tuple(torch.randn(*shape, generator=draw).bfloat16() for shape in ((n, d), (r, d), (n, r)))  # type: ignore[return-value]


def seeds(n: int) -> list[int | dropout.Keyed]:
    keys = dropout.token_keys([5, 2], [n // 2, n - n // 2], seed=3, step=4)
    return [12345, dropout.Keyed(torch.from_numpy(keys), site=7)]


def kept(seed: int | dropout.Keyed, n: int, d: int, p: float) -> Tensor:
    if isinstance(seed, dropout.Keyed):
        return dropout.kept(seed, torch.Size((n, d)), p, torch.device("cpu"))
    ones, out = torch.ones(n, d).bfloat16(), torch.empty(n, d).bfloat16()
    gate.dropped(ones, out, p, seed)
    return out.bool()


def near(got: Tensor, wanted: Tensor, sizes: Tensor, terms: int, eps: float) -> None:
    """Sums of `terms` exact products in fp32, in any order, of these sizes in all; then one rounding."""
    off = (got.double() - wanted).abs()
    assert bool((off <= eps / 2 * wanted.abs() + terms * SUM * sizes + 1e-30).all()), float(off.max())


@pytest.mark.parametrize("p", [0.0, 0.05, 0.6])
@pytest.mark.parametrize(("n", "d", "r"), SHAPES)
def test_products_are_those_of_the_dropped_numbers(n: int, d: int, r: int, p: float) -> None:
    x, a, dh = given(n, d, r)
    assert lora_products(x, a)
    for seed in seeds(n):
        mask = kept(seed, n, d, p) if p else torch.ones(n, d, dtype=torch.bool)
        assert not p or n * d < 1000 or abs(float(mask.double().mean()) - (1 - p)) < 5 * (p / (n * d)) ** 0.5
        dropped, a64, dh64 = x.double() * mask, a.double(), dh.double()
        near(lora.down(x, a, p, seed), dropped @ a64.T, dropped.abs() @ a64.abs().T, d, EPS)
        near(lora.gradient(dh, x, p, seed), dh64.T @ dropped, dh64.abs().T @ dropped.abs(), n, 0.0)
        near(lora.up(dh, a, p, seed), (dh64 @ a64) * mask, dh64.abs() @ a64.abs(), r, EPS)


def test_a_sum_over_rows_does_not_depend_on_the_threads() -> None:
    x, _, dh = given(2000, 96, 16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(lora.gradient(dh, x, 0.1, 9))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], one) for one in found[1:])


def test_what_is_not_finite_is_not_hidden() -> None:
    x, a, dh = given(40, 64, 16)
    x[3, 5], dh[7, 2] = float("nan"), float("inf")
    assert lora.down(x, a, 0.0, 0)[3].isnan().all()
    assert lora.gradient(dh, x, 0.0, 0)[:, 5].isnan().all()
    assert not lora.up(dh, a, 0.0, 0)[7].isfinite().any()


@pytest.mark.parametrize(("d", "r"), [(576, 15), (80, 16), (576, 66)])
def test_other_shapes_are_the_librarys(d: int, r: int) -> None:
    x, a, dh = given(40, d, r)
    assert not lora_products(x, a)
    h, mask = lora_linear.lora_down(x, a, 0.2, 11)
    seen = kept(11, 40, d, 0.2)
    assert mask is None
    torch.testing.assert_close(h, (x * seen) @ a.T)
    torch.testing.assert_close(lora_linear.lora_gradient(dh, x, a, 0.2, 11, None), dh.T @ (x * seen))
    torch.testing.assert_close(lora_linear.lora_up(dh, a, 0.2, 11, None), (dh @ a) * seen)


def test_the_mask_of_a_kernel_is_the_definition() -> None:
    """Of `dropout.kept`, in numpy, number by number."""
    x = torch.ones(30, 32).bfloat16()
    seed = seeds(30)[1]
    eye = torch.eye(32).bfloat16()
    assert np.array_equal(lora.down(x, eye, 0.3, seed).bool().numpy(), kept(seed, 30, 32, 0.3).numpy())


@pytest.mark.parametrize("name", ["down", "gradient", "up"])
def test_a_wrong_product_is_seen_at_the_start_and_not_used(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    x, a, _ = given(40, 64, 16)
    assert lora_products(x, a)
    own = getattr(lora, name)

    def wrong(*args: object) -> Tensor:
        made: Tensor = own(*args)
        made[3, 1] += 0.05 * made.float().abs().amax().to(made.dtype)
        return made

    monkeypatch.setattr(lora, name, wrong)
    lora.fault.cache_clear()
    cpu.works.cache_clear()
    try:
        assert not lora_products(x, a)
        assert "of LoRA is wrong by our kernel on this machine" in caplog.text
    finally:
        monkeypatch.undo()
        lora.fault.cache_clear()
        cpu.works.cache_clear()
    assert lora_products(x, a)
