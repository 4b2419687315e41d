"""Attention of a token over its cache against its formulas in fp64: odd widths, groups of heads, windows, caps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from halfbyte.layers.decoding.tape import CachedAttention, NormFormula, Tape, isa

DTYPES = [d for d in (torch.bfloat16, torch.float32) if isa(d)]
# Scores and sums are fp32: sums of d and of n products in any order, exp within 2e-7, a softmax over scores below 10.
ROUNDED = 1e-5


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (heads, d); cos, sin (R)."""
    r, made = len(cos), x.clone()
    low, high = x[:, : r // 2], x[:, r // 2 : r]
    made[:, :r] = x[:, :r] * cos + torch.cat([-high, low], 1) * sin
    return made


def normed(x: Tensor, norm: NormFormula | None) -> Tensor:
    return x if norm is None else x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()


def reference(
    a: CachedAttention, m: int, qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Text m's out (H d) in fp64; keys and values (K, T, d) are put there."""
    n, h, k = int(a.positions[m]) + 1, a.heads, a.key_heads
    q, own, v = qkv[m].double().view(-1, a.d).split([h, k, k])
    q = rotated(normed(q, a.q_norm), cos[m].double(), sin[m].double())
    own = rotated(normed(own, a.k_norm), cos[m].double(), sin[m].double())
    assert torch.allclose(keys[:, n - 1], own, rtol=2**-7 if a.keys.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert torch.equal(values[:, n - 1].to(a.values.dtype), v.to(a.values.dtype))
    first = max(0, n - a.window) if a.window else 0
    made = []
    for head in range(h):
        group = head * k // h
        scores = keys[group, first:n] @ q[head] * a.scale
        scores = a.cap * torch.tanh(scores / a.cap) if a.cap else scores
        made.append(torch.softmax(scores, 0) @ values[group, first:n])
    return torch.cat(made)


CASES: list[dict[str, Any]] = [
    {"heads": 9, "keys": 3, "d": 64, "positions": [0, 15, 16, 17, 99, 127, 3, 40]},
    {"heads": 4, "keys": 4, "d": 80, "positions": [5]},
    {"heads": 8, "keys": 1, "d": 24, "positions": [63, 64], "cap": 3.0},
    {"heads": 2, "keys": 1, "d": 6, "positions": [70, 8, 2], "window": 7},
    {"heads": 7, "keys": 1, "d": 96, "positions": [33, 1, 80], "window": 48},
    {"heads": 10, "keys": 2, "d": 64, "positions": [47, 100], "places": [1, 0], "normed": True},
    {"heads": 4, "keys": 1, "d": 256, "positions": [18]},
    {"heads": 3, "keys": 3, "d": 128, "positions": [126, 127], "window": 100, "normed": True},
    {"heads": 4, "keys": 2, "d": 40, "positions": [31, 90], "rotary": 16, "places": [1, 0]},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['heads']}-{c['keys']}-{c['d']}")
def test_attention_is_that_of_its_formulas(case: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(case["d"])
    positions = torch.tensor(case["positions"])
    m, h, k, d, wide = len(positions), case["heads"], case["keys"], case["d"], case.get("rotary", case["d"])
    tape = Tape(dtype, m, 128)
    keys, values = tape.cache(k, d), tape.cache(k, d)
    keys.normal_()
    values.normal_()
    whole = [cache.as_strided((m, k, 128, cache.stride(2)), cache.stride()) for cache in (keys, values)]
    norms = [NormFormula(torch.randn(d).to(dtype), 1e-5) if case.get("normed") else None for _ in range(2)]
    places = torch.tensor(case["places"]) if "places" in case else None
    qkv, out = tape.buffer(m, (h + 2 * k) * d), tape.buffer(m, h * d + 5)
    a = CachedAttention(
        qkv, keys, values, positions, h, k, d, 1 / math.sqrt(d), case.get("cap", 0.0), case.get("window", 0), *norms,
        places=places,
    )  # fmt: skip
    angles = torch.rand(m, wide // 2) * 6
    cos, sin = torch.cat([angles.cos()] * 2, 1).contiguous(), torch.cat([angles.sin()] * 2, 1).contiguous()
    given = torch.randn_like(qkv)
    tape.attend(a, cos, sin, out)
    found = []
    for threads in (1, 3):
        qkv.copy_(given)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            tape.run()
        finally:
            torch.set_num_threads(before)
        found.append(out.clone())
    assert torch.equal(*found) and not out[:, h * d :].any()
    for i in range(m):
        place = i if places is None else int(places[i])
        wanted = reference(a, i, given, keys[place].double(), values[place].double(), cos, sin)
        assert torch.linalg.norm(out[i, : h * d] - wanted) < ROUNDED * torch.linalg.norm(wanted)
    assert all(not cache[..., d:].any() for cache in whole)  # what a row is filled up with


@pytest.mark.skipif(not DTYPES, reason="no kernels here")
def test_a_number_that_is_none_is_seen_and_stays_in_its_text() -> None:
    tape = Tape(DTYPES[0], 2, 64)
    keys, values, qkv = tape.cache(1, 64), tape.cache(1, 64), tape.buffer(2, 192)
    qkv.normal_()
    values[1, 0, 3, 7] = float("nan")
    positions = torch.tensor([20, 20])
    a = CachedAttention(qkv, keys, values, positions, 1, 1, 64, 0.125)
    out = tape.buffer(2, 64)
    tape.attend(a, torch.ones(2, 64), torch.zeros(2, 64), out)
    tape.run()
    assert torch.isfinite(out[0]).all() and torch.isnan(out[1, 7]) and torch.isfinite(out[1, :7]).all()
