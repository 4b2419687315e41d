"""The gated activation of an MLP, act(gate) * up, forward and backward, and the elementwise half of LoRA's dropout.

Letters: N elements in all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import overload

from halfbyte.layers.kernels.cpu.parallel import BLOCK_ELEMENTS, per_dtype, run
from halfbyte.layers.kernels.cpu.scalar import (
    FASTMATH,
    below,
    counter_bits,
    drop_pair,
    exp_f32,
    hash_u32,
    load,
    pointer,
    store,
    take,
)

if TYPE_CHECKING:
    from torch import Tensor

SILU = 0  # else gelu by tanh
_K, _C = np.float32(0.7978845608028654), np.float32(0.044715)  # sqrt(2/pi)


@njit(inline="always", error_model="numpy")
def _sigmoid(v):  # type: ignore[no-untyped-def]
    return np.float32(1.0) / (np.float32(1.0) + exp_f32(-v))


@njit(forceinline=True, fastmath=FASTMATH, error_model="numpy")
def _forward_part(g, u, h, kind):  # type: ignore[no-untyped-def]
    if kind == SILU:
        for j in range(g.shape[0]):
            v = load(g[j])
            h[j] = store(v * _sigmoid(v) * load(u[j]), h)
    else:
        for j in range(g.shape[0]):
            v = load(g[j])
            s = _sigmoid(np.float32(2.0) * _K * (v + _C * v * v * v))  # (1 + tanh(z)) / 2 = sigmoid(2 z)
            h[j] = store(v * s * load(u[j]), h)


@njit(forceinline=True, fastmath=FASTMATH, error_model="numpy")
def _backward_part(dh, g, u, dg, du, kind):  # type: ignore[no-untyped-def]
    one = np.float32(1.0)
    if kind == SILU:
        for j in range(g.shape[0]):
            v, d = load(g[j]), load(dh[j])
            s = _sigmoid(v)
            w = load(u[j])
            du[j] = store(d * v * s, du)
            dg[j] = store(d * w * s * (one + v * (one - s)), dg)
    else:
        for j in range(g.shape[0]):
            v, d = load(g[j]), load(dh[j])
            s = _sigmoid(np.float32(2.0) * _K * (v + _C * v * v * v))
            slope = np.float32(2.0) * _K * (one + np.float32(3.0) * _C * v * v)
            w = load(u[j])
            du[j] = store(d * v * s, du)
            dg[j] = store(d * w * s * (one + v * (one - s) * slope), dg)


def _forward(element: type) -> object:
    size = np.dtype(element).itemsize

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
            here, skip = (b - a,), a * size
            g, u = carray(pointer(s[1] + skip), here, element), carray(pointer(s[2] + skip), here, element)
            _forward_part(g, u, carray(pointer(s[3] + skip), here, element), s[5])

    return kernel


def _backward(element: type) -> object:
    size = np.dtype(element).itemsize

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
            here, skip = (b - a,), a * size
            dh, g = carray(pointer(s[1] + skip), here, element), carray(pointer(s[2] + skip), here, element)
            u, dg = carray(pointer(s[3] + skip), here, element), carray(pointer(s[4] + skip), here, element)
            _backward_part(dh, g, u, dg, carray(pointer(s[5] + skip), here, element), s[7])

    return kernel


def _masked_part(x, out, low, seed, start):  # type: ignore[no-untyped-def]
    """out = x where the mask keeps it. A pair of elements has 2 x 16 random bits from one hash of its number."""
    raise NotImplementedError("compiled only")


@overload(_masked_part, jit_options={"forceinline": True, "error_model": "numpy"})
def _of_words(x, out, low, seed, start):  # type: ignore[no-untyped-def]
    def pairs(x, out, low, seed, start):  # type: ignore[no-untyped-def]
        """bf16: a pair is one word of 32 bits."""
        for j in range(x.shape[0]):
            out[j] = drop_pair(x[j], hash_u32(counter_bits(start, j, seed)), low)

    def floats(x, out, low, seed, start):  # type: ignore[no-untyped-def]
        """fp32: a pair is two words."""
        for j in range(x.shape[0]):
            bits = hash_u32(counter_bits(start, j >> 1, seed))
            out[j] = np.float32(0.0) if below(bits, low, j & 1 == 1) else x[j]

    return pairs if x.dtype == types.uint32 else floats


def _masking(element: type) -> object:
    words, word = (1, np.uint32) if element is np.uint16 else (2, np.float32)

    @cfunc(types.void(types.voidptr), cache=True, error_model="numpy")
    def kernel(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        n, block = s[3], s[6]  # pairs
        counter = carray(pointer(s[0]), (1,), np.int64)
        while True:
            a = take(counter) * block
            if a >= n:
                break
            here, skip = (words * (min(n, a + block) - a),), a * 4 * words
            x, out = carray(pointer(s[1] + skip), here, word), carray(pointer(s[2] + skip), here, word)
            _masked_part(x, out, np.uint32(s[4]), np.uint32(s[5]), np.uint32(a))  # type: ignore[no-untyped-call]

    return kernel


_forward_kernel, _backward_kernel, _mask_kernel = per_dtype(_forward), per_dtype(_backward), per_dtype(_masking)


def gated(g: Tensor, u: Tensor, h: Tensor, kind: int) -> None:
    """h = act(g) * u, all of one shape and contiguous."""
    run(_forward_kernel(g.dtype), [g, u, h, g.numel(), kind, BLOCK_ELEMENTS])


def gated_backward(dh: Tensor, g: Tensor, u: Tensor, dg: Tensor, du: Tensor, kind: int) -> None:
    run(_backward_kernel(g.dtype), [dh, g, u, dg, du, g.numel(), kind, BLOCK_ELEMENTS])


def threshold(p: float) -> int:
    """Dropout's probability in 1/65536: an element whose 16 random bits are below it becomes 0."""
    return round(p * 65536)


def dropped(x: Tensor, out: Tensor, p: float, seed: int) -> None:
    """out = x where the mask of `seed` keeps it, else 0; not scaled by 1 / (1 - p). x is of even size; may be out."""
    run(_mask_kernel(x.dtype), [x, out, x.numel() // 2, threshold(p), seed & 0xFFFFFFFF, BLOCK_ELEMENTS // 2])
