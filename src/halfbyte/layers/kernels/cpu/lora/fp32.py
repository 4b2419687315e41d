"""LoRA's own products in fp32, dropout inside: drop(x) A^T, its gradient dh^T drop(x), and drop(dh A).

Why, source: as `bf16.py`. In fp32 a row with its dropped numbers is twice as long, and was written and read three times
a step.
What: the same, without pairs: a row's random bits are made first, 32 for two numbers, then each number looks at its 16.
Cost: N D R multiplications each, and one pass over x or dx.

Letters: N tokens, D in, R rank.
"""

import numpy as np
import torch
from numba import carray

from halfbyte.layers.kernels.cpu import tiles
from halfbyte.layers.kernels.cpu.lora.common import PART, LoraProducts
from halfbyte.layers.kernels.cpu.parallel import array, each_block, kernel
from halfbyte.layers.kernels.cpu.scalar import counter_bits, hash_u32, inlined
from halfbyte.layers.kernels.cpu.tiles import COLUMNS32 as COLUMNS
from halfbyte.layers.kernels.cpu.tiles import ROWS32 as ROWS
from halfbyte.layers.kernels.cpu.tiles import rows_into, tile32

AT_ONCE = 64  # rows that lie in cache at once, in a sum over rows
_ZERO = np.float32(0.0)


if not tiles.available32():
    raise ImportError("these kernels are for processors with AVX2 and FMA")


@inlined
def _drop(x, out, mask, bits, i):  # type: ignore[no-untyped-def]
    """Row i of x (D,) -> out, the numbers that its mask drops 0. bits: (D / 2,), to be filled."""
    low, seed, keys = mask
    if low == 0:
        for j in range(x.shape[0]):
            out[j] = x[j]
    else:
        keyed = keys.shape[0] > 0
        start = np.uint32(0) if keyed else np.uint32(i * bits.shape[0])
        row_seed = hash_u32(keys[i] ^ seed) if keyed else seed
        for j in range(bits.shape[0]):
            bits[j] = hash_u32(counter_bits(start, j, row_seed))
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
                _drop(x[i + k], here[k * width : (k + 1) * width], mask, bits, i + k)
            for j in range(0, wide, COLUMNS):
                tile32(sums[j:], wide, here, width, 1, a[j:], wide, width, 0)
        for k in range(rows):
            for j in range(rank):
                h[i + k, j] = sums[k * wide + j]


@inlined
def _up(dh, a, out, add, mask, work, first, last):  # type: ignore[no-untyped-def]
    rank, width = dh.shape[1], out.shape[1]
    here, sums, bits, more = work
    for i in range(first, last, ROWS):
        rows = min(ROWS, last - i)
        rows_into(here, dh, i, rows)
        for j in range(0, width, COLUMNS):
            tile32(sums[j:], width, here, rank, 1, a[j:], width, rank, 0)
        for k in range(rows):
            to = out[i + k]
            _drop(sums[k * width : (k + 1) * width], more if add else to, mask, bits, i + k)
            if add:
                for j in range(width):
                    to[j] += more[j]


@inlined
def _gradient(dh, x, out, mask, work, first, last):  # type: ignore[no-untyped-def]
    """Parts [first, last) of the sum over rows: out (parts, ranks, D), `ranks` of whole tiles."""
    n, width = x.shape
    rank, ranks = dh.shape[1], out.shape[1]
    here, given, bits = work
    for part in range(first, last):
        end = min(n, (part + 1) * PART)
        sums = out[part].reshape(ranks * width)
        for i in range(part * PART, end, AT_ONCE):
            many = min(AT_ONCE, end - i)
            for k in range(many):
                _drop(x[i + k], here[k * width : (k + 1) * width], mask, bits, i + k)
                for r in range(rank):
                    given[k * ranks + r] = dh[i + k, r]
            more = 0 if i == part * PART else 1
            for j in range(0, width, COLUMNS):
                for r in range(0, ranks, ROWS):
                    tile32(sums[r * width + j :], width, given[r:], 1, ranks, here[j:], width, many, more)


@kernel
def lora_down(p):  # type: ignore[no-untyped-def]
    s = carray(p, (32,), np.int64)
    width, wide = s[9], s[11]
    x, a = array(s[3], (s[1], width), np.float32), array(s[4], (width * wide,), np.float32)
    h, keys = array(s[5], (s[1], s[10]), np.float32), array(s[8], (s[12],), np.uint32)
    here, bits = np.zeros(ROWS * width, np.float32), np.empty(width // 2, np.uint32)
    work, mask = (here, np.empty(ROWS * wide, np.float32), bits), (np.uint32(s[6]), np.uint32(s[7]), keys)
    each_block(s, _down, (x, a, h, wide, mask, work))


@kernel
def lora_up(p):  # type: ignore[no-untyped-def]
    s = carray(p, (32,), np.int64)
    width, rank = s[9], s[10]
    dh, a = array(s[3], (s[1], rank), np.float32), array(s[4], (rank * width,), np.float32)
    out, keys = array(s[5], (s[1], width), np.float32), array(s[8], (s[11],), np.uint32)
    here, bits = np.zeros(ROWS * rank, np.float32), np.empty(width // 2, np.uint32)
    work = (here, np.empty(ROWS * width, np.float32), bits, np.empty(width, np.float32))
    each_block(s, _up, (dh, a, out, s[13] != 0, (np.uint32(s[6]), np.uint32(s[7]), keys), work))


@kernel
def lora_gradient(p):  # type: ignore[no-untyped-def]
    s = carray(p, (32,), np.int64)
    width, ranks = s[9], s[11]
    dh, x = array(s[3], (s[12], s[10]), np.float32), array(s[4], (s[12], width), np.float32)
    out, keys = array(s[5], (s[1], ranks, width), np.float32), array(s[8], (s[13],), np.uint32)
    here, given = np.empty(AT_ONCE * width, np.float32), np.zeros(AT_ONCE * ranks, np.float32)
    work, mask = (here, given, np.empty(width // 2, np.uint32)), (np.uint32(s[6]), np.uint32(s[7]), keys)
    each_block(s, _gradient, (dh, x, out, mask, work))


PRODUCTS = LoraProducts(
    lora_down,
    lora_up,
    lora_gradient,
    dtype=torch.float32,
    numbers=1,
    columns=lambda rank: -(-rank // COLUMNS) * COLUMNS,
    ranks=lambda rank: -(-rank // ROWS) * ROWS,
)


def fault() -> str | None:
    """What these products get wrong on this machine; None where nothing is."""
    return PRODUCTS.fault(6, COLUMNS + 8)
