"""A token's whole way through a model as one call: a list of operations that all threads walk through together.

Why: a small model has 210 matrix products a token; started one by one from Python, or one by one on a pool of threads,
the starts cost more than the products. Here each operation is split into items; a thread takes the next item from a
counter, and an operation begins when those that it names are done. No thread waits for a thread, only for work, so any
number of threads is right, one included.
What: an operation is a row of 32 int64 slots: kind, items, the range of operations that must be done before, then
addresses, sizes and floats (as float64 bits); `layers/decoding/tape.py` writes them. Activations between
operations are fp32; what a product reads is there twice, in order in fp32, and in the kernels' order and type.
Source: the products are in `nibbles.py`; the rest are the formulas of `norm.py`, `gate.py` and of attention.
Cost: about 0.2 microseconds between two operations on two threads.

Letters: M vectors (texts at once), D in, O out, H query heads, K key heads, T room of the cache, R rotary width.
"""

import math
from collections.abc import Callable

import numpy as np
from numba import carray

from halfbyte.layers.kernels.cpu import nibbles
from halfbyte.layers.kernels.cpu.gate import SILU, sigmoid
from halfbyte.layers.kernels.cpu.parallel import array, kernel, per_dtype
from halfbyte.layers.kernels.cpu.scalar import exp_f32, inlined, load, pause, read, store, take

WIDTH = 32  # slots of an operation
LINE = 8  # int64 of a cache line: each counter has its own
KINDS = NORM, CODES, DENSE, ROTATE, ATTEND, GATE, EIGHTS, EXACT = range(8)
GATE_ELEMENTS = 1024
_NEAR_BYTES = 24 * 1024  # of vectors that a pass over rows reads again and again
_SPINS = 2000  # looks at a counter before the core is offered to others


@inlined
def _in_order(x, out, first, last, order):  # type: ignore[no-untyped-def]
    """x[first:last] in fp32 -> the same chunks in the kernels' order and type; `first` and `last` are whole chunks."""
    for c in range(first, last, nibbles.CHUNK):
        a, to = x[c : c + nibbles.CHUNK], out[c : c + nibbles.CHUNK]
        if out.itemsize == 2:  # avx512
            for j in range(32):
                to[j] = store(a[4 * j + 1], to)
                to[32 + j] = store(a[4 * j], to)
                to[64 + j] = store(a[4 * j + 3], to)
                to[96 + j] = store(a[4 * j + 2], to)
        else:
            for j in range(nibbles.CHUNK):
                to[j] = store(a[order[j]], to)


@inlined
def _chunks(n):  # type: ignore[no-untyped-def]
    return (n + nibbles.CHUNK - 1) // nibbles.CHUNK * nibbles.CHUNK


@inlined
def _norm(op, number, like, order, m):  # type: ignore[no-untyped-def]
    """4 x (M, D), 5 its row, 6 weight, 7 D, 8 eps, 9 one_plus, 10 plain out (M, D'), 11 ordered out, 12 D', 13 onto,
    14 length of what comes out (M) or 0; a weight of 0: no norm, only the order."""
    d, wide = op[7], op[12]
    x = array(op[4] + m * op[5] * 4, (d,), np.float32)
    share, one = np.float32(1.0), np.float32(0.0)
    weight = array(op[6], (d,), like.dtype)
    if op[6] != 0:
        total = np.float32(0.0)
        for j in range(d):
            total += x[j] * x[j]
        share = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(d) + np.float32(number[8])))
        one = np.float32(op[9])
    if op[13] != 0:
        onto = array(op[13] + m * d * 4, (d,), np.float32)
        for j in range(d):
            onto[j] += x[j] * share * (load(weight[j]) + one)
        return
    out = array(op[10] + m * wide * 4, (wide,), np.float32)
    if op[6] != 0:
        for j in range(d):
            out[j] = x[j] * share * (load(weight[j]) + one)
    else:
        for j in range(d):
            out[j] = x[j]
    if op[14] != 0:
        total = np.float32(0.0)
        for j in range(d):
            total += out[j] * out[j]
        array(op[14], (m + 1,), np.float32)[m] = np.float32(math.sqrt(total))
    _in_order(out, array(op[11] + m * wide * like.itemsize, (wide,), like.dtype), 0, wide, order)


def _rows(dots: Callable[..., None], looked_up: Callable[..., None], count: int) -> Callable[..., None]:
    """Rows of codes times `count` vectors, by these products."""

    @inlined
    def rows(op, like, lookups, sums, m, begin, end):  # type: ignore[no-untyped-def]
        blocks, row_bytes, row, h_row = op[9] // nibbles.BLOCK, op[9] // 2, op[12], op[20]
        bias, t, to = array(op[16], (op[10],), np.float32), lookups.ctypes.data, sums.ctypes.data
        x, h, nested, start = op[11] + m * row, op[19] + m * h_row, op[6] != 0, begin * blocks // nibbles.GROUP
        for r in range(begin, end):
            first, w, up = r * blocks - start * nibbles.GROUP, op[4] + r * row_bytes, op[17] + r * op[18]
            at = op[5] + r * blocks * (1 if nested else 4)
            if nested:
                looked_up(like, w, x, row, at, t, first, blocks, op[22], up, h, h_row, op[21], to)
            else:
                dots(like, w, x, row, at, t, first, blocks, op[22], up, h, h_row, op[21], to)
            add = bias[r] if op[16] != 0 else np.float32(0.0)
            for k in range(count):
                out = array(op[13] + ((m + k) * op[14] + r) * 4, (1,), np.float32)
                out[0] = sums[k] + add + out[0] if op[15] != 0 else sums[k] + add

    made: Callable[..., None] = rows
    return made


_rows_of_1 = _rows(nibbles.dots_of_1, nibbles.looked_up_1, 1)
_rows_of_2 = _rows(nibbles.dots_of_2, nibbles.looked_up_2, 2)
_rows_of_4 = _rows(nibbles.dots_of_4, nibbles.looked_up_4, 4)
_rows_of_8 = _rows(nibbles.dots_of_8, nibbles.looked_up_8, 8)


@inlined
def _codes(op, number, like, lookups, sums, item):  # type: ignore[no-untyped-def]
    """4 codes, 5 absmax, 6 table of 256 or 0, 7 nested absmax, 8 offset, 9 D, 10 O, 11 x in order (M, D'), 12 bytes of
    its row, 13 out (M, ..), 14 its row, 15 onto, 16 bias (O) fp32, 17 B, 18 its row, 19 A x (M, ..), 20 its row,
    21 pieces, 22 levels, 23 rows of an item, 24 M."""
    blocks, vectors = op[9] // nibbles.BLOCK, op[24]
    begin, end = item * op[23], min(op[10], item * op[23] + op[23])
    if op[6] != 0:
        group = begin * blocks // nibbles.GROUP
        groups = (end * blocks - 1) // nibbles.GROUP - group + 1
        nibbles.lookups(like, op[6], op[7], np.float32(number[8]), group, groups, lookups.ctypes.data)
    m = 0
    while m < vectors:  # outside the rows: the vectors of a pass stay in the first cache
        left = vectors - m
        if left >= 8 and 8 * op[12] <= _NEAR_BYTES:
            _rows_of_8(op, like, lookups, sums, m, begin, end)
            m += 8
        elif left >= 4:
            _rows_of_4(op, like, lookups, sums, m, begin, end)
            m += 4
        elif left >= 2:
            _rows_of_2(op, like, lookups, sums, m, begin, end)
            m += 2
        else:
            _rows_of_1(op, like, lookups, sums, m, begin, end)
            m += 1


@inlined
def _dense(op, number, like, sums, item):  # type: ignore[no-untyped-def]
    """4 w (O, D), 9 D, 10 O, 11 x (M, ..) fp32, 12 bytes of its row, 13 out (M, ..), 14 its row, 15 onto, 16 bias, 17
    out as `like` times 18, 19 (M) of fp32 or 0: where it is 0.0 the vector is left out, 23 rows of an item, 24 M."""
    d, vectors, row = op[9], op[24], op[12]
    bias, taken = array(op[16], (op[10],), np.float32), array(op[19], (op[24],), np.float32)
    lanes = nibbles.LANES_BF16 if like.itemsize == 2 else nibbles.LANES_FP32
    for r in range(item * op[23], min(op[10], item * op[23] + op[23])):
        w = array(op[4] + r * d * like.itemsize, (d,), like.dtype)
        add = bias[r] if op[16] != 0 else np.float32(0.0)
        m = 0
        while m < vectors:
            at, x, to = op[4] + r * d * like.itemsize, op[11] + m * row, sums.ctypes.data + m * 4
            if op[19] != 0:
                sums[m] = np.float32(0.0)
                if taken[m] != np.float32(0.0):
                    nibbles.plain_of_1(like, at, x, row, d // lanes, to)
                m += 1
            elif vectors - m >= 8:
                nibbles.plain_of_8(like, at, x, row, d // lanes, to)
                m += 8
            elif vectors - m >= 4:
                nibbles.plain_of_4(like, at, x, row, d // lanes, to)
                m += 4
            elif vectors - m >= 2:
                nibbles.plain_of_2(like, at, x, row, d // lanes, to)
                m += 2
            else:
                nibbles.plain_of_1(like, at, x, row, d // lanes, to)
                m += 1
        for m in range(vectors):
            total = sums[m]
            if op[19] == 0 or taken[m] != np.float32(0.0):
                x = array(op[11] + m * row, (d,), np.float32)
                for j in range(d // lanes * lanes, d):
                    total += load(w[j]) * x[j]
            if op[17] != 0:
                half = array(op[13] + (m * op[14] + r) * like.itemsize, (1,), like.dtype)
                half[0] = store(total * np.float32(number[18]), half)
            else:
                out = array(op[13] + (m * op[14] + r) * 4, (1,), np.float32)
                out[0] = total + add + out[0] if op[15] != 0 else total + add


@inlined
def _eights(op, like, sums, item):  # type: ignore[no-untyped-def]
    """4 rows of 8 bits (O, D), 5 their scales (O) fp32, 6 bounds (O) fp32, 7 lengths of x (M), 8 best (items, M), 9 D,
    10 O, 11 x (M, ..) fp32, 12 bytes of its row, 13 out (M, ..), 14 its row, 23 rows of an item, 24 M."""
    d, vectors, row = op[9], op[24], op[12]
    scales, bounds = array(op[5], (op[10],), np.float32), array(op[6], (op[10],), np.float32)
    lengths, best = array(op[7], (vectors,), np.float32), array(op[8] + item * vectors * 4, (vectors,), np.float32)
    for m in range(vectors):
        best[m] = np.float32(-np.inf)
    for r in range(item * op[23], min(op[10], item * op[23] + op[23])):
        m = 0
        while m < vectors:
            w, x, to = op[4] + r * d, op[11] + m * row, sums.ctypes.data + m * 4
            if vectors - m >= 8:
                nibbles.eights_8(like, w, x, row, d // nibbles.WHOLE, to)
                m += 8
            elif vectors - m >= 4:
                nibbles.eights_4(like, w, x, row, d // nibbles.WHOLE, to)
                m += 4
            elif vectors - m >= 2:
                nibbles.eights_2(like, w, x, row, d // nibbles.WHOLE, to)
                m += 2
            else:
                nibbles.eights_1(like, w, x, row, d // nibbles.WHOLE, to)
                m += 1
        for m in range(vectors):
            about = sums[m] * scales[r]
            array(op[13] + (m * op[14] + r) * 4, (1,), np.float32)[0] = about
            best[m] = max(best[m], about - bounds[r] * lengths[m])


@inlined
def _exact(op, like, sums, item):  # type: ignore[no-untyped-def]
    """4 w (O, D), 6 .. 24 as in `_eights`, 5 items of that one: rows that may be the largest, as `_dense` has them."""
    d, vectors, row = op[9], op[24], op[12]
    lanes = nibbles.LANES_BF16 if like.itemsize == 2 else nibbles.LANES_FP32
    bounds, lengths = array(op[6], (op[10],), np.float32), array(op[7], (vectors,), np.float32)
    best = array(op[8], (op[5], vectors), np.float32)
    first, last = item * op[23], min(op[10], item * op[23] + op[23])
    for m in range(vectors):
        most, out = np.float32(-np.inf), array(op[13] + m * op[14] * 4, (op[10],), np.float32)
        for i in range(op[5]):
            most = max(most, best[i, m])
        for r in range(first, last):
            if not out[r] + bounds[r] * lengths[m] < most:  # NaN too
                nibbles.plain_of_1(
                    like, op[4] + r * d * like.itemsize, op[11] + m * row, row, d // lanes, sums.ctypes.data
                )
                out[r] = sums[0]


@inlined
def _rotate(op, number, like, item):  # type: ignore[no-untyped-def]
    """4 q, k, v (M, (H + 2 K) d), 5 H, 6 K, 7 d, 8 R, 9 cos (M, R), 10 sin, 11 weight of q's norm, 12 of k's, 13 eps,
    14 one_plus, 15 keys (M, K, d, T), 16 values (M, K, T, d), 17 T, 18 positions (M)."""
    heads, key_heads, d, wide, room = op[5], op[6], op[7], op[8], op[17]
    m, head = item // (heads + key_heads), item % (heads + key_heads)
    x = array(op[4] + (m * (heads + 2 * key_heads) + head) * d * 4, (d,), np.float32)
    weights = op[11] if head < heads else op[12]
    if weights != 0:
        weight, total = array(weights, (d,), like.dtype), np.float32(0.0)
        for j in range(d):
            total += x[j] * x[j]
        share = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(d) + np.float32(number[13])))
        for j in range(d):
            x[j] *= share * (load(weight[j]) + np.float32(op[14]))
    cos, sin = array(op[9] + m * wide * 4, (wide,), np.float32), array(op[10] + m * wide * 4, (wide,), np.float32)
    half = wide // 2
    for j in range(half):
        a, b = x[j], x[half + j]
        x[j], x[half + j] = a * cos[j] - b * sin[j], b * cos[half + j] + a * sin[half + j]
    if head >= heads:
        at, place = m * key_heads + head - heads, array(op[18], (m + 1,), np.int64)[m]
        keys = array(op[15] + at * d * room * like.itemsize, (d * room,), like.dtype)
        values = array(op[16] + (at * room + place) * d * like.itemsize, (d,), like.dtype)
        v = array(op[4] + (m * (heads + 2 * key_heads) + head + key_heads) * d * 4, (d,), np.float32)
        for j in range(d):
            keys[j * room + place] = store(x[j], keys)
            values[j] = store(v[j], values)


@inlined
def _scores(q, keys, room, first, last, scale, cap, s):  # type: ignore[no-untyped-def]
    """q (d), keys (d, T) -> s[: last - first], scaled, maybe capped; returns the largest."""
    n = last - first
    for t in range(n):
        s[t] = np.float32(0.0)
    for c in range(len(q)):
        row, one = keys[c * room + first : c * room + last], q[c]
        for t in range(n):
            s[t] += one * load(row[t])
    most = np.float32(-3.0e38)
    for t in range(n):
        score = s[t] * scale
        if cap != np.float32(0.0):
            score = cap * np.float32(math.tanh(score / cap))
        s[t] = score
        most = score if score > most else most
    return most


@inlined
def _attend(op, number, like, order, s, item):  # type: ignore[no-untyped-def]
    """4..7, 15..18 as in `_rotate`; 19 scale, 20 cap, 21 window, 22 plain out (M, D'), 23 ordered out, 24 D'."""
    heads, key_heads, d, room, wide = op[5], op[6], op[7], op[17], op[24]
    m, head = item // heads, item % heads
    q = array(op[4] + (m * (heads + 2 * key_heads) + head) * d * 4, (d,), np.float32)
    at = m * key_heads + head * key_heads // heads
    keys = array(op[15] + at * d * room * like.itemsize, (d * room,), like.dtype)
    values = array(op[16] + at * d * room * like.itemsize, (d * room,), like.dtype)
    last = array(op[18], (m + 1,), np.int64)[m] + 1
    first = max(0, last - op[21]) if op[21] > 0 else 0
    most = _scores(q, keys, room, first, last, np.float32(number[19]), np.float32(number[20]), s)
    total = np.float32(0.0)
    for t in range(last - first):
        e = exp_f32(s[t] - most)
        s[t] = e
        total += e
    out = array(op[22] + (m * wide + head * d) * 4, (d,), np.float32)
    for c in range(d):
        out[c] = np.float32(0.0)
    for t in range(last - first):
        row, one = values[(first + t) * d : (first + t + 1) * d], s[t] / total
        for c in range(d):
            out[c] += one * load(row[c])


@inlined
def _gate(op, like, order, item):  # type: ignore[no-untyped-def]
    """4 gate (M, ..), 5 up (M, ..), 6 their row, 7 I, 8 kind, 22 plain out (M, D'), 23 ordered out, 24 D'."""
    inner, wide = op[7], op[24]
    parts = (wide + GATE_ELEMENTS - 1) // GATE_ELEMENTS
    m, first = item // parts, item % parts * GATE_ELEMENTS
    last = min(inner, first + GATE_ELEMENTS)
    g = array(op[4] + (m * op[6] + first) * 4, (last - first,), np.float32)
    u = array(op[5] + (m * op[6] + first) * 4, (last - first,), np.float32)
    out = array(op[22] + m * wide * 4, (wide,), np.float32)
    to = out[first:last]
    if op[8] == SILU:
        for j in range(last - first):
            to[j] = g[j] * sigmoid(g[j]) * u[j]
    else:
        for j in range(last - first):
            v = g[j]
            z = np.float32(1.5957691216) * (v + np.float32(0.044715) * v * v * v)  # 2 sqrt(2 / pi)
            to[j] = v * sigmoid(z) * u[j]
    ordered = array(op[23] + m * wide * like.itemsize, (wide,), like.dtype)
    _in_order(out, ordered, first, min(wide, first + GATE_ELEMENTS), order)


@inlined
def _wait(counters, first, last, ops, yielding):  # type: ignore[no-untyped-def]
    for one in range(first, last):
        done, items, spins = counters[(2 * one + 1) * LINE :], ops[one * WIDTH + 1], 0
        while read(done) < items:
            spins += 1
            pause(yielding if spins % _SPINS == 0 else 0)


def _make(element: type) -> object:
    @kernel
    def token(address):  # type: ignore[no-untyped-def]
        """Slots: 0 operations, 1 their number, 2 the first, 3 the last, 4 counters, 5 most groups of 256 blocks in an
        item, 6 T, 7 order, 8 sched_yield."""
        slot = carray(address, (32,), np.int64)
        ops = array(slot[0], (slot[1] * WIDTH,), np.int64)
        numbers = array(slot[0], (slot[1] * WIDTH,), np.float64)
        counters = array(slot[4], (2 * slot[1] * LINE,), np.int64)
        order = array(slot[7], (nibbles.CHUNK,), np.int64)
        like = array(slot[0], (1,), element)
        lookups, s = np.empty(slot[5] * nibbles.GROUP, np.float32), np.empty(slot[6], np.float32)
        sums = np.empty(64, np.float32)
        for i in range(slot[2], slot[3]):
            op, number = ops[i * WIDTH : (i + 1) * WIDTH], numbers[i * WIDTH : (i + 1) * WIDTH]
            _wait(counters, op[2], op[3], ops, slot[8])
            taken, done = counters[2 * i * LINE :], counters[(2 * i + 1) * LINE :]
            while True:
                item = take(taken)
                if item >= op[1]:
                    break
                if op[0] == CODES:
                    _codes(op, number, like, lookups, sums, item)
                elif op[0] == DENSE:
                    _dense(op, number, like, sums, item)
                elif op[0] == NORM:
                    _norm(op, number, like, order, item)
                elif op[0] == ROTATE:
                    _rotate(op, number, like, item)
                elif op[0] == ATTEND:
                    _attend(op, number, like, order, s, item)
                elif op[0] == EIGHTS:
                    _eights(op, like, sums, item)
                elif op[0] == EXACT:
                    _exact(op, like, sums, item)
                else:
                    _gate(op, like, order, item)
                take(done)

    return token


compiled = per_dtype(_make)
