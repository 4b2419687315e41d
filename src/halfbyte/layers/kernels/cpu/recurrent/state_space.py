"""Mamba-2's state-space scan of examples laid end to end, forward and backward, a chunk of tokens at a time.

What: S_t = e^a_t S_{t-1} + dt_t b_t x_t^T and y_t = S_t^T c_t + skip x_t. In a chunk, with A_i the sum of a up to i:
y = e^A_i S^T c_i + sum_j c_i b_j e^(A_i - A_j) dt_j x_j for j <= i. A task is an example and some heads of a group,
which share b and c and so their products; it keeps the states in fp32. Backward makes the states again.
Source: Mamba-2, arXiv:2405.21060, section 6; `mamba2_chunk_scan` in transformers.
Cost: forward 4 N P + C P FLOP a token and head, and C N a group; backward 2.5 times that; x, b, c, a and dt are kept.

Letters: T tokens, H heads, G groups, N a state's rows, P a head's width, C tokens of a chunk.
"""

import numpy as np
import torch
from numba import carray
from torch import Tensor

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu.parallel import array, per_dtype, run
from halfbyte.layers.kernels.cpu.recurrent import chunks
from halfbyte.layers.kernels.cpu.recurrent.chunks import matrices, numbers

from halfbyte.layers.kernels.cpu.recurrent.products import (  # isort: skip
    decayed, decays, left_turned, lower, multiply, multiply_turned, operands_of, padded, right, right_turned, rounded,
    scores, triangle_left, upper,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.recurrent.rows import copy_rows, dot, next_state, scaled, summed
from halfbyte.layers.kernels.cpu.recurrent.sizes import CHUNK, SPARE, matrix_numbers, parts_of, thread_bytes
from halfbyte.layers.kernels.cpu.scalar import fill_registers, inlined, load, store, up
from halfbyte.layers.kernels.cpu.tiles import COLUMNS32 as COLUMNS

# A thread's matrices in fp32, all of one size: of a chunk products c b, decays; x, dt x, the output; and gradients.
CB, E, X, XD, Y, DXD, DM, DCB, DB, DC, DH, MATRICES = range(12)
# Its operands, in rows: b, c, products with their decays, dt x, a state, what is read once, the output's gradient.
B, C, M, XDR, SR, T, YR = range(7)
# The same as tiles read them: b turned, as a right operand, that turned; c; and what else is read once.
BT, BB, BL, CR, CL, XB, XT, SB, TB, ST, TRIANGLE, TURNED, OPERANDS = range(7, 20)
# Numbers of each token: the sum of a in the chunk, its e^; e^ of what is left of it; dt; and a gradient.
SUM, GROWN, LEFT, DT, DSUM, VECTORS = range(6)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@inlined
def _place(task, starts, sizes):  # type: ignore[no-untyped-def]
    """Of a task: its example's first token and the one behind its last, its group, part of it, and heads."""
    heads, groups, parts, _, _, _, _, _ = sizes
    example, rest = task // (groups * parts), task % (groups * parts)
    group, part = rest // parts, rest % parts
    here = heads // groups
    first, last = group * here + part * here // parts, group * here + (part + 1) * here // parts
    return starts[example], starts[example + 1], group, part, first, last


@inlined
def _group(xbc, sizes, at, rows, group, work, op):  # type: ignore[no-untyped-def]
    """b and c of a chunk, and their products; returns b turned, as a left operand."""
    heads, groups, _, n, p, wn, _, row = sizes
    x = xbc[at * row + heads * p + group * n :]
    copy_rows(x, row, rows, n, op[B], wn)
    padded(op[B], wn, rows, n)
    copy_rows(x[groups * n :], row, rows, n, op[C], wn)
    padded(op[C], wn, rows, n)
    scores(work[CB], op[C], wn, right_turned(op[B], wn, rows, n, op[BT], CHUNK), rows, n)
    return left_turned(right(op[B], wn, rows, op[BB]), wn, rows, n, op[BL])


@inlined
def _head(given, sizes, at, rows, head, work, each):  # type: ignore[no-untyped-def]
    """x, dt x and decays of a chunk of one head."""
    xbc, a, dts, _ = given
    heads, p = sizes[0], sizes[4]
    wp, row = sizes[6], sizes[7]
    summed(a, heads, head, at, rows, each[SUM], each[GROWN], each[LEFT])
    for i in range(rows):
        each[DT, i] = dts[(at + i) * heads + head]
    copy_rows(xbc[at * row + head * p :], row, rows, p, work[X], wp)
    scaled(work[X], wp, rows, p, each[DT], work[XD])


@inlined
def _next_state(sizes, rows, work, op, each, b, before, more, state):  # type: ignore[no-untyped-def]
    _, _, _, n, p, wn, wp, _ = sizes
    next_state(b, wn, n, work[XD], wp, p, (op[T], op[TB]), rows, each[GROWN], each[LEFT], before, more, state)


@inlined
def _forward_task(given, starts, out, sizes, work, op, each, states, task, _):  # type: ignore[no-untyped-def]
    heads, _, _, n, p, wn, wp, _ = sizes
    y = work[Y]
    start, end, group, _, first, last = _place(task, starts, sizes)
    for at in range(start, end, CHUNK):
        rows, more = min(CHUNK, end - at), 1 if at > start else 0
        b = _group(given[0], sizes, at, rows, group, work, op)
        for head in range(first, last):
            state, skip = states[(head - first) * (n + SPARE) * wp :], given[3][head]
            _head(given, sizes, at, rows, head, work, each)
            decays(each[SUM], rows, work[E])
            decayed(work[CB], work[E], rows, 0, _ONE, op[M])
            if more:
                turned = right(rounded(state, wp, n, p, op[SR]), wp, n, op[SB])
                multiply(y, wp, op[C], wn, turned, wp, rows, wp, n, 0)
                scaled(y, wp, rows, p, each[GROWN], y)
            x = right(rounded(work[XD], wp, rows, p, op[XDR]), wp, rows, op[XB])
            lower(y, wp, op[M], x, rows, wp, more)
            for i in range(rows):
                place = ((at + i) * heads + head) * p
                v, u = y[i * wp : i * wp + p], work[X, i * wp : i * wp + p]
                to = out[place : place + p]
                for j in range(p):
                    to[j] = store(v[j] + skip * u[j], to)
            if at + rows < end:
                _next_state(sizes, rows, work, op, each, b, state, more, state)


@inlined
def _scores_back(rows, work, each):  # type: ignore[no-untyped-def]
    """Of the gradients of the decayed products: their part in those of the products, and of the decays' sums."""
    fill_registers()
    to_sums = each[DSUM]
    for i in range(rows):
        first, last = i * CHUNK, i * CHUNK + i + 1
        v, w = work[DM, first:last], work[CB, first:last]
        to, decay = work[DCB, first:last], work[E, first:last]
        total = _ZERO
        for j in range(i + 1):
            e = v[j] * decay[j]
            to[j] += e
            total += e * w[j]
            to_sums[j] -= e * w[j]
        to_sums[i] += total


@inlined
def _add_state_part(dh, x, wide, rows, n, total, sign, to_sums):  # type: ignore[no-untyped-def]
    """Rows of dh, to the total; and sign times their products with x, to the gradient of the decays' sums."""
    fill_registers()
    for i in range(rows):
        here, to = dh[i * wide : i * wide + n], total[i * wide : i * wide + n]
        to_sums[i] += sign * dot(here, x[i * wide : i * wide + n])
        for c in range(n):
            to[c] += here[c]


@inlined
def _head_back(sizes, rows, work, op, each, c, state, behind, ds, more, later):  # type: ignore[no-untyped-def]
    """Gradients of a chunk of one head: of dt x, of the decays' sums, of the state before, in place of that behind;
    those of b, c and their products are added. c: turned, as a left operand."""
    _, _, _, n, p, wn, wp, _ = sizes
    t, dxd = op[T], work[DXD]
    dh = work[DH]
    sums = each[DSUM]
    sums[:rows] = _ZERO
    decays(each[SUM], rows, work[E])
    decayed(work[CB], work[E], rows, 0, _ONE, op[M])
    if later:
        sr = rounded(ds, wp, n, p, op[SR])
        multiply(dxd, wp, op[B], wn, right(sr, wp, n, op[SB]), wp, rows, wp, n, 0)
        scaled(dxd, wp, rows, p, each[LEFT], dxd)
        scaled(work[XD], wp, rows, p, each[LEFT], t)
        padded(t, wp, rows, p)
        multiply(dh, wn, t, wp, right_turned(sr, wp, n, p, op[ST], wn), wn, rows, wn, p, 0)
        _add_state_part(dh, op[B], wn, rows, n, work[DB], -_ONE, sums)
        for i in range(n):  # rounded as in the product that is taken off it
            sums[rows - 1] += dot(sr[i * wp : i * wp + p], behind[i * wp : i * wp + p])
    upper(
        dxd, wp, triangle_left(op[M], rows, op[TRIANGLE], op[TURNED]), right(op[YR], wp, rows, op[TB]), rows, wp, later
    )
    xt = right_turned(rounded(work[XD], wp, rows, p, op[XDR]), wp, rows, p, op[XT], CHUNK)
    scores(work[DM], op[YR], wp, xt, rows, p)
    _scores_back(rows, work, each)
    if more:
        scaled(op[YR], wp, rows, p, each[GROWN], t)
        padded(t, wp, rows, p)
        st = right_turned(rounded(state, wp, n, p, op[SR]), wp, n, p, op[ST], wn)
        multiply(dh, wn, t, wp, st, wn, rows, wn, p, 0)
        _add_state_part(dh, op[C], wn, rows, n, work[DC], _ONE, sums)
        if later:
            f = each[GROWN, rows - 1]
            for j in range(n * wp):
                ds[j] *= f
        multiply_turned(ds, wp, c, wn, right(t, wp, rows, op[TB]), wp, n, wp, rows, later)


@inlined
def _write_head(grads, sizes, place, skip, work, op, each):  # type: ignore[no-untyped-def]
    """The gradients of x, dt and a of a chunk."""
    dxbc, da, ddts = grads
    heads, p = sizes[0], sizes[4]
    wp, row = sizes[6], sizes[7]
    at, rows, head = place
    total = _ZERO
    for i in range(rows - 1, -1, -1):
        first, last = i * wp, i * wp + p
        u, v = work[DXD, first:last], op[YR, first:last]
        to = dxbc[(at + i) * row + head * p :]
        total += each[DSUM, i]
        da[(at + i) * heads + head], ddts[(at + i) * heads + head] = total, dot(u, work[X, first:last])
        for j in range(p):
            to[j] = store(each[DT, i] * u[j] + skip * load(v[j]), to)


@inlined
def _backward_task(given, starts, grads, sizes, work, op, each, states, dstates, task, _):  # type: ignore[no-untyped-def]
    dout, dxbc, da, ddts, dbc = grads
    heads, groups, _, n, p, wn, wp, _ = sizes
    start, end, group, part, first, last = _place(task, starts, sizes)
    size, many = (n + SPARE) * wp, last - first
    for at in range(start, end - CHUNK, CHUNK):
        b = _group(given[0], sizes, at, CHUNK, group, work, op)
        for head in range(first, last):
            before = states[((at - start) // CHUNK * many + head - first) * size :]
            _head(given, sizes, at, CHUNK, head, work, each)
            _next_state(sizes, CHUNK, work, op, each, b, before, 1 if at > start else 0, before[many * size :])
    for chunk in range((end - start - 1) // CHUNK, -1, -1):
        at = start + chunk * CHUNK
        rows, more = min(CHUNK, end - at), 1 if chunk else 0
        later = 1 if at + rows < end else 0
        _group(given[0], sizes, at, rows, group, work, op)
        turned = left_turned(right(op[C], wn, rows, op[CR]), wn, rows, n, op[CL])
        for i in range(DCB, DH):
            work[i] = _ZERO
        for head in range(first, last):
            before, ds = states[(chunk * many + head - first) * size :], dstates[(head - first) * size :]
            _head(given, sizes, at, rows, head, work, each)
            copy_rows(dout[(at * heads + head) * p :], heads * p, rows, p, op[YR], wp)
            padded(op[YR], wp, rows, p)
            _head_back(sizes, rows, work, op, each, turned, before, before[many * size :], ds, more, later)
            _write_head((dxbc, da, ddts), sizes, (at, rows, head), given[3][head], work, op, each)
        dcb = rounded(work[DCB], CHUNK, rows, CHUNK, op[M])
        lower(work[DC], wn, dcb, right(op[B], wn, rows, op[BB]), rows, wn, 1)
        c = right(op[C], wn, rows, op[CR])
        upper(work[DB], wn, triangle_left(dcb, rows, op[TRIANGLE], op[TURNED]), c, rows, wn, 1)
        to = dbc[((part * (len(da) // heads) + at) * 2 * groups + group) * n :]
        copy_rows(work[DB], wn, rows, n, to, 2 * groups * n)
        copy_rows(work[DC], wn, rows, n, to[groups * n :], 2 * groups * n)


@inlined
def _given(s, element):  # type: ignore[no-untyped-def]
    """Sizes (heads, groups, parts, N, P, both in whole tiles, from a row of x, b and c to the next), and what forward
    and backward read."""
    heads, tokens = s[10], s[15]
    n, p = s[13], s[14]
    width = heads * p + 2 * s[11] * n
    sizes = (heads, s[11], s[12], n, p, up(n, COLUMNS), up(p, COLUMNS), width)
    xbc, a = array(s[3], (tokens * width,), element), array(s[4], (tokens * heads,), np.float32)
    given = (xbc, a, array(s[5], (tokens * heads,), np.float32), array(s[6], (heads,), np.float32))
    return sizes, given, array(s[7], (s[16] + 1,), np.int64), array(s[8], (tokens * heads * p,), element)


@inlined
def _thread_matrices(s, sizes, operand):  # type: ignore[no-untyped-def]
    """Its matrices, its operands, the states of its heads, and the address behind them."""
    work, at = matrices(chunks.thread_memory(s, s[9], s[17]), MATRICES, s[18], np.float32)
    op, at = matrices(at, OPERANDS, s[18], operand)
    count = (sizes[0] // (sizes[1] * sizes[2]) + 1) * (sizes[3] + SPARE) * sizes[6]
    states, at = numbers(at, count)
    return work, op, states, at


@per_dtype
def _forward_kernel(element: type) -> object:
    operand, amx = operands_of(element), chunks.AMX

    def state_space(pointer):  # type: ignore[no-untyped-def]
        s = carray(pointer, (32,), np.int64)
        sizes, given, starts, out = _given(s, element)
        work, op, states, _ = _thread_matrices(s, sizes, operand)
        each = np.empty((VECTORS, CHUNK), np.float32)
        chunks.each_task(s, _forward_task, (given, starts, out, sizes, work, op, each, states), amx)

    return state_space


@per_dtype
def _backward_kernel(element: type) -> object:
    operand, amx = operands_of(element), chunks.AMX

    def state_space_backward(pointer):  # type: ignore[no-untyped-def]
        s = carray(pointer, (32,), np.int64)
        sizes, given, starts, dout = _given(s, element)
        work, op, dstates, at = _thread_matrices(s, sizes, operand)
        states, at = numbers(at, len(dstates) * (up(s[19], CHUNK) // CHUNK))
        dxbc, da = array(s[20], (len(given[0]),), element), array(s[21], (len(given[1]),), np.float32)
        ddt, width = array(s[22], (len(given[1]),), np.float32), 2 * sizes[1] * sizes[3]
        grads = (dout, dxbc, da, ddt, array(s[23], (sizes[2] * s[15] * width,), np.float32))
        each = np.empty((VECTORS, CHUNK), np.float32)
        chunks.each_task(s, _backward_task, (given, starts, grads, sizes, work, op, each, states, dstates), amx)

    return state_space_backward


def forward(xbc: Tensor, a: Tensor, dt: Tensor, skip: Tensor, starts: Tensor, groups: int, n: int) -> Tensor:
    """(T, H P). xbc: (T, H P + 2 G N) of bf16 or fp32, contiguous; a, dt: (T, H), skip: (H,), fp32; starts:
    (examples + 1,)."""
    out = pool.empty((xbc.shape[0], xbc.shape[1] - 2 * groups * n), xbc)
    _run(_forward_kernel(xbc.dtype), (xbc, a, dt, skip, starts, out), groups, n)
    return out


def backward(
    dout: Tensor, xbc: Tensor, a: Tensor, dt: Tensor, skip: Tensor, starts: Tensor, groups: int, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of xbc, a and dt, from that of the output (T, H P), contiguous."""
    dxbc = pool.empty(xbc.shape, xbc)
    da, ddt = torch.empty_like(a), torch.empty_like(dt)
    dbc = pool.empty((parts_of(a.shape[1], groups), len(xbc), 2 * groups * n), xbc, torch.float32)
    _run(_backward_kernel(xbc.dtype), (xbc, a, dt, skip, starts, dout), groups, n, dxbc, da, ddt, dbc)
    for part in dbc[1:]:
        dbc[0].add_(part)
    dxbc[:, dout.shape[1] :] = dbc[0]
    return dxbc, da, ddt


def _run(compiled: object, given: tuple[Tensor, ...], groups: int, n: int, *grads: Tensor) -> None:
    _, a, _, _, starts, out = given
    (tokens, heads), longest = a.shape, int(starts.diff().max())
    p, examples = out.shape[1] // heads, len(starts) - 1
    size, parts = thread_bytes(heads, groups, n, p, longest, chunks.TILE, scan=True), parts_of(heads, groups)
    memory = pool.empty((size * torch.get_num_threads(),), a, torch.uint8)
    sizes = heads, groups, parts, n, p, tokens, examples, size, matrix_numbers(n, p, chunks.TILE), longest
    run(compiled, examples * groups * parts, 1, *given, memory, *sizes, *grads)
