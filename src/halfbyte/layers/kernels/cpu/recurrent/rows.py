"""Rows of a chunk of tokens, of fp32 or bf16: to and from a thread's own memory; their scales, and sums of decays."""

import numpy as np

from halfbyte.layers.kernels.cpu.recurrent.products import multiply_turned, padded, right
from halfbyte.layers.kernels.cpu.scalar import exp_f32, fill_registers, inlined, load, store


@inlined
def copy_rows(x, row, rows, d, out, wide):  # type: ignore[no-untyped-def]
    """x (rows, d), `row` apart -> out, `wide` apart."""
    fill_registers()
    for i in range(rows):
        a, to = x[i * row : i * row + d], out[i * wide : i * wide + d]
        for c in range(d):
            to[c] = store(load(a[c]), to)


@inlined
def scaled(x, wide, rows, d, by, out):  # type: ignore[no-untyped-def]
    """out_i = by_i x_i, rows of d numbers."""
    fill_registers()
    for i in range(rows):
        a, to = x[i * wide : i * wide + d], out[i * wide : i * wide + d]
        for c in range(d):
            to[c] = store(by[i] * load(a[c]), to)


@inlined
def dot(a, b):  # type: ignore[no-untyped-def]
    fill_registers()
    total = np.float32(0.0)
    for c in range(len(a)):
        total += load(a[c]) * load(b[c])
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
    v_i)^T. keys: as `left_turned` makes them; scratch: two operands; `grown`, `left`: e^G_i and e^(G_last - G_i)."""
    scaled(values, wide, rows, o, left, scratch[0])
    padded(scratch[0], wide, rows, o)
    if more:
        f = grown[rows - 1]
        for j in range(n * wide):
            state[j] = f * before[j]
    multiply_turned(state, wide, keys, wk, right(scratch[0], wide, rows, scratch[1]), wide, n, wide, rows, more)
