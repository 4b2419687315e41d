"""A frozen weight from a GGUF file's blocks into 8-bit integers, in one pass: decoded, mixed and rounded in a core's
cache, as `weights.py` does it for 4-bit codes.

What: a thread decodes a row (`rows`), or 16 rows (`groups`), into fp32. They are the file's own numbers, not rounded to
the compute dtype before.
Source: `quant/kernels/gguf_cpu.py` for the blocks, `rounding.py` for what follows.
Cost: the blocks read and a byte written a number.
"""

import numpy as np
from numba import carray
from torch import Tensor

from halfbyte.layers.kernels.cpu.integer.rounding import (  # isort: skip
    MOST, Int8Matrix, decoded_groups, decoded_rows, mirrors_thirds, padded_width, registers_mixed,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.parallel import array, block_rows, each_block, kernel, run
from halfbyte.layers.kernels.cpu.scalar import inlined
from halfbyte.quant.kernels import gguf_cpu
from halfbyte.quant.number_format import BlockRows


@inlined
def _row(how, row, to, width, scratch):  # type: ignore[no-untyped-def]
    codes, order, kind, row_bytes, blocks = how
    place = np.int64(row)
    if order != 0:
        place = np.int64(array(order + 4 * row, (1,), np.int32)[0])
    gguf_cpu.row(kind, codes + place * row_bytes, array(to, (width,), np.float32), blocks)


@inlined
def _rows(how, q, steps, width, count, thirds, share, first, last):  # type: ignore[no-untyped-def]
    decoded_rows(_row, how, q, steps, width, count, thirds, share, first, last)


@inlined
def _groups(how, q, steps, width, rows, share, first, last):  # type: ignore[no-untyped-def]
    decoded_groups(_row, how, q, steps, width, rows, share, first, last)


@kernel
def decode_rows(p):  # type: ignore[no-untyped-def]
    s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
    how, steps = (s[3], s[4], s[5], s[6], s[7]), array(s[9], (s[1],), np.float32)
    each_block(s, _rows, (how, s[8], steps, s[10], s[11], s[12], np.float32(f[13])))


@kernel
def decode_groups(p):  # type: ignore[no-untyped-def]
    s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
    how, steps = (s[3], s[4], s[5], s[6], s[7]), array(s[9], (s[1] * MOST,), np.float32)
    each_block(s, _groups, (how, s[8], steps, s[10], s[11], np.float32(f[12])))


def _given(w: BlockRows, out: Int8Matrix) -> tuple[Tensor | int, ...]:
    """What both kernels take first."""
    order = 0 if w.order is None else w.order
    return w.codes, order, w.kind, w.codes.stride(0), w.shape[1] // w.weights, *out, w.shape[1]


def rows(w: BlockRows, *, share: float = 1.0, out: Int8Matrix) -> Int8Matrix:
    """As `rounding.rows` of the weight that these blocks stand for."""
    o, d = w.shape
    run(decode_rows, o, block_rows(d), *_given(w, out), registers_mixed(d), int(mirrors_thirds(d)), float(share))
    return out


def groups(w: BlockRows, *, share: float = 1.0, out: Int8Matrix) -> Int8Matrix:
    """As `rounding.groups` of the weight that these blocks stand for."""
    o, d = w.shape
    run(decode_groups, padded_width(o) // MOST, block_rows(d * MOST), *_given(w, out), o, float(share))
    return out
