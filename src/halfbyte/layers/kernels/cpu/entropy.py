"""Cross-entropy over a chunk of logits, and its gradient in their place: two reads and one write of each row.

Letters: K labelled tokens, V vocabulary.
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
def _largest(a):  # type: ignore[no-untyped-def]
    top = np.float32(-3.0e38)
    for j in range(a.shape[0]):
        v = load(a[j])
        top = v if v > top else top
    return top


@njit(forceinline=True, fastmath=FASTMATH, error_model="numpy")
def _exp_sum(a, top):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for j in range(a.shape[0]):
        total += exp_f32(load(a[j]) - top)
    return total


@njit(forceinline=True, fastmath=FASTMATH, error_model="numpy")
def _plain_sum(a):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for j in range(a.shape[0]):
        total += load(a[j])
    return total


@njit(forceinline=True, fastmath=FASTMATH, error_model="numpy")
def _gradient(a, lse, low):  # type: ignore[no-untyped-def]
    for j in range(a.shape[0]):
        a[j] = store(exp_f32(load(a[j]) - lse) - low, a)


def _make(element: object) -> object:
    @cfunc(types.void(types.voidptr), cache=True, error_model="numpy")
    def kernel(p):  # type: ignore[no-untyped-def]
        s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
        n, width, block = s[4], s[5], s[8]
        smoothing = np.float32(f[7])
        low = smoothing / np.float32(width)
        counter = carray(pointer(s[0]), (1,), np.int64)
        logits = carray(pointer(s[1]), (n, width), element)
        target, loss = carray(pointer(s[2]), (n,), np.int64), carray(pointer(s[3]), (n,), np.float32)
        while True:
            first = take(counter) * block
            if first >= n:
                break
            for i in range(first, min(n, first + block)):
                a = logits[i]
                top = _largest(a)
                lse = top + np.log(_exp_sum(a, top))
                wanted = load(a[target[i]])
                loss[i] = lse - (np.float32(1.0) - smoothing) * wanted
                if smoothing > np.float32(0.0):
                    loss[i] -= low * _plain_sum(a)
                if s[6]:
                    hit = exp_f32(wanted - lse)
                    _gradient(a, lse, low)
                    a[target[i]] = store(hit - low - (np.float32(1.0) - smoothing), a)

    return kernel


_kernel = per_dtype(_make)


def cross_entropy_(logits: Tensor, targets: Tensor, loss: Tensor, *, smoothing: float, gradient: bool) -> None:
    """loss[i] = -log softmax(logits[i])[targets[i]] (label-smoothed); with `gradient`, logits become its gradient.

    logits: (K, V) contiguous, targets: (K,) int64, loss: (K,) fp32. A row that is not finite gives a loss that is not.
    """
    n, width = logits.shape
    run(
        _kernel(logits.dtype),
        [logits, targets, loss, n, width, int(gradient), float(smoothing), block_rows(4 * width)],
    )
