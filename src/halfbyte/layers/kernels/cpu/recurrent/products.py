"""Products of a chunk of tokens, whose operands lie in a thread's own memory; decays between its tokens.

What: an operand is a matrix in rows, of fp32, or of bf16 where the layer computes in it and the processor multiplies
pairs of them (AMX, else AVX512-BF16). Of these, rows hold pairs of neighbours; `right` and the turned forms lay pairs
out as a tile reads them, and return in fp32 what they were given, where a tile can read that as it is. Sums are fp32.
Numbers beyond a chunk's rows or a matrix' columns are whatever they are: a tile reads and writes them, and nothing that
counts is made of them. Sums of pairs run over whole steps, so bf16 operands end in zeros (`padded`), triangles always.

Letters: C tokens of a chunk, R of them that are there, D a width.
"""

from collections.abc import Callable

import numpy as np
from numba import types
from numba.extending import overload

from halfbyte.layers.kernels.cpu import tiles
from halfbyte.layers.kernels.cpu.recurrent.chunks import AMX
from halfbyte.layers.kernels.cpu.recurrent.sizes import CHUNK
from halfbyte.layers.kernels.cpu.registers import LANES, decay_row, pair_rows, round_row, turn_words
from halfbyte.layers.kernels.cpu.scalar import FASTMATH, Value, exp_f32, fill_registers, inlined, store, up
from halfbyte.layers.kernels.cpu.tiles import COLUMNS32 as COLUMNS
from halfbyte.layers.kernels.cpu.tiles import ROWS32, tile32

# Rows of a tile of pairs, and numbers that it sums at a time.
ROWS16, STEP16, tile16 = (tiles.AMX_ROWS, 2 * tiles.AMX_STEPS, tiles.amx_tile) if AMX else (tiles.ROWS, 2, tiles.tile)
_STEP = 2 * tiles.AMX_STEPS


def operands_of(element: type) -> type:
    """In which type a layer's products read their operands, where its activations are of type `element`."""
    return np.uint16 if element is np.uint16 and tiles.available() else np.float32


def _by_type(fp32: Callable[..., object], bf16: Callable[..., object]) -> Callable[..., Value]:
    """One of two functions: `bf16` where an argument is an array of 16 bits. The other one is not compiled."""

    def either(*args: object) -> None:
        raise NotImplementedError

    def choose(*args: types.Type) -> Callable[..., object]:
        return bf16 if any(getattr(a, "dtype", None) == types.uint16 for a in args) else fp32

    options = {"forceinline": True, "fastmath": FASTMATH, "error_model": "numpy"}
    overload(either, jit_options=options, strict=False)(choose)
    return either


def _as_it_is(x, *others):  # type: ignore[no-untyped-def]
    return x


def _padded16(x, wide, rows, d):  # type: ignore[no-untyped-def]
    """Zeros behind x (rows, d) of bf16 to the ends of what tiles read."""
    if d < wide:
        for i in range(rows):
            x[i * wide + d : (i + 1) * wide] = 0
    x[rows * wide : up(rows, _STEP) * wide] = 0


def _rounded16(x, wide, rows, d, out):  # type: ignore[no-untyped-def]
    """x (rows, d) in fp32, `wide` apart, as an operand in rows."""
    for i in range(rows):
        round_row(x[i * wide :], out[i * wide :], wide)
    padded(out, wide, rows, d)
    return out


def _right16(x, wide, rows, out):  # type: ignore[no-untyped-def]
    """x (rows, d) as the right operand of a product that sums over its rows."""
    for i in range(0, up(rows, _STEP), 2):
        pair_rows(x[i * wide :], wide, out[i * wide :], wide)
    return out


def _right_turned32(x, wide, rows, d, out, out_row):  # type: ignore[no-untyped-def]
    """x^T, for x (rows, d); a square that stays in registers at a time."""
    for i in range(0, rows, 8):
        for c in range(d):
            to = out[c * out_row + i : c * out_row + i + 8]
            for r in range(min(8, rows - i)):
                to[r] = x[(i + r) * wide + c]
    return out


def _right_turned16(x, wide, rows, d, out, out_row):  # type: ignore[no-untyped-def]
    """x^T as the right operand of a product that sums over its columns; its rows are `out_row` apart."""
    words, row = x.view(np.uint32), wide // 2
    to = out.view(np.uint32)
    for i in range(0, up(rows, LANES), LANES):
        for c in range(0, row, LANES):
            turn_words(words[i * row + c :], row, to[c * out_row + i :], out_row)
    return out


def _left_turned16(right, wide, rows, d, out):  # type: ignore[no-untyped-def]
    """x^T as a left operand, for tokens x (rows, d) as a right one."""
    words, to = right.view(np.uint32), out.view(np.uint32)
    for i in range(0, up(rows, _STEP) // 2, LANES):
        for c in range(0, up(d, LANES), LANES):
            turn_words(words[i * wide + c :], wide, to[c * (CHUNK // 2) + i :], CHUNK // 2)
    return out


def _multiply32(c, c_row, a, a_row, b, b_row, m, n, k, add):  # type: ignore[no-untyped-def]
    for i in range(0, m, ROWS32):
        for j in range(0, n, COLUMNS):
            tile32(c[i * c_row + j :], c_row, a[i * a_row :], a_row, 1, b[j:], b_row, k, add)


def _multiply16(c, c_row, a, a_row, b, b_row, m, n, k, add):  # type: ignore[no-untyped-def]
    """C (m, n) = A (m, k) B (k, n), or += where `add`."""
    left, right = a.view(np.uint32), b.view(np.uint32)
    row, steps = a_row // 2, up(k, STEP16) // 2
    for i in range(0, m, ROWS16):
        for j in range(0, n, COLUMNS):
            tile16(c[i * c_row + j :], c_row, left[i * row :], row, 1, right[j:], b_row, steps, add)


def _multiply_turned32(c, c_row, at, wide, b, b_row, m, n, k, add):  # type: ignore[no-untyped-def]
    for i in range(0, m, ROWS32):
        for j in range(0, n, COLUMNS):
            tile32(c[i * c_row + j :], c_row, at[i:], 1, wide, b[j:], b_row, k, add)


def _multiply_turned16(c, c_row, at, wide, b, b_row, m, n, k, add):  # type: ignore[no-untyped-def]
    """C (m, n) = A^T B, or +=, for the turned form of tokens A (k, m)."""
    multiply(c, c_row, at, CHUNK, b, b_row, m, n, k, add)


padded, rounded = _by_type(_as_it_is, _padded16), _by_type(_as_it_is, _rounded16)
right, left_turned = _by_type(_as_it_is, _right16), _by_type(_as_it_is, _left_turned16)
right_turned = _by_type(_right_turned32, _right_turned16)
multiply = _by_type(_multiply32, _multiply16)
multiply_turned = _by_type(_multiply_turned32, _multiply_turned16)


@inlined
def scores(s, a, row, bt, rows, d):  # type: ignore[no-untyped-def]
    """s (C, C): a b^T on and below the diagonal, of a (R, d) and bt (d, C)."""
    step = ROWS32 if a.itemsize == 4 else ROWS16
    for i in range(0, rows, step):
        multiply(s[i * CHUNK :], CHUNK, a[i * row :], row, bt, CHUNK, step, min(rows, i + step), d, 0)


@inlined
def lower(c, row, s, b, rows, n, add):  # type: ignore[no-untyped-def]
    """c (R, n) = s b, or +=, for a lower triangle s."""
    step = ROWS32 if s.itemsize == 4 else ROWS16
    for i in range(0, rows, step):
        multiply(c[i * row :], row, s[i * CHUNK :], CHUNK, b, row, step, n, min(rows, i + step), add)


@inlined
def upper(c, row, s, b, rows, n, add):  # type: ignore[no-untyped-def]
    """c (R, n) = s^T b, or +=, for the turned form of a lower triangle s."""
    step = ROWS32 if s.itemsize == 4 else ROWS16
    for i in range(0, rows, step):
        k = i if s.itemsize == 4 else i // STEP16 * STEP16
        multiply_turned(c[i * row :], row, s[i * CHUNK + k :], CHUNK, b[k * row :], row, step, n, rows - k, add)


@inlined
def triangle_left(s, rows, scratch, out):  # type: ignore[no-untyped-def]
    """The turned form of a lower triangle, for `upper`."""
    return left_turned(right(s, CHUNK, rows, scratch), CHUNK, rows, rows, out)


@inlined
def _decays_wide(gamma, rows, out):  # type: ignore[no-untyped-def]
    """out (C, C): e^(gamma_i - gamma_j) on and below the diagonal."""
    for i in range(rows):
        decay_row(gamma[i], gamma, out[i * CHUNK :], up(i + 1, LANES))


@inlined
def _decays(gamma, rows, out):  # type: ignore[no-untyped-def]
    for i in range(rows):
        to = out[i * CHUNK : i * CHUNK + i + 1]
        for j in range(i + 1):
            to[j] = exp_f32(gamma[i] - gamma[j])


decays = _decays_wide if tiles.has("avx512f") else _decays


@inlined
def decayed(s, e, rows, first, sign, out):  # type: ignore[no-untyped-def]
    """A triangle of scores, each times sign and its decay: of the tokens j up to i - first; zeros beyond."""
    fill_registers()
    for i in range(rows):
        here, last = i * CHUNK, i * CHUNK + i + 1 - first
        row, decay = s[here:last], e[here:last]
        to = out[here:last]
        for j in range(len(row)):
            to[j] = store(row[j] * sign * decay[j], to)
        out[last : here + CHUNK] = 0
    padded(out, CHUNK, rows, CHUNK)
