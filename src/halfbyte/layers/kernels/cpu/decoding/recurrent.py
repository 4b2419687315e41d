"""Recurrent layers a token at a time: short convolution, gated delta rule, state-space scan, gates with their norms.

What: the recurrences of `kernels/cpu/recurrent` as they are written there, on a text's state. Vectors with places are
tokens of texts and run in their order; others are a text each. A text's state begins at its first token.
Source: as there; a norm with its gate as `gated_norm.py`.
Cost: of a head its state, read twice and written once; the second time from cache.

Letters: M vectors, W channels, J taps, H heads, G key heads or groups, N a state's rows, P its columns.
"""

import math

import numpy as np

from halfbyte.layers.kernels.cpu.decoding import slots
from halfbyte.layers.kernels.cpu.decoding.emit import F32, F32X8, F32X16, I64, Code, emitted
from halfbyte.layers.kernels.cpu.parallel import array
from halfbyte.layers.kernels.cpu.scalar import Value, exp_f32, inlined, sigmoid

CHANNELS = 256  # of a convolution's item
LANES = {2: 16, 4: 8}  # that a state's columns are a multiple of: its tape's type's bytes
_UNIT_EPS = np.float32(1e-6)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


def scratch_bytes(rows: int, columns: int) -> int:
    """What DELTA and SCAN need: queries, keys and what is added."""
    return 64 + 4 * (2 * rows + columns)


@emitted("state rows columns weights out")
def _recall(code: Code, args: Value) -> None:
    """out (columns) = the sum of weights_i times row i of the state."""
    _rows(code, args, None)


@emitted("state rows columns weights out decay:f keys added")
def _update(code: Code, args: Value) -> None:
    """The same after row i became decay times itself + keys_i added."""
    _rows(code, args, args.added)


def _rows(code: Code, args: Value, added: Value | None) -> None:
    b, (kind, lanes) = code.b, (F32X16, 16) if code.is_bf16 else (F32X8, 8)
    registers = (8, 4, 2, 1) if code.is_bf16 else (4, 2, 1)  # of columns at once: there are 32, and 16
    for size, first in code.ladder(b.udiv(args.columns, I64(lanes)), registers):
        sums, parts = code.variables(kind, size), list[Value]()
        at = first, 4 * lanes
        if added is not None:
            parts = [code.load(code.at(added, at, 4 * lanes * k), kind) for k in range(size)]
        with code.rolled(args.rows) as i:
            of = (args.weights,) if added is None else (args.weights, args.keys)
            weight, *key = (code.every(code.load(code.at(one, (i, 4)), F32), lanes) for one in of)
            for k, total in enumerate(sums):
                place = code.at(args.state, at, (i, b.mul(args.columns, I64(4))), 4 * lanes * k)
                number = code.load(place, kind)
                if added is not None:
                    number = code.fma(key[0], parts[k], b.fmul(code.every(args.decay, lanes), number))
                    code.store(number, place)
                b.store(code.fma(weight, number, b.load(total)), total)
        for k, total in enumerate(sums):
            code.store(b.load(total), code.at(args.out, at, 4 * lanes * k))


@inlined
def _span(op, item, parts):  # type: ignore[no-untyped-def]
    """Vectors of an item, from the first to before the last, and which of `parts` it is."""
    if op[slots.STATE_PLACES] != 0:
        return np.int64(0), op[slots.USED], item
    m = item // parts
    return m, min(m + 1, op[slots.USED]), item % parts


@inlined
def _state(op, m):  # type: ignore[no-untyped-def]
    """The position of vector m, and the address of its text's state."""
    position, place = array(op[slots.STATE_POSITIONS], (m + 1,), np.int64)[m], np.int64(m)
    if op[slots.STATE_PLACES] != 0:
        place = array(op[slots.STATE_PLACES], (m + 1,), np.int64)[m]
    return position, op[slots.STATE] + place * op[slots.STATE_BYTES]


@inlined
def conv(op, item):  # type: ignore[no-untyped-def]
    """CONV: some channels of act(bias + sum_j w_j x_{t-j}), before and behind it multiplied where that is asked for."""
    width, taps = op[slots.CONV_WIDTH], op[slots.CONV_TAPS]
    begin, end, part = _span(op, item, (width + CHANNELS - 1) // CHANNELS)
    first, n = part * CHANNELS, min(CHANNELS, width - part * CHANNELS)
    w, bias = op[slots.CONV_W] + 4 * first, array(op[slots.CONV_BIAS] + 4 * first, (n,), np.float32)
    newest = array(w, (n,), np.float32)
    for m in range(begin, end):
        t, state = _state(op, m)
        if t < 0:
            continue
        shift = (m * op[slots.STATE_X_ROW] + first) * 4
        x = array(op[slots.STATE_X] + shift, (n,), np.float32)
        to = array(op[slots.STATE_OUT] + (m * op[slots.STATE_OUT_ROW] + first) * 4, (n,), np.float32)
        for c in range(n):
            to[c] = bias[c]
        for j in range(1, min(taps, t + 1)):
            tap = array(w + 4 * j * width, (n,), np.float32)
            past = array(state + ((t - j) % (taps - 1) * width + first) * 4, (n,), np.float32)
            for c in range(n):
                to[c] += tap[c] * past[c]
        here = array(state + (t % (taps - 1) * width + first) * 4, (n,), np.float32)  # in the oldest one's place
        for c in range(n):
            here[c] = x[c]
        if op[slots.CONV_BEFORE] != 0:
            before = array(op[slots.CONV_BEFORE] + shift, (n,), np.float32)
            for c in range(n):
                here[c] *= before[c]
        for c in range(n):
            to[c] += newest[c] * here[c]
        if op[slots.CONV_SILU] != 0:
            for c in range(n):
                to[c] *= sigmoid(to[c])
        if op[slots.CONV_AFTER] != 0:
            after = array(op[slots.CONV_AFTER] + shift, (n,), np.float32)
            for c in range(n):
                to[c] *= after[c]


@inlined
def _unit(x, scale, out):  # type: ignore[no-untyped-def]
    total = _UNIT_EPS
    for c in range(len(x)):
        total += x[c] * x[c]
    f = scale / np.float32(math.sqrt(total))
    for c in range(len(x)):
        out[c] = f * x[c]


@inlined
def _rate(op, m, head, factor):  # type: ignore[no-untyped-def]
    """softplus(dt + bias), and how much of a state is left by it."""
    place = m * op[slots.SCAN_ROW] + head
    v = factor * array(op[slots.SCAN_DT], (place + 1,), np.float32)[place]
    v += array(op[slots.SCAN_BIAS], (head + 1,), np.float32)[head]
    rate = v if v > np.float32(20.0) else np.float32(math.log1p(math.exp(v)))
    left = exp_f32(array(op[slots.SCAN_A], (head + 1,), np.float32)[head] * rate)
    return rate, left if left > np.float32(1e-30) else _ZERO  # products below 2^-126 take a hundred times as long


@inlined
def scan(op, number, like, scratch, item):  # type: ignore[no-untyped-def]
    """DELTA and SCAN: one head's state, a token further; what its query reads there."""
    heads, groups = op[slots.SCAN_HEADS], op[slots.SCAN_GROUPS]
    rows, columns = op[slots.SCAN_ROWS], op[slots.SCAN_COLUMNS]
    begin, end, head = _span(op, item, heads)
    group, factor = head * groups // heads, np.float32(number[slots.SCAN_FACTOR])
    is_delta = op[slots.KIND] == slots.DELTA
    at = (np.int64(scratch.ctypes.data) + 63) // 64 * 64
    queries, keys = array(at, (rows,), np.float32), array(at + 4 * rows, (rows,), np.float32)
    added = array(at + 8 * rows, (columns,), np.float32)
    for m in range(begin, end):
        t, state = _state(op, m)
        if t < 0:
            continue
        x, state = op[slots.STATE_X] + 4 * m * op[slots.STATE_X_ROW], state + 4 * head * rows * columns
        to = array(op[slots.STATE_OUT] + (m * op[slots.STATE_OUT_ROW] + head * columns) * 4, (columns,), np.float32)
        if t == 0:
            numbers = array(state, (rows * columns,), np.float32)
            for j in range(rows * columns):
                numbers[j] = _ZERO
        if is_delta:
            _, decay = _rate(op, m, head, _ONE)
            _unit(array(x + 4 * group * rows, (rows,), np.float32), _ONE / np.float32(math.sqrt(rows)), queries)
            _unit(array(x + 4 * (groups + group) * rows, (rows,), np.float32), _ONE, keys)
            v = array(x + 4 * (2 * groups * rows + head * columns), (columns,), np.float32)
            place = m * op[slots.SCAN_ROW] + head
            beta = factor * sigmoid(array(op[slots.SCAN_BETA], (place + 1,), np.float32)[place])
            _recall(like, state, rows, columns, keys.ctypes.data, added.ctypes.data)
            for c in range(columns):
                added[c] = beta * (v[c] - decay * added[c])
            of, by = keys.ctypes.data, queries.ctypes.data
        else:
            rate, decay = _rate(op, m, head, factor)
            v = array(x + 4 * head * columns, (columns,), np.float32)
            for c in range(columns):
                added[c] = rate * v[c]
            of = x + 4 * (heads * columns + group * rows)
            by = of + 4 * groups * rows
        _update(like, state, rows, columns, by, to.ctypes.data, decay, of, added.ctypes.data)
        if not is_delta:
            skip = array(op[slots.SCAN_SKIP], (heads,), np.float32)[head]
            for c in range(columns):
                to[c] += skip * v[c]


@inlined
def gated(op, number, m):  # type: ignore[no-untyped-def]
    """GATED: vector m in groups, normalised where there is a weight and times act(gate) where there is one; in fp32,
    filled up to whole chunks."""
    n, width = op[slots.GATED_WIDTH], op[slots.GATED_TO_WIDTH]
    factor, last = np.float32(number[slots.GATED_FACTOR]), np.float32(number[slots.GATED_OUT_FACTOR])
    out = array(op[slots.GATED_PLAIN] + m * width * 4, (width,), np.float32)
    for group in range(op[slots.GATED_GROUPS]):
        x = array(op[slots.GATED_X] + (m * op[slots.GATED_X_ROW] + group * n) * 4, (n,), np.float32)
        shift = (m * op[slots.GATED_GATE_ROW] + group * op[slots.GATED_STEP]) * 4
        z, to = array(op[slots.GATED_GATE] + shift, (n,), np.float32), out[group * n : (group + 1) * n]
        for c in range(n):
            to[c] = x[c]
        if op[slots.GATED_GATE] != 0 and op[slots.GATED_FIRST] != 0:
            _times_gate(op, z, factor, to)
        if op[slots.GATED_WEIGHT] != 0:
            at = op[slots.GATED_WEIGHT] + (4 * group * n if op[slots.GATED_EACH] != 0 else 0)
            w, total = array(at, (n,), np.float32), _ZERO
            for c in range(n):
                total += to[c] * to[c]
            share = _ONE / np.float32(math.sqrt(total / np.float32(n) + np.float32(number[slots.GATED_EPS])))
            for c in range(n):
                to[c] *= share * w[c]
        if op[slots.GATED_GATE] != 0 and op[slots.GATED_FIRST] == 0:
            _times_gate(op, z, factor, to)
        for c in range(n):
            to[c] *= last
    return out


@inlined
def _times_gate(op, z, factor, to):  # type: ignore[no-untyped-def]
    is_silu = op[slots.GATED_SIGMOID] == 0
    for c in range(len(to)):
        v = factor * z[c]
        to[c] *= sigmoid(v) * (v if is_silu else _ONE)
