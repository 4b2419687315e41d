"""The gated delta rule of examples laid end to end, forward and backward, a chunk of tokens at a time.

What: S_t = e^g_t S_{t-1} + k_t u_t^T with u_t = beta_t (v_t - e^g_t S_{t-1}^T k_t), and o_t = S_t^T q_t, for unit keys
and queries, the queries times D^-1/2. In a chunk, with G_i the sum of g up to i: (I + L) u = beta (v - e^G_i S^T k_i),
where L_ij = beta_i k_i k_j e^(G_i - G_j) for j < i; o = e^G_i S^T q_i + sum_j q_i k_j e^(G_i - G_j) u_j for j <= i.
A task is an example and a key head; it keeps the state in fp32. Backward makes the states again, and the u.
Source: Gated DeltaNet, arXiv:2412.06464, section 3.3; `torch_chunk_gated_delta_rule` in transformers. How g's gradient
follows from those of q and k: gated linear attention, arXiv:2312.06635, appendix C.
Cost: forward 6 D O + C (2 D + 2 O) FLOP a token and value head, backward 2.4 times that; q, k, v, g and beta are kept.

Letters: T tokens, K key heads, H value heads, D a key's width, O a value's, C tokens of a chunk, L of an example.
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
from halfbyte.layers.kernels.cpu.recurrent.sizes import CHUNK, SPARE, matrix_numbers, thread_bytes
from halfbyte.layers.kernels.cpu.scalar import fill_registers, inlined, load, store, up
from halfbyte.layers.kernels.cpu.tiles import COLUMNS32 as COLUMNS
from halfbyte.layers.kernels.cpu.tiles import ROWS32 as ROWS
from halfbyte.layers.kernels.cpu.tiles import row32, tile32

# A thread's matrices in fp32, all of one size: of a chunk -L / beta, scores, decays; x = u / beta, u, the state; and
# in backward gradients.
N, SCORES, E, X, U, S, Y, DU, DX, DQ, DK, DK_ADDED, MATRICES = range(13)
# Its operands of products, in rows: q, k, the triangle of q k, u, a state; what else is read once; and in backward.
Q, K, P, UR, SR, T, Z, YR, DXR, DPR, DNR = range(11)
# The same as tiles read them: k as a right operand, that turned, and k turned to it; q; and what else is read once.
KT, KB, KL, QB, QL, SB, TB, ZB, UB, UT, TRIANGLE, TURNED, OPERANDS = range(11, 24)
# Numbers of each token: the sum of g in the chunk, its e^, that negative; e^ of what is left of it; beta; gradients.
SUM, GROWN, TAKEN, LEFT, BETA, DSUM, DBETA, VECTORS = range(8)
_EPS = np.float32(1e-6)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@inlined
def _inverse_norm(x):  # type: ignore[no-untyped-def]
    fill_registers()
    total = _EPS
    for c in range(len(x)):
        total += load(x[c]) * load(x[c])
    return _ONE / np.sqrt(total)


@inlined
def _unit_rows(x, row, rows, d, scale, out, wide):  # type: ignore[no-untyped-def]
    fill_registers()
    for i in range(rows):
        a, to = x[i * row : i * row + d], out[i * wide : i * wide + d]
        r = _inverse_norm(a) * scale
        for c in range(d):
            to[c] = store(load(a[c]) * r, to)
    padded(out, wide, rows, d)


@inlined
def _unit_gradient(x, dx, scale, out):  # type: ignore[no-untyped-def]
    """The gradient of a row x from that of scale x / |x|."""
    r = _inverse_norm(x)
    along = _ZERO
    for c in range(len(dx)):
        along += load(x[c]) * dx[c]
    along *= r * r
    for c in range(len(dx)):
        out[c] = store(scale * r * (dx[c] - load(x[c]) * along), out)


@inlined
def _solve(n, x, u, beta, rows, wide):  # type: ignore[no-untyped-def]
    """x_i += sum_{j < i} n_ij u_j with u_i = beta_i x_i, rows in their order; in fp32."""
    for i in range(0, rows, ROWS):
        for j in range(0, wide if i else 0, COLUMNS):
            tile32(x[i * wide + j :], wide, n[i * CHUNK :], CHUNK, 1, u[j:], wide, i, 1)
        for r in range(i, min(rows, i + ROWS)):
            a, to = x[r * wide : (r + 1) * wide], u[r * wide : (r + 1) * wide]
            for j in range(0, wide, COLUMNS):
                row32(a[j:], wide, n[r * CHUNK + i :], CHUNK, 1, u[i * wide + j :], wide, r - i, 1)
            f = beta[r]
            for c in range(wide):
                to[c] = f * a[c]


@inlined
def _solve_back(n, du, dx, beta, rows, wide):  # type: ignore[no-untyped-def]
    """The gradients of u and x in `_solve`: du_i += sum_{j > i} n_ji dx_j with dx_i = beta_i du_i."""
    for i in range(up(rows, ROWS) - ROWS, -1, -ROWS):
        below = min(rows, i + ROWS)
        for j in range(0, wide if below < rows else 0, COLUMNS):
            a, b = n[below * CHUNK + i :], dx[below * wide + j :]
            tile32(du[i * wide + j :], wide, a, 1, CHUNK, b, wide, rows - below, 1)
        for r in range(below - 1, i - 1, -1):
            a, to = du[r * wide : (r + 1) * wide], dx[r * wide : (r + 1) * wide]
            for j in range(0, wide, COLUMNS):
                b = dx[(r + 1) * wide + j :]
                row32(a[j:], wide, n[(r + 1) * CHUNK + r :], 1, CHUNK, b, wide, below - 1 - r, 1)
            f = beta[r]
            for c in range(wide):
                to[c] = f * a[c]


@inlined
def _chunk(given, sizes, place, work, op, each):  # type: ignore[no-untyped-def]
    """Of a chunk: unit k, decays, beta, and what is solved; returns k turned, as a right operand."""
    qkv, g, betas = given
    keys, heads, d, _, wd, _, row = sizes
    at, rows, key_head, head = place
    _unit_rows(qkv[at * row + (keys + key_head) * d :], row, rows, d, _ONE, op[K], wd)
    kt = right_turned(op[K], wd, rows, d, op[KT], CHUNK)
    summed(g, heads, head, at, rows, each[SUM], each[GROWN], each[LEFT])
    for i in range(rows):
        each[BETA, i], each[TAKEN, i] = betas[(at + i) * heads + head], -each[GROWN, i]
    decays(each[SUM], rows, work[E])
    scores(work[N], op[K], wd, kt, rows, d)
    decayed(work[N], work[E], rows, 1, -_ONE, work[N])
    return kt


@inlined
def _queries(given, sizes, place, work, op, kt):  # type: ignore[no-untyped-def]
    """Of a chunk: unit q, and the triangle of q k."""
    _, _, d, _, wd, _, row = sizes
    at, rows, key_head, _ = place
    _unit_rows(given[0][at * row + key_head * d :], row, rows, d, _ONE / np.sqrt(np.float32(d)), op[Q], wd)
    scores(work[SCORES], op[Q], wd, kt, rows, d)
    decayed(work[SCORES], work[E], rows, 0, _ONE, op[P])


@inlined
def _updates(qkv, sizes, place, work, op, each, state, more, x):  # type: ignore[no-untyped-def]
    """x = u / beta and u of a chunk, from its values and the state before it, as a right operand, if there is one
    (`more`)."""
    keys, _, d, o, wd, wo, row = sizes
    at, rows, _, head = place
    v = qkv[at * row + 2 * keys * d + head * o :]
    if more:
        multiply(x, wo, op[K], wd, state, wo, rows, wo, d, 0)
        for i in range(rows):
            a, to = v[i * row : i * row + o], x[i * wo : i * wo + o]
            for c in range(o):
                to[c] = load(a[c]) - each[GROWN, i] * to[c]
    else:
        copy_rows(v, row, rows, o, x, wo)
    _solve(work[N], x, work[U], each[BETA], rows, wo)


@inlined
def _state_right(state, sizes, op):  # type: ignore[no-untyped-def]
    _, _, d, o, _, wo, _ = sizes
    return right(rounded(state, wo, d, o, op[SR]), wo, d, op[SB])


@inlined
def _next_state(sizes, rows, work, op, each, before, more, state):  # type: ignore[no-untyped-def]
    """e^G_last before + sum_i k_i (e^(G_last - G_i) u_i)^T."""
    _, _, d, o, wd, wo, _ = sizes
    k = left_turned(right(op[K], wd, rows, op[KB]), wd, rows, d, op[KL])
    next_state(k, wd, d, work[U], wo, o, (op[T], op[TB]), rows, each[GROWN], each[LEFT], before, more, state)


@inlined
def _place(task, starts, keys):  # type: ignore[no-untyped-def]
    """Of a task: its example's first token and the one behind its last, and its key head."""
    return starts[task // keys], starts[task // keys + 1], task % keys


@inlined
def _forward_task(given, starts, out, sizes, work, op, each, task, _):  # type: ignore[no-untyped-def]
    keys, heads, d, o, wd, wo, _ = sizes
    start, end, key_head = _place(task, starts, keys)
    state, y = work[S], work[Y]
    for head in range(key_head * (heads // keys), (key_head + 1) * (heads // keys)):
        for at in range(start, end, CHUNK):
            rows, more = min(CHUNK, end - at), 1 if at > start else 0
            place = (at, rows, key_head, head)
            _queries(given, sizes, place, work, op, _chunk(given, sizes, place, work, op, each))
            before = _state_right(state, sizes, op) if more else op[SB]
            _updates(given[0], sizes, place, work, op, each, before, more, work[X])
            if more:
                multiply(y, wo, op[Q], wd, before, wo, rows, wo, d, 0)
                scaled(y, wo, rows, o, each[GROWN], y)
            u = right(rounded(work[U], wo, rows, o, op[UR]), wo, rows, op[UB])
            lower(y, wo, op[P], u, rows, wo, more)
            copy_rows(y, wo, rows, o, out[(at * heads + head) * o :], heads * o)
            if at + rows < end:
                _next_state(sizes, rows, work, op, each, state, more, state)


@inlined
def _states_again(given, start, end, key_head, head, sizes, work, op, each, states, xs):  # type: ignore[no-untyped-def]
    """The state before each chunk but the first, and x of each."""
    size = (sizes[2] + SPARE) * sizes[5]
    for at in range(start, end, CHUNK):
        rows, more = min(CHUNK, end - at), 1 if at > start else 0
        before, place = states[(at - start) // CHUNK * size :], (at, rows, key_head, head)
        _chunk(given, sizes, place, work, op, each)
        turned = _state_right(before, sizes, op) if more else op[SB]
        _updates(given[0], sizes, place, work, op, each, turned, more, xs[(at - start) * sizes[5] :])
        if at + rows < end:
            _next_state(sizes, rows, work, op, each, before, more, before[size:])


@inlined
def _values_back(sizes, rows, work, op, each, x, behind, later):  # type: ignore[no-untyped-def]
    """Of a chunk's output and of the state behind it (S, if `later`): the gradients of u, v, beta and both triangles;
    the part of k's that is taken off g's, and what of the state behind is added to these. Returns q and k as right
    operands."""
    _, _, d, o, wd, wo, _ = sizes
    du, dk = work[DU], work[DK]
    u = work[U]
    scaled(x, wo, rows, o, each[BETA], u)
    if later:
        ds = rounded(work[S], wo, d, o, op[SR])
        multiply(du, wo, op[K], wd, right(ds, wo, d, op[SB]), wo, rows, wo, d, 0)
        scaled(du, wo, rows, o, each[LEFT], du)
        for i in range(d):  # rounded as in the product that is taken off it
            each[DSUM, rows - 1] += dot(ds[i * wo : i * wo + o], behind[i * wo : i * wo + o])
        scaled(u, wo, rows, o, each[LEFT], op[T])
        padded(op[T], wo, rows, o)
        multiply(dk, wd, op[T], wo, right_turned(ds, wo, d, o, op[TURNED], wd), wd, rows, wd, o, 0)
    upper(
        du, wo, triangle_left(op[P], rows, op[TRIANGLE], op[TURNED]), right(op[YR], wo, rows, op[TB]), rows, wo, later
    )
    _solve_back(work[N], du, work[DX], each[BETA], rows, wo)
    for i in range(rows):
        each[DBETA, i] = dot(du[i * wo : i * wo + o], x[i * wo : i * wo + o])
    ut = right_turned(rounded(u, wo, rows, o, op[UR]), wo, rows, o, op[UT], CHUNK)
    scores(work[SCORES], op[YR], wo, ut, rows, o)
    decayed(work[SCORES], work[E], rows, 0, _ONE, op[DPR])
    scores(work[SCORES], rounded(work[DX], wo, rows, o, op[DXR]), wo, ut, rows, o)
    decayed(work[SCORES], work[E], rows, 1, -_ONE, op[DNR])
    q, k = right(op[Q], wd, rows, op[QB]), right(op[K], wd, rows, op[KB])
    upper(dk, wd, triangle_left(op[DPR], rows, op[TRIANGLE], op[TURNED]), q, rows, wd, later)
    upper(dk, wd, triangle_left(op[DNR], rows, op[TRIANGLE], op[TURNED]), k, rows, wd, 1)
    return q, k


@inlined
def _keys_back(sizes, rows, work, op, each, q, k, state, more, later):  # type: ignore[no-untyped-def]
    """The gradients of q, of the other part of k, and of g's sums; and that of the state before, in place of that
    behind."""
    _, _, d, o, wd, wo, _ = sizes
    ds, t = work[S], op[T]
    z, dq = op[Z], work[DQ]
    dk = work[DK_ADDED]
    if more:
        st = right_turned(rounded(state, wo, d, o, op[SR]), wo, d, o, op[TURNED], wd)
        scaled(op[YR], wo, rows, o, each[GROWN], t)
        scaled(work[DX], wo, rows, o, each[TAKEN], z)
        padded(t, wo, rows, o)
        padded(z, wo, rows, o)
        multiply(dq, wd, t, wo, st, wd, rows, wd, o, 0)
        multiply(dk, wd, z, wo, st, wd, rows, wd, o, 0)
        if later:
            f = each[GROWN, rows - 1]
            for j in range(d * wo):
                ds[j] *= f
        tb, zb = right(t, wo, rows, op[TB]), right(z, wo, rows, op[ZB])
        multiply_turned(ds, wo, left_turned(q, wd, rows, d, op[QL]), wd, tb, wo, d, wo, rows, later)
        multiply_turned(ds, wo, left_turned(k, wd, rows, d, op[KL]), wd, zb, wo, d, wo, rows, 1)
    lower(dq, wd, op[DPR], k, rows, wd, more)
    lower(dk, wd, op[DNR], k, rows, wd, more)
    for i in range(rows):
        first, last = i * wd, i * wd + d
        k_row, added = op[K, first:last], dk[first:last]
        off = work[DK, first:last]
        each[DSUM, i] += dot(dq[first:last], op[Q, first:last]) + dot(added, k_row) - dot(off, k_row)
        for c in range(d):
            off[c] += added[c]


@inlined
def _backward_task(given, starts, grads, sizes, work, op, each, memory, task, _):  # type: ignore[no-untyped-def]
    dout, dqkv, dg, dbetas = grads
    keys, heads, d, o, wd, wo, row = sizes
    states, xs, dqs, dks = memory
    start, end, key_head = _place(task, starts, keys)
    size = (d + SPARE) * wo
    dqs[: (end - start) * wd] = _ZERO
    dks[: (end - start) * wd] = _ZERO
    for head in range(key_head * (heads // keys), (key_head + 1) * (heads // keys)):
        _states_again(given, start, end, key_head, head, sizes, work, op, each, states, xs)
        for chunk in range((end - start - 1) // CHUNK, -1, -1):
            at = start + chunk * CHUNK
            rows, more = min(CHUNK, end - at), 1 if chunk else 0
            later, before = 1 if at + rows < end else 0, states[chunk * size :]
            place = (at, rows, key_head, head)
            _queries(given, sizes, place, work, op, _chunk(given, sizes, place, work, op, each))
            copy_rows(dout[(at * heads + head) * o :], heads * o, rows, o, op[YR], wo)
            padded(op[YR], wo, rows, o)
            each[DSUM, :rows] = _ZERO
            q, k = _values_back(sizes, rows, work, op, each, xs[chunk * CHUNK * wo :], before[size:], later)
            _keys_back(sizes, rows, work, op, each, q, k, before, more, later)
            copy_rows(work[DX], wo, rows, o, dqkv[at * row + 2 * keys * d + head * o :], row)
            total = _ZERO
            for i in range(rows - 1, -1, -1):
                total += each[DSUM, i]
                dg[(at + i) * heads + head], dbetas[(at + i) * heads + head] = total, each[DBETA, i]
            for j in range(rows * wd):
                dqs[chunk * CHUNK * wd + j] += work[DQ, j]
                dks[chunk * CHUNK * wd + j] += work[DK, j]
    for i in range(end - start):
        place = (start + i) * row + key_head * d
        x, to = given[0][place : place + d], dqkv[place : place + d]
        _unit_gradient(x, dqs[i * wd : i * wd + d], _ONE / np.sqrt(np.float32(d)), to)
        place += keys * d
        x, to = given[0][place : place + d], dqkv[place : place + d]
        _unit_gradient(x, dks[i * wd : i * wd + d], _ONE, to)


@inlined
def _given(s, element):  # type: ignore[no-untyped-def]
    """Sizes (keys, heads, widths, widths in whole tiles, from a row of q, k and v to the next), how many numbers q, k
    and v have, and what forward and backward read."""
    keys, heads = s[9], s[10]
    d, o = s[11], s[12]
    count, width = s[14] * heads, 2 * keys * d + heads * o
    qkv, starts = array(s[3], (s[14] * width,), element), array(s[6], (s[15] + 1,), np.int64)
    g, beta = array(s[4], (count,), np.float32), array(s[5], (count,), np.float32)
    sizes = (keys, heads, d, o, up(d, COLUMNS), up(o, COLUMNS), width)
    return sizes, (qkv, g, beta), starts, array(s[7], (count * o,), element)


@inlined
def _thread_matrices(s, operand):  # type: ignore[no-untyped-def]
    """Its matrices, its operands, numbers of each token, and the address behind them."""
    work, at = matrices(chunks.thread_memory(s, s[8], s[13]), MATRICES, s[16], np.float32)
    op, at = matrices(at, OPERANDS, s[16], operand)
    return work, op, np.empty((VECTORS, CHUNK), np.float32), at


@per_dtype
def _forward_kernel(element: type) -> object:
    operand, amx = operands_of(element), chunks.AMX

    def delta_rule(pointer):  # type: ignore[no-untyped-def]
        s = carray(pointer, (32,), np.int64)
        sizes, given, starts, out = _given(s, element)
        work, op, each, _ = _thread_matrices(s, operand)
        chunks.each_task(s, _forward_task, (given, starts, out, sizes, work, op, each), amx)

    return delta_rule


@per_dtype
def _backward_kernel(element: type) -> object:
    operand, amx = operands_of(element), chunks.AMX

    def delta_rule_backward(pointer):  # type: ignore[no-untyped-def]
        s = carray(pointer, (32,), np.int64)
        sizes, given, starts, dout = _given(s, element)
        longest = up(s[17], CHUNK)
        dqkv, dg = array(s[18], (len(given[0]),), element), array(s[19], (len(given[1]),), np.float32)
        grads = (dout, dqkv, dg, array(s[20], (len(given[1]),), np.float32))
        work, op, each, at = _thread_matrices(s, operand)
        states, at = numbers(at, longest // CHUNK * (sizes[2] + SPARE) * sizes[5])
        xs, at = numbers(at, longest * sizes[5])
        dqs, at = numbers(at, longest * sizes[4])
        dks, at = numbers(at, longest * sizes[4])
        chunks.each_task(s, _backward_task, (given, starts, grads, sizes, work, op, each, (states, xs, dqs, dks)), amx)

    return delta_rule_backward


def forward(qkv: Tensor, g: Tensor, beta: Tensor, starts: Tensor, keys: int, d: int) -> Tensor:
    """(T, H O). qkv: (T, 2 K D + H O) of bf16 or fp32, contiguous; g, beta: (T, H) fp32; starts: (examples + 1,)."""
    out = pool.empty((qkv.shape[0], qkv.shape[1] - 2 * keys * d), qkv)
    _run(_forward_kernel(qkv.dtype), (qkv, g, beta, starts, out), keys, d)
    return out


def backward(
    dout: Tensor, qkv: Tensor, g: Tensor, beta: Tensor, starts: Tensor, keys: int, d: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of qkv, g and beta, from that of the output (T, H O), contiguous."""
    grads = pool.empty(qkv.shape, qkv), torch.empty_like(g), torch.empty_like(beta)
    _run(_backward_kernel(qkv.dtype), (qkv, g, beta, starts, dout), keys, d, *grads)
    return grads


def _run(compiled: object, given: tuple[Tensor, ...], keys: int, d: int, *grads: Tensor) -> None:
    _, g, _, starts, out = given
    (tokens, heads), longest = g.shape, int(starts.diff().max())
    o, examples = out.shape[1] // heads, len(starts) - 1
    size = thread_bytes(heads, keys, d, o, longest, chunks.TILE, scan=False)
    memory = pool.empty((size * torch.get_num_threads(),), g, torch.uint8)
    sizes = keys, heads, d, o, size, tokens, examples, matrix_numbers(d, o, chunks.TILE), longest
    run(compiled, examples * keys, 1, *given, memory, *sizes, *grads)
