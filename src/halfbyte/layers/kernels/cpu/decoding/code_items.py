"""Items of CODES, products of 4-bit rows with vectors, by each of the ways that processors have; and PAIRS, what AMX
reads.

What: an item's rows in parts of as many as a product takes, with the scales of their blocks looked up before.
"""

import numpy as np
from numba import types
from numba.extending import overload

from halfbyte.layers.kernels.cpu.decoding import code_tables, codes_amx, codes_bf16, codes_int16, slots
from halfbyte.layers.kernels.cpu.decoding.emit import ask
from halfbyte.layers.kernels.cpu.parallel import array
from halfbyte.layers.kernels.cpu.scalar import FASTMATH, inlined

BLOCK, GROUP = code_tables.BLOCK, code_tables.GROUP


@inlined
def finish_int16(op, like, sums, vectors, r, n):  # type: ignore[no-untyped-def]
    """Sums (vectors, 8) of n rows from r on, in fp32, with LoRA's and the bias, to or onto where they go."""
    bias = array(op[slots.BIAS], (op[slots.O],), np.float32)
    if op[slots.CODES_UP] != 0:
        codes_int16.add_lora(
            like, vectors, sums.ctypes.data, op[slots.CODES_UP] + 4 * r, op[slots.CODES_UP_ROW],
            op[slots.CODES_H], op[slots.CODES_H_ROW], op[slots.CODES_PIECES],
        )  # fmt: skip
    for m in range(vectors):
        out = array(op[slots.OUT] + (m * op[slots.OUT_ROW] + r) * 4, (n,), np.float32)
        for k in range(n):
            total = sums[m, k] + (bias[r + k] if op[slots.BIAS] != 0 else np.float32(0.0))
            out[k] = total + out[k] if op[slots.ADD] != 0 else total


def _codes_int16(op, number, like, lookups, scratch, item):  # type: ignore[no-untyped-def]
    """CODES in fp32, eight rows at a time."""
    d, vectors, nested = op[slots.D], op[slots.VECTORS], op[slots.CODES_TABLE] != 0
    blocks, rows = d // BLOCK, codes_int16.ROWS
    begin, end = item * op[slots.ITEM_ROWS], min(op[slots.O], (item + 1) * op[slots.ITEM_ROWS])
    group = begin * blocks // GROUP
    if nested:
        count, offset = (end * blocks - 1) // GROUP - group + 1, np.float32(number[slots.CODES_OFFSET])
        code_tables.lookups(
            like, op[slots.CODES_TABLE], op[slots.CODES_OUTER], offset, group, count, lookups.ctypes.data
        )
    levels = (scratch.ctypes.data + 63) // 64 * 64
    sums = array(levels + codes_int16.LEVELS_BYTES, (vectors, rows), np.float32)
    scales = array(levels + codes_int16.LEVELS_BYTES + 32 * (vectors + 16), (blocks, rows), np.float32)
    width = op[slots.X_ROW] // 2
    pairs, pair_steps, steps = codes_int16.ordered_parts(op[slots.X], vectors, width)
    for r in range(begin, end, rows):
        n, at = min(rows, end - r), op[slots.CODES_SCALES] + r * blocks * (1 if nested else 4)
        table, first = (np.int64(lookups.ctypes.data), r * blocks - group * GROUP) if nested else (0, 0)
        code_tables.scales_of_8_rows(like, at, table, first, blocks, n, scales.ctypes.data)
        codes_int16.rows_times_vectors(
            like, op[slots.W] + r * (d // 2), d // 2, n, vectors, op[slots.X], steps, pairs, pair_steps, width,
            scales.ctypes.data, blocks, op[slots.CODES_LEVELS], levels, sums.ctypes.data,
        )  # fmt: skip
        finish_int16(op, like, sums, vectors, r, n)


@inlined
def _scales(op, number, like, looked_up, begin, end):  # type: ignore[no-untyped-def]
    """The scales of rows begin .. end, which are codes of 8 bits -> `looked_up`, from a block that is a multiple of
    64."""
    blocks, codes_at, offset = op[slots.D] // BLOCK, op[slots.CODES_SCALES], np.float32(number[slots.CODES_OFFSET])
    first, last = begin * blocks, end * blocks
    for at in range(last, min(op[slots.O], end + op[slots.ITEM_ROWS]) * blocks, 64):  # those of the next item
        ask(codes_at + at)
    if op[slots.CODES_IN_PLANES] != 0:
        code_tables.scales_of_planes(
            like, codes_at, op[slots.CODES_TABLE], op[slots.CODES_OUTER], offset, first, last, looked_up
        )
        return
    codes, table = array(codes_at, (last,), np.uint8), array(op[slots.CODES_TABLE], (GROUP,), np.float32)
    outer = array(op[slots.CODES_OUTER], (last // GROUP + 1,), np.float32)
    scales, start = array(looked_up, (last - first + 64,), np.float32), first // 64 * 64
    for n in range(first, last):
        scales[n - start] = table[codes[n]] * outer[n // GROUP] + offset


@inlined
def _item_scales(op, number, like, lookups, begin, end):  # type: ignore[no-untyped-def]
    """Where the scales of rows begin .. end are in fp32, as if all others were too."""
    if op[slots.CODES_TABLE] == 0:
        return op[slots.CODES_SCALES]
    looked_up = np.int64(lookups.ctypes.data)
    _scales(op, number, like, looked_up, begin, end)
    return looked_up - 4 * (begin * (op[slots.D] // BLOCK) // 64 * 64)


@inlined
def codes_by_amx(op, number, like, lookups, scratch, item):  # type: ignore[no-untyped-def]
    """CODES by AMX, 16 rows at a time."""
    begin, end = item * op[slots.ITEM_ROWS], min(op[slots.O], (item + 1) * op[slots.ITEM_ROWS])
    at, row = (np.int64(scratch.ctypes.data) + 63) // 64 * 64, codes_amx.pair_bytes(op[slots.VECTORS])
    d, scales = op[slots.D], _item_scales(op, number, like, lookups, begin, end)
    h = at + codes_amx.H_PAIRS
    up_row, pieces = op[slots.CODES_UP_ROW], op[slots.CODES_PIECES]
    codes_amx.order_lora(like, op[slots.CODES_H], op[slots.CODES_H_ROW], op[slots.USED], pieces, row, h)
    for r in range(begin, end, codes_amx.ROWS):
        n, bias = min(codes_amx.ROWS, end - r), op[slots.BIAS] + 4 * r if op[slots.BIAS] != 0 else 0
        for m in range(0, op[slots.USED], codes_amx.MOST_VECTORS):
            codes_amx.rows_times_vectors(
                like, op[slots.W] + r * (d // 2), n, d // BLOCK, min(codes_amx.MOST_VECTORS, op[slots.USED] - m),
                op[slots.X] + 4 * m, row, scales + 4 * r * (d // BLOCK), op[slots.CODES_LEVELS],
                op[slots.CODES_UP] + r * up_row, up_row, h + 4 * m, pieces, at, bias, op[slots.ADD],
                op[slots.OUT] + 4 * (m * op[slots.OUT_ROW] + r), 4 * op[slots.OUT_ROW],
            )  # fmt: skip


@inlined
def pairs(op, like, item):  # type: ignore[no-untyped-def]
    """PAIRS: a part of all vectors as CODES read them by AMX."""
    width, row = op[slots.X_ROW] // 4, codes_amx.pair_bytes(op[slots.VECTORS])
    first = item * codes_amx.PAIRS_BLOCKS
    blocks = min(codes_amx.PAIRS_BLOCKS, width // BLOCK - first)
    x, out = op[slots.X] + 4 * BLOCK * first, op[slots.OUT] + BLOCK // 2 * first * row
    codes_amx.order_vectors(like, x, op[slots.X_ROW], op[slots.USED], blocks, out, row)


def _codes_bf16(op, number, like, lookups, scratch, item):  # type: ignore[no-untyped-def]
    """CODES in bf16, 16 rows at a time."""
    begin, end = item * op[slots.ITEM_ROWS], min(op[slots.O], (item + 1) * op[slots.ITEM_ROWS])
    sums, d = (np.int64(scratch.ctypes.data) + 63) // 64 * 64, op[slots.D]
    blocks, all_scales = d // BLOCK, _item_scales(op, number, like, lookups, begin, end)
    for r in range(begin, end, codes_bf16.ROWS):
        n, w, scales = min(codes_bf16.ROWS, end - r), op[slots.W] + r * (d // 2), all_scales + 4 * r * blocks
        up, bias = op[slots.CODES_UP] + r * op[slots.CODES_UP_ROW], op[slots.BIAS] + 4 * r if op[slots.BIAS] != 0 else 0
        if op[slots.VECTORS] == 1:
            codes_bf16.rows_times_one(
                like, w, n, blocks, op[slots.X], op[slots.X] + op[slots.X_ROW], scales, op[slots.CODES_LEVELS], up,
                op[slots.CODES_UP_ROW], op[slots.CODES_H], op[slots.CODES_PIECES], sums, bias, op[slots.ADD],
                op[slots.OUT] + 4 * r,
            )  # fmt: skip
        else:
            codes_bf16.rows_times_vectors(
                like, w, n, blocks, op[slots.USED], op[slots.X], op[slots.X_ROW], scales, op[slots.CODES_LEVELS], up,
                op[slots.CODES_UP_ROW], op[slots.CODES_H], op[slots.CODES_H_ROW], op[slots.CODES_PIECES], sums, bias,
                op[slots.ADD], op[slots.OUT] + 4 * r, 4 * op[slots.OUT_ROW],
            )  # fmt: skip


def codes(op, number, like, lookups, scratch, item) -> None:  # type: ignore[no-untyped-def]
    raise NotImplementedError


@overload(codes, jit_options={"forceinline": True, "fastmath": FASTMATH, "error_model": "numpy"})
def _codes_of_type(op, number, like, lookups, scratch, item):  # type: ignore[no-untyped-def]
    """The other one is not compiled."""
    return _codes_bf16 if like.dtype == types.uint16 else _codes_int16
