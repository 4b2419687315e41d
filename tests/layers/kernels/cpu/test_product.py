"""Products in fp32 against fp64: sizes that end in the middle of a tile, parts of B, rows that lie apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbyte.layers.kernels import cpu

if not cpu.enabled():
    pytest.skip("numba does not work here", allow_module_level=True)

from halfbyte.layers.kernels.cpu import matmul, product, tiles

pytestmark = pytest.mark.skipif(not tiles.available32(), reason="no AVX2 and FMA")
UNIT = 2.0**-24  # half a last place of fp32


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def check(out: Tensor, a: Tensor, b: Tensor, before: Tensor | None = None) -> None:
    """Each number within the bound of a sum of its terms in any order (Higham, Accuracy and Stability, 3.1)."""
    wanted, sizes = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    if before is not None:
        wanted, sizes = wanted + before, sizes + before.abs()
    assert bool(((out.double() - wanted).abs() <= (a.shape[1] + 2) * UNIT * sizes).all())


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(1, 1, 1), (7, 9, 17), (145, 193, 33), (300, 16, 800), (200, 5000, 300), (61, 2500, 1000)]
)
def test_a_product(m: int, k: int, n: int, turned: bool, add: bool) -> None:
    a, b, before = draw(m, k), draw(n, k, seed=1).T if turned else draw(k, n, seed=1), draw(m, n, seed=2)
    out = before.clone()
    assert product.product_(out, a, b, add=add) is out
    check(out, a, b, before if add else None)


def test_parts_of_larger_tensors() -> None:
    wide, b, out = draw(150, 400), draw(100, 90, seed=1), torch.zeros(150, 200)
    product.product_(out[:, 50:140], wide[:, 7:107], b)
    check(out[:, 50:140], wide[:, 7:107], b)
    assert not out[:, :50].any() and not out[:, 140:].any()


def test_the_same_numbers_on_any_number_of_threads_and_rows() -> None:
    a, b, threads = draw(500, 300), draw(300, 160, seed=1), torch.get_num_threads()
    made = product.product_(torch.empty(500, 160), a, b)
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(product.product_(torch.empty(500, 160), a, b), made)
            assert torch.equal(product.product_(torch.empty(77, 160), a[100:177], b), made[100:177])
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_finite_stays_in_its_row_and_column() -> None:
    a, b = draw(200, 40), draw(40, 50, seed=1)
    a[3, 5], b[7, 11] = torch.nan, torch.inf
    out = product.product_(torch.empty(200, 50), a, b)
    bad = ~out.isfinite()
    assert bool(bad[3].all()) and bool(bad[:, 11].all()) and int(bad.sum()) == 50 + 199


def test_a_product_goes_to_the_kernel_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "faster", lambda: True)
    a, b, out = draw(256, 64), draw(64, 48, seed=1), torch.empty(256, 48)
    assert matmul.by_kernel(out, a, b) and matmul.by_kernel(out, a, draw(48, 64).T)
    few, thin = matmul.by_kernel(out[:8], a[:8], b), matmul.by_kernel(out[:, :4], a, b[:, :4])
    assert not few and not thin
    assert not matmul.by_kernel(out, draw(64, 256).T, b)  # A's columns one after the other
    assert not matmul.by_kernel(out.bfloat16(), a.bfloat16(), b.bfloat16())
    check(matmul.product(a, b), a, b)
    bias = draw(48, seed=3)
    check(matmul.product(a, b, bias), a, b, bias.expand(256, 48))
    check(matmul.into(out.fill_(1.0), a, b, add=True), a, b, torch.ones(256, 48))
    monkeypatch.setattr(product, "faster", lambda: False)
    assert not matmul.by_kernel(out, a, b)
    check(matmul.product(a, b), a, b)


def test_a_wrong_product_is_seen_at_the_start_and_torch_multiplies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(product, "faster", lambda: True)
    own, (a, b, out) = product.product_, (draw(256, 64), draw(64, 48, seed=1), torch.empty(256, 48))

    def wrong(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
        own(out, a, b, add=add)[5, 7] = 0.0  # that no tile has written
        return out

    monkeypatch.setattr(product, "product_", wrong)
    product.fault.cache_clear()
    cpu.works.cache_clear()
    try:
        assert not matmul.by_kernel(out, a, b)
        assert "A product in fp32 is wrong by our kernel on this machine" in caplog.text
        check(matmul.into(out, a, b), a, b)
    finally:
        monkeypatch.setattr(product, "product_", own)
        product.fault.cache_clear()
        cpu.works.cache_clear()
    assert matmul.by_kernel(out, a, b)


BAND = [(576, 576), (640, 576), (1151, 576), (300, 256), (1500, 1023)]  # rows and columns that oneDNN gives one thread


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("rows", "columns"), BAND)
def test_a_product_by_halves(rows: int, columns: int, add: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16: a sum in fp32, rounded once, or twice where what is there is added to a rounded product."""
    monkeypatch.setattr(matmul, "_has_amx", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    a, b, before = (t.bfloat16() for t in (draw(rows, 300), draw(columns, 300, seed=1).T, draw(rows, columns, seed=2)))
    out = before.clone() if add else torch.full((rows, columns), torch.nan, dtype=torch.bfloat16)
    assert matmul.on_one_thread(out, a)
    made = matmul.into(out, a, b, add=add)
    wanted, sizes = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    rounded = wanted.abs()
    if add:
        wanted, sizes, rounded = wanted + before, sizes + before.abs(), rounded + (wanted + before).abs()
    bound = 302 * UNIT * sizes + 2.0**-8 * (1 + 2.0**-8) * rounded
    assert made is out and bool(((made.double() - wanted).abs() <= bound).all())
    bias = draw(columns, seed=3).bfloat16()
    product_alone, with_bias = a.double() @ b.double(), a.double() @ b.double() + bias
    off = (matmul.product(a, b, bias).double() - with_bias).abs()
    sizes, rounded = a.double().abs() @ b.double().abs() + bias.abs(), product_alone.abs() + with_bias.abs()
    assert bool((off <= 302 * UNIT * sizes + 2.0**-8 * (1 + 2.0**-8) * rounded).all())


def test_whole_products_where_both_threads_have_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = [2]
    monkeypatch.setattr(matmul, "_has_amx", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])

    def halves(rows: int, columns: int, depth: int = 300, dtype: torch.dtype = torch.bfloat16) -> bool:
        return matmul.on_one_thread(torch.empty(rows, columns, dtype=dtype), torch.empty(rows, depth, dtype=dtype))

    assert all(halves(*shape) for shape in BAND)
    assert not any(halves(*shape) for shape in ((575, 576), (1152, 576), (1500, 1025)))
    assert not halves(640, 576, depth=16) and not halves(640, 576, dtype=torch.float32)
    threads[0] = 3
    assert not halves(640, 576)
    threads[0] = 2
    monkeypatch.setattr(matmul, "_has_amx", lambda: False)
    assert not halves(640, 576)
