"""Causal attention of whole examples as one kernel, forward and backward, on bf16 tiles that stay in cache.

What: a task is one example, one key head and some of the query heads that it serves. Keys and values are laid out once
in pairs (`tiles.py`); then a few rows of queries at a time go through scores, softmax and product, and no score ever
leaves the core's own cache. Only the columns that a row sees are computed, in steps of a tile.
Source: FlashAttention-2, arXiv:2307.08691, section 3.1 (formulas); the layout is ours.
Cost: 2 and 5 products of L x L x D / 2; scratch of some hundred kB a thread.

Letters: T tokens, H query heads, K key heads, G = H / K, D head size (even), L tokens in an example.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numba import carray, cfunc, njit, types
from torch import Tensor

from halfbyte.layers.kernels.cpu.parallel import run
from halfbyte.layers.kernels.cpu.scalar import FASTMATH, exp_f32, load, pointer, store, take
from halfbyte.layers.kernels.cpu.tiles import COLUMNS, ROWS, tile

_TALL = 48  # rows of queries in a block of the backward pass: a multiple of ROWS and of 2
_WIDE = 192  # columns in a block of it: a multiple of ROWS and of COLUMNS
_PAD = 96  # of an example's length: the least common multiple of ROWS and COLUMNS
_HIGH = np.uint32(16)

# Inlined by force, as in the other kernels: a part that is compiled on its own as well is there twice, and a process
# that compiles uses another copy, with other last bits, than one that takes the kernel from the cache.
_jit: Any = njit(forceinline=True, fastmath=FASTMATH, error_model="numpy")


@njit(forceinline=True, fastmath={*FASTMATH, "nnan"}, error_model="numpy")
def _largest(row):  # type: ignore[no-untyped-def]
    """The maximum; a NaN may be passed over, and comes back with its exp."""
    m = row[0]
    for j in range(len(row)):
        m = row[j] if row[j] > m else m
    return m


@_jit
def _columns_in_pairs(x, row, rows, pairs, out, padded):  # type: ignore[no-untyped-def]
    """x (rows, pairs) of 32 bits, `row` apart -> out (pairs, padded): the transpose, for products over D."""
    for c in range(pairs):
        to = out[c * padded : (c + 1) * padded]
        for i in range(rows):
            to[i] = x[i * row + c]
        for i in range(rows, padded):
            to[i] = np.uint32(0)


@_jit
def _rows_in_pairs(x, row, rows, d, out, wide, padded):  # type: ignore[no-untyped-def]
    """x (rows, d) of 16 bits, `row` apart -> out (padded / 2, wide) of pairs of rows, for products over rows."""
    for i in range(padded // 2):
        to = out[i * wide : (i + 1) * wide]
        if 2 * i + 1 < rows:
            a, b = x[2 * i * row : 2 * i * row + d], x[(2 * i + 1) * row : (2 * i + 1) * row + d]
            for c in range(d):
                to[c] = np.uint32(a[c]) | (np.uint32(b[c]) << _HIGH)
        elif 2 * i < rows:
            a = x[2 * i * row : 2 * i * row + d]
            for c in range(d):
                to[c] = np.uint32(a[c])
        else:
            for c in range(d):
                to[c] = np.uint32(0)
        for c in range(d, wide):
            to[c] = np.uint32(0)


@_jit
def _copy_rows(x, row, rows, pairs, out, padded):  # type: ignore[no-untyped-def]
    """x (rows, pairs) of 32 bits, `row` apart -> out (padded, pairs), zeros below."""
    for i in range(rows):
        a, to = x[i * row : i * row + pairs], out[i * pairs : (i + 1) * pairs]
        for c in range(pairs):
            to[c] = a[c]
    for j in range(rows * pairs, padded * pairs):
        out[j] = np.uint32(0)


@_jit
def _up(n, step):  # type: ignore[no-untyped-def]
    return (n + step - 1) // step * step


@njit(forceinline=True, error_model="numpy")
def _words(at, count):  # type: ignore[no-untyped-def]
    """An array of `count` 32-bit words at an address, and the address behind it. So `_halves` and `_floats`."""
    return carray(pointer(at), (count,), np.uint32), at + 4 * count


@njit(forceinline=True, error_model="numpy")
def _halves(at, count):  # type: ignore[no-untyped-def]
    return carray(pointer(at), (count,), np.uint16), at + 2 * count


@njit(forceinline=True, error_model="numpy")
def _floats(at, count):  # type: ignore[no-untyped-def]
    return carray(pointer(at), (count,), np.float32), at + 4 * count


@_jit
def _store_rows(x, wide, rows, d, out):  # type: ignore[no-untyped-def]
    """x (rows, wide) in fp32 -> out (rows, d) in 16 bits."""
    for r in range(rows):
        a, to = x[r * wide : r * wide + d], out[r * d : (r + 1) * d]
        for c in range(d):
            to[c] = store(a[c], to)


@_jit
def _softmax_rows(s, p, o_sums, first, length, padded, until, scale, lse):  # type: ignore[no-untyped-def]
    """Rows of scores s (ROWS, padded) -> p in bf16, unnormalised; zeros where a row does not see, up to `until`."""
    for r in range(ROWS):
        i = first + r
        q = p[r * padded : r * padded + until]
        seen = i + 1 if i < length else 0
        if seen:
            a = s[r * padded : r * padded + seen]
            m = _largest(a) * scale
            total = np.float32(0.0)
            for j in range(seen):
                e = exp_f32(a[j] * scale - m)
                total += e
                q[j] = store(e, q)
            o_sums[r] = total
            lse[i] = m + np.float32(math.log(total))
        for j in range(seen, until):
            q[j] = np.uint16(0)


@_jit
def _forward_head(head, keys, work, length, row, scale):  # type: ignore[no-untyped-def]
    """One query head of one example: q (L, D / 2) of 32 bits -> out (L, D) of 16 bits, `row` apart, and lse (L)."""
    q, out, lse = head
    kt, vp, padded, d, wide = keys
    s, p, o, qp, sums = work
    pairs = d // 2
    s_at, p_at, o_at = s.ctypes.data, p.ctypes.data, o.ctypes.data
    kt_at, vp_at, qp_at = kt.ctypes.data, vp.ctypes.data, qp.ctypes.data
    for i in range(0, length, ROWS):
        rows = min(ROWS, length - i)
        columns = i + rows
        _copy_rows(q[i * pairs :], pairs, rows, pairs, qp, ROWS)
        for j in range(0, columns, COLUMNS):
            tile(s_at + 4 * j, padded, qp_at, pairs, 1, kt_at + 4 * j, padded, pairs, 0)
        until = _up(columns, 2)
        _softmax_rows(s, p, sums, i, length, padded, until, scale, lse)
        for c in range(0, wide, COLUMNS):
            tile(o_at + 4 * c, wide, p_at, padded // 2, 1, vp_at + 4 * c, wide, until // 2, 0)
        for r in range(rows):
            a, to = o[r * wide : r * wide + d], out[(i + r) * row : (i + r) * row + d]
            share = np.float32(1.0) / sums[r]
            for c in range(d):
                to[c] = store(a[c] * share, to)


@cfunc(types.void(types.voidptr), cache=True, error_model="numpy")
def _forward(address):  # type: ignore[no-untyped-def]
    slot, number = carray(address, (32,), np.int64), carray(address, (32,), np.float64)
    tokens, heads, key_heads, d, parts, examples = slot[8], slot[9], slot[10], slot[11], slot[12], slot[13]
    longest, scratch_bytes, scale = slot[14], slot[15], np.float32(number[16])
    counter = carray(pointer(slot[0]), (8,), np.int64)
    q32 = carray(pointer(slot[1]), (tokens * heads * d // 2,), np.uint32)
    k32 = carray(pointer(slot[2]), (tokens * key_heads * d // 2,), np.uint32)
    v16 = carray(pointer(slot[3]), (tokens * key_heads * d,), np.uint16)
    out = carray(pointer(slot[4]), (tokens * heads * d,), np.uint16)
    lse = carray(pointer(slot[5]), (tokens * heads,), np.float32)
    starts = carray(pointer(slot[6]), (examples + 1,), np.int64)
    wide = _up(d, COLUMNS)
    most = _up(longest, _PAD)
    at = slot[7] + take(counter[1:]) * scratch_bytes
    kt, at = _words(at, d // 2 * most)
    vp, at = _words(at, most // 2 * wide)
    s, at = _floats(at, ROWS * most)
    p, at = _halves(at, ROWS * most)
    o, at = _floats(at, ROWS * wide)
    qp, at = _words(at, ROWS * d // 2)
    work = (s, p, o, qp, np.empty(ROWS, np.float32))
    groups = heads // key_heads
    each = groups // parts
    while True:
        task = take(counter)
        if task >= examples * key_heads * parts:
            break
        example, rest = task // (key_heads * parts), task % (key_heads * parts)
        key_head, part = rest // parts, rest % parts
        start, length = starts[example], starts[example + 1] - starts[example]
        padded = _up(length, _PAD)
        block = (start * key_heads + key_head * length) * d
        _columns_in_pairs(k32[block // 2 :], d // 2, length, d // 2, kt, padded)
        _rows_in_pairs(v16[block:], d, length, d, vp, wide, padded)
        for g in range(part * each, (part + 1) * each):
            head = key_head * groups + g
            block = start * heads + head * length
            own = (q32[block * d // 2 :], out[(start * heads + head) * d :], lse[block:])
            _forward_head(own, (kt, vp, padded, d, wide), work, length, heads * d, scale)


@_jit
def _probabilities(s, dp, i0, j0, rows, width, until, scale, lse, delta, ds, dsp, pp):  # type: ignore[no-untyped-def]
    """Two rows at a time: p and ds of a block, ds by rows, both by pairs of rows; zeros up to `until`."""
    for pair in range(_TALL // 2):
        a = 2 * pair
        both = pair * _WIDE
        tp, td = pp[both : both + until], dsp[both : both + until]
        da, db = ds[a * _WIDE : a * _WIDE + until], ds[(a + 1) * _WIDE : (a + 1) * _WIDE + until]
        seen_a = max(0, min(width, i0 + a + 1 - j0)) if a < rows else 0
        seen_b = max(0, min(width, i0 + a + 2 - j0)) if a + 1 < rows else 0
        sa, ga = s[a * _WIDE : a * _WIDE + until], dp[a * _WIDE : a * _WIDE + until]
        sb, gb = s[(a + 1) * _WIDE : (a + 1) * _WIDE + until], dp[(a + 1) * _WIDE : (a + 1) * _WIDE + until]
        both_see = min(seen_a, seen_b)
        la, ea = lse[a], delta[a]
        lb, eb = lse[a + 1], delta[a + 1]
        for j in range(both_see):
            pa, pb = exp_f32(sa[j] * scale - la), exp_f32(sb[j] * scale - lb)
            ua, ub = store(pa * (ga[j] - ea) * scale, da), store(pb * (gb[j] - eb) * scale, db)
            da[j], db[j] = ua, ub
            td[j] = np.uint32(ua) | (np.uint32(ub) << _HIGH)
            tp[j] = np.uint32(store(pa, da)) | (np.uint32(store(pb, db)) << _HIGH)
        for j in range(both_see, until):
            ua, ub, wa, wb = np.uint16(0), np.uint16(0), np.uint16(0), np.uint16(0)
            if j < seen_a:
                pa = exp_f32(sa[j] * scale - la)
                wa, ua = store(pa, da), store(pa * (ga[j] - ea) * scale, da)
            if j < seen_b:
                pb = exp_f32(sb[j] * scale - lb)
                wb, ub = store(pb, db), store(pb * (gb[j] - eb) * scale, db)
            da[j], db[j] = ua, ub
            td[j] = np.uint32(ua) | (np.uint32(ub) << _HIGH)
            tp[j] = np.uint32(wa) | (np.uint32(wb) << _HIGH)


@_jit
def _backward_head(head, keys, work, length, row, scale):  # type: ignore[no-untyped-def]
    """One query head of one example: fills dq (L, D) of 16 bits, adds to dk and dv (padded, wide) in fp32."""
    q, do, o, lse, dq = head
    kt, kp, vt, dk, dv, padded, d, wide = keys
    s, dp, ds, dsp, pp, qn, qp, don, dop, dqa, delta, sums = work
    pairs = d // 2
    s_at, dp_at, ds_at, dsp_at, pp_at = s.ctypes.data, dp.ctypes.data, ds.ctypes.data, dsp.ctypes.data, pp.ctypes.data
    qn_at, qp_at, don_at, dop_at = qn.ctypes.data, qp.ctypes.data, don.ctypes.data, dop.ctypes.data
    kt_at, kp_at, vt_at, dk_at, dv_at = kt.ctypes.data, kp.ctypes.data, vt.ctypes.data, dk.ctypes.data, dv.ctypes.data
    dqa_at = dqa.ctypes.data
    q32, do32 = q.view(np.uint32), do.view(np.uint32)
    for i0 in range(0, length, _TALL):
        rows = min(_TALL, length - i0)
        tall = _up(rows, ROWS)
        _copy_rows(q32[i0 * pairs :], pairs, rows, pairs, qn, tall)
        _rows_in_pairs(q[i0 * d :], d, rows, d, qp, wide, _TALL)
        _copy_rows(do32[i0 * row // 2 :], row // 2, rows, pairs, don, tall)
        _rows_in_pairs(do[i0 * row :], row, rows, d, dop, wide, _TALL)
        for r in range(_TALL):
            total = np.float32(0.0)
            if r < rows:
                a, b = do[(i0 + r) * row : (i0 + r) * row + d], o[(i0 + r) * row : (i0 + r) * row + d]
                for c in range(d):
                    total += load(a[c]) * load(b[c])
            delta[r] = total
            sums[r] = lse[i0 + r] if r < rows else np.float32(0.0)
        end = i0 + rows  # columns that the last row sees
        for j0 in range(0, end, _WIDE):
            width = min(_WIDE, end - j0)
            for r in range(0, tall, ROWS):
                for j in range(0, min(width, i0 + r + ROWS - j0), COLUMNS):
                    to = 4 * (r * _WIDE + j)
                    tile(s_at + to, _WIDE, qn_at + 4 * r * pairs, pairs, 1, kt_at + 4 * (j0 + j), padded, pairs, 0)
                    tile(dp_at + to, _WIDE, don_at + 4 * r * pairs, pairs, 1, vt_at + 4 * (j0 + j), padded, pairs, 0)
            until = _up(_up(width, ROWS), 2)
            _probabilities(s, dp, i0, j0, rows, width, until, scale, sums, delta, ds, dsp, pp)
            for r in range(0, tall, ROWS):
                steps = _up(max(0, min(width, i0 + r + ROWS - j0)), 2) // 2
                for c in range(0, wide, COLUMNS):
                    tile(
                        dqa_at + 4 * (r * wide + c), wide, ds_at + 2 * r * _WIDE, _WIDE // 2, 1,
                        kp_at + 4 * (j0 // 2 * wide + c), wide, steps, j0,
                    )  # fmt: skip
            for j in range(0, width, ROWS):
                skip = max(0, j0 + j - i0) // 2  # rows of queries before the first that sees column j
                for c in range(0, wide, COLUMNS):
                    to = 4 * ((j0 + j) * wide + c)
                    a, b = 4 * (skip * _WIDE + j), 4 * (skip * wide + c)
                    tile(dv_at + to, wide, pp_at + a, 1, _WIDE, dop_at + b, wide, _TALL // 2 - skip, 1)
                    tile(dk_at + to, wide, dsp_at + a, 1, _WIDE, qp_at + b, wide, _TALL // 2 - skip, 1)
        _store_rows(dqa, wide, rows, d, dq[i0 * d :])


@cfunc(types.void(types.voidptr), cache=True, error_model="numpy")
def _backward(address):  # type: ignore[no-untyped-def]
    slot, number = carray(address, (32,), np.int64), carray(address, (32,), np.float64)
    tokens, heads, key_heads, d, parts, examples = slot[12], slot[13], slot[14], slot[15], slot[16], slot[17]
    longest, scratch_bytes, scale = slot[18], slot[19], np.float32(number[20])
    counter = carray(pointer(slot[0]), (8,), np.int64)
    q = carray(pointer(slot[1]), (tokens * heads * d,), np.uint16)
    k = carray(pointer(slot[2]), (tokens * key_heads * d,), np.uint16)
    v = carray(pointer(slot[3]), (tokens * key_heads * d,), np.uint16)
    o = carray(pointer(slot[4]), (tokens * heads * d,), np.uint16)
    do = carray(pointer(slot[5]), (tokens * heads * d,), np.uint16)
    lse = carray(pointer(slot[6]), (tokens * heads,), np.float32)
    dq = carray(pointer(slot[7]), (tokens * heads * d,), np.uint16)
    dk = carray(pointer(slot[8]), (parts * tokens * key_heads * d,), np.uint16)
    dv = carray(pointer(slot[9]), (parts * tokens * key_heads * d,), np.uint16)
    starts = carray(pointer(slot[10]), (examples + 1,), np.int64)
    wide = _up(d, COLUMNS)
    most = _up(longest, _PAD)
    at = slot[11] + take(counter[1:]) * scratch_bytes
    kt, at = _words(at, d // 2 * most)
    vt, at = _words(at, d // 2 * most)
    kp, at = _words(at, most // 2 * wide)
    dka, at = _floats(at, most * wide)
    dva, at = _floats(at, most * wide)
    s, at = _floats(at, _TALL * _WIDE)
    dp, at = _floats(at, _TALL * _WIDE)
    ds, at = _halves(at, _TALL * _WIDE)
    dsp, at = _words(at, _TALL // 2 * _WIDE)
    pp, at = _words(at, _TALL // 2 * _WIDE)
    qn, at = _words(at, _TALL * d // 2)
    don, at = _words(at, _TALL * d // 2)
    qp, at = _words(at, _TALL // 2 * wide)
    dop, at = _words(at, _TALL // 2 * wide)
    dqa, at = _floats(at, _TALL * wide)
    delta, sums = np.empty(_TALL, np.float32), np.empty(_TALL, np.float32)
    work = (s, dp, ds, dsp, pp, qn, qp, don, dop, dqa, delta, sums)
    groups = heads // key_heads
    each = groups // parts
    while True:
        task = take(counter)
        if task >= examples * key_heads * parts:
            break
        example, rest = task // (key_heads * parts), task % (key_heads * parts)
        key_head, part = rest // parts, rest % parts
        start, length = starts[example], starts[example + 1] - starts[example]
        padded = _up(length, _PAD)
        block = (start * key_heads + key_head * length) * d
        _columns_in_pairs(k[block:].view(np.uint32), d // 2, length, d // 2, kt, padded)
        _columns_in_pairs(v[block:].view(np.uint32), d // 2, length, d // 2, vt, padded)
        _rows_in_pairs(k[block:], d, length, d, kp, wide, padded)
        for j in range(padded * wide):
            dka[j] = np.float32(0.0)
            dva[j] = np.float32(0.0)
        for g in range(part * each, (part + 1) * each):
            head = key_head * groups + g
            own, rows = start * heads + head * length, (start * heads + head) * d
            mine = (q[own * d :], do[rows:], o[rows:], lse[own:], dq[own * d :])
            _backward_head(mine, (kt, kp, vt, dka, dva, padded, d, wide), work, length, heads * d, scale)
        block += part * tokens * key_heads * d
        _store_rows(dka, wide, length, d, dk[block:])
        _store_rows(dva, wide, length, d, dv[block:])


def _scratch(d: int, longest: int, *, backward: bool) -> int:
    """Bytes a thread needs, a multiple of 4 kB."""
    wide, most = -(-d // COLUMNS) * COLUMNS, -(-longest // _PAD) * _PAD
    if backward:
        own = most * (4 * d + 10 * wide) + _TALL * (14 * _WIDE + 4 * d + 8 * wide)
    else:
        own = most * (2 * d + 2 * wide + 6 * ROWS) + ROWS * (4 * wide + 2 * d)
    return -(-own // 4096) * 4096 + 4096


def _parts(groups: int, examples: int, key_heads: int, threads: int) -> int:
    """Into how many tasks the query heads of a key head are split, so that every thread has a few."""
    for parts in range(1, groups + 1):
        if groups % parts == 0 and examples * key_heads * parts >= 4 * threads:
            return parts
    return groups


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], starts: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention of each example.

    Args:
        q: (T, H, D), k, v: (T, K, D) bf16 in blocks: example after example, each (heads, L, D).
        starts: (len(lengths) + 1,) int64: tokens before each example, and T.

    Returns:
        The output (T, H, D) by tokens, and the log-sum-exp in blocks of (H, L), fp32.
    """
    tokens, heads, d = q.shape
    key_heads, threads, longest = k.shape[1], torch.get_num_threads(), max(lengths)
    each = _scratch(d, longest, backward=False)
    scratch = torch.empty(each * threads, dtype=torch.uint8)
    out, lse = torch.empty_like(q), torch.empty(tokens * heads, dtype=torch.float32)
    parts = _parts(heads // key_heads, len(lengths), key_heads, threads)
    values = [q, k, v, out, lse, starts, scratch, tokens, heads, key_heads, d, parts, len(lengths), longest, each]
    run(_forward, [*values, float(scale)])
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, lengths: tuple[int, ...], starts: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, in blocks as they are, from `dout` (T, H, D) by tokens and what `forward` gave."""
    tokens, heads, d = q.shape
    key_heads, threads, longest = k.shape[1], torch.get_num_threads(), max(lengths)
    each = _scratch(d, longest, backward=True)
    scratch = torch.empty(each * threads, dtype=torch.uint8)
    parts = _parts(heads // key_heads, len(lengths), key_heads, threads)
    dq = torch.empty_like(q)
    dk, dv = (torch.empty((parts, *x.shape), dtype=x.dtype) for x in (k, v))
    values = [q, k, v, out, dout, lse, dq, dk, dv, starts, scratch, tokens, heads, key_heads, d, parts, len(lengths)]
    run(_backward, [*values, longest, each, float(scale)])
    if parts == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0, dtype=torch.float32).to(k.dtype), dv.sum(0, dtype=torch.float32).to(v.dtype)
