"""Around the matrix products of attention: rotary and re-arrangement, softmax's backward, row sums.

What: q, k and v come as (T, heads, D), a token a row; the products want each example's heads as blocks (heads, L, D).
`to_blocks` copies into blocks, with rotary on the way; `from_blocks` back, with the inverse rotary for gradients.
Letters: T tokens in the pack, H heads, D head size, R rotated part of it, L tokens in one example, G query heads to a
key head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import carray, cfunc, njit, types

from halfbyte.layers.kernels.cpu.parallel import block_rows, per_dtype, run
from halfbyte.layers.kernels.cpu.scalar import FASTMATH, exp_f32, load, pointer, store, take

if TYPE_CHECKING:
    from torch import Tensor


@njit(forceinline=True, fastmath=FASTMATH, error_model="numpy")
def _to_rows(x, stride, cos, sin, start, length, out, heads, d, r, first, last):  # type: ignore[no-untyped-def]
    half = r // 2
    for t in range(first, last):
        c, s = cos[t], sin[t]
        for h in range(heads):
            at = t * stride + h * d
            a = x[at : at + d]
            to = (start[t] * heads + h * length[t] + t - start[t]) * d
            b = out[to : to + d]
            for j in range(half):
                v, w = load(a[j]), load(a[j + half])
                b[j] = store(v * load(c[j]) - w * load(s[j]), b)
                b[j + half] = store(w * load(c[j + half]) + v * load(s[j + half]), b)
            for j in range(r, d):
                b[j] = a[j]


@njit(forceinline=True, fastmath=FASTMATH, error_model="numpy")
def _from_rows(x, cos, sin, start, length, out, heads, d, r, first, last):  # type: ignore[no-untyped-def]
    half = r // 2
    for t in range(first, last):
        c, s = cos[t], sin[t]
        for h in range(heads):
            at = (start[t] * heads + h * length[t] + t - start[t]) * d
            a = x[at : at + d]
            to = (t * heads + h) * d
            b = out[to : to + d]
            for j in range(half):
                v, w = load(a[j]), load(a[j + half])
                b[j] = store(v * load(c[j]) + w * load(s[j + half]), b)
                b[j + half] = store(w * load(c[j + half]) - v * load(s[j]), b)
            for j in range(r, d):
                b[j] = a[j]


@njit(forceinline=True, fastmath=FASTMATH, error_model="numpy")
def _softmax_rows(scores, dp, p, ds, lse, delta, scale, offset, tall, first, last):  # type: ignore[no-untyped-def]
    width = scores.shape[1]
    for i in range(first, last):
        seen = min(width, offset + i % tall + 1)  # causal: the columns that row i sees
        a, g, q, d = scores[i], dp[i], p[i], ds[i]
        m, e = lse[i], delta[i]
        for j in range(seen):
            v = exp_f32(a[j] * scale - m)
            q[j] = store(v, q)
            d[j] = store(v * (g[j] - e) * scale, d)
        for j in range(seen, width):
            q[j] = store(np.float32(0.0), q)
            d[j] = store(np.float32(0.0), d)


@njit(forceinline=True, fastmath=FASTMATH, error_model="numpy")
def _dot_rows(a, b, start, length, out, heads, d, first, last):  # type: ignore[no-untyped-def]
    for t in range(first, last):
        for h in range(heads):
            at = (t * heads + h) * d
            u, v = a[at : at + d], b[at : at + d]
            total = np.float32(0.0)
            for j in range(d):
                total += load(u[j]) * load(v[j])
            out[start[t] * heads + h * length[t] + t - start[t]] = total


def _to_blocks(element: object) -> object:
    @cfunc(types.void(types.voidptr), cache=True, error_model="numpy")
    def kernel(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        n, heads, d, r, stride, block = s[7], s[8], s[9], s[10], s[11], s[12]
        counter = carray(pointer(s[0]), (1,), np.int64)
        x = carray(pointer(s[1]), (n * stride,), element)
        cos, sin = carray(pointer(s[2]), (n, r), element), carray(pointer(s[3]), (n, r), element)
        start, length = carray(pointer(s[4]), (n,), np.int64), carray(pointer(s[5]), (n,), np.int64)
        out = carray(pointer(s[6]), (n * heads * d,), element)
        while True:
            first = take(counter) * block
            if first >= n:
                break
            _to_rows(x, stride, cos, sin, start, length, out, heads, d, r, first, min(n, first + block))

    return kernel


def _from_blocks(element: object) -> object:
    @cfunc(types.void(types.voidptr), cache=True, error_model="numpy")
    def kernel(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        n, heads, d, r, block = s[7], s[8], s[9], s[10], s[11]
        counter = carray(pointer(s[0]), (1,), np.int64)
        x = carray(pointer(s[1]), (n * heads * d,), element)
        cos, sin = carray(pointer(s[2]), (n, r), element), carray(pointer(s[3]), (n, r), element)
        start, length = carray(pointer(s[4]), (n,), np.int64), carray(pointer(s[5]), (n,), np.int64)
        out = carray(pointer(s[6]), (n * heads * d,), element)
        while True:
            first = take(counter) * block
            if first >= n:
                break
            _from_rows(x, cos, sin, start, length, out, heads, d, r, first, min(n, first + block))

    return kernel


def _softmax_backward(element: object) -> object:
    @cfunc(types.void(types.voidptr), cache=True, error_model="numpy")
    def kernel(p):  # type: ignore[no-untyped-def]
        s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
        n, width, block = s[7], s[8], s[12]
        counter = carray(pointer(s[0]), (1,), np.int64)
        scores, dp = carray(pointer(s[1]), (n, width), np.float32), carray(pointer(s[2]), (n, width), np.float32)
        out, ds = carray(pointer(s[3]), (n, width), element), carray(pointer(s[4]), (n, width), element)
        lse, delta = carray(pointer(s[5]), (n,), np.float32), carray(pointer(s[6]), (n,), np.float32)
        while True:
            first = take(counter) * block
            if first >= n:
                break
            last = min(n, first + block)
            _softmax_rows(scores, dp, out, ds, lse, delta, np.float32(f[9]), s[10], s[11], first, last)

    return kernel


def _row_dots(element: object) -> object:
    @cfunc(types.void(types.voidptr), cache=True, error_model="numpy")
    def kernel(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        n, heads, d, block = s[6], s[7], s[8], s[9]
        counter = carray(pointer(s[0]), (1,), np.int64)
        a, b = carray(pointer(s[1]), (n * heads * d,), element), carray(pointer(s[2]), (n * heads * d,), element)
        start, length = carray(pointer(s[3]), (n,), np.int64), carray(pointer(s[4]), (n,), np.int64)
        out = carray(pointer(s[5]), (n * heads,), np.float32)
        while True:
            first = take(counter) * block
            if first >= n:
                break
            _dot_rows(a, b, start, length, out, heads, d, first, min(n, first + block))

    return kernel


_to_kernel, _from_kernel = per_dtype(_to_blocks), per_dtype(_from_blocks)
_softmax_kernel, _dots_kernel = per_dtype(_softmax_backward), per_dtype(_row_dots)


def to_blocks(x: Tensor, cos: Tensor, sin: Tensor, start: Tensor, length: Tensor, out: Tensor) -> None:
    """Rows of tokens to blocks of heads, rotated on the way.

    Args:
        x: (T, H, D), each token's heads and D contiguous; its rows may lie in a wider matrix.
        cos, sin: (T, R) of x's dtype, R even and at most D; R = 0 copies.
        start: (T,) int64: the pack's tokens before the example of token t. Its blocks begin at row H * start.
        length: (T,) int64: tokens of its example.
        out: H * T * D elements: block after block, each (H, L, D).
    """
    tokens, heads, d = x.shape
    values = [x, cos, sin, start, length, out, tokens, heads, d, cos.shape[1], x.stride(0), block_rows(heads * d)]
    run(_to_kernel(x.dtype), values)


def from_blocks(x: Tensor, cos: Tensor, sin: Tensor, start: Tensor, length: Tensor, out: Tensor) -> None:
    """The gradient of `to_blocks`: blocks (H, L, D) to rows (T, H, D), rotated back."""
    tokens, heads, d = out.shape
    run(
        _from_kernel(x.dtype),
        [x, cos, sin, start, length, out, tokens, heads, d, cos.shape[1], block_rows(heads * d)],
    )


def softmax_backward(
    scores: Tensor,
    dp: Tensor,
    p: Tensor,
    ds: Tensor,
    lse: Tensor,
    delta: Tensor,
    *,
    scale: float,
    offset: int,
    tall: int,
) -> None:
    """p = exp(scale * scores - lse) and ds = p * (dp - delta) * scale, 0 where a row does not see a column.

    Args:
        scores, dp: (N, W) fp32. p, ds: (N, W) of the compute dtype. lse, delta: (N,) fp32.
        offset, tall: row i stands at position offset + i % tall and sees the columns up to its own.
    """
    n, width = scores.shape
    run(
        _softmax_kernel(p.dtype),
        [scores, dp, p, ds, lse, delta, n, width, float(scale), offset, tall, block_rows(4 * width)],
    )


def row_dots(a: Tensor, b: Tensor, start: Tensor, length: Tensor, out: Tensor) -> None:
    """sum over D of a * b for each token and head: (T, H, D) twice -> blocks of (H, L) in fp32."""
    tokens, heads, d = a.shape
    run(_dots_kernel(a.dtype), [a, b, start, length, out, tokens, heads, d, block_rows(heads * d)])
