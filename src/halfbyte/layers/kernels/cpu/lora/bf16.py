"""LoRA's own products in bf16, dropout inside: drop(x) A^T, its gradient dh^T drop(x), and drop(dh A).

Why: as products of a library, each wants x with its dropped numbers written to memory and read again, forward and
backward, which costs more than the products; and a result of 16 columns leaves most of a library's tile idle.
What: a thread takes a few rows of x, drops their numbers into its cache and multiplies them there (`tiles.py`), in
tiles that the rank fills. A's gradient is a sum over rows: each `PART` of them makes its own, and these are added in
their order, so that the result does not depend on how many threads there are, or which one was faster.
Source: LoRA, arXiv:2106.09685 section 4.1; the mask is `gate.py`'s.
Cost: N D R multiplications each, and one pass over x or dx.

Letters: N tokens, D in, R rank; a word is two neighbours of 16 bits.
"""

import numpy as np
import torch
from numba import carray

from halfbyte.layers.kernels.cpu import tiles
from halfbyte.layers.kernels.cpu.gate import mask_words
from halfbyte.layers.kernels.cpu.lora.common import PART, LoraProducts
from halfbyte.layers.kernels.cpu.parallel import Kernel, array, each_block, kernel
from halfbyte.layers.kernels.cpu.registers import round_row
from halfbyte.layers.kernels.cpu.scalar import hash_u32, inlined, load, store, up

from halfbyte.layers.kernels.cpu.tiles import (  # isort: skip
    COLUMNS, LOW_ROWS, TALL_COLUMNS, TALL_ROWS, low_tile, tall_tile,
)  # fmt: skip

AMX = tiles.amx()
# Rows of a tile, pairs that it takes at a time.
ROWS, STEP, tile = (tiles.AMX_ROWS, tiles.AMX_STEPS, tiles.amx_tile) if AMX else (tiles.ROWS, 1, tiles.tile)
PAIRS = 32  # pairs of rows that lie in cache at once
_LOW = np.uint32(0xFFFF)


if not tiles.available():  # LLVM ends the process where it meets an instruction that the processor lacks
    raise ImportError("these kernels multiply pairs of bf16, which this processor does not (avx512_bf16)")


@inlined
def _drop(x, out, low, seed, keys, i):  # type: ignore[no-untyped-def]
    """Words of row i of x (words,) -> out, those that its mask drops 0."""
    if low == 0:
        for j in range(x.shape[0]):
            out[j] = x[j]
    elif keys.shape[0] > 0:
        mask_words(x, out, low, np.uint32(0), hash_u32(keys[i] ^ seed))
    else:
        mask_words(x, out, low, np.uint32(i * x.shape[0]), seed)


@inlined
def _down(x, a, h, wide, low, seed, keys, first, last):  # type: ignore[no-untyped-def]
    words, rank = x.shape[1], h.shape[1]
    most = TALL_ROWS if wide == TALL_COLUMNS else ROWS  # AMX's tiles are all of one size
    here, sums = np.zeros(most * words, np.uint32), np.empty(most * wide, np.float32)
    for i in range(first, last, most):
        rows = min(most, last - i)
        for k in range(rows):
            _drop(x[i + k], here[k * words : (k + 1) * words], low, seed, keys, i + k)
        if wide == TALL_COLUMNS:
            tall_tile(sums, wide, here, words, 1, a, wide, words, 0)
        else:
            for j in range(0, wide, COLUMNS):
                tile(sums[j:], wide, here, words, 1, a[j:], wide, words, 0)
        for k in range(rows):
            product, to = sums[k * wide : k * wide + rank], h[i + k]
            for j in range(rank):
                to[j] = store(product[j], to)


@inlined
def _up(dh, a, pairs, out, add, low, seed, keys, first, last):  # type: ignore[no-untyped-def]
    given, width = dh.shape[1], 2 * out.shape[1]
    here, sums = np.zeros(ROWS * pairs, np.uint32), np.empty(ROWS * width, np.float32)
    row, word_mask = np.empty(width, np.uint16), np.empty(width // 2, np.uint32)
    ones = np.full(width // 2, 0xFFFFFFFF, np.uint32)
    for i in range(first, last, ROWS):
        rows = min(ROWS, last - i)
        for k in range(rows):
            for j in range(given):
                here[k * pairs + j] = dh[i + k, j]
        for j in range(0, width, COLUMNS):
            tile(sums[j:], width, here, pairs, 1, a[j:], width, pairs, 0)
        for k in range(rows):
            if add:  # in fp32, rounded once
                _drop(ones, word_mask, low, seed, keys, i + k)
                to, seen = out[i + k].view(np.uint16), word_mask.view(np.uint16)
                part = sums[k * width : (k + 1) * width]
                for j in range(width):
                    to[j] = store(load(to[j]) + (part[j] if seen[j] else np.float32(0.0)), to)
            else:
                round_row(sums[k * width :], row, width)
                _drop(row.view(np.uint32), out[i + k], low, seed, keys, i + k)


@inlined
def _gradient(dh, x, out, low, seed, keys, first, last):  # type: ignore[no-untyped-def]
    """Parts [first, last) of the sum over rows: out (parts, ranks, 2 words) in fp32, even columns first, then odd ones;
    `ranks` of whole tiles."""
    n, words = x.shape
    rank, ranks = dh.shape[1], out.shape[1]
    wide = 2 * words
    a, b = np.empty(words, np.uint32), np.empty(words, np.uint32)
    pairs, given = np.zeros(PAIRS * wide, np.uint32), np.zeros(PAIRS * ranks, np.uint32)
    rank_step, pair_step = (PAIRS, 1) if AMX else (1, ranks)  # AMX takes pairs that are neighbours
    for part in range(first, last):
        end = min(n, (part + 1) * PART)
        sums = out[part].reshape(ranks * wide)
        for i in range(part * PART, end, 2 * PAIRS):
            many = (min(2 * PAIRS, end - i) + 1) // 2
            for k in range(many):
                one = i + 2 * k
                _drop(x[one], a, low, seed, keys, one)
                if one + 1 < end:
                    _drop(x[one + 1], b, low, seed, keys, one + 1)
                else:
                    b[:] = 0
                even, odd = pairs[k * wide : k * wide + words], pairs[k * wide + words : (k + 1) * wide]
                for j in range(words):
                    even[j] = (a[j] & _LOW) | (b[j] << np.uint32(16))
                    odd[j] = (a[j] >> np.uint32(16)) | (b[j] & ~_LOW)
                for r in range(rank):
                    second = np.uint32(dh[one + 1, r]) if one + 1 < end else np.uint32(0)
                    given[k * pair_step + r * rank_step] = np.uint32(dh[one, r]) | (second << np.uint32(16))
            steps = up(many, STEP)
            for k in range(many, steps):
                for r in range(rank):
                    given[k * pair_step + r * rank_step] = np.uint32(0)
            for j in range(0, wide, COLUMNS):
                more = 0 if i == part * PART else 1
                if ranks % ROWS != 0:
                    for r in range(0, ranks, LOW_ROWS):
                        low_tile(sums[r * wide + j :], wide, given[r:], 1, ranks, pairs[j:], wide, steps, more)
                else:
                    for r in range(0, ranks, ROWS):
                        a_at, to = r * rank_step, r * wide + j
                        tile(sums[to:], wide, given[a_at:], rank_step, pair_step, pairs[j:], wide, steps, more)


def _down_kernel(amx: bool) -> Kernel:
    """`amx`: AMX, by which numba tells what it has compiled with and without it."""

    @kernel
    def lora_down(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        x, a = array(s[3], (s[1], s[9]), np.uint32), array(s[4], (s[9] * s[11],), np.uint32)
        h, keys = array(s[5], (s[1], s[10]), np.uint16), array(s[8], (s[12],), np.uint32)
        if amx:
            tiles.amx_begin(np.zeros(64, np.uint8))
        each_block(s, _down, (x, a, h, s[11], np.uint32(s[6]), np.uint32(s[7]), keys))
        if amx:
            tiles.amx_end()

    return lora_down


def _up_kernel(amx: bool) -> Kernel:
    @kernel
    def lora_up(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        dh, a = array(s[3], (s[1], s[10]), np.uint32), array(s[4], (s[9] * s[12] * 2,), np.uint32)
        out, keys = array(s[5], (s[1], s[9]), np.uint32), array(s[8], (s[11],), np.uint32)
        if amx:
            tiles.amx_begin(np.zeros(64, np.uint8))
        each_block(s, _up, (dh, a, s[12], out, s[13] != 0, np.uint32(s[6]), np.uint32(s[7]), keys))
        if amx:
            tiles.amx_end()

    return lora_up


def _gradient_kernel(amx: bool) -> Kernel:
    @kernel
    def lora_gradient(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        dh, x = array(s[3], (s[12], s[10]), np.uint16), array(s[4], (s[12], s[9]), np.uint32)
        out, keys = array(s[5], (s[1], s[11], s[9] * 2), np.float32), array(s[8], (s[13],), np.uint32)
        if amx:
            tiles.amx_begin(np.zeros(64, np.uint8))
        each_block(s, _gradient, (dh, x, out, np.uint32(s[6]), np.uint32(s[7]), keys))
        if amx:
            tiles.amx_end()

    return lora_gradient


PRODUCTS = LoraProducts(
    _down_kernel(AMX),
    _up_kernel(AMX),
    _gradient_kernel(AMX),
    dtype=torch.bfloat16,
    numbers=2,
    columns=lambda rank: TALL_COLUMNS if rank <= TALL_COLUMNS and not AMX else -(-rank // COLUMNS) * COLUMNS,
    ranks=lambda rank: min(-(-rank // rows) * rows for rows in ((ROWS,) if AMX else (ROWS, LOW_ROWS))),
    step=STEP,
)


def fault() -> str | None:
    """What these products get wrong on this machine, with tiles of each size; None where nothing is."""
    return PRODUCTS.fault(6, TALL_COLUMNS + 8)
