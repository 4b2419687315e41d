"""A token's whole way through a model as one call: a list of operations that all threads walk through together.

Why: a small model has 210 matrix products a token; started one by one from Python, or one by one on a pool of threads,
the starts cost more than the products. Here each operation is split into items; a thread takes the next item from a
counter, and an operation begins when those that it names are done. No thread waits for a thread, only for work, so any
number of threads is right, one included.
What: `slots.py` says what an operation's numbers mean; `layers/decoding/tape.py` writes them. Activations between
operations are fp32; what a product reads is there twice, in order in fp32, and in the kernels' order and type. Each
thread has a share of an operation's items, neighbours in memory, before it takes another's; and while it waits it asks
for the first bytes of its share of the next matrix.
Source: products are in `codes_amx.py`, `codes_bf16.py`, `codes_int16.py`, `block_rows.py`, `dense.py` and
`int8_head.py`, attention in `attend.py`, recurrent layers in `recurrent.py`; the rest are the formulas of `norm.py` and
`gate.py`.
Cost: about 0.2 microseconds between two operations on two threads.
"""

import math
from functools import partial

import numpy as np
from numba import carray

from halfbyte.layers.kernels.cpu import tiles

from halfbyte.layers.kernels.cpu.decoding import (  # isort: skip
    attend, block_rows, block_vectors, code_items, code_tables, codes_bf16, codes_int16, dense, head_items, recurrent,
    slots,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.decoding.emit import ask
from halfbyte.layers.kernels.cpu.parallel import SLOTS, array, per_dtype
from halfbyte.layers.kernels.cpu.scalar import SILU, give, inlined, load, pause, read, sigmoid, store, take
from halfbyte.quant.kernels import gguf_cpu
from halfbyte.system import kernel_cache

LINE = 8  # int64 of a cache line: each counter has its own
GATE_ELEMENTS = 1024  # of an item
BLOCK, CHUNK, GROUP = code_tables.BLOCK, codes_bf16.CHUNK, code_tables.GROUP
AMX = tiles.amx()  # CODES in bf16 are multiplied by it
_SPINS = 2000  # looks at a counter before the core is offered to others
_ASKED_BYTES = 32 * 1024  # of the next matrix, by each thread while it waits


@inlined
def _order(op, x, like, m, vectors, d, first, last, blocks):  # type: ignore[no-untyped-def]
    """Vector m's x[first:last] in fp32 -> as products read it, in the orders that are asked for; `first` and `last` are
    whole chunks. For CODES, bf16: (M, D') by `order_vector`; of one vector of an odd number of blocks also (D'), from
    its last block on. fp32: as `ordered_parts` says."""
    width, out = len(x), op[slots.NORM_ORDERS]
    if blocks is not None:
        for order in range(block_vectors.ORDERS):
            to = op[slots.NORM_ORDERS + 1 + order]
            if to != 0:
                to += m * block_vectors.ordered_row(width) + block_vectors.ordered_row(first)
                block_vectors.order_blocks(like, x.ctypes.data + 4 * first, order, (last - first) // CHUNK, to)
    if out == 0:
        return
    if like.itemsize == 2:
        to = out + (m * width + first) * like.itemsize
        codes_bf16.order_vector(like, x.ctypes.data + 4 * first, (last - first) // CHUNK, to)
        if vectors == 1 and d % CHUNK == BLOCK:
            ordered, after = array(out, (width,), like.dtype), array(out + width * like.itemsize, (width,), like.dtype)
            for c in range(first, last, CHUNK):
                _order_from_last(ordered[c : c + CHUNK], after, c, width)
    else:
        blocks, eight, lane = width // BLOCK, m // 8, m % 8
        pairs, pair_steps, steps = codes_int16.ordered_parts(out, vectors, width)
        pairs, pair_steps = pairs + 16 * eight * width + 4 * lane, pair_steps + 32 * eight * blocks + 4 * lane
        for c in range(first // BLOCK, last // BLOCK):
            codes_int16.round_block(
                like, x.ctypes.data + 256 * c, out + 2 * m * width + 128 * c, steps + 4 * m * blocks + 4 * c,
                pairs + 1024 * c if vectors >= codes_int16.FEWEST_OF_MANY else 0, pair_steps + 32 * c,
            )  # fmt: skip


@inlined
def _order_from_last(ordered, out, c, width):  # type: ignore[no-untyped-def]
    """A chunk, numbers c .. c + 128 of a vector, to where `rows_times_one` reads it for every second row."""
    for k in range(0, CHUNK, 32):
        for j in range(16):
            out[c + k + 16 + j] = ordered[k + j]
        if c + CHUNK < width:
            for j in range(16):
                out[c + CHUNK + k + j] = ordered[k + 16 + j]
        else:
            for j in range(16):
                out[k + j] = ordered[k + j]


@inlined
def _norm(op, number, like, m, blocks):  # type: ignore[no-untyped-def]
    """NORM: vector m, normalised where there is a weight, to where products read it; or onto another one."""
    d, width = op[slots.NORM_D], op[slots.NORM_WIDTH]
    if m >= op[slots.USED]:
        return
    x = array(op[slots.NORM_X] + m * op[slots.NORM_X_ROW] * 4, (d,), np.float32)
    share, one = np.float32(1.0), np.float32(0.0)
    middle = one
    weight, bias = array(op[slots.NORM_WEIGHT], (d,), like.dtype), array(op[slots.NORM_BIAS], (d,), like.dtype)
    if op[slots.NORM_WEIGHT] != 0:
        total = np.float32(0.0)
        if op[slots.NORM_CENTRED] != 0:
            for j in range(d):
                middle += x[j]
            middle /= np.float32(d)
        for j in range(d):
            total += (x[j] - middle) * (x[j] - middle)
        mean = total / np.float32(d) + np.float32(number[slots.NORM_EPS])
        share = np.float32(1.0) / np.float32(math.sqrt(mean))
        one = np.float32(op[slots.NORM_ONE_PLUS])
    if op[slots.NORM_ADD_TO] != 0:
        onto = array(op[slots.NORM_ADD_TO] + m * op[slots.NORM_TO_ROW] * 4, (d,), np.float32)
        for j in range(d):
            y = (x[j] - middle) * share * (load(weight[j]) + one)
            y += load(bias[j]) if op[slots.NORM_BIAS] != 0 else np.float32(0.0)
            onto[j] = y if op[slots.NORM_SET] != 0 else onto[j] + y
        return
    out = array(op[slots.NORM_PLAIN] + m * width * 4, (width,), np.float32)
    if op[slots.NORM_WEIGHT] != 0:
        for j in range(d):
            y = (x[j] - middle) * share * (load(weight[j]) + one)
            out[j] = y + load(bias[j]) if op[slots.NORM_BIAS] != 0 else y
    else:
        for j in range(d):
            out[j] = x[j]
    if op[slots.NORM_LENGTHS] != 0:
        total = np.float32(0.0)
        for j in range(d):
            total += out[j] * out[j]
        array(op[slots.NORM_LENGTHS], (m + 1,), np.float32)[m] = np.float32(math.sqrt(total))
    if op[slots.NORM_INTS] != 0:
        ints, steps = op[slots.NORM_INTS] + m * width * 2, op[slots.NORM_STEPS] + 4 * m
        codes_int16.round_vector(like, out.ctypes.data, width, np.float32(number[slots.NORM_MAX_INT]), ints, steps)
    _order(op, out, like, m, op[slots.ITEMS], d, 0, width, blocks)


@inlined
def _blocks(op, like, scratch, item):  # type: ignore[no-untyped-def]
    """BLOCKS: 16 rows at a time in bf16, eight in fp32."""
    at, at_once = (np.int64(scratch.ctypes.data) + 63) // 64 * 64, 16 if like.itemsize == 2 else codes_int16.ROWS
    begin, end = item * op[slots.ITEM_ROWS], min(op[slots.O], (item + 1) * op[slots.ITEM_ROWS])
    sums = array(at, (op[slots.USED], codes_int16.ROWS), np.float32)
    for r in range(begin, end, at_once):
        n = min(at_once, end - r)
        block_rows.rows_times_vectors(
            like, op[slots.BLOCKS_TYPE], op[slots.W], op[slots.BLOCKS_ROW_BYTES], op[slots.BLOCKS_ORDER], r, n,
            op[slots.O], op[slots.D], op[slots.USED], op[slots.X], op[slots.X_ROW], at,
        )  # fmt: skip
        if like.itemsize == 2:
            codes_bf16.finish_rows(
                like, n, op[slots.USED], op[slots.CODES_UP] + r * op[slots.CODES_UP_ROW], op[slots.CODES_UP_ROW],
                op[slots.CODES_H], op[slots.CODES_H_ROW], op[slots.CODES_PIECES], at,
                op[slots.BIAS] + 4 * r if op[slots.BIAS] != 0 else 0, op[slots.ADD], op[slots.OUT] + 4 * r,
                4 * op[slots.OUT_ROW],
            )  # fmt: skip
        else:
            code_items.finish_int16(op, like, sums, op[slots.USED], r, n)


@inlined
def _dense(op, number, like, sums, scratch, item, blocks):  # type: ignore[no-untyped-def]
    """DENSE: rows of plain numbers, or of blocks that become such."""
    d, vectors, row = op[slots.D], op[slots.USED], op[slots.X_ROW]
    bias = array(op[slots.BIAS], (op[slots.O],), np.float32)
    uses = array(op[slots.DENSE_USES], (op[slots.VECTORS],), np.float32)
    lanes = dense.LANES_BF16 if like.itemsize == 2 else dense.LANES_FP32
    for r in range(item * op[slots.ITEM_ROWS], min(op[slots.O], (item + 1) * op[slots.ITEM_ROWS])):
        at = op[slots.W] + r * d * like.itemsize
        if blocks is not None and op[slots.DENSE_TYPE] != 0:
            order, place = array(op[slots.DENSE_ORDER], (op[slots.O],), np.int32), np.int64(r)
            if op[slots.DENSE_ORDER] != 0:
                place = np.int64(order[r])
            at, there = (scratch.ctypes.data + 63) // 64 * 64, op[slots.W] + place * op[slots.DENSE_ROW_BYTES]
            gguf_cpu.row(op[slots.DENSE_TYPE], there, array(at, (d,), like.dtype), op[slots.DENSE_BLOCKS])
        w, add = array(at, (d,), like.dtype), bias[r] if op[slots.BIAS] != 0 else np.float32(0.0)
        if op[slots.DENSE_USES] == 0:
            dense.row_dots(like, vectors, at, op[slots.X], row, d // lanes, sums.ctypes.data)
        else:
            for m in range(vectors):
                sums[m] = np.float32(0.0)
                if uses[m] != np.float32(0.0):
                    dense.row_dot(like, at, op[slots.X] + m * row, d // lanes, sums.ctypes.data + m * 4)
        for m in range(vectors):
            total = sums[m]
            if op[slots.DENSE_USES] == 0 or uses[m] != np.float32(0.0):
                x = array(op[slots.X] + m * row, (d,), np.float32)
                for j in range(d // lanes * lanes, d):
                    total += load(w[j]) * x[j]
            place = m * op[slots.OUT_ROW] + r
            if op[slots.DENSE_SCALED] != 0:
                half = array(op[slots.OUT] + place * like.itemsize, (1,), like.dtype)
                half[0] = store(total * np.float32(number[slots.DENSE_SCALE]), half)
            else:
                out = array(op[slots.OUT] + place * 4, (1,), np.float32)
                out[0] = total + add + out[0] if op[slots.ADD] != 0 else total + add


@inlined
def _activation(v, kind):  # type: ignore[no-untyped-def]
    """As `norm_gate.activation_formula`."""
    if kind == SILU:
        return v * sigmoid(v)
    if kind == 1:  # GELU by tanh
        return v * sigmoid(np.float32(1.5957691216) * (v + np.float32(0.044715) * v * v * v))
    if kind == 2:  # GELU
        return v * np.float32(0.5) * (np.float32(1.0) + np.float32(math.erf(v * np.float32(0.70710678))))
    positive = max(v, np.float32(0.0))
    return positive * positive if kind == 3 else positive  # squared, or plain


@inlined
def _gate(op, like, item, blocks):  # type: ignore[no-untyped-def]
    """GATE: act(g) * u, or act(g) alone, to where products read it."""
    inner, width = op[slots.GATE_INNER], op[slots.GATE_WIDTH]
    parts = (width + GATE_ELEMENTS - 1) // GATE_ELEMENTS
    m, first = item // parts, item % parts * GATE_ELEMENTS
    if m >= op[slots.USED]:
        return
    last, at = min(inner, first + GATE_ELEMENTS), (m * op[slots.GATE_ROW] + first) * 4
    g = array(op[slots.GATE_G] + at, (last - first,), np.float32)
    u = array(op[slots.GATE_U] + at, (last - first,), np.float32)
    out = array(op[slots.GATE_PLAIN] + m * width * 4, (width,), np.float32)
    to, kind = out[first:last], op[slots.GATE_ACTIVATION]
    if op[slots.GATE_U] == 0:
        for j in range(last - first):
            to[j] = _activation(g[j], kind)
    elif kind == SILU:
        for j in range(last - first):
            to[j] = g[j] * sigmoid(g[j]) * u[j]
    else:
        for j in range(last - first):
            v = g[j]
            z = np.float32(1.5957691216) * (v + np.float32(0.044715) * v * v * v)  # 2 sqrt(2 / pi)
            to[j] = v * sigmoid(z) * u[j]
    vectors = op[slots.GATE_VECTORS]
    _order(op, out, like, m, vectors, inner, first, min(width, first + GATE_ELEMENTS), blocks)


@inlined
def _share(items, threads, share):  # type: ignore[no-untyped-def]
    """The first item of a thread's share."""
    return share * items // threads


@inlined
def _wait(counters, lines, op, ops, me, threads, asked, yielding):  # type: ignore[no-untyped-def]
    """Until all before `op` is done. Asks meanwhile for bytes of this thread's share of the next matrix; `asked`: its
    address, and how many were."""
    begin, end = _share(op[slots.NEXT_ITEMS], threads, me), _share(op[slots.NEXT_ITEMS], threads, me + 1)
    if asked[0] != op[slots.NEXT_W]:
        asked[0], asked[1] = op[slots.NEXT_W], 0
    limit = min(_ASKED_BYTES, (end - begin) * op[slots.NEXT_ITEM_BYTES])
    for one in range(op[slots.AFTER], op[slots.UNTIL]):
        items, spins = ops[one * slots.WIDTH + slots.ITEMS], 0
        while read(counters[((one + 1) * lines - 1) * LINE :]) < items:
            spins += 1
            if asked[1] < limit:
                for k in range(0, 256, 64):
                    ask(op[slots.NEXT_W] + begin * op[slots.NEXT_ITEM_BYTES] + asked[1] + k)
                asked[1] += 256
            else:
                pause(yielding if spins % _SPINS == 0 else 0)


@inlined
def _do_recurrent(op, number, like, scratch, item, blocks):  # type: ignore[no-untyped-def]
    if op[slots.KIND] == slots.CONV:
        recurrent.conv(op, item)
    elif op[slots.KIND] != slots.GATED:
        recurrent.scan(op, number, like, scratch, item)
    elif item < op[slots.USED]:
        out, d = recurrent.gated(op, number, item), op[slots.GATED_GROUPS] * op[slots.GATED_WIDTH]
        _order(op, out, like, item, op[slots.ITEMS], d, 0, len(out), blocks)


@inlined
def _do(op, number, like, lookups, s, sums, scratch, item, amx, blocks, states):  # type: ignore[no-untyped-def]
    kind = op[slots.KIND]
    if kind == slots.CODES:
        if amx is not None:
            code_items.codes_by_amx(op, number, like, lookups, scratch, item)
        else:
            code_items.codes(op, number, like, lookups, scratch, item)
    elif kind == slots.PAIRS or kind == slots.QUADS:
        if amx is not None:
            if kind == slots.PAIRS:
                code_items.pairs(op, like, item)
            else:
                head_items.quads(op, like)
    elif kind == slots.DENSE:
        _dense(op, number, like, sums, scratch, item, blocks)
    elif kind == slots.BLOCKS:
        if blocks is not None:
            _blocks(op, like, scratch, item)
    elif kind == slots.NORM:
        _norm(op, number, like, item, blocks)
    elif kind == slots.ROTATE or kind == slots.ATTEND:
        if op[slots.ATTEND_COS] != 0:
            attend.rotate(op, number, like, item)
        if kind == slots.ATTEND:
            attend.attend(op, number, like, s, scratch, item)
    elif kind == slots.HEAD_ROUGH:
        head_items.rough(op, like, sums, scratch, item, amx)
    elif kind == slots.HEAD_EXACT:
        head_items.exact(op, like, sums, item)
    elif slots.CONV <= kind <= slots.GATED:
        if states is not None:
            _do_recurrent(op, number, like, scratch, item, blocks)
    else:
        _gate(op, like, item, blocks)


def _make(element: type, blocks: int | None = None, states: int | None = None) -> object:
    """None leaves out what is compiled for few models: `blocks`, what reads a GGUF file's blocks, half of all;
    `states`, recurrent layers."""
    amx = 1 if AMX and element == np.uint16 else None

    def token(address):  # type: ignore[no-untyped-def]
        """`address`: of the slots TAPE_*. Counters of an operation, each in a line: taken of each share; items done."""
        run = carray(address, (SLOTS,), np.int64)
        threads, lines, width = run[slots.TAPE_THREADS], run[slots.TAPE_THREADS] + 1, slots.WIDTH
        me = take(array(run[slots.TAPE_ARRIVED], (1,), np.int64)) % threads
        ops = array(run[slots.TAPE_OPERATIONS], (run[slots.TAPE_COUNT] * width,), np.int64)
        numbers = array(run[slots.TAPE_OPERATIONS], (run[slots.TAPE_COUNT] * width,), np.float64)
        counters = array(run[slots.TAPE_COUNTERS], (run[slots.TAPE_COUNT] * lines * LINE,), np.int64)
        like = array(run[slots.TAPE_OPERATIONS], (1,), element)
        lookups = np.empty(run[slots.TAPE_GROUPS] * GROUP, np.float32)
        s = np.empty(attend.AT_ONCE * run[slots.TAPE_MAX_TOKENS], np.float32)
        scratch = np.empty(run[slots.TAPE_SCRATCH_BYTES], np.uint8)
        sums, asked = np.empty(64, np.float32), np.zeros(2, np.int64)
        if amx is not None:
            if run[slots.TAPE_VECTORS] == 1:
                tiles.amx_begin_for_one(np.zeros(64, np.uint8))
            else:
                tiles.amx_begin(np.zeros(64, np.uint8))
        for i in range(run[slots.TAPE_FIRST], run[slots.TAPE_LAST]):
            op, number = ops[i * width : (i + 1) * width], numbers[i * width : (i + 1) * width]
            _wait(counters, lines, op, ops, me, threads, asked, run[slots.TAPE_YIELD])
            turn, count = 0, 0
            while turn < threads:
                share = (me + turn) % threads
                first, end = _share(op[slots.ITEMS], threads, share), _share(op[slots.ITEMS], threads, share + 1)
                taken = counters[(i * lines + share) * LINE :]
                item = first + (take(taken) if turn == 0 or first + read(taken) < end else end)
                if item >= end:
                    turn += 1
                    continue
                _do(op, number, like, lookups, s, sums, scratch, item, amx, blocks, states)
                count += 1
            if count > 0:
                give(counters[((i + 1) * lines - 1) * LINE :], count)
        if amx is not None:
            tiles.amx_end()

    name = kernel_cache.decoding(blocks=blocks is not None, states=states is not None)
    token.__qualname__ = f"{name}_{'bf16' if element == np.uint16 else 'fp32'}"
    return token


compiled = per_dtype(_make)
compiled_with_blocks = per_dtype(partial(_make, blocks=1))
compiled_with_states = per_dtype(partial(_make, states=1))
compiled_with_blocks_states = per_dtype(partial(_make, blocks=1, states=1))
