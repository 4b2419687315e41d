"""A text meets the same mask wherever it is computed: the kernel is the definition, of the text up to each token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from halfbyte.data import prefixes
from halfbyte.layers import lora_linear as room
from halfbyte.layers.kernels import dropout

LAYER = nn.Linear(2, 2)
SITES = {id(LAYER): 5}


def of_texts(first: list[int], lengths: list[int]) -> torch.Tensor:
    """Texts whose tokens are a number and those after it."""
    ids = np.concatenate([np.arange(a, a + n) for a, n in zip(first, lengths, strict=True)])
    return torch.from_numpy(prefixes.beginnings(ids, np.concatenate([np.arange(n) for n in lengths])))


def mask(
    first: list[int], lengths: list[int], d: int, p: float = 0.3, *, seed: int = 1, step: int = 0, site: int = 5
) -> torch.Tensor:
    with dropout.row_masks({id(LAYER): site}, of_texts(first, lengths), seed=seed, step=step, anywhere=True):
        key = dropout.token_seed(LAYER, torch.ones(sum(lengths), d), by_kernel=True)
    assert key is not None
    return dropout.keep_mask(key, (sum(lengths), d), p, torch.device("cpu"))


def lowbias32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def test_the_mask_by_hand() -> None:
    keys = dropout.token_keys(np.array([9, -4, 2**60]), seed=1, step=2)
    key = dropout.TokenSeed(torch.from_numpy(keys), 5)
    got = dropout.keep_mask(key, (3, 5), 0.25, torch.device("cpu"))
    for t in range(3):
        row = lowbias32((int(keys[t]) & 0xFFFFFFFF) ^ (5 * 0x9E3779B97F4A7C15 & 0xFFFFFFFF))
        for j in range(5):
            bits = lowbias32(row ^ (j // 2)) >> (16 * (j % 2)) & 0xFFFF
            assert bool(got[t, j]) == (bits >= 16384)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 7])
def test_the_kernel_is_the_definition(dtype: torch.dtype, d: int) -> None:
    x = torch.randn(12, d).to(dtype)
    with dropout.row_masks(SITES, of_texts([3, 8], [5, 6]), seed=1, step=2):
        key = dropout.token_seed(LAYER, x, by_kernel=True)  # a row of no text behind the others
        assert key is not None and dropout.token_seed(nn.Linear(2, 2), x, by_kernel=True) is None
        assert dropout.token_seed(LAYER, x[:10], by_kernel=True) is None
        assert dropout.token_seed(LAYER, x, by_kernel=False) is None
    assert dropout.token_seed(LAYER, x, by_kernel=True) is None
    wanted = dropout.keep_mask(key, x.shape, 0.3, x.device)
    dropped, made = room.drop(x, 0.3, key)
    assert torch.equal(dropped, x * wanted)
    assert (made is None) == (d % 2 == 0)
    again = x.clone()
    room.drop_(again, 0.3, key, made)
    assert torch.equal(again, dropped)


def test_what_begins_alike_has_one_mask_until_it_parts() -> None:
    long, short = mask([7], [9], 64), mask([7], [4], 64)
    assert torch.equal(long[:4], short)
    other = mask([1, 7], [3, 9], 64)
    assert torch.equal(other[3:], long)
    ids = torch.tensor([7, 8, 9, 3, 11]), torch.arange(5)
    parted = torch.from_numpy(prefixes.beginnings(*(x.numpy() for x in ids)))
    assert [bool(a == b) for a, b in zip(parted, of_texts([7], [5]), strict=True)] == [True] * 3 + [False] * 2


def test_a_row_has_its_mask_in_any_company() -> None:
    alone, together = mask([7], [5], 64), mask([2, 7, 9], [3, 5, 4], 64)
    assert torch.equal(alone, together[3:8])
    for other in (
        mask([8], [5], 64),
        mask([7], [5], 64, seed=2),
        mask([7], [5], 64, step=1),
        mask([7], [5], 64, site=6),
    ):
        assert not torch.equal(alone, other)


def test_its_share_and_independence() -> None:
    p, one = 0.1, mask(list(range(0, 2000, 100)), [50] * 20, 512, 0.1)
    n = one.numel()
    assert abs(float((~one).float().mean()) - p) < 5 * math.sqrt(p * (1 - p) / n)
    for other in (
        mask(list(range(0, 2000, 100)), [50] * 20, 512, 0.1, step=1),
        one.roll(1, 0),
        one.roll(1, 1),
        one.roll(50, 0),
    ):
        both = float((~one & ~other).float().mean())
        assert abs(both - p * p) < 5 * math.sqrt(p * p / n)
