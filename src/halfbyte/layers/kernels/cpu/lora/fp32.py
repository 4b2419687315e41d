"""LoRA's own products in fp32, dropout inside: drop(x) A^T, its gradient dh^T drop(x), and drop(dh A).

Why, source: as `bf16.py`. In fp32 a row with its dropped numbers is twice as long, and was written and read three times
a step.
What: the same, without pairs: a row's random bits are made first, 32 for two numbers, then each number looks at its 16.
Cost: N D R multiplications each, and one pass over x or dx.

Letters: N tokens, D in, R rank.
"""

from functools import cache

import numpy as np
import torch
from numba import carray
from torch import Tensor

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu import tiles
from halfbyte.layers.kernels.cpu.lora.shared import PART, TAKEN, Seed, fault_of, mask_of
from halfbyte.layers.kernels.cpu.parallel import array, each_block, kernel, run
from halfbyte.layers.kernels.cpu.scalar import counter_bits, hash_u32, inlined
from halfbyte.layers.kernels.cpu.tiles import COLUMNS32 as COLUMNS
from halfbyte.layers.kernels.cpu.tiles import ROWS32 as ROWS
from halfbyte.layers.kernels.cpu.tiles import rows_into, tile32

AT_ONCE = 64  # rows that lie in cache at once, in a sum over rows
_ZERO = np.float32(0.0)


if not tiles.available32():
    raise ImportError("these kernels are for processors with AVX2 and FMA")


@inlined
def _dropped(x, out, mask, bits, i):  # type: ignore[no-untyped-def]
    """Row i of x (D,) -> out, the numbers that its mask drops 0. bits: (D / 2,), to be filled."""
    low, seed, keys = mask
    if low == 0:
        for j in range(x.shape[0]):
            out[j] = x[j]
    else:
        keyed = keys.shape[0] > 0
        start = np.uint32(0) if keyed else np.uint32(i * bits.shape[0])
        own = hash_u32(keys[i] ^ seed) if keyed else seed
        for j in range(bits.shape[0]):
            bits[j] = hash_u32(counter_bits(start, j, own))
        halves = bits.view(np.uint16)
        for j in range(x.shape[0]):
            v = x[j]  # read in any case, which keeps this free of branches
            out[j] = v if np.uint32(halves[j]) >= low else _ZERO


@inlined
def _down(x, a, h, wide, mask, work, first, last):  # type: ignore[no-untyped-def]
    width, rank = x.shape[1], h.shape[1]
    here, sums, bits = work
    for i in range(first, last, ROWS):
        rows = min(ROWS, last - i)
        if mask[0] == 0 and rows == ROWS:
            for j in range(0, wide, COLUMNS):
                tile32(sums[j:], wide, x[i], width, 1, a[j:], wide, width, 0)
        else:
            for k in range(rows):
                _dropped(x[i + k], here[k * width : (k + 1) * width], mask, bits, i + k)
            for j in range(0, wide, COLUMNS):
                tile32(sums[j:], wide, here, width, 1, a[j:], wide, width, 0)
        for k in range(rows):
            for j in range(rank):
                h[i + k, j] = sums[k * wide + j]


@inlined
def _up(dh, a, out, mask, work, first, last):  # type: ignore[no-untyped-def]
    rank, width = dh.shape[1], out.shape[1]
    here, sums, bits = work
    for i in range(first, last, ROWS):
        rows = min(ROWS, last - i)
        rows_into(here, dh, i, rows)
        for j in range(0, width, COLUMNS):
            tile32(sums[j:], width, here, rank, 1, a[j:], width, rank, 0)
        for k in range(rows):
            _dropped(sums[k * width : (k + 1) * width], out[i + k], mask, bits, i + k)


@inlined
def _gradient(dh, x, out, mask, work, first, last):  # type: ignore[no-untyped-def]
    """Parts [first, last) of the sum over rows: out (parts, ranks, D), `ranks` of whole tiles."""
    n, width, rank, ranks = x.shape[0], x.shape[1], dh.shape[1], out.shape[1]
    here, given, bits = work
    for part in range(first, last):
        end = min(n, (part + 1) * PART)
        sums = out[part].reshape(ranks * width)
        for i in range(part * PART, end, AT_ONCE):
            many = min(AT_ONCE, end - i)
            for k in range(many):
                _dropped(x[i + k], here[k * width : (k + 1) * width], mask, bits, i + k)
                for r in range(rank):
                    given[k * ranks + r] = dh[i + k, r]
            more = 0 if i == part * PART else 1
            for j in range(0, width, COLUMNS):
                for r in range(0, ranks, ROWS):
                    tile32(sums[r * width + j :], width, given[r:], 1, ranks, here[j:], width, many, more)


@kernel
def lora_down(p):  # type: ignore[no-untyped-def]
    s = carray(p, (32,), np.int64)
    n, width, wide = s[1], s[9], s[11]
    x, a = array(s[3], (n, width), np.float32), array(s[4], (width * wide,), np.float32)
    h, keys = array(s[5], (n, s[10]), np.float32), array(s[8], (s[12],), np.uint32)
    here, bits = np.zeros(ROWS * width, np.float32), np.empty(width // 2, np.uint32)
    work, mask = (here, np.empty(ROWS * wide, np.float32), bits), (np.uint32(s[6]), np.uint32(s[7]), keys)
    each_block(s, _down, (x, a, h, wide, mask, work))


@kernel
def lora_up(p):  # type: ignore[no-untyped-def]
    s = carray(p, (32,), np.int64)
    n, width, rank = s[1], s[9], s[10]
    dh, a = array(s[3], (n, rank), np.float32), array(s[4], (rank * width,), np.float32)
    out, keys = array(s[5], (n, width), np.float32), array(s[8], (s[11],), np.uint32)
    here, bits = np.zeros(ROWS * rank, np.float32), np.empty(width // 2, np.uint32)
    work, mask = (here, np.empty(ROWS * width, np.float32), bits), (np.uint32(s[6]), np.uint32(s[7]), keys)
    each_block(s, _up, (dh, a, out, mask, work))


@kernel
def lora_gradient(p):  # type: ignore[no-untyped-def]
    s = carray(p, (32,), np.int64)
    width, rank, ranks, n = s[9], s[10], s[11], s[12]
    dh, x = array(s[3], (n, rank), np.float32), array(s[4], (n, width), np.float32)
    out, keys = array(s[5], (s[1], ranks, width), np.float32), array(s[8], (s[13],), np.uint32)
    here, given = np.empty(AT_ONCE * width, np.float32), np.zeros(AT_ONCE * ranks, np.float32)
    work, mask = (here, given, np.empty(width // 2, np.uint32)), (np.uint32(s[6]), np.uint32(s[7]), keys)
    each_block(s, _gradient, (dh, x, out, mask, work))


def down(x: Tensor, a: Tensor, p: float, seed: Seed) -> Tensor:
    """drop(x) A^T, not scaled by 1 / (1 - p): x (N, D), A (R, D) -> (N, R). The mask is `gate.dropped`'s."""
    (n, width), rank = x.shape, a.shape[0]
    h, wide = pool.empty((n, rank), x), -(-rank // COLUMNS) * COLUMNS
    turned = torch.zeros(width, wide)
    turned[:, :rank] = a.T
    mask, keys = mask_of(p, seed)
    run(lora_down, n, TAKEN, x, turned, h, *mask, width, rank, wide, keys)
    return h


def up(dh: Tensor, a: Tensor, p: float, seed: Seed) -> Tensor:
    """drop(dh A), not scaled: dh (N, R), A (R, D) -> (N, D), in memory of the pool."""
    (rank, width), n = a.shape, dh.shape[0]
    out, (mask, keys) = pool.empty((n, width), a), mask_of(p, seed)
    run(lora_up, n, TAKEN, dh.contiguous(), a.contiguous(), out, *mask, width, rank, keys)
    return out


def gradient(dh: Tensor, x: Tensor, p: float, seed: Seed) -> Tensor:
    """dh^T drop(x), not scaled: dh (N, R), x (N, D) -> (R, D)."""
    (n, width), rank = x.shape, dh.shape[1]
    parts, ranks = -(-n // PART), -(-rank // ROWS) * ROWS
    out, (mask, keys) = pool.empty((parts, ranks, width), x), mask_of(p, seed)
    run(lora_gradient, parts, 1, dh.contiguous(), x, out, *mask, width, rank, ranks, n, keys)
    return out[:, :rank].sum(0) if parts > 1 else out[0, :rank]


@cache
def fault() -> str | None:
    """What these products get wrong on this machine; None where nothing is."""
    return fault_of(down, gradient, up, torch.float32, ranks=(6, COLUMNS + 8))
