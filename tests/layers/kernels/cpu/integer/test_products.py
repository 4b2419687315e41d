"""Integer products of frozen layers against products in fp64, with the rounding error that their definition allows."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu.integer import products as integer
from halfbyte.layers.lora_linear import frozen_linear, frozen_weight, lora_linear
from halfbyte.quant import formats
from halfbyte.recipe.schema import Quant

if integer.why_not():
    pytest.skip(integer.why_not(), allow_module_level=True)

SHAPES = [(5, 123, 65), (1, 64, 64), (33, 576, 192), (2, 192, 576), (600, 40, 24)]


def layer_of(kind: str, o: int, d: int, dtype: torch.dtype, *, bias: bool = False) -> Any:
    quant = Quant(type=kind)
    w = (torch.randn(o, d, generator=torch.Generator().manual_seed(o + d)) * d**-0.5).to(dtype)
    if kind == "none":
        made: Any = nn.Linear(d, o, bias=False, dtype=dtype)
        made.weight.data = w
    else:
        held = formats.of(quant)
        encoder = held.encoder(quant, (o, d), dtype, "w")
        codes = torch.from_numpy(encoder.codes(0, w))
        codes = codes.view(-1, 1) if codes.dtype == torch.uint8 else codes.view(o, d)
        parts = encoder.parts()
        made = held.layer({"": codes, **parts}, (o, d), quant, dtype)
        if kind in ("nf4", "fp4"):
            made.compute_dtype = dtype
    made.requires_grad_(False)
    made.bias = nn.Parameter(torch.randn(o).to(dtype), requires_grad=False) if bias else None
    return made


def allowed(a: Tensor, b: Tensor, mixed: int) -> Tensor:
    """How far a product a b^T (N, M) of rounded rows may be off, each: half a step of one factor times the other's sum
    of sizes. Mixing makes a row's largest number at most sqrt(mixed) x its norm within a group, so at most its norm."""
    steps = [x.norm(dim=1) * mixed**0.5 / 127 for x in (a, b)]  # of mixed rows; so are the norms below
    norms = [x.norm(dim=1) * mixed**0.5 for x in (a, b)]
    width = a.shape[1] ** 0.5
    first = 0.5 * steps[0][:, None] * width * norms[1][None, :]
    second = 0.5 * steps[1][None, :] * width * norms[0][:, None]
    both = 0.25 * steps[0][:, None] * steps[1][None, :] * a.shape[1]
    return (first + second + both) / mixed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize(("n", "d", "o"), SHAPES)
def test_both_products_of_every_format(n: int, d: int, o: int, kind: str, dtype: torch.dtype) -> None:
    layer = layer_of(kind, o, d, dtype, bias=True)
    draw = torch.Generator().manual_seed(n)
    x, dy = torch.randn(n, d, generator=draw).to(dtype), torch.randn(n, o, generator=draw).to(dtype)
    w = frozen_weight(layer, dtype).double().clone()
    integer.set_products([layer], integer.Products())
    given = x.clone().requires_grad_()
    y = frozen_linear(given, layer)
    y.backward(dy)
    assert given.grad is not None and y.dtype == dtype
    for got, wanted, most in (
        (y, x.double() @ w.T + layer.bias.double(), allowed(x.double(), w, 1)),
        (given.grad, dy.double() @ w, allowed(dy.double(), w.T, 1) * o**0.5),
    ):
        off = (got.detach().double() - wanted).abs()
        assert bool((off <= most + torch.finfo(dtype).eps * 2 * wanted.abs() + 1e-3).all())
        # as independent noise: of uniform rounding in two factors, for numbers that are about normal once mixed; a
        # row's largest is then at most 6 sigma
        noise = 2**0.5 * 6 / 127 / 12**0.5 * float(wanted.norm()) + torch.finfo(dtype).eps * float(wanted.norm())
        assert 0 < float(off.norm()) <= noise


@pytest.mark.parametrize("products", [integer.Products(), integer.Products(forward=False), None])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_loras_own_products_stay_as_they_are(p: float, products: integer.Products | None) -> None:
    """What an integer layer gives is the exact layer's, up to the rounding of the frozen product alone: not at all for
    the gradients of A and B where only the input gradient is an integer product."""
    n, d, o, r = 40, 123, 65, 3
    layer, dtype = layer_of("nf4", o, d, torch.float32), torch.float32
    x, dy, a, b = (torch.randn(*s).to(dtype) for s in ((n, d), (n, o), (r, d), (o, r)))
    found = []
    for asked in (None, products):
        integer.set_products([layer], asked)
        given = [t.clone().requires_grad_() for t in (x, a, b)]
        torch.manual_seed(3)
        y = lora_linear(given[0], layer, given[1], given[2], 0.7, p)
        y.backward(dy)
        found.append([y.detach(), *(g.grad for g in given)])
    exact, got = found
    same = [torch.equal(e, g) for e, g in zip(exact, got, strict=True)]
    forward, backward = (products.forward, products.backward) if products else (False, False)
    assert same == [not forward, not backward, True, True]
    w = frozen_weight(layer, dtype)
    for e, g, base in ((exact[0], got[0], x @ w.T), (exact[1], got[1], dy @ w)):
        assert float((e - g).norm()) <= 0.03 * float(base.norm())


def test_without_gradients_products_are_exact() -> None:
    layer = layer_of("nf4", 65, 123, torch.float32)
    x = torch.randn(9, 123)
    exact = frozen_linear(x, layer)
    integer.set_products([layer], integer.Products())
    with torch.no_grad():
        assert torch.equal(frozen_linear(x, layer), exact)
    assert not torch.equal(frozen_linear(x, layer), exact)
    integer.set_products([layer], None)
    assert torch.equal(frozen_linear(x, layer), exact) and integer.NAME not in layer.__dict__


def test_the_rounded_input_is_shared_and_never_stale() -> None:
    x = torch.randn(40, 64)
    first = integer.round_rows(x)
    assert integer.round_rows(x) is first
    assert integer.round_rows(x.clone()) is not first
    integer.round_rows(x)
    x.mul_(2)
    assert float(integer.round_rows(x).steps[0]) == pytest.approx(2 * float(first.steps[0]))
    del x
    gc.collect()
    assert integer._INPUT.entry is None


def test_no_rows_and_many_pieces_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of("nf4", 24, 40, torch.float32)
    integer.set_products([layer], integer.Products())
    assert frozen_linear(torch.zeros(0, 40), layer).shape == (0, 24)
    x, dy = torch.randn(601, 40), torch.randn(601, 24)
    found = []
    for least in (10_000, 7):
        monkeypatch.setattr(integer, "LEAST_ROWS", least)
        monkeypatch.setattr(integer, "SUMS", 1)
        given = x.clone().requires_grad_()
        y = frozen_linear(given, layer)
        y.backward(dy)
        found.append((y.detach(), given.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_weight_in_pieces_gives_the_same_bits(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(kind, 72, 64, dtype)
    integer.set_products([layer], integer.Products())
    x, dy = torch.randn(9, 64).to(dtype), torch.randn(9, 72).to(dtype)
    found = []
    for piece in (1 << 19, 1):
        monkeypatch.setattr(integer, "PIECE", piece)
        given = x.clone().requires_grad_()
        y = frozen_linear(given, layer)
        y.backward(dy)
        found.append((y.detach(), given.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def lent_at_most(layers: list[Any], products: integer.Products | None, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of the pool that are lent at once in a micro-batch through these layers; nothing is recomputed."""
    fresh = pool.Pool()
    monkeypatch.setattr(pool, "POOL", fresh)
    integer.set_products(layers, products)
    x = pool.empty((512, layers[0].in_features), torch.zeros(1, dtype=torch.bfloat16)).zero_()
    y = x.requires_grad_()
    for k, layer in enumerate(layers):
        draw = torch.Generator().manual_seed(k)
        a, b = (
            torch.randn(*s, generator=draw).requires_grad_() for s in ((8, layer.in_features), (layer.out_features, 8))
        )
        y = lora_linear(y, layer, a, b, 0.5, 0.05)
    y.sum().backward()
    return fresh.max_lent_bytes


def test_no_more_of_the_pool_is_lent_than_by_exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a product needs for a moment must not lie where a tensor that backward needs is put next: that one would
    hold up to twice its size. Widths are in the proportions of a decoder layer's."""
    layers = [layer_of("nf4", o, d, torch.bfloat16) for o, d in [(256, 512), (1024, 256), (512, 1024)] * 4]
    exact = lent_at_most(layers, None, monkeypatch)
    assert lent_at_most(layers, integer.Products(), monkeypatch) <= exact
