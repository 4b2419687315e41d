"""Around the matrix products of attention: rotary and re-arrangement, softmax's backward, row sums.

What: q, k and v come as (T, heads, D), a token a row; the products want each example's heads as blocks (heads, L, D).
`to_blocks` copies into blocks, with rotary on the way; `from_blocks` back, with the inverse rotary for gradients.
Letters: T tokens in the pack, H heads, D head size, R rotated part of it, L tokens in one example, G query heads to a
key head.
"""

import numpy as np
import torch
from numba import carray
from torch import Tensor

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu.parallel import array, block_rows, each_block, per_dtype, run
from halfbyte.layers.kernels.cpu.scalar import exp_f32, inlined, load, store


@inlined
def _move(x, stride, between, cos, sin, start, length, out, heads, d, back, first, last):  # type: ignore[no-untyped-def]
    r = cos.shape[1]
    half = r // 2
    for t in range(first, last):
        c, s = cos[t], sin[t]
        for h in range(heads):
            row = t * stride + h * between
            block = (start[t] * heads + h * length[t] + t - start[t]) * d
            at, to = (block, row) if back else (row, block)
            a, b = x[at : at + d], out[to : to + d]
            for j in range(half):
                v, w = load(a[j]), load(a[j + half])
                if back:
                    b[j] = store(v * load(c[j]) + w * load(s[j + half]), b)
                    b[j + half] = store(w * load(c[j + half]) - v * load(s[j]), b)
                else:
                    b[j] = store(v * load(c[j]) - w * load(s[j]), b)
                    b[j + half] = store(w * load(c[j + half]) + v * load(s[j + half]), b)
            for j in range(r, d):
                b[j] = a[j]


@inlined
def _softmax_rows(scores, dp, p, ds, lse, delta, scale, offset, tall, first, last):  # type: ignore[no-untyped-def]
    width = scores.shape[1]
    for i in range(first, last):
        seen = min(width, offset + i % tall + 1)  # causal: the columns that row i sees
        a, g = scores[i], dp[i]
        q, d = p[i], ds[i]
        m, e = lse[i], delta[i]
        for j in range(seen):
            v = exp_f32(a[j] * scale - m)
            q[j] = store(v, q)
            d[j] = store(v * (g[j] - e) * scale, d)
        for j in range(seen, width):
            q[j] = store(np.float32(0.0), q)
            d[j] = store(np.float32(0.0), d)


@inlined
def _dot_rows(a, b, start, length, out, heads, d, first, last):  # type: ignore[no-untyped-def]
    for t in range(first, last):
        for h in range(heads):
            at = (t * heads + h) * d
            u, v = a[at : at + d], b[at : at + d]
            total = np.float32(0.0)
            for j in range(d):
                total += load(u[j]) * load(v[j])
            out[start[t] * heads + h * length[t] + t - start[t]] = total


@per_dtype
def _move_kernel(element: type) -> object:
    def move(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        n, stride, between = s[1], s[12], s[14]
        heads, d = s[9], s[10]
        x, out = (
            array(s[3], ((n - 1) * stride + (heads - 1) * between + d,), element),
            array(s[8], (n * heads * d,), element),
        )
        cos, sin = array(s[4], (n, s[11]), element), array(s[5], (n, s[11]), element)
        start, length = array(s[6], (n,), np.int64), array(s[7], (n,), np.int64)
        each_block(s, _move, (x, stride, between, cos, sin, start, length, out, heads, d, s[13]))

    return move


@per_dtype
def _softmax_kernel(element: type) -> object:
    def softmax_backward(p):  # type: ignore[no-untyped-def]
        s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
        n, width = s[1], s[9]
        scores, dp = array(s[3], (n, width), np.float32), array(s[4], (n, width), np.float32)
        out, ds = array(s[5], (n, width), element), array(s[6], (n, width), element)
        lse, delta = array(s[7], (n,), np.float32), array(s[8], (n,), np.float32)
        each_block(s, _softmax_rows, (scores, dp, out, ds, lse, delta, np.float32(f[10]), s[11], s[12]))

    return softmax_backward


@per_dtype
def _dots_kernel(element: type) -> object:
    def row_dots(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        heads, d = s[8], s[9]
        size = s[1] * heads * d
        a, b = array(s[3], (size,), element), array(s[4], (size,), element)
        start, length = array(s[5], (s[1],), np.int64), array(s[6], (s[1],), np.int64)
        each_block(s, _dot_rows, (a, b, start, length, array(s[7], (s[1] * heads,), np.float32), heads, d))

    return row_dots


def to_blocks(x: Tensor, cos: Tensor, sin: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Rows of tokens to blocks of heads, rotated on the way.

    Args:
        x: (T, H, D), D contiguous; heads may lie in a wider matrix, as far apart as its strides say.
        cos, sin: (T, R) of x's dtype, R even and at most D; R = 0 copies.
        start: (T,) int64: the pack's tokens before the example of token t. Its blocks begin at row H * start.
        length: (T,) int64: tokens of its example.

    Returns:
        H * T * D elements, seen as (T, H, D): block after block, each (H, L, D).
    """
    return _moved(x, cos, sin, start, length, (x.stride(0), x.stride(1)), back=False)


def from_blocks(x: Tensor, cos: Tensor, sin: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """The gradient of `to_blocks`: blocks (H, L, D) to rows (T, H, D), rotated back."""
    return _moved(x, cos, sin, start, length, (x[0].numel(), x.shape[2]), back=True)


def _moved(
    x: Tensor, cos: Tensor, sin: Tensor, start: Tensor, length: Tensor, strides: tuple[int, int], *, back: bool
) -> Tensor:
    tokens, heads, d = x.shape
    out = pool.empty_like(x)
    values = (x, cos, sin, start, length, out, heads, d, cos.shape[1], strides[0], int(back), strides[1])
    run(_move_kernel(x.dtype), tokens, block_rows(heads * d), *values)
    return out


def softmax_backward(
    scores: Tensor, dp: Tensor, lse: Tensor, delta: Tensor, dtype: torch.dtype, *, scale: float, offset: int, tall: int
) -> tuple[Tensor, Tensor]:
    """p = exp(scale * scores - lse) and ds = p * (dp - delta) * scale, 0 where a row does not see a column.

    Args:
        scores, dp: (N, W) fp32; in fp32 they become p and ds. lse, delta: (N,) fp32. dtype: of p and ds.
        offset, tall: row i stands at position offset + i % tall and sees the columns up to its own.
    """
    p, ds = (x if x.dtype == dtype else pool.empty(x.shape, x, dtype) for x in (scores, dp))
    n, width = scores.shape
    values = (scores, dp, p, ds, lse, delta, width, float(scale), offset, tall)
    run(_softmax_kernel(dtype), n, block_rows(4 * width), *values)
    return p, ds


def row_dots(a: Tensor, b: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """sum over D of a * b for each token and head: (T, H, D) twice -> blocks of (H, L) in fp32."""
    tokens, heads, d = a.shape
    out = torch.empty(tokens * heads, dtype=torch.float32)
    run(_dots_kernel(a.dtype), tokens, block_rows(heads * d), a, b, start, length, out, heads, d)
    return out
