"""An MLP's activation, act(x) or act(gate) * up, forward and backward, and the elementwise half of LoRA's dropout."""

import numpy as np
from numba import carray
from torch import Tensor

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu.parallel import BLOCK_ELEMENTS, array, block_rows, each_block, per_dtype, run

from halfbyte.layers.kernels.cpu.scalar import (  # isort: skip
    GELU, SILU, counter_bits, drop_pair, hash_u32, inlined, load, normal_share, sigmoid, store,
)  # fmt: skip

_K, _C = np.float32(0.7978845608028654), np.float32(0.044715)  # sqrt(2/pi)


@inlined
def _forward_rows(g, u, h, sizes, scale, first, last):  # type: ignore[no-untyped-def]
    width, row, u_row, kind = sizes
    for i in range(first, last):
        x, y = g[i * row : i * row + width], u[i * u_row : i * u_row + width]
        out = h[i * width : (i + 1) * width]
        if kind == SILU:
            for j in range(width):
                v = load(x[j]) * scale
                out[j] = store(v * sigmoid(v) * load(y[j]), h)
        elif kind == GELU:
            for j in range(width):
                v = load(x[j]) * scale
                share, _ = normal_share(v)
                out[j] = store(v * share * load(y[j]), h)
        else:
            for j in range(width):
                v = load(x[j]) * scale
                s = sigmoid(np.float32(2.0) * _K * (v + _C * v * v * v))  # (1 + tanh(z)) / 2 = sigmoid(2 z)
                out[j] = store(v * s * load(y[j]), h)


@inlined
def _backward_rows(dh, g, u, dg, du, sizes, scale, first, last):  # type: ignore[no-untyped-def]
    one = np.float32(1.0)
    width, row, u_row, dg_row, du_row, kind = sizes
    for i in range(first, last):
        x, y = g[i * row : i * row + width], u[i * u_row : i * u_row + width]
        d_out = dh[i * width : (i + 1) * width]
        dx, dy = dg[i * dg_row : i * dg_row + width], du[i * du_row : i * du_row + width]
        if kind == SILU:
            for j in range(width):
                v, d = load(x[j]) * scale, load(d_out[j])
                s = sigmoid(v)
                w = load(y[j])
                dy[j] = store(d * v * s, du)
                dx[j] = store(d * w * s * (one + v * (one - s)) * scale, dg)
        elif kind == GELU:
            for j in range(width):
                v, d = load(x[j]) * scale, load(d_out[j])
                share, density = normal_share(v)
                w = load(y[j])
                dy[j] = store(d * v * share, du)
                dx[j] = store(d * w * (share + v * density) * scale, dg)
        else:
            for j in range(width):
                v, d = load(x[j]) * scale, load(d_out[j])
                s = sigmoid(np.float32(2.0) * _K * (v + _C * v * v * v))
                slope = np.float32(2.0) * _K * (one + np.float32(3.0) * _C * v * v)
                w = load(y[j])
                dy[j] = store(d * v * s, du)
                dx[j] = store(d * w * s * (one + v * (one - s) * slope) * scale, dg)


@inlined
def _activate(x, y, kind, first, last):  # type: ignore[no-untyped-def]
    z, out = x[first:last], y[first:last]
    if kind == SILU:
        for j in range(len(z)):
            v = load(z[j])
            out[j] = store(v * sigmoid(v), y)
    else:
        for j in range(len(z)):
            v = load(z[j])
            out[j] = store(v * sigmoid(np.float32(2.0) * _K * (v + _C * v * v * v)), y)


@inlined
def _activate_backward(dy, x, dx, kind, first, last):  # type: ignore[no-untyped-def]
    one, out = np.float32(1.0), dx[first:last]
    d_out, z = dy[first:last], x[first:last]
    if kind == SILU:
        for j in range(len(z)):
            v = load(z[j])
            s = sigmoid(v)
            out[j] = store(load(d_out[j]) * s * (one + v * (one - s)), dx)
    else:
        for j in range(len(z)):
            v = load(z[j])
            s = sigmoid(np.float32(2.0) * _K * (v + _C * v * v * v))
            slope = np.float32(2.0) * _K * (one + np.float32(3.0) * _C * v * v)
            out[j] = store(load(d_out[j]) * s * (one + v * (one - s) * slope), dx)


@inlined
def mask_words(x, out, low, start, seed):  # type: ignore[no-untyped-def]
    """Words of x -> out, those of their numbers 0 that the mask of `seed` drops; the first word is number `start`."""
    for j in range(x.shape[0]):
        out[j] = drop_pair(x[j], hash_u32(counter_bits(start, j, seed)), low)


@inlined
def _mask_part(x, out, low, seed, first, last):  # type: ignore[no-untyped-def]
    mask_words(x[first:last], out[first:last], low, np.uint32(first), seed)


@inlined
def _mask_rows(x, out, low, seed, keys, first, last):  # type: ignore[no-untyped-def]
    for i in range(first, last):
        mask_words(x[i], out[i], low, np.uint32(0), hash_u32(keys[i] ^ seed))


@per_dtype
def _forward_kernel(element: type) -> object:
    def glu(p):  # type: ignore[no-untyped-def]
        s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
        n, width = s[1], s[6]
        row, u_row = s[7], s[8]
        g, u = array(s[3], ((n - 1) * row + width,), element), array(s[4], ((n - 1) * u_row + width,), element)
        h, sizes = array(s[5], (n * width,), element), (width, row, u_row, s[9])
        each_block(s, _forward_rows, (g, u, h, sizes, np.float32(f[10])))

    return glu


@per_dtype
def _backward_kernel(element: type) -> object:
    def glu_backward(p):  # type: ignore[no-untyped-def]
        s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
        n, width = s[1], s[8]
        sizes = (width, s[9], s[10], s[11], s[12], s[13])
        rows = n - 1
        g, u = array(s[4], (rows * s[9] + width,), element), array(s[5], (rows * s[10] + width,), element)
        dg, du = array(s[6], (rows * s[11] + width,), element), array(s[7], (rows * s[12] + width,), element)
        each_block(s, _backward_rows, (array(s[3], (n * width,), element), g, u, dg, du, sizes, np.float32(f[14])))

    return glu_backward


@per_dtype
def _activation_kernel(element: type) -> object:
    def activation(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        each_block(s, _activate, (array(s[3], (s[1],), element), array(s[4], (s[1],), element), s[5]))

    return activation


@per_dtype
def _activation_backward_kernel(element: type) -> object:
    def activation_backward(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        dy, x = array(s[3], (s[1],), element), array(s[4], (s[1],), element)
        each_block(s, _activate_backward, (dy, x, array(s[5], (s[1],), element), s[6]))

    return activation_backward


@per_dtype
def _mask_kernel(element: type) -> object:
    """A pair of elements, which is one word, has 2 x 16 random bits from one hash of its number."""
    word = np.uint32 if element is np.uint16 else np.uint64

    def drop(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        x, out = array(s[3], (s[1],), word), array(s[4], (s[1],), word)
        each_block(s, _mask_part, (x, out, np.uint32(s[5]), np.uint32(s[6])))

    return drop


@per_dtype
def _mask_rows_kernel(element: type) -> object:
    """As `_mask_kernel`, with a seed for each row of words."""
    word = np.uint32 if element is np.uint16 else np.uint64

    def drop_rows(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        x, out = array(s[3], (s[1], s[8]), word), array(s[4], (s[1], s[8]), word)
        keys = array(s[7], (s[1],), np.uint32)
        each_block(s, _mask_rows, (x, out, np.uint32(s[5]), np.uint32(s[6]), keys))

    return drop_rows


def glu(g: Tensor, u: Tensor, kind: int, scale: float = 1.0) -> Tensor:
    """act(scale g) * u, contiguous, for g and u (.., I), each contiguous or a part of each row of what is."""
    h, width = pool.empty(g.shape, g), g.shape[-1]
    sizes = width, g.stride(-2), u.stride(-2), kind, float(scale)
    run(_forward_kernel(g.dtype), g.numel() // width, block_rows(width), g, u, h, *sizes)
    return h


def glu_backward(dh: Tensor, g: Tensor, u: Tensor, kind: int, dg: Tensor, du: Tensor, scale: float = 1.0) -> None:
    """The gradients of g and u into dg and du; all four lie as in `glu`. dh: contiguous."""
    width = g.shape[-1]
    sizes = width, *(x.stride(-2) for x in (g, u, dg, du)), kind, float(scale)
    run(_backward_kernel(g.dtype), g.numel() // width, block_rows(width), dh, g, u, dg, du, *sizes)


def activation(x: Tensor, out: Tensor, kind: int) -> None:
    """out = act(x), SILU or GELU by tanh; both contiguous, of one size."""
    run(_activation_kernel(x.dtype), x.numel(), BLOCK_ELEMENTS, x, out, kind)


def activation_backward(dy: Tensor, x: Tensor, dx: Tensor, kind: int) -> None:
    """The gradient of x into dx; all contiguous, of one size."""
    run(_activation_backward_kernel(x.dtype), x.numel(), BLOCK_ELEMENTS, dy, x, dx, kind)


def drop(x: Tensor, out: Tensor, p: float, seed: int) -> None:
    """out = x where the mask of `seed` keeps it, else 0; not scaled by 1 / (1 - p). x is of even size; may be out."""
    low = round(p * 65536)  # an element whose 16 random bits are below it becomes 0
    run(_mask_kernel(x.dtype), x.numel() // 2, BLOCK_ELEMENTS // 2, x, out, low, seed & 0xFFFFFFFF)


def drop_rows(x: Tensor, out: Tensor, p: float, seed: int, keys: Tensor) -> None:
    """As `drop`, of x (N, D) with D even, with a key for each row: (N,) int32. The mask is `dropout.keep_mask`'s."""
    low, words = round(p * 65536), x.shape[1] // 2
    run(_mask_rows_kernel(x.dtype), x.shape[0], block_rows(x.shape[1]), x, out, low, seed & 0xFFFFFFFF, keys, words)
