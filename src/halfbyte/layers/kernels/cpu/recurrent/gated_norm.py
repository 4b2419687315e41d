"""An RMS norm of groups of numbers with a gate: w * norm(x) * silu(z), or w * norm(x * silu(z)), forward and backward.

Why: transformers makes ten passes in fp32 over what a recurrent layer returns.
Source: `Qwen3NextRMSNormGated` (the gate behind the norm), `MambaRMSNormGated` (before it).
Cost: one read of x and z and one write; in backward twice as much; x and z are kept.

Letters: N groups of D numbers.
"""

import numpy as np
from numba import carray
from torch import Tensor

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu.parallel import array, block_rows, each_block, kernel, per_dtype, run
from halfbyte.layers.kernels.cpu.scalar import fill_registers, inlined, load, sigmoid, store

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@inlined
def _normal(x, z, eps, gate_first, h):  # type: ignore[no-untyped-def]
    """h = what the norm reads; returns 1 / rms(h)."""
    total = _ZERO
    for c in range(len(x)):
        v = load(x[c])
        if gate_first:
            u = load(z[c])
            v *= u * sigmoid(u)
        h[c] = v
        total += v * v
    return _ONE / np.sqrt(total / np.float32(len(x)) + eps)


@inlined
def _forward_rows(x, z, w, out, eps, gate_first, h, first, last):  # type: ignore[no-untyped-def]
    fill_registers()
    for i in range(first, last):
        r = _normal(x[i], z[i], eps, gate_first, h)
        to, gate = out[i], z[i]
        weight = w[i % len(w)]
        for c in range(len(h)):
            v = weight[c] * h[c] * r
            if not gate_first:
                u = load(gate[c])
                v *= u * sigmoid(u)
            to[c] = store(v, to)


@inlined
def _backward_rows(dy, x, z, w, dx, dz, eps, gate_first, h, dh, first, last):  # type: ignore[no-untyped-def]
    fill_registers()
    for i in range(first, last):
        r, along = _normal(x[i], z[i], eps, gate_first, h), _ZERO
        a, gate = x[i], z[i]
        grad, weight = dy[i], w[i % len(w)]
        to, to_gate = dx[i], dz[i]
        for c in range(len(h)):
            v = load(grad[c]) * weight[c]
            if not gate_first:
                u = load(gate[c])
                s = sigmoid(u)
                to_gate[c] = store(v * h[c] * r * s * (_ONE + u * (_ONE - s)), to_gate)
                v *= u * s
            dh[c] = v
            along += v * h[c]
        along *= r * r / np.float32(len(h))
        for c in range(len(h)):
            v = r * (dh[c] - h[c] * along)
            if gate_first:
                u = load(gate[c])
                s = sigmoid(u)
                to_gate[c] = store(v * load(a[c]) * s * (_ONE + u * (_ONE - s)), to_gate)
                v *= u * s
            to[c] = store(v, to)


@per_dtype
def _forward_kernel(element: type) -> object:
    @kernel
    def gated_norm(p):  # type: ignore[no-untyped-def]
        s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
        n, d = s[1], s[7]
        x, z = array(s[3], (n, d), element), array(s[4], (n, d), element)
        w, out = array(s[5], (s[8], d), np.float32), array(s[6], (n, d), element)
        each_block(s, _forward_rows, (x, z, w, out, np.float32(f[9]), s[10], np.empty(d, np.float32)))

    return gated_norm


@per_dtype
def _backward_kernel(element: type) -> object:
    @kernel
    def gated_norm_backward(p):  # type: ignore[no-untyped-def]
        s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
        n, d = s[1], s[7]
        x, z = array(s[3], (n, d), element), array(s[4], (n, d), element)
        w, dy = array(s[5], (s[8], d), np.float32), array(s[6], (n, d), element)
        dx, dz = array(s[11], (n, d), element), array(s[12], (n, d), element)
        h, dh = np.empty(d, np.float32), np.empty(d, np.float32)
        each_block(s, _backward_rows, (dy, x, z, w, dx, dz, np.float32(f[9]), s[10], h, dh))

    return gated_norm_backward


def forward(x: Tensor, z: Tensor, w: Tensor, eps: float, *, gate_first: bool) -> Tensor:
    """(N, D) of x and z (N, D), contiguous, of bf16 or fp32. w: (M, D) fp32: each M groups have the same weights."""
    out, (n, d) = pool.empty(x.shape, x), x.shape
    run(_forward_kernel(x.dtype), n, block_rows(d), x, z, w, out, d, len(w), float(eps), int(gate_first))
    return out


def backward(dy: Tensor, x: Tensor, z: Tensor, w: Tensor, eps: float, *, gate_first: bool) -> tuple[Tensor, Tensor]:
    """The gradients of x and z."""
    dx, dz = pool.empty(x.shape, x), pool.empty(x.shape, x)
    n, d = x.shape
    sizes = d, len(w), float(eps), int(gate_first)
    run(_backward_kernel(x.dtype), n, block_rows(d), x, z, w, dy, *sizes, dx, dz)
    return dx, dz
