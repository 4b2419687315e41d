"""Attention of one token of each text over its cache: rotary embedding, keys and values kept, scores, their sums.

What: a head's keys lie as (d, T), so that scores of neighbouring tokens are neighbours, its values as (T, d). Four rows
are multiplied at a time: what they are added onto is read and written once for the four.
Source: the formulas of attention; rotary embedding as in transformers' Llama.

Letters: M texts, H query heads, K key heads, T room of the cache, R rotary width.
"""

import math

import numpy as np

from halfbyte.layers.kernels.cpu.parallel import array
from halfbyte.layers.kernels.cpu.scalar import exp_f32, inlined, load, store


@inlined
def _place(op, m):  # type: ignore[no-untyped-def]
    """Whose cache vector m reads and writes."""
    return array(op[25], (m + 1,), np.int64)[m] if op[25] != 0 else m


@inlined
def rotate(op, number, like, item):  # type: ignore[no-untyped-def]
    """4 q, k, v (M, (H + 2 K) d), 5 H, 6 K, 7 d, 8 R, 9 cos (M, R), 10 sin, 11 weight of q's norm, 12 of k's, 13 eps,
    14 one_plus, 15 keys (M, K, d, T), 16 values (M, K, T, d), 17 T, 18 positions (M), 25 whose cache (M) or 0."""
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
        at, place = _place(op, m) * key_heads + head - heads, array(op[18], (m + 1,), np.int64)[m]
        keys = array(op[15] + at * d * room * like.itemsize, (d * room,), like.dtype)
        values = array(op[16] + (at * room + place) * d * like.itemsize, (d,), like.dtype)
        v = array(op[4] + (m * (heads + 2 * key_heads) + head + key_heads) * d * 4, (d,), np.float32)
        for j in range(d):
            keys[j * room + place] = store(x[j], keys)
            values[j] = store(v[j], values)


@inlined
def _scores(q, like, keys, room, n, scale, cap, s):  # type: ignore[no-untyped-def]
    """q (d), keys from address `keys` (d, T) -> s[:n], scaled, maybe capped; returns the largest."""
    size, fours = like.itemsize, len(q) // 4 * 4
    for t in range(n):
        s[t] = np.float32(0.0)
    for c in range(0, fours, 4):
        at, step, shape = keys + c * room * size, room * size, (n,)
        k0, k1 = array(at, shape, like.dtype), array(at + step, shape, like.dtype)
        k2, k3 = array(at + 2 * step, shape, like.dtype), array(at + 3 * step, shape, like.dtype)
        q0, q1, q2, q3 = q[c], q[c + 1], q[c + 2], q[c + 3]
        for t in range(n):
            s[t] += q0 * load(k0[t]) + q1 * load(k1[t]) + (q2 * load(k2[t]) + q3 * load(k3[t]))
    for c in range(fours, len(q)):
        row, one = array(keys + c * room * size, (n,), like.dtype), q[c]
        for t in range(n):
            s[t] += one * load(row[t])
    most = np.float32(-3.0e38)
    if cap != np.float32(0.0):
        for t in range(n):
            s[t] = cap * np.float32(math.tanh(s[t] * scale / cap))
        scale = np.float32(1.0)
    for t in range(n):
        score = s[t] * scale
        s[t] = score
        most = score if score > most else most
    return most


@inlined
def _weighed(s, share, like, values, d, n, out):  # type: ignore[no-untyped-def]
    """s[:n] times share, values from address `values` (T, d) -> out (d)."""
    row = d * like.itemsize
    for c in range(d):
        out[c] = np.float32(0.0)
    for t in range(0, n // 4 * 4, 4):
        at, shape = values + t * row, (d,)
        v0, v1 = array(at, shape, like.dtype), array(at + row, shape, like.dtype)
        v2, v3 = array(at + 2 * row, shape, like.dtype), array(at + 3 * row, shape, like.dtype)
        p0, p1, p2, p3 = s[t] * share, s[t + 1] * share, s[t + 2] * share, s[t + 3] * share
        for c in range(d):
            out[c] += p0 * load(v0[c]) + p1 * load(v1[c]) + (p2 * load(v2[c]) + p3 * load(v3[c]))
    for t in range(n // 4 * 4, n):
        v, one = array(values + t * row, (d,), like.dtype), s[t] * share
        for c in range(d):
            out[c] += one * load(v[c])


@inlined
def attend(op, number, like, s, item):  # type: ignore[no-untyped-def]
    """4..7, 15..18, 25 as in `rotate`; 19 scale, 20 cap, 21 window, 22 plain out (M, D'), 24 D'."""
    heads, key_heads, d, room, wide, size = op[5], op[6], op[7], op[17], op[24], like.itemsize
    m, head = item // heads, item % heads
    q = array(op[4] + (m * (heads + 2 * key_heads) + head) * d * 4, (d,), np.float32)
    at = _place(op, m) * key_heads + head * key_heads // heads
    last = array(op[18], (m + 1,), np.int64)[m] + 1
    first = max(0, last - op[21]) if op[21] > 0 else 0
    keys, values = op[15] + (at * d * room + first) * size, op[16] + (at * room + first) * d * size
    n = last - first
    most = _scores(q, like, keys, room, n, np.float32(number[19]), np.float32(number[20]), s)
    total = np.float32(0.0)
    for t in range(n):
        e = exp_f32(s[t] - most)
        s[t] = e
        total += e
    out = array(op[22] + (m * wide + head * d) * 4, (d,), np.float32)
    _weighed(s, np.float32(1.0) / total, like, values, d, n, out)
