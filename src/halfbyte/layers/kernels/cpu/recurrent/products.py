"""Products of a chunk of tokens, whose operands lie in a thread's own memory, in fp32; decays between its tokens.

Numbers beyond a chunk's rows or a matrix' columns are whatever they are: a tile reads and writes them, and nothing that
counts is made of them. Only a triangle is filled with zeros to the end of its tiles.

Letters: C tokens of a chunk, R of them that are there, D a width.
"""

import numpy as np

from halfbyte.layers.kernels.cpu.recurrent.chunks import CHUNK
from halfbyte.layers.kernels.cpu.scalar import exp_f32, inlined, up
from halfbyte.layers.kernels.cpu.tiles import COLUMNS32 as COLUMNS
from halfbyte.layers.kernels.cpu.tiles import ROWS32 as ROWS
from halfbyte.layers.kernels.cpu.tiles import tile32

_ZERO = np.float32(0.0)


@inlined
def multiply(c, c_row, a, a_row, a_step, b, b_row, m, n, k, add):  # type: ignore[no-untyped-def]
    """C (m, n) = A (m, k) B (k, n), or += where `add`. A number of A is a_row from the next row's, a_step from its
    row's next."""
    for i in range(0, m, ROWS):
        for j in range(0, n, COLUMNS):
            tile32(c[i * c_row + j :], c_row, a[i * a_row :], a_row, a_step, b[j:], b_row, k, add)


@inlined
def scores(s, a, row, bt, rows, d):  # type: ignore[no-untyped-def]
    """s (C, C): a b^T on and below the diagonal, of a (R, d) and bt (d, C)."""
    for i in range(0, rows, ROWS):
        for j in range(0, min(rows, i + ROWS), COLUMNS):
            tile32(s[i * CHUNK + j :], CHUNK, a[i * row :], row, 1, bt[j:], CHUNK, d, 0)


@inlined
def lower(c, row, s, b, rows, n, add):  # type: ignore[no-untyped-def]
    """c (R, n) = s b, or +=, for a lower triangle s."""
    for i in range(0, rows, ROWS):
        for j in range(0, n, COLUMNS):
            tile32(c[i * row + j :], row, s[i * CHUNK :], CHUNK, 1, b[j:], row, min(rows, i + ROWS), add)


@inlined
def upper(c, row, s, b, rows, n, add):  # type: ignore[no-untyped-def]
    """c (R, n) = s^T b, or +=, for a lower triangle s."""
    for i in range(0, rows, ROWS):
        for j in range(0, n, COLUMNS):
            tile32(c[i * row + j :], row, s[i * CHUNK + i :], 1, CHUNK, b[i * row + j :], row, rows - i, add)


@inlined
def decayed(s, gamma, rows, first, sign, out):  # type: ignore[no-untyped-def]
    """A triangle of scores, each times sign e^(gamma_i - gamma_j): of the tokens j up to i - first; zeros beyond."""
    for i in range(rows):
        until = i * CHUNK + up(i + 1, ROWS)
        row, to = s[i * CHUNK : until], out[i * CHUNK : until]
        for j in range(i + 1 - first):
            to[j] = row[j] * sign * exp_f32(gamma[i] - gamma[j])
        for j in range(i + 1 - first, len(to)):
            to[j] = _ZERO


@inlined
def turned(x, row, rows, d, out, out_row):  # type: ignore[no-untyped-def]
    """x (rows, d) -> its transpose, whose rows are `out_row` apart; a square that stays in registers at a time."""
    for i in range(0, rows, 8):
        for c in range(d):
            to = out[c * out_row + i : c * out_row + i + 8]
            for r in range(min(8, rows - i)):
                to[r] = x[(i + r) * row + c]
