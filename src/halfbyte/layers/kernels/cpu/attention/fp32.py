"""Causal attention of whole examples as one kernel in fp32, forward and backward, on tiles that stay in cache.

Why: the matmul library makes all scores of an example, half of which no row sees, and one call for each product costs
as much as its arithmetic: a third of the processor's rate (docs/log).
What: as `bf16.py`, without pairs: a task is one piece of a tree, one key head and some of the query heads that it
serves. Some rows of queries at a time go through scores, softmax and product; only columns that a row sees are
computed, in steps of a tile. Keys and values are laid out once, in panels as wide as a tile.
Source: FlashAttention-2, arXiv:2307.08691, section 3.1 (formulas).
Cost: 2 and 5 products of L x L x D / 2; scratch of some hundred kB a thread.

Letters: T tokens, H query heads, K key heads, G = H / K, D head size, L tokens of a segment.
"""

import math

import numpy as np
from numba import carray

from halfbyte.layers.kernels.cpu.attention import tasks

from halfbyte.layers.kernels.cpu.attention.tasks import (  # isort: skip
    PAD, TALL, WIDE, drop_chances, largest, row_seed, scratch, store_rows, tile_end, tilt,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.parallel import kernel
from halfbyte.layers.kernels.cpu.scalar import exp_f32, inlined, up
from halfbyte.layers.kernels.cpu.tiles import COLUMNS32 as COLUMNS
from halfbyte.layers.kernels.cpu.tiles import ROWS32 as ROWS
from halfbyte.layers.kernels.cpu.tiles import tile32

_ZERO = np.float32(0.0)


@inlined
def _panels(x, rows, d, out, before, padded, reach):  # type: ignore[no-untyped-def]
    """x (rows, d) -> columns from `before` on of its transpose, a panel of COLUMNS after the other: (.., D, COLUMNS)"""
    for j in range(before // COLUMNS * COLUMNS, before + padded, COLUMNS):
        skip = max(0, before - j)
        for c in range(d):
            to = out[j * d + c * COLUMNS : j * d + (c + 1) * COLUMNS]
            for n in range(skip, COLUMNS):
                i = j + n - before
                to[n] = x[i * d + c] if i < rows else _ZERO


@inlined
def _rows(x, row, rows, d, out, wide, padded):  # type: ignore[no-untyped-def]
    """x (rows, d), `row` apart -> out (padded, wide), zeros around."""
    for i in range(padded):
        to = out[i * wide : (i + 1) * wide]
        for c in range(wide):
            to[c] = _ZERO
        if i < rows:
            a = x[i * row : i * row + d]
            for c in range(d):
                to[c] = a[c]


@inlined
def _softmax(s, sums, first, i0, begin, end, rows, reach, scale, lse, terms, sees):  # type: ignore[no-untyped-def]
    """Rows of scores s (TALL, reach) from column `begin` on -> exp(scale s - max), zeros where a row does not see, up
    to its tile's end. `first`: row of the segment, `i0`: of its path, which has `end` columns."""
    for r in range(up(rows, ROWS)):
        low, many = begin, 0
        if r < rows:
            low = max(begin, i0 + r - sees[0])
            many = min(end, i0 + r + 1 + sees[1]) - low
        row = s[r * reach + low : r * reach + tile_end(i0 + up(r + 1, ROWS), end, sees[1])]
        if many:
            if terms[0] != _ZERO:
                tilt(row[:many], low - i0 - r, terms[0])
            m = largest(row[:many]) * scale
            total = _ZERO
            for j in range(many):
                e = exp_f32(row[j] * scale - m)
                total += e
                row[j] = e
            if terms[3] != 0:
                drop_chances(row[:many], low, row_seed(terms, first + r), terms[3], np.float32(1.0))
            sums[r] = total
            lse[first + r] = m + np.float32(math.log(total))
        for j in range(many, len(row)):
            row[j] = _ZERO
        for j in range(r * reach + begin, r * reach + low):
            s[j] = _ZERO


@inlined
def _forward_head(head, keys, sizes, work, terms, sees):  # type: ignore[no-untyped-def]
    """One query head of one segment: q (L, D) -> out (L, D), `row` apart, and lse (L)."""
    q, out, lse = head
    kt, vp = keys
    length, before, reach, d, wide, row, scale = sizes
    s, o, qp, sums = work
    for i in range(0, length, TALL):
        rows, i0 = min(TALL, length - i), before + i
        tall, end = up(rows, ROWS), before + length
        begin = max(0, i0 - sees[0]) // COLUMNS * COLUMNS
        _rows(q[i * d :], d, rows, d, qp, d, tall)
        for j in range(begin, min(end, i0 + rows + sees[1]), COLUMNS):
            for r in range(max(0, j - sees[1] - i0) // ROWS * ROWS, tall, ROWS):
                tile32(s[r * reach + j :], reach, qp[r * d :], d, 1, kt[j * d :], COLUMNS, d, 0)
        _softmax(s, sums, i, i0, begin, end, rows, reach, scale, lse[:length], terms, sees)
        for r in range(0, tall, ROWS):
            many, at = tile_end(i0 + r + ROWS, end, sees[1]) - begin, r * reach + begin
            for c in range(0, wide, COLUMNS):
                tile32(o[r * wide + c :], wide, s[at:], reach, 1, vp[begin * wide + c :], wide, many, 0)
        for r in range(rows):
            a, to = o[r * wide : r * wide + d], out[(i + r) * row : (i + r) * row + d]
            share = terms[4] / sums[r]
            for c in range(d):
                to[c] = a[c] * share


@kernel
def _forward(address):  # type: ignore[no-untyped-def]
    slot = carray(address, (32,), np.int64)
    d, most = slot[tasks.WIDTH], up(slot[tasks.LONGEST], PAD)
    wide, at = up(d, COLUMNS), tasks.memory_of_thread(slot)
    kt, at = scratch(at, d * most, np.float32)
    vp, at = scratch(at, most * wide, np.float32)
    s, at = scratch(at, TALL * most, np.float32)
    o, at = scratch(at, TALL * wide, np.float32)
    qp, at = scratch(at, TALL * d, np.float32)
    work = (s, o, qp, np.empty(TALL, np.float32))
    tasks.forward_tasks(address, np.float32, _panels, _rows, _forward_head, wide, 1, (kt, vp), work)


@inlined
def _probabilities(s, dp, i0, j0, first, rows, width, scale, lse, delta, terms, sees):  # type: ignore[no-untyped-def]
    """Scores s and dP (TALL, WIDE) become P and dS; zeros where a row does not see, to the last column's tile."""
    until = up(width, ROWS)
    for r in range(up(rows, ROWS)):
        seen = max(0, min(width, i0 + r + 1 + sees[1] - j0)) if r < rows else 0
        low = min(seen, max(0, i0 + r - sees[0] - j0))
        many, at = seen - low, r * WIDE + low
        p, ds = s[at : r * WIDE + until], dp[at : r * WIDE + until]
        m, e = lse[r], delta[r]
        if terms[0] != _ZERO:
            tilt(p[:many], j0 + low - i0 - r, terms[0])
        if terms[3] != 0 and many:
            drop_chances(ds[:many], j0 + low, row_seed(terms, first + r), terms[3], terms[4])
        for j in range(many):
            v = exp_f32(p[j] * scale - m)
            ds[j] = v * (ds[j] - e) * scale
            p[j] = v
        if terms[3] != 0 and many:
            drop_chances(p[:many], j0 + low, row_seed(terms, first + r), terms[3], np.float32(1.0))
        for j in range(many, until - low):
            p[j] = _ZERO
            ds[j] = _ZERO
        for j in range(r * WIDE, at):
            s[j] = _ZERO
            dp[j] = _ZERO


@inlined
def _backward_head(head, keys, sizes, work, terms, sees):  # type: ignore[no-untyped-def]
    """One query head of one segment: fills dq (L, D), adds to dk and dv (reach, wide)."""
    q, do, o, lse, dq = head
    kt, kp, vt, dk, dv = keys
    length, before, _, d, wide, row, scale = sizes
    s, dp, qp, dop, dqa, delta, sums = work
    for i in range(0, length, TALL):
        rows, i0 = min(TALL, length - i), before + i
        tall = up(rows, ROWS)
        _rows(q[i * d :], d, rows, d, qp, wide, tall)
        _rows(do[i * row :], row, rows, d, dop, wide, tall)
        for r in range(rows):
            total = _ZERO
            a, b = dop[r * wide : r * wide + d], o[(i + r) * row : (i + r) * row + d]
            for c in range(d):
                total += a[c] * b[c]
            delta[r] = total
            sums[r] = lse[i + r]
        begin, end = max(0, i0 - sees[0]) // COLUMNS * COLUMNS, min(before + length, i0 + rows + sees[1])
        for j0 in range(begin, end, WIDE):
            width = min(WIDE, end - j0)
            for j in range(0, width, COLUMNS):
                for r in range(max(0, j0 + j - sees[1] - i0) // ROWS * ROWS, tall, ROWS):
                    to, panel = r * WIDE + j, (j0 + j) * d
                    tile32(s[to:], WIDE, qp[r * wide :], wide, 1, kt[panel:], COLUMNS, d, 0)
                    tile32(dp[to:], WIDE, dop[r * wide :], wide, 1, vt[panel:], COLUMNS, d, 0)
            _probabilities(s, dp, i0, j0, i, rows, width, scale, sums, delta, terms, sees)
            for r in range(0, tall, ROWS):
                steps, more = max(0, min(width, i0 + r + ROWS + sees[1] - j0)), j0 - begin
                for c in range(0, wide, COLUMNS):
                    k_at = j0 * wide + c
                    tile32(dqa[r * wide + c :], wide, dp[r * WIDE :], WIDE, 1, kp[k_at:], wide, steps, more)
            for j in range(0, width, ROWS):
                skip = max(0, j0 + j - sees[1] - i0)  # rows of queries before the first that sees column j
                for c in range(0, wide, COLUMNS):
                    to = (j0 + j) * wide + c
                    a, b = skip * WIDE + j, skip * wide + c
                    tile32(dv[to:], wide, s[a:], 1, WIDE, dop[b:], wide, rows - skip, 1)
                    tile32(dk[to:], wide, dp[a:], 1, WIDE, qp[b:], wide, rows - skip, 1)
        store_rows(dqa, wide, rows, d, dq[i * d :], np.float32(1.0))


@kernel
def _backward(address):  # type: ignore[no-untyped-def]
    slot = carray(address, (32,), np.int64)
    d, most = slot[tasks.WIDTH], up(slot[tasks.LONGEST], PAD)
    wide, at = up(d, COLUMNS), tasks.memory_of_thread(slot)
    kt, at = scratch(at, d * most, np.float32)
    vt, at = scratch(at, d * most, np.float32)
    kp, at = scratch(at, most * wide, np.float32)
    dka, at = scratch(at, most * wide, np.float32)
    dva, at = scratch(at, most * wide, np.float32)
    s, at = scratch(at, TALL * WIDE, np.float32)
    dp, at = scratch(at, TALL * WIDE, np.float32)
    qp, at = scratch(at, TALL * wide, np.float32)
    dop, at = scratch(at, TALL * wide, np.float32)
    dqa, at = scratch(at, TALL * wide, np.float32)
    work = (s, dp, qp, dop, dqa, np.empty(TALL, np.float32), np.empty(TALL, np.float32))
    keys = (kt, kp, vt, dka, dva)
    tasks.backward_tasks(address, np.float32, _panels, _rows, _backward_head, wide, 1, keys, work)


KERNELS = tasks.Attention(
    _forward,
    _backward,
    COLUMNS,
    lambda d, wide, most: 4 * (most * (d + wide + TALL) + TALL * (wide + d)),
    lambda d, wide, most: 4 * (most * (2 * d + 3 * wide) + TALL * (2 * WIDE + 3 * wide)),
)
