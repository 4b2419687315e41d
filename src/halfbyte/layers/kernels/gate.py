"""The gated activation of an MLP, act(gate) * up, forward and backward, and the elementwise half of LoRA's dropout.

Letters: N elements in all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from halfbyte.layers.kernels.parallel import BLOCK_ELEMENTS, per_dtype, run
from halfbyte.layers.kernels.scalar import (
    FASTMATH,
    add_pair,
    below,
    counter_bits,
    drop_pair,
    exp_f32,
    hash_u32,
    pointer,
    take,
)

SILU = 0  # else gelu by tanh
_K, _C = np.float32(0.7978845608028654), np.float32(0.044715)  # sqrt(2/pi)


@njit(inline="always", error_model="numpy")
def _sigmoid(v):  # type: ignore[no-untyped-def]
    return np.float32(1.0) / (np.float32(1.0) + exp_f32(-v))


def _forward(load: Any, store: Any, element: Any) -> Any:
    size = np.dtype(element).itemsize

    @njit(fastmath=FASTMATH, cache=True, error_model="numpy")
    def part(g, u, h, kind):  # type: ignore[no-untyped-def]
        if kind == SILU:
            for j in range(g.shape[0]):
                v = load(g[j])
                h[j] = store(v * _sigmoid(v) * load(u[j]))
        else:
            for j in range(g.shape[0]):
                v = load(g[j])
                s = _sigmoid(np.float32(2.0) * _K * (v + _C * v * v * v))  # (1 + tanh(z)) / 2 = sigmoid(2 z)
                h[j] = store(v * s * load(u[j]))

    @njit(inline="always", error_model="numpy")
    def at(address, shape):  # type: ignore[no-untyped-def]
        return carray(pointer(address), shape, element)

    @cfunc(types.void(types.voidptr), cache=True, error_model="numpy")
    def kernel(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        n, block = s[4], s[6]
        counter = carray(pointer(s[0]), (1,), np.int64)
        while True:
            a = take(counter) * block
            if a >= n:
                break
            b = min(n, a + block)
            n_here, skip = (b - a,), a * size
            part(at(s[1] + skip, n_here), at(s[2] + skip, n_here), at(s[3] + skip, n_here), s[5])

    return kernel


def _backward(load: Any, store: Any, element: Any) -> Any:
    size = np.dtype(element).itemsize

    @njit(fastmath=FASTMATH, cache=True, error_model="numpy")
    def part(dh, g, u, dg, du, kind):  # type: ignore[no-untyped-def]
        one = np.float32(1.0)
        if kind == SILU:
            for j in range(g.shape[0]):
                v, d = load(g[j]), load(dh[j])
                s = _sigmoid(v)
                w = load(u[j])
                du[j] = store(d * v * s)
                dg[j] = store(d * w * s * (one + v * (one - s)))
        else:
            for j in range(g.shape[0]):
                v, d = load(g[j]), load(dh[j])
                s = _sigmoid(np.float32(2.0) * _K * (v + _C * v * v * v))
                slope = np.float32(2.0) * _K * (one + np.float32(3.0) * _C * v * v)
                w = load(u[j])
                du[j] = store(d * v * s)
                dg[j] = store(d * w * s * (one + v * (one - s) * slope))

    @njit(inline="always", error_model="numpy")
    def at(address, shape):  # type: ignore[no-untyped-def]
        return carray(pointer(address), shape, element)

    @cfunc(types.void(types.voidptr), cache=True, error_model="numpy")
    def kernel(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        n, block = s[6], s[8]
        counter = carray(pointer(s[0]), (1,), np.int64)
        while True:
            a = take(counter) * block
            if a >= n:
                break
            b = min(n, a + block)
            n_here, skip = (b - a,), a * size
            dh, g, u = at(s[1] + skip, n_here), at(s[2] + skip, n_here), at(s[3] + skip, n_here)
            part(dh, g, u, at(s[4] + skip, n_here), at(s[5] + skip, n_here), s[7])

    return kernel


def _masked(*, add: bool) -> Any:
    """Kernels over pairs of elements: each pair takes its 2 x 16 random bits from one hash of its number.

    A bf16 pair is one 32-bit word; an fp32 pair is two words. `out` = x or `out` += x where kept.
    """

    def make(load: Any, store: Any, element: Any) -> Any:
        is_pair = element is np.uint16
        words = 1 if is_pair else 2

        if is_pair:

            @njit(cache=True, error_model="numpy")
            def part(x, out, low, seed, start):  # type: ignore[no-untyped-def]
                for j in range(x.shape[0]):
                    kept = drop_pair(x[j], hash_u32(counter_bits(start, j, seed)), low)
                    out[j] = add_pair(out[j], kept) if add else kept

        else:

            @njit(cache=True, error_model="numpy")
            def part(x, out, low, seed, start):  # type: ignore[no-untyped-def]
                for j in range(x.shape[0]):
                    bits = hash_u32(counter_bits(start, j >> 1, seed))
                    kept = np.float32(0.0) if below(bits, low, j & 1 == 1) else x[j]
                    out[j] = out[j] + kept if add else kept

        word = np.uint32 if is_pair else np.float32

        @cfunc(types.void(types.voidptr), cache=True)
        def kernel(p):  # type: ignore[no-untyped-def]
            s = carray(p, (32,), np.int64)
            n, block = s[3], s[6]  # pairs
            counter = carray(pointer(s[0]), (1,), np.int64)
            while True:
                a = take(counter) * block
                if a >= n:
                    break
                shape, skip = ((min(n, a + block) - a) * words,), a * words * 4
                x, out = carray(pointer(s[1] + skip), shape, word), carray(pointer(s[2] + skip), shape, word)
                part(x, out, np.uint32(s[4]), np.uint32(s[5]), np.uint32(a))

        return kernel

    return make


_forward_kernel, _backward_kernel = per_dtype(_forward), per_dtype(_backward)
_dropped_kernel, _add_dropped_kernel = per_dtype(_masked(add=False)), per_dtype(_masked(add=True))


def gated(g: Any, u: Any, h: Any, kind: int) -> None:
    """h = act(g) * u, all of one shape and contiguous."""
    run(_forward_kernel(g.dtype), [g, u, h, g.numel(), kind, BLOCK_ELEMENTS])


def gated_backward(dh: Any, g: Any, u: Any, dg: Any, du: Any, kind: int) -> None:
    run(_backward_kernel(g.dtype), [dh, g, u, dg, du, g.numel(), kind, BLOCK_ELEMENTS])


def threshold(p: float) -> int:
    """Dropout's probability in 1/65536: an element whose 16 random bits are below it becomes 0."""
    return round(p * 65536)


def dropped(x: Any, out: Any, p: float, seed: int) -> None:
    """out = x where the mask of `seed` keeps it, else 0; not scaled by 1 / (1 - p). x has an even size."""
    run(_dropped_kernel(x.dtype), [x, out, x.numel() // 2, threshold(p), seed & 0xFFFFFFFF, BLOCK_ELEMENTS // 2])


def add_dropped(x: Any, out: Any, p: float, seed: int) -> None:
    """out += x where the mask of `seed` keeps it: the same mask as `dropped` has for this shape and seed."""
    run(_add_dropped_kernel(x.dtype), [x, out, x.numel() // 2, threshold(p), seed & 0xFFFFFFFF, BLOCK_ELEMENTS // 2])
