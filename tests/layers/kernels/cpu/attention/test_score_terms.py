"""ALiBi and dropped chances in the attention kernels, against the formula in fp64 with the mask by its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbyte.layers import attention
from halfbyte.layers.kernels.cpu import whole_attention
from halfbyte.layers.kernels.dropout import TokenSeed, _hash

LENGTHS = (1, 47, 97, 48, 230, 49)  # beside a block's rows and columns
HEADS, KEY_HEADS, D = 4, 2, 32
DTYPES = [torch.float32, torch.bfloat16]


def draw(heads: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(LENGTHS), heads, D, generator=generator).to(dtype).requires_grad_()


def keep(seed: TokenSeed, first: int, length: int, p: float) -> Tensor:
    """(H, L, L) bool: by the hash of (the query's key, layer; head, place of the key)."""
    heads = _hash(torch.arange(HEADS) ^ seed.seed)
    keys = seed.keys[first : first + length].long() & 0xFFFFFFFF
    rows = _hash(keys[None, :] ^ heads[:, None])
    return _hash(torch.arange(length) ^ rows[..., None]) >= round(p * 2**32)


def by_formula(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, p: float, seed: TokenSeed) -> Tensor:
    outputs, first = [], 0
    for length in LENGTHS:
        each = [x[first : first + length].transpose(0, 1) for x in (q, k, v)]
        a, b, c = each[0], *(x.repeat_interleave(HEADS // KEY_HEADS, 0) for x in each[1:])
        scores = a @ b.transpose(1, 2) * 0.2
        places = torch.arange(length)
        if slopes is not None:
            scores = scores + slopes.double()[:, None, None] * places
        scores = scores.masked_fill(places[None, :] > places[:, None], -torch.inf)
        chances = scores.softmax(-1)
        if p:
            chances = chances * keep(seed, first, length, p) / (1 - p)
        outputs.append((chances @ c).transpose(0, 1))
        first += length
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("alibi", "p"), [(True, 0.0), (False, 0.1), (True, 0.3)])
def test_scores_with_terms(dtype: torch.dtype, alibi: bool, p: float) -> None:
    q, k, v = draw(HEADS, dtype, 0), draw(KEY_HEADS, dtype, 1), draw(KEY_HEADS, dtype, 2)
    if not whole_attention(q):
        pytest.skip("no kernel for this dtype here")
    slopes = torch.tensor([0.5, 0.0625, 2**-8, 0.3]) if alibi else None
    seed = TokenSeed(torch.randint(-(2**31), 2**31 - 1, (sum(LENGTHS),), dtype=torch.int32), 7)
    out = attention.attention(q, k, v, LENGTHS, 0.2, None, None, (), slopes, p, seed if p else None)
    gradient = draw(HEADS, dtype, 3).detach()
    out.backward(gradient)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = by_formula(*wide, slopes, p, seed)
    wanted.backward(gradient.double())
    # fp32: sums of 230 in another order; bf16: scores, chances and gradients are rounded once each
    allowed = 3e-6 if dtype == torch.float32 else 1e-2
    pairs = [(out, wanted), *((a.grad, b.grad) for a, b in zip((q, k, v), wide, strict=True))]
    for got, right in pairs:
        assert got is not None and right is not None
        assert float((got.double() - right).norm() / right.norm()) < allowed


def test_what_is_dropped_does_not_depend_on_the_neighbours() -> None:
    """A row alone and in a pack: the same keys, the same numbers."""
    q, k, v = (draw(n, torch.float32, i).detach() for i, n in enumerate((HEADS, KEY_HEADS, KEY_HEADS)))
    seed = TokenSeed(torch.arange(sum(LENGTHS), dtype=torch.int32), 3)
    together = attention.attention(q, k, v, LENGTHS, 0.2, None, None, (), None, 0.2, seed)
    first = sum(LENGTHS[:4])
    rows = slice(first, first + LENGTHS[4])
    one = TokenSeed(seed.keys[rows], 3)
    alone = attention.attention(q[rows], k[rows], v[rows], LENGTHS[4:5], 0.2, None, None, (), None, 0.2, one)
    assert torch.equal(alone, together[rows])
