"""Rows of a chunk of tokens: into a thread's own memory, in fp32, and out of it; their scales, and sums of decays."""

import numpy as np

from halfbyte.layers.kernels.cpu.recurrent.products import multiply
from halfbyte.layers.kernels.cpu.scalar import exp_f32, inlined, load, store


@inlined
def read_rows(x, row, rows, d, out, wide):  # type: ignore[no-untyped-def]
    """x (rows, d) of bf16 or fp32, `row` apart -> out in fp32, `wide` apart."""
    for i in range(rows):
        a, to = x[i * row : i * row + d], out[i * wide : i * wide + d]
        for c in range(d):
            to[c] = load(a[c])


@inlined
def write_rows(x, wide, rows, d, out, row):  # type: ignore[no-untyped-def]
    """x (rows, d) in fp32, `wide` apart -> out of bf16 or fp32, `row` apart."""
    for i in range(rows):
        a, to = x[i * wide : i * wide + d], out[i * row : i * row + d]
        for c in range(d):
            to[c] = store(a[c], to)


@inlined
def scaled(x, wide, rows, d, by, out):  # type: ignore[no-untyped-def]
    """out_i = by_i x_i, rows of d numbers."""
    for i in range(rows):
        a, to = x[i * wide : i * wide + d], out[i * wide : i * wide + d]
        for c in range(d):
            to[c] = by[i] * a[c]


@inlined
def dot(a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for c in range(len(a)):
        total += a[c] * b[c]
    return total


@inlined
def summed(a, heads, head, at, rows, gamma, grown, left):  # type: ignore[no-untyped-def]
    """Decays a (T, heads) of a chunk's tokens -> their running sum gamma; e^gamma_i; e^(the last - gamma_i)."""
    total = np.float32(0.0)
    for i in range(rows):
        total += a[(at + i) * heads + head]
        gamma[i] = total
    for i in range(rows):
        grown[i], left[i] = exp_f32(gamma[i]), exp_f32(total - gamma[i])


@inlined
def next_state(keys, wk, n, values, wide, o, scratch, rows, grown, left, before, more, state):  # type: ignore[no-untyped-def]
    """The state (n, o) behind a chunk: e^G_last before, where there is one (`more`), + sum_i k_i (e^(G_last - G_i)
    v_i)^T. `grown`, `left`: e^G_i and e^(G_last - G_i)."""
    scaled(values, wide, rows, o, left, scratch)
    if more:
        f = grown[rows - 1]
        for j in range(n * wide):
            state[j] = f * before[j]
    multiply(state, wide, keys, 1, wk, scratch, wide, n, wide, rows, more)
