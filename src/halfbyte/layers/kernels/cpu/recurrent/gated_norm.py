"""An RMS norm of groups with a gate: w * norm(x) * silu(scale z), or w * norm(x * silu(scale z)); and its gradients.

Why: transformers makes ten passes in fp32 over what a recurrent layer returns.
Source: `Qwen3NextRMSNormGated` (the gate behind the norm), `MambaRMSNormGated` (before it).
Cost: one read of x and z and one write; in backward twice as much; x and z are kept.

Letters: N groups of D numbers, M of them a token.
"""

import numpy as np
from numba import carray
from torch import Tensor

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu.parallel import array, block_rows, each_block, per_dtype, run
from halfbyte.layers.kernels.cpu.scalar import fill_registers, inlined, load, sigmoid, store

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@inlined
def _normal(x, z, scale, eps, gate_first, h):  # type: ignore[no-untyped-def]
    """h = what the norm reads; returns 1 / rms(h)."""
    total = _ZERO
    for c in range(len(x)):
        v = load(x[c])
        if gate_first:
            u = load(z[c]) * scale
            v *= u * sigmoid(u)
        h[c] = v
        total += v * v
    return _ONE / np.sqrt(total / np.float32(len(x)) + eps)


@inlined
def _forward_rows(x, z, w, out, sizes, scale, eps, h, first, last):  # type: ignore[no-untyped-def]
    fill_registers()
    many, row, _, gate_first = sizes
    for i in range(first, last):
        to, gate = out[i], z[i // many * row + i % many * len(h) :][: len(h)]
        r = _normal(x[i], gate, scale, eps, gate_first, h)
        weight = w[i % len(w)]
        for c in range(len(h)):
            v = weight[c] * h[c] * r
            if not gate_first:
                u = load(gate[c]) * scale
                v *= u * sigmoid(u)
            to[c] = store(v, to)


@inlined
def _backward_rows(dy, x, z, w, dx, dz, sizes, scale, eps, h, dh, first, last):  # type: ignore[no-untyped-def]
    fill_registers()
    many, row, dz_row, gate_first = sizes
    for i in range(first, last):
        token, part = i // many, i % many * len(h)
        a, gate = x[i], z[token * row + part :][: len(h)]
        r, along = _normal(a, gate, scale, eps, gate_first, h), _ZERO
        grad, weight = dy[i], w[i % len(w)]
        to, to_gate = dx[i], dz[token * dz_row + part :][: len(h)]
        for c in range(len(h)):
            v = load(grad[c]) * weight[c]
            if not gate_first:
                u = load(gate[c]) * scale
                s = sigmoid(u)
                to_gate[c] = store(v * h[c] * r * s * (_ONE + u * (_ONE - s)) * scale, to_gate)
                v *= u * s
            dh[c] = v
            along += v * h[c]
        along *= r * r / np.float32(len(h))
        for c in range(len(h)):
            v = r * (dh[c] - h[c] * along)
            if gate_first:
                u = load(gate[c]) * scale
                s = sigmoid(u)
                to_gate[c] = store(v * load(a[c]) * s * (_ONE + u * (_ONE - s)) * scale, to_gate)
                v *= u * s
            to[c] = store(v, to)


@inlined
def _given(s, element):  # type: ignore[no-untyped-def]
    """x, z and w; groups of a token, from a token of z to the next, of its gradient too; is the gate first?"""
    n, d, many = s[1], s[6], s[8]
    z = array(s[4], ((n // many - 1) * s[9] + many * d,), element)
    return array(s[3], (n, d), element), z, array(s[5], (s[7], d), np.float32), (many, s[9], s[10], s[11])


@per_dtype
def _forward_kernel(element: type) -> object:
    def gated_norm(p):  # type: ignore[no-untyped-def]
        s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
        x, z, w, sizes = _given(s, element)
        out, h = array(s[12], x.shape, element), np.empty(s[6], np.float32)
        each_block(s, _forward_rows, (x, z, w, out, sizes, np.float32(f[14]), np.float32(f[13]), h))

    return gated_norm


@per_dtype
def _backward_kernel(element: type) -> object:
    def gated_norm_backward(p):  # type: ignore[no-untyped-def]
        s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
        x, z, w, sizes = _given(s, element)
        dy, dx = array(s[12], x.shape, element), array(s[15], x.shape, element)
        dz = array(s[16], ((s[1] // s[8] - 1) * s[10] + s[8] * s[6],), element)
        h, dh = np.empty(s[6], np.float32), np.empty(s[6], np.float32)
        each_block(s, _backward_rows, (dy, x, z, w, dx, dz, sizes, np.float32(f[14]), np.float32(f[13]), h, dh))

    return gated_norm_backward


def forward(x: Tensor, z: Tensor, w: Tensor, eps: float, *, gate_first: bool, scale: float = 1.0) -> Tensor:
    """(N, D) of x (N, D), contiguous, of bf16 or fp32, and z (N / M, M D), its rows any distance apart. w: (.., D)
    fp32, of so many groups one after the other."""
    out, given = pool.empty(x.shape, x), _given_to(x, z, w, z, gate_first)
    run(_forward_kernel(x.dtype), len(x), block_rows(x.shape[1]), *given, out, float(eps), scale)
    return out


def backward(
    dy: Tensor, x: Tensor, z: Tensor, w: Tensor, eps: float, *, gate_first: bool, scale: float = 1.0,
    dz: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x and z; `dz`: where that of z goes."""
    dx, dz = pool.empty(x.shape, x), pool.empty(z.shape, z) if dz is None else dz
    given = _given_to(x, z, w, dz, gate_first)
    run(_backward_kernel(x.dtype), len(x), block_rows(x.shape[1]), *given, dy, float(eps), scale, dx, dz)
    return dx, dz


def _given_to(x: Tensor, z: Tensor, w: Tensor, dz: Tensor, gate_first: bool) -> tuple[Tensor | int, ...]:
    return x, z, w, x.shape[1], len(w), len(x) // len(z), z.stride(0), dz.stride(0), int(gate_first)
