"""The head in 8 bits: all logits roughly, then those that may be the largest as they are (`layers/decoding/head.py`).

Letters: M vectors (texts at once), D in, O out.
"""

import numpy as np

from halfbyte.layers.kernels.cpu.decoding import nibbles, several, single, words
from halfbyte.layers.kernels.cpu.parallel import array
from halfbyte.layers.kernels.cpu.scalar import inlined


@inlined
def _rough(op, like, sums, r):  # type: ignore[no-untyped-def]
    """Row r times the vectors -> sums (M,), without the row's scale."""
    d, vectors, m = op[9], op[24], 0
    while m < vectors:
        w, x, to = op[4] + r * d, op[15] + m * op[16], sums.ctypes.data + m * 4
        if vectors - m >= 8:
            words.eights_8(like, w, x, op[16], d // nibbles.WHOLE, to)
            m += 8
        elif vectors - m >= 4:
            words.eights_4(like, w, x, op[16], d // nibbles.WHOLE, to)
            m += 4
        elif vectors - m >= 2:
            words.eights_2(like, w, x, op[16], d // nibbles.WHOLE, to)
            m += 2
        else:
            words.eights_1(like, w, x, op[16], d // nibbles.WHOLE, to)
            m += 1
    steps = array(op[17], (vectors,), np.float32)
    for m in range(vectors):
        sums[m] *= steps[m]


@inlined
def _rough_of_16(op, like, kept, found, r, n):  # type: ignore[no-untyped-def]
    """Rows r .. r + n, at most 16, times all vectors of whole numbers, and what they are at least and at most."""
    wholes, vectors, row, out_row = op[9] // nibbles.WHOLE, op[24], op[16], 4 * op[14]
    w, scales, bounds, m = op[4] + r * op[9], op[5] + 4 * r, op[6] + 4 * r, 0
    while m < vectors:
        x, steps, lengths, to = op[15] + m * row, op[17] + 4 * m, op[7] + 4 * m, op[13] + m * out_row + 4 * r
        if vectors - m >= 8:
            several.eights_of_8(
                like, w, n, wholes, x, row, steps, scales, bounds, lengths, kept, to, out_row, found + 128 * m
            )
            m += 8
        elif vectors - m >= 4:
            several.eights_of_4(
                like, w, n, wholes, x, row, steps, scales, bounds, lengths, kept, to, out_row, found + 128 * m
            )
            m += 4
        elif vectors - m >= 2:
            several.eights_of_2(
                like, w, n, wholes, x, row, steps, scales, bounds, lengths, kept, to, out_row, found + 128 * m
            )
            m += 2
        else:
            several.eights_of_1(
                like, w, n, wholes, x, row, steps, scales, bounds, lengths, kept, to, out_row, found + 128 * m
            )
            m += 1


@inlined
def _rough_rows(op, like, scratch, item):  # type: ignore[no-untyped-def]
    """An item's rows, 16 at a time, in bf16; what they are at least and at most."""
    kept, vectors = (np.int64(scratch.ctypes.data) + 63) // 64 * 64, op[24]
    first, last = item * op[23], min(op[10], (item + 1) * op[23])
    highest = array(kept + 8 * single.SUMS, (vectors, 2, single.ROWS), np.float32)
    highest[:] = np.float32(-np.inf)
    found, length = highest.ctypes.data, array(op[7], (1,), np.float32)[0]
    step = array(op[17], (1,), np.float32)[0]
    while first < last:
        if vectors == 1 and first + single.ROWS <= last:
            single.eights_of_16(
                like, op[4] + first * op[9], op[9] // nibbles.WHOLE, op[15], step, op[5] + 4 * first,
                op[6] + 4 * first, length, kept, op[13] + 4 * first, found,
            )  # fmt: skip
        else:
            _rough_of_16(op, like, kept, found, first, min(single.ROWS, last - first))
        first += single.ROWS
    ends = array(op[8], (2, op[1], vectors), np.float32)
    for m in range(vectors):
        for k in range(2):
            for j in range(single.ROWS):
                ends[k, item, m] = max(ends[k, item, m], highest[m, k, j])


@inlined
def eights(op, like, sums, scratch, item):  # type: ignore[no-untyped-def]
    """4 rows of 8 bits (O, D), 5 their scales (O) fp32, 6 bounds (O) fp32, 7 lengths of x (M), 8 what the largest logit
    of each item's rows is at least, and at most, (2, items, M), 9 D, 10 O, 11 x (M, ..) fp32, 12 bytes of its row, 13
    out (M, ..), 14 its row, 15 x in whole numbers (M, ..), 16 bytes of its row, 17 its steps (M), 23 rows of an
    item, 24 M."""
    vectors, first = op[24], item * op[23]
    scales, bounds = array(op[5], (op[10],), np.float32), array(op[6], (op[10],), np.float32)
    lengths, ends = array(op[7], (vectors,), np.float32), array(op[8], (2, op[1], vectors), np.float32)
    for m in range(vectors):
        ends[0, item, m] = ends[1, item, m] = np.float32(-np.inf)
    if like.itemsize == 2:
        _rough_rows(op, like, scratch, item)
        return
    for r in range(first, min(op[10], (item + 1) * op[23])):
        _rough(op, like, sums, r)
        for m in range(vectors):
            about, off = sums[m] * scales[r], bounds[r] * lengths[m]
            array(op[13] + (m * op[14] + r) * 4, (1,), np.float32)[0] = about
            ends[0, item, m], ends[1, item, m] = max(ends[0, item, m], about - off), max(ends[1, item, m], about + off)


@inlined
def exact(op, like, sums, item):  # type: ignore[no-untyped-def]
    """4 w (O, D), 6 .. 24 as in `eights`, 5 items of that one: rows that may be the largest, as `tape.py` has them."""
    d, vectors, row = op[9], op[24], op[12]
    lanes = nibbles.LANES_BF16 if like.itemsize == 2 else nibbles.LANES_FP32
    bounds, lengths = array(op[6], (op[10],), np.float32), array(op[7], (vectors,), np.float32)
    ends, first, last = array(op[8], (2, op[5], vectors), np.float32), item * op[23], min(op[10], (item + 1) * op[23])
    for m in range(vectors):
        most, out = np.float32(-np.inf), array(op[13] + m * op[14] * 4, (op[10],), np.float32)
        for i in range(op[5]):
            most = max(most, ends[0, i, m])
        if ends[1, item, m] < most:
            continue
        for r in range(first, last):
            if not out[r] + bounds[r] * lengths[m] < most:  # NaN too
                nibbles.plain_of_1(
                    like, op[4] + r * d * like.itemsize, op[11] + m * row, row, d // lanes, sums.ctypes.data
                )
                out[r] = sums[0]
