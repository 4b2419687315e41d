"""Causal attention of whole examples as one kernel, forward and backward, on bf16 tiles that stay in cache.

What: a task is one piece of a tree (`tasks.py`), one key head and some of the query heads that it serves. Keys and
values are laid out once in pairs (`tiles.py`); then a few rows of queries at a time go through scores, softmax and
product, and no score ever leaves the core's own cache. Only the columns that a row sees are computed, in steps of a
tile. AMX multiplies no transposed A: there the gradients of keys and values are made as their transposes.
Source: FlashAttention-2, arXiv:2307.08691, section 3.1 (formulas); the layout is ours.
Cost: 2 and 5 products of L x L x D / 2; scratch of some hundred kB a thread.

Letters: T tokens, H query heads, K key heads, G = H / K, D head size (even), L tokens of a segment.
"""

import math

import numpy as np
from numba import carray

from halfbyte.layers.kernels.cpu import tiles
from halfbyte.layers.kernels.cpu.attention import tasks
from halfbyte.layers.kernels.cpu.attention.softmax import pair_gradients, row_exp, row_max
from halfbyte.layers.kernels.cpu.attention.tasks import PAD, WIDE, drop_chances, row_seed, scratch, store_rows, tilt
from halfbyte.layers.kernels.cpu.parallel import Kernel, kernel
from halfbyte.layers.kernels.cpu.registers import LANES, turn_words
from halfbyte.layers.kernels.cpu.scalar import hash_u32, inlined, load, store, up

if not tiles.available():  # LLVM ends the process where it meets an instruction that the processor lacks
    raise ImportError("this attention kernel multiplies pairs of bf16, which this processor does not (avx512_bf16)")

AMX = tiles.amx()
COLUMNS = tiles.COLUMNS
# Rows of a tile, pairs that it takes at a time, rows of queries at once in backward.
ROWS, STEP, TALL, tile = (
    (tiles.AMX_ROWS, tiles.AMX_STEPS, 64, tiles.amx_tile) if AMX else (tiles.ROWS, 1, tasks.TALL, tiles.tile)
)
_HIGH = np.uint32(16)


@inlined
def _pairs(n):  # type: ignore[no-untyped-def]
    """Pairs of n numbers, in whole steps of a tile."""
    return (n + 2 * STEP - 1) // (2 * STEP) * STEP


@inlined
def _columns_in_pairs(x, rows, d, out, before, padded, reach):  # type: ignore[no-untyped-def]
    """x (rows, d) of 16 bits -> columns from `before` on of out (pairs of d, reach) of 32: the transpose, for products
    over D."""
    x, pairs = x.view(np.uint32), d // 2
    for c in range(pairs, _pairs(d)):
        out[c * reach + before : c * reach + before + padded] = np.uint32(0)
    whole_pairs, whole_rows = pairs // LANES * LANES, rows // LANES * LANES
    for c in range(0, whole_pairs, LANES):
        for i in range(0, whole_rows, LANES):
            turn_words(x[i * pairs + c :], pairs, out[c * reach + before + i :], reach)
    for c in range(pairs):
        to = out[c * reach + before : c * reach + before + padded]
        for i in range(whole_rows if c < whole_pairs else 0, rows):
            to[i] = x[i * pairs + c]
        for i in range(rows, padded):
            to[i] = np.uint32(0)


@inlined
def _rows_in_pairs(x, row, rows, d, out, wide, padded):  # type: ignore[no-untyped-def]
    """x (rows, d) of 16 bits, `row` apart -> out (padded / 2, wide) of pairs of rows, for products over rows."""
    for i in range(padded // 2):
        to = out[i * wide : (i + 1) * wide]
        for c in range(wide):
            to[c] = np.uint32(0)
        if 2 * i < rows:
            a = x[2 * i * row : 2 * i * row + d]
            for c in range(d):
                to[c] = np.uint32(a[c])
        if 2 * i + 1 < rows:
            b = x[(2 * i + 1) * row : (2 * i + 1) * row + d]
            for c in range(d):
                to[c] |= np.uint32(b[c]) << _HIGH


@inlined
def _queries_in_pairs(x, row, rows, d, out, wide, padded, work):  # type: ignore[no-untyped-def]
    """`_rows_in_pairs` of some queries; with AMX their transpose, out (wide, TALL / 2)."""
    if AMX:
        paired = work.view(np.uint32)
        _rows_in_pairs(x, row, rows, d, paired, wide, TALL)
        for c in range(0, wide, LANES):
            for i in range(0, TALL // 2, LANES):
                turn_words(paired[i * wide + c :], wide, out[c * (TALL // 2) + i :], TALL // 2)
    else:
        _rows_in_pairs(x, row, rows, d, out, wide, padded)


@inlined
def _copy_rows(x, row, rows, d, out, padded):  # type: ignore[no-untyped-def]
    """x (rows, d / 2) of 32 bits, `row` apart -> out (padded, pairs of d), zeros below and behind."""
    pairs, some = _pairs(d), d // 2
    for i in range(rows):
        a, to = x[i * row : i * row + some], out[i * pairs : (i + 1) * pairs]
        for c in range(some):
            to[c] = a[c]
        for c in range(some, pairs):
            to[c] = np.uint32(0)
    for j in range(rows * pairs, padded * pairs):
        out[j] = np.uint32(0)


@inlined
def _clear_columns(x, wide, reach, before, padded):  # type: ignore[no-untyped-def]
    """Zeros for columns of x (wide, reach)."""
    for c in range(wide):
        for j in range(c * reach + before, c * reach + before + padded):
            x[j] = np.float32(0.0)


@inlined
def _keep_columns(x, wide, reach, before, rows, d, out, factor):  # type: ignore[no-untyped-def]
    """Columns of x (wide, reach), times a factor -> out (rows, d) of bf16."""
    square, whole = np.empty(LANES * LANES, np.float32), rows // LANES * LANES
    for i in range(0, whole, LANES):
        for c in range(0, d, LANES):
            turn_words(x[c * reach + before + i :], reach, square, LANES)
            for r in range(LANES):
                a, to = square[r * LANES : (r + 1) * LANES], out[(i + r) * d + c : (i + r) * d + min(d, c + LANES)]
                for j in range(len(to)):
                    to[j] = store(a[j] * factor, to)
    for r in range(whole, rows):
        to = out[r * d : (r + 1) * d]
        for c in range(d):
            to[c] = store(x[c * reach + before + r] * factor, to)


_clear, _keep = (_clear_columns, _keep_columns) if AMX else (tasks.clear_rows, tasks.keep_rows)


@inlined
def _softmax_rows(s, p, o_sums, first, before, length, reach, begin, until, scale, lse, terms, sees):  # type: ignore[no-untyped-def]
    """Rows of scores s (ROWS, reach) from column `begin` on -> p in bf16, unnormalised; zeros where a row does not see,
    up to `until`. `before`: tokens above the segment."""
    for r in range(ROWS):
        i, (low, end) = first + r, (begin, begin)
        if i < length:
            low, end = max(begin, before + i - sees[0]), min(before + length, before + i + 1 + sees[1])
        a, q = s[r * reach : (r + 1) * reach], p[r * reach : (r + 1) * reach]
        m = np.float32(0.0)
        if low < end:
            if terms[0] != np.float32(0.0):
                tilt(a[low:end], low - before - i, terms[0])
            m = row_max(a[begin:], until - begin, low - begin, end - begin) * scale
        total = row_exp(a[begin:], q[begin:], until - begin, low - begin, end - begin, scale, m)
        if low < end:
            if terms[3] != 0:
                seed, seen = row_seed(terms, i), q[low:end]
                for j in range(len(seen)):
                    seen[j] = seen[j] if hash_u32(np.uint32(low + j) ^ seed) >= terms[3] else np.uint16(0)
            o_sums[r] = total
            lse[i] = m + np.float32(math.log(total))


@inlined
def _forward_head(head, keys, sizes, work, terms, sees):  # type: ignore[no-untyped-def]
    """One query head of one segment: q (L, D) of 16 bits -> out (L, D), `row` apart, and lse (L)."""
    q, out, lse = head
    kt, vp = keys
    length, before, reach, d, wide, row, scale = sizes
    s, p, o, qp, sums = work
    pairs, q = _pairs(d), q.view(np.uint32)
    for i in range(0, length, ROWS):
        rows = min(ROWS, length - i)
        columns = min(before + length, before + i + rows + sees[1])
        begin = max(0, before + i - sees[0]) // COLUMNS * COLUMNS
        _copy_rows(q[i * d // 2 :], d // 2, rows, d, qp, ROWS)
        for j in range(begin, columns, COLUMNS):
            tile(s[j:], reach, qp, pairs, 1, kt[j:], reach, pairs, 0)
        until, v_at = begin + 2 * _pairs(columns - begin), begin // 2 * wide
        whole = begin + up(columns - begin, 2 * LANES)
        _softmax_rows(s, p, sums, i, before, length, reach, begin, whole, scale, lse, terms, sees)
        for c in range(0, wide, COLUMNS):
            tile(o[c:], wide, p[begin:], reach // 2, 1, vp[v_at + c :], wide, (until - begin) // 2, 0)
        for r in range(rows):
            a, to = o[r * wide : r * wide + d], out[(i + r) * row : (i + r) * row + d]
            share = terms[4] / sums[r]
            for c in range(d):
                to[c] = store(a[c] * share, to)


def _forward_kernel(amx: bool) -> Kernel:
    """`amx`: AMX, by which numba tells what it has compiled with and without it."""

    @kernel
    def forward(address):  # type: ignore[no-untyped-def]
        slot = carray(address, (32,), np.int64)
        d, most = slot[tasks.WIDTH], up(slot[tasks.LONGEST], PAD)
        wide, at = up(d, COLUMNS), tasks.memory_of_thread(slot)
        kt, at = scratch(at, _pairs(d) * most, np.uint32)
        vp, at = scratch(at, most // 2 * wide, np.uint32)
        s, at = scratch(at, ROWS * most, np.float32)
        p, at = scratch(at, ROWS * most, np.uint16)
        o, at = scratch(at, ROWS * wide, np.float32)
        qp, at = scratch(at, ROWS * _pairs(d), np.uint32)
        work = (s, p, o, qp, np.empty(ROWS, np.float32))
        if amx:
            tiles.amx_begin(np.zeros(64, np.uint8))
        tasks.forward_tasks(
            address, np.uint16, _columns_in_pairs, _rows_in_pairs, _forward_head, wide, 2, (kt, vp), work
        )
        if amx:
            tiles.amx_end()

    return forward


@inlined
def _probabilities(s, dp, i0, j0, rows, width, until, scale, lse, delta, ds, dsp, pp, sees):  # type: ignore[no-untyped-def]
    """Two rows at a time: p and ds of a block, ds by rows, both by pairs of rows; zeros up to `until`."""
    for pair in range(up(rows, max(ROWS, 2 * STEP)) // 2):
        a, at = 2 * pair, pair * WIDE
        b = a + 1
        end_a = max(0, min(width, i0 + a + 1 + sees[1] - j0)) if a < rows else 0
        end_b = max(0, min(width, i0 + b + 1 + sees[1] - j0)) if b < rows else 0
        low_a, low_b = max(0, i0 + a - sees[0] - j0), max(0, i0 + b - sees[0] - j0)
        pair_gradients(
            until, scale, s[a * WIDE :], dp[a * WIDE :], low_a, end_a, lse[a], delta[a], s[b * WIDE :], dp[b * WIDE :],
            low_b, end_b, lse[b], delta[b], ds[a * WIDE :], ds[b * WIDE :], dsp[at:], pp[at:],
        )  # fmt: skip


@inlined
def _drop_pairs(pp, first, j0, rows, until, terms):  # type: ignore[no-untyped-def]
    """Chances by pairs of rows: 0 where the mask drops them."""
    for pair in range((rows + 1) // 2):
        a = row_seed(terms, first + 2 * pair)
        b = row_seed(terms, first + min(2 * pair + 1, rows - 1))
        tp = pp[pair * WIDE : pair * WIDE + until]
        for j in range(until):
            low = np.uint32(0xFFFF) if hash_u32(np.uint32(j0 + j) ^ a) >= terms[3] else np.uint32(0)
            high = np.uint32(0xFFFF0000) if hash_u32(np.uint32(j0 + j) ^ b) >= terms[3] else np.uint32(0)
            tp[j] &= low | high


@inlined
def _backward_head(head, keys, sizes, work, terms, sees):  # type: ignore[no-untyped-def]
    """One query head of one segment: fills dq (L, D) of 16 bits, adds to dk and dv (reach, wide) in fp32."""
    q, do, o, lse, dq = head
    kt, kp, vt, dk, dv = keys
    length, before, reach, d, wide, row, scale = sizes
    s, dp, ds, dsp, pp, qn, qp, don, dop, dqa, delta, sums = work
    pairs = _pairs(d)
    q32, do32 = q.view(np.uint32), do.view(np.uint32)
    for i in range(0, length, TALL):
        rows, i0 = min(TALL, length - i), before + i
        tall, steps_down = up(rows, ROWS), _pairs(rows)
        _copy_rows(q32[i * d // 2 :], d // 2, rows, d, qn, tall)
        _queries_in_pairs(q[i * d :], d, rows, d, qp, wide, tall, dqa)
        _copy_rows(do32[i * row // 2 :], row // 2, rows, d, don, tall)
        _queries_in_pairs(do[i * row :], row, rows, d, dop, wide, tall, dqa)
        for r in range(tall):
            total = np.float32(0.0)
            if r < rows:
                a, b = do[(i + r) * row : (i + r) * row + d], o[(i + r) * row : (i + r) * row + d]
                for c in range(d):
                    total += load(a[c]) * load(b[c])
            delta[r] = total
            sums[r] = lse[i + r] if r < rows else np.float32(0.0)
        begin, end = max(0, i0 - sees[0]) // COLUMNS * COLUMNS, min(before + length, i0 + rows + sees[1])
        for j0 in range(begin, end, WIDE):
            width = min(WIDE, end - j0)
            for r in range(0, tall, ROWS):
                for j in range(0, min(width, i0 + r + ROWS + sees[1] - j0), COLUMNS):
                    to = r * WIDE + j
                    tile(s[to:], WIDE, qn[r * pairs :], pairs, 1, kt[j0 + j :], reach, pairs, 0)
                    tile(dp[to:], WIDE, don[r * pairs :], pairs, 1, vt[j0 + j :], reach, pairs, 0)
            until = up(width, COLUMNS)
            if terms[0] != np.float32(0.0) or terms[3] != 0:
                for r in range(rows):
                    at = slice(r * WIDE, r * WIDE + max(0, min(width, i0 + r + 1 + sees[1] - j0)))
                    tilt(s[at], j0 - i0 - r, terms[0])
                    if terms[3] != 0:
                        drop_chances(dp[at], j0, row_seed(terms, i + r), terms[3], terms[4])
            _probabilities(s, dp, i0, j0, rows, width, until, scale, sums, delta, ds, dsp, pp, sees)
            if terms[3] != 0:
                _drop_pairs(pp, i, j0, rows, until, terms)
            for r in range(0, tall, ROWS):
                steps = _pairs(max(0, min(width, i0 + r + ROWS + sees[1] - j0)))
                for c in range(0, wide, COLUMNS):
                    k_at = j0 // 2 * wide + c
                    tile(dqa[r * wide + c :], wide, ds[r * WIDE :], WIDE // 2, 1, kp[k_at:], wide, steps, j0 - begin)
            for j in range(0, width, COLUMNS if AMX else ROWS):
                skip = max(0, j0 + j - sees[1] - i0) // (2 * STEP) * STEP  # pairs before the first that sees column j
                at = skip * WIDE + j
                if AMX:
                    for c in range(0, wide, ROWS):
                        to, a = c * reach + j0 + j, c * (TALL // 2) + skip
                        tile(dv[to:], reach, dop[a:], TALL // 2, 1, pp[at:], WIDE, steps_down - skip, 1)
                        tile(dk[to:], reach, qp[a:], TALL // 2, 1, dsp[at:], WIDE, steps_down - skip, 1)
                else:
                    for c in range(0, wide, COLUMNS):
                        to, b = (j0 + j) * wide + c, skip * wide + c
                        tile(dv[to:], wide, pp[at:], 1, WIDE, dop[b:], wide, steps_down - skip, 1)
                        tile(dk[to:], wide, dsp[at:], 1, WIDE, qp[b:], wide, steps_down - skip, 1)
        store_rows(dqa, wide, rows, d, dq[i * d :], np.float32(1.0))


def _backward_kernel(amx: bool) -> Kernel:
    """As `_forward_kernel`."""

    @kernel
    def backward(address):  # type: ignore[no-untyped-def]
        slot = carray(address, (32,), np.int64)
        d, most = slot[tasks.WIDTH], up(slot[tasks.LONGEST], PAD)
        wide, at = up(d, COLUMNS), tasks.memory_of_thread(slot)
        kt, at = scratch(at, _pairs(d) * most, np.uint32)
        vt, at = scratch(at, _pairs(d) * most, np.uint32)
        kp, at = scratch(at, most // 2 * wide, np.uint32)
        dka, at = scratch(at, most * wide, np.float32)
        dva, at = scratch(at, most * wide, np.float32)
        s, at = scratch(at, TALL * WIDE, np.float32)
        dp, at = scratch(at, TALL * WIDE, np.float32)
        ds, at = scratch(at, TALL * WIDE, np.uint16)
        dsp, at = scratch(at, TALL // 2 * WIDE, np.uint32)
        pp, at = scratch(at, TALL // 2 * WIDE, np.uint32)
        qn, at = scratch(at, TALL * _pairs(d), np.uint32)
        don, at = scratch(at, TALL * _pairs(d), np.uint32)
        qp, at = scratch(at, TALL // 2 * wide, np.uint32)
        dop, at = scratch(at, TALL // 2 * wide, np.uint32)
        dqa, at = scratch(at, TALL * wide, np.float32)
        delta, sums = np.empty(TALL, np.float32), np.empty(TALL, np.float32)
        work = (s, dp, ds, dsp, pp, qn, qp, don, dop, dqa, delta, sums)
        keys = (kt, kp, vt, dka, dva)
        if amx:
            tiles.amx_begin(np.zeros(64, np.uint8))
        tasks.backward_tasks(
            address, np.uint16, _columns_in_pairs, _rows_in_pairs, _backward_head, wide, 2, keys, work, _clear, _keep
        )
        if amx:
            tiles.amx_end()

    return backward


def _forward_bytes(d: int, wide: int, most: int) -> int:
    pairs = _pairs.py_func(d)
    return most * (4 * pairs + 2 * wide + 6 * ROWS) + ROWS * (4 * wide + 4 * pairs)


def _backward_bytes(d: int, wide: int, most: int) -> int:
    pairs = _pairs.py_func(d)
    return most * (8 * pairs + 10 * wide) + TALL * (14 * WIDE + 8 * pairs + 8 * wide)


KERNELS = tasks.Attention(_forward_kernel(AMX), _backward_kernel(AMX), COLUMNS, _forward_bytes, _backward_bytes)
