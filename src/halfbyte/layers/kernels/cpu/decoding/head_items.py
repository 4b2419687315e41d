"""Items of the head in 8 bits: HEAD_ROUGH, HEAD_EXACT; and QUADS, what the first reads by AMX."""

import numpy as np

from halfbyte.layers.kernels.cpu.decoding import dense, int8_head, int8_head_amx, slots
from halfbyte.layers.kernels.cpu.decoding.codes_bf16 import ROWS, SUMS
from halfbyte.layers.kernels.cpu.decoding.int8_head import PIECE
from halfbyte.layers.kernels.cpu.parallel import array
from halfbyte.layers.kernels.cpu.scalar import inlined


@inlined
def quads(op, like):  # type: ignore[no-untyped-def]
    """QUADS: all vectors, in one item."""
    pieces = op[slots.D] // PIECE
    int8_head_amx.order_integers(like, op[slots.X], op[slots.X_ROW], op[slots.VECTORS], pieces, op[slots.OUT])


@inlined
def _rows_of_16(op, like, scratch, item, amx):  # type: ignore[no-untyped-def]
    """An item's rows, 16 at a time, in bf16; what they are at least and at most."""
    sums = (np.int64(scratch.ctypes.data) + 63) // 64 * 64
    vectors, d = op[slots.VECTORS], op[slots.D]
    first, last = item * op[slots.ITEM_ROWS], min(op[slots.O], (item + 1) * op[slots.ITEM_ROWS])
    highest = array(sums + 8 * SUMS, (vectors, 2, ROWS), np.float32)
    highest[:] = np.float32(-np.inf)
    length = array(op[slots.HEAD_LENGTHS], (1,), np.float32)[0]
    step = array(op[slots.HEAD_STEPS], (1,), np.float32)[0]
    while first < last:
        w, out = op[slots.W] + first * d, op[slots.OUT] + 4 * first
        scales, bounds = op[slots.HEAD_SCALES] + 4 * first, op[slots.HEAD_BOUNDS] + 4 * first
        if vectors == 1 and first + ROWS <= last:
            int8_head.rows_times_one(
                like, w, d // PIECE, op[slots.HEAD_INTS], step, scales, bounds, length, sums, out, highest.ctypes.data
            )
        elif amx is not None and op[slots.HEAD_QUADS] != 0 and first + ROWS <= last:
            int8_head_amx.rows_times_vectors(
                like, w, d // PIECE, vectors, op[slots.HEAD_QUADS], op[slots.HEAD_STEPS], scales, bounds,
                op[slots.HEAD_LENGTHS], sums, out, 4 * op[slots.OUT_ROW], highest.ctypes.data,
            )  # fmt: skip
        else:
            int8_head.rows_times_vectors(
                like, w, min(ROWS, last - first), d // PIECE, vectors, op[slots.HEAD_INTS], op[slots.HEAD_INTS_ROW],
                op[slots.HEAD_STEPS], scales, bounds, op[slots.HEAD_LENGTHS], sums, out, 4 * op[slots.OUT_ROW],
                highest.ctypes.data,
            )  # fmt: skip
        first += ROWS
    ends = array(op[slots.HEAD_ENDS], (2, op[slots.ITEMS], vectors), np.float32)
    for m in range(vectors):
        for k in range(2):
            for j in range(ROWS):
                ends[k, item, m] = max(ends[k, item, m], highest[m, k, j])


@inlined
def rough(op, like, sums, scratch, item, amx):  # type: ignore[no-untyped-def]
    """HEAD_ROUGH: logits by the rows of 8 bits, and what the largest of the item's is at least, and at most."""
    vectors, d = op[slots.VECTORS], op[slots.D]
    scales = array(op[slots.HEAD_SCALES], (op[slots.O],), np.float32)
    bounds = array(op[slots.HEAD_BOUNDS], (op[slots.O],), np.float32)
    lengths = array(op[slots.HEAD_LENGTHS], (vectors,), np.float32)
    steps = array(op[slots.HEAD_STEPS], (vectors,), np.float32)
    ends = array(op[slots.HEAD_ENDS], (2, op[slots.ITEMS], vectors), np.float32)
    for m in range(vectors):
        ends[0, item, m] = ends[1, item, m] = np.float32(-np.inf)
    if like.itemsize == 2:
        _rows_of_16(op, like, scratch, item, amx)
        return
    for r in range(item * op[slots.ITEM_ROWS], min(op[slots.O], (item + 1) * op[slots.ITEM_ROWS])):
        int8_head.int8_dots(
            like, vectors, op[slots.W] + r * d, op[slots.HEAD_INTS], op[slots.HEAD_INTS_ROW], d // PIECE,
            sums.ctypes.data,
        )  # fmt: skip
        for m in range(vectors):
            sums[m] *= steps[m]
        for m in range(vectors):
            about, off = sums[m] * scales[r], bounds[r] * lengths[m]
            array(op[slots.OUT] + (m * op[slots.OUT_ROW] + r) * 4, (1,), np.float32)[0] = about
            ends[0, item, m], ends[1, item, m] = max(ends[0, item, m], about - off), max(ends[1, item, m], about + off)


@inlined
def exact(op, like, sums, item):  # type: ignore[no-untyped-def]
    """HEAD_EXACT: rows that may be the largest, multiplied as they are."""
    d, vectors = op[slots.D], op[slots.VECTORS]
    lanes = dense.LANES_BF16 if like.itemsize == 2 else dense.LANES_FP32
    bounds = array(op[slots.HEAD_BOUNDS], (op[slots.O],), np.float32)
    lengths = array(op[slots.HEAD_LENGTHS], (vectors,), np.float32)
    ends = array(op[slots.HEAD_ENDS], (2, op[slots.HEAD_ITEMS], vectors), np.float32)
    for m in range(vectors):
        least, out = np.float32(-np.inf), array(op[slots.OUT] + m * op[slots.OUT_ROW] * 4, (op[slots.O],), np.float32)
        for i in range(op[slots.HEAD_ITEMS]):
            least = max(least, ends[0, i, m])
        if ends[1, item, m] < least:
            continue
        for r in range(item * op[slots.ITEM_ROWS], min(op[slots.O], (item + 1) * op[slots.ITEM_ROWS])):
            if not out[r] + bounds[r] * lengths[m] < least:  # NaN too
                w, x = op[slots.W] + r * d * like.itemsize, op[slots.X] + m * op[slots.X_ROW]
                dense.row_dot(like, w, x, d // lanes, sums.ctypes.data)
                out[r] = sums[0]
