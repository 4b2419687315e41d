"""A short depthwise causal convolution of examples laid end to end, with SiLU behind it or nothing.

Why: torch's Conv1d wants channels first and knows no lengths: two transposes and a pass for each kind of padding.
What: y_t = act(b + sum_j w_j x_{t-j}) with x = 0 before the example's first token. Backward makes what is before the
activation again, so only x is kept.
Source: `causal_conv1d_fn` of transformers' hybrids; Mamba, arXiv:2312.00752, section 3.4.
Cost: J multiplications a number; x read J times from cache, y written once.

Letters: T tokens, W channels, J taps.
"""

import numpy as np
from numba import carray
from torch import Tensor

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu.parallel import array, block_rows, each_block, per_dtype, run
from halfbyte.layers.kernels.cpu.scalar import fill_registers, inlined, load, sigmoid, store

# What a pass makes of x: the convolution; SiLU of it; dy through SiLU; and the other way round, dy through the taps.
PLAIN, SILU, SILU_BACK, TAPS_BACK = range(4)


@inlined
def _before(x, row, w, bias, t, place, here):  # type: ignore[no-untyped-def]
    """here = the convolution at token t, number `place` of its example."""
    taps, width = w.shape
    for c in range(width):
        here[c] = bias[c]
    for j in range(min(taps, place + 1)):
        a, b = x[(t - j) * row : (t - j) * row + width], w[j]
        for c in range(width):
            here[c] += load(a[c]) * b[c]


@inlined
def _behind(dy, row, w, places, t, here):  # type: ignore[no-untyped-def]
    """here = what token t gets of the gradients of tokens behind it in its example."""
    taps, width = w.shape
    here[:] = np.float32(0.0)
    for j in range(taps):
        if t + j >= len(places) or places[t + j] < j:
            break
        a, b = dy[(t + j) * row : (t + j) * row + width], w[j]
        for c in range(width):
            here[c] += load(a[c]) * b[c]


@inlined
def _rows(x, row, w, bias, places, dy, out, out_row, what, here, first, last):  # type: ignore[no-untyped-def]
    fill_registers()
    one = np.float32(1.0)
    for t in range(first, last):
        if what == TAPS_BACK:
            _behind(x, row, w, places, t, here)
        else:
            _before(x, row, w, bias, t, places[t], here)
        a, to = dy[t], out[t * out_row : t * out_row + w.shape[1]]
        if what == SILU:
            for c in range(len(to)):
                to[c] = store(here[c] * sigmoid(here[c]), to)
        elif what == SILU_BACK:
            for c in range(len(to)):
                s = sigmoid(here[c])
                to[c] = store(load(a[c]) * s * (one + here[c] * (one - s)), to)
        else:
            for c in range(len(to)):
                to[c] = store(here[c], to)


@per_dtype
def _kernel(element: type) -> object:
    def conv(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        tokens, width = s[1], s[9]
        row, w = s[10], array(s[4], (s[11], width), np.float32)
        x, bias = array(s[3], ((tokens - 1) * row + width,), element), array(s[5], (width,), np.float32)
        places, dy = array(s[6], (tokens,), np.int64), array(s[7], (tokens, width), element)
        out, here = array(s[8], ((tokens - 1) * s[13] + width,), element), np.empty(width, np.float32)
        each_block(s, _rows, (x, row, w, bias, places, dy, out, s[13], s[12], here))

    return conv


def _run(what: int, x: Tensor, *given: Tensor, out: Tensor | None = None) -> Tensor:
    (tokens, width), out = x.shape, pool.empty(x.shape, x) if out is None else out
    sizes = width, x.stride(0), given[0].shape[0], what, out.stride(0)
    run(_kernel(x.dtype), tokens, block_rows(width), x, *given, out, *sizes)
    return out


def forward(x: Tensor, w: Tensor, bias: Tensor, places: Tensor, *, silu: bool) -> Tensor:
    """(T, W). x: (T, W), its rows any distance apart; w: (J, W) fp32, the newest tap first; bias: (W,) fp32; places:
    (T,) int64, a token's number in its example, from 0."""
    return _run(SILU if silu else PLAIN, x, w, bias, places, x)


def backward(
    dy: Tensor, x: Tensor, w: Tensor, bias: Tensor, places: Tensor, *, silu: bool, out: Tensor | None = None
) -> tuple[Tensor]:
    """The gradient of x, (T, W), from that of y, contiguous; `out`: where it goes, its rows any distance apart."""
    before = _run(SILU_BACK, x, w, bias, places, dy) if silu else dy
    return (_run(TAPS_BACK, before, w, bias, places, before, out=out),)
