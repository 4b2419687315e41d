"""Recurrent kernels on examples laid end to end, forward and backward: as the recurrence token by token in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.layers import recurrent
from halfbyte.layers.kernels import cpu
from halfbyte.layers.kernels.cpu import tiles

pytestmark = pytest.mark.skipif(not cpu.enabled() or not tiles.available32(), reason="these kernels do not run here")
CHUNK = 96
LENGTHS = {
    "around a chunk": (1, CHUNK - 1, CHUNK, CHUNK + 1, 3),
    "three chunks": (2, 2 * CHUNK + 7, 1),
    "one": (1,),
    "whole chunks": (2 * CHUNK, 2 * CHUNK),
}
DTYPES = [torch.float32, torch.bfloat16]
# The recurrence is computed in fp32, with sums of some hundred terms (seen 4e-7). In bf16 the inputs are what they are;
# on the way from them to the output or a gradient at most eight numbers are rounded, as operands of products or as the
# result (unit k and q, u or dt x, a state, its gradient, a scaled row, a triangle, the output), each by 2^-9 of itself:
# 1.6e-2 if all in one direction (seen 2e-3 to 6e-3; 8e-3 for decays of a state that is kept over 4,000 tokens).
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8 * 2**-9}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def apart(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-12))


def check(
    name: str, options: dict[str, Any], given: Sequence[Tensor], others: Sequence[Tensor],
    by_token: Callable[..., Tensor], dtype: torch.dtype, of_decays: float = 0.0, of_sums: float = 0.0,
) -> None:  # fmt: skip
    """The kernel of this name on `given` and `others`; all of `given` have a gradient. of_decays: a wider tolerance for
    that of the second. of_sums: the largest sum of a chunk's logarithms of decays, each of which is rounded: a decay
    between two tokens is e to the difference of two."""
    ours = [x.clone().requires_grad_() for x in given]
    y = recurrent.Kernel.apply(name, options, *ours, *others)
    dy = draw(*y.shape, dtype=dtype, seed=9)
    y.backward(dy)
    wide = [x.double().requires_grad_() for x in given]
    wanted = by_token(*wide)
    wanted.backward(dy.double())
    allowed = TOLERANCE[dtype] + of_sums * 2**-24
    assert apart(y.detach(), wanted.detach()) <= allowed
    for number, (a, b) in enumerate(zip(ours, wide, strict=True)):
        assert a.grad is not None and b.grad is not None
        if float(b.grad.norm()) > 1e-9:  # of one token alone, the decay has none
            tolerance = max(allowed, of_decays if number == 1 else 0.0)
            assert apart(a.grad, b.grad) <= tolerance, f"gradient {number}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("width", "taps", "silu"), [(64, 4, True), (37, 3, False)])
def test_conv(width: int, taps: int, silu: bool, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    w, bias = draw(taps, width, seed=1), draw(width, seed=2)

    def by_token(x: Tensor) -> Tensor:
        rows = []
        for example in x.split(list(lengths)):
            for t in range(len(example)):
                row = bias.double()
                for j in range(min(taps, t + 1)):
                    row = row + w[j].double() * example[t - j]
                rows.append(F.silu(row) if silu else row)
        return torch.stack(rows)

    x = draw(sum(lengths), width, dtype=dtype)
    check("conv", {"silu": silu}, [x], [w, bias, recurrent.places_of(lengths).places], by_token, dtype)


def delta_by_token(keys: int, heads: int, d: int, o: int, lengths: tuple[int, ...]) -> Callable[..., Tensor]:
    def unit(x: Tensor) -> Tensor:
        return (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)).repeat_interleave(heads // keys, 1)

    def by_token(qkv: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        tokens = len(qkv)
        q, k, v = qkv.split([keys * d, keys * d, heads * o], 1)
        q, k = unit(q.view(tokens, keys, d)) * d**-0.5, unit(k.view(tokens, keys, d))
        v, out, t = v.view(tokens, heads, o), [], 0
        for length in lengths:
            state = qkv.new_zeros(heads, d, o)
            for _ in range(length):
                state = state * g[t].exp()[:, None, None]
                error = v[t] - (state * k[t][..., None]).sum(1)  # (H, O)
                state = state + k[t][..., None] * (beta[t][:, None] * error)[:, None]
                out.append((state * q[t][..., None]).sum(1).flatten())
                t += 1
        return torch.stack(out)

    return by_token


def scan_by_token(groups: int, n: int, p: int, skip: Tensor, lengths: tuple[int, ...]) -> Callable[..., Tensor]:
    heads = len(skip)

    def by_token(xbc: Tensor, a: Tensor, dt: Tensor) -> Tensor:
        tokens = len(xbc)
        x, b, c = xbc.split([heads * p, groups * n, groups * n], 1)
        x = x.view(tokens, heads, p)
        b, c = (part.view(tokens, groups, n).repeat_interleave(heads // groups, 1) for part in (b, c))
        out, t = [], 0
        for length in lengths:
            state = xbc.new_zeros(heads, n, p)
            for _ in range(length):
                new = b[t][..., None] * (dt[t][:, None] * x[t])[:, None]
                state = state * a[t].exp()[:, None, None] + new
                out.append(((state * c[t][..., None]).sum(1) + skip.double()[:, None] * x[t]).flatten())
                t += 1
        return torch.stack(out)

    return by_token


# key heads, heads, a key's width, a value's
DELTA = [(2, 2, 32, 32), (1, 2, 24, 40), (1, 1, 128, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("keys", "heads", "d", "o"), DELTA)
def test_delta_rule(keys: int, heads: int, d: int, o: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens = sum(lengths)
    qkv = draw(tokens, 2 * keys * d + heads * o, dtype=dtype)
    g, beta = -F.softplus(draw(tokens, heads, seed=1)) * 0.3, draw(tokens, heads, seed=2).sigmoid()
    starts, by_token = recurrent.places_of(lengths).starts, delta_by_token(keys, heads, d, o, lengths)
    check("delta_rule", {"keys": keys, "d": d}, [qkv, g, beta], [starts], by_token, dtype)


# heads, groups, a state's rows, a head's width
STATE_SPACE = [(4, 2, 16, 16), (2, 1, 40, 24), (17, 1, 8, 32), (1, 1, 128, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("heads", "groups", "n", "p"), STATE_SPACE)
def test_state_space(heads: int, groups: int, n: int, p: int, lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens = sum(lengths)
    xbc = draw(tokens, heads * p + 2 * groups * n, dtype=dtype)
    dt, skip = F.softplus(draw(tokens, heads, seed=1)), draw(heads, seed=2)
    a = -dt * torch.linspace(0.02, 0.5, heads)
    starts, by_token = recurrent.places_of(lengths).starts, scan_by_token(groups, n, p, skip, lengths)
    check("state_space", {"groups": groups, "n": n}, [xbc, a, dt], [skip, starts], by_token, dtype)


# Decays of 4,000 tokens: nearly none, so a state is a sum over all of them; nearly all, so the gradient of a decay is
# the small difference of large sums; below 2^-126 in one step; and each of these now and then.
# Of sums that are a thousand times what is left of them, each right to some 2^-22 (fp32: seen 1.2e-4).
LEFT = 1000 * 2**-22
LONG = {"kept": [-1e-5], "lost": [-5.0], "sunk": [-100.0], "mixed": [-1e-5, -1e-3, -0.1, -5.0, -100.0]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decays", LONG.values(), ids=LONG)
@pytest.mark.parametrize("name", ["delta_rule", "state_space"])
def test_long_rows_and_extreme_decays(name: str, decays: list[float], dtype: torch.dtype) -> None:
    lengths, heads, d = (4000, CHUNK + 1), 2, 16
    tokens = sum(lengths)
    places, starts = torch.arange(tokens * heads), recurrent.places_of(lengths).starts
    g = torch.tensor(decays)[places * 7919 % 31 % len(decays)].view(tokens, heads)  # as good as at random
    beta, skip = draw(tokens, heads, seed=2).sigmoid(), torch.zeros(heads)
    x = draw(tokens, 3 * heads * d, dtype=dtype)
    sums = float(g.abs().unfold(0, CHUNK, CHUNK).sum(-1).max())
    if name == "delta_rule":
        by_token = delta_by_token(heads, heads, d, d, lengths)
        check(name, {"keys": heads, "d": d}, [x, g, beta], [starts], by_token, dtype, LEFT, sums)
    else:
        by_token = scan_by_token(heads, d, d, skip, lengths)
        check(name, {"groups": heads, "n": d}, [x, g, beta], [skip, starts], by_token, dtype, LEFT, sums)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gate_first", [True, False])
def test_gated_norm(gate_first: bool, dtype: torch.dtype) -> None:
    w, eps = draw(3, 40, seed=1), 1e-5

    def by_definition(x: Tensor, z: Tensor) -> Tensor:
        h = x * F.silu(z) if gate_first else x
        y = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * w.double().repeat(len(x) // 3, 1)
        return y if gate_first else y * F.silu(z)

    given = [draw(150, 40, dtype=dtype, seed=s) for s in (2, 3)]
    check("gated_norm", {"eps": eps, "gate_first": gate_first}, given, [w], by_definition, dtype)


@pytest.mark.parametrize("name", ["delta_rule", "state_space"])
def test_what_sinks_below_the_smallest_normal_number_is_zero(name: str) -> None:
    """On Intel's processors an operation on a subnormal number takes as long as a hundred others."""
    tokens, heads, d = 3 * CHUNK, 2, 32
    decay = torch.full((tokens, heads), -0.5)  # e^-48 after a chunk, e^-96 after two
    starts, ones = torch.tensor([0, tokens]), torch.ones(tokens, heads)
    x = torch.zeros(tokens, 3 * heads * d)
    x[0], x[:, : heads * d if name == "delta_rule" else 0] = 1.0, 1.0  # one token writes, all read
    if name == "delta_rule":
        options: dict[str, Any] = {"keys": heads, "d": d}
        y = recurrent.Kernel.apply(name, options, x, decay, ones, starts)
    else:
        x[:, 2 * heads * d :] = 1.0
        options = {"groups": heads, "n": d}
        y = recurrent.Kernel.apply(name, options, x, decay, ones, torch.zeros(heads), starts)
    sizes = y.detach().abs().amax(1)
    smallest = torch.finfo(torch.float32).tiny
    assert sizes[CHUNK] > 0 and sizes[-1] == 0 and not ((sizes > 0) & (sizes < smallest)).any()
    assert float(torch.tensor(smallest) * 0.5) > 0, "torch's threads keep such numbers"
    assert (torch.full((1 << 20,), smallest) * 0.5 > 0).all()
