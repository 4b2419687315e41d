"""Cross-entropy over a chunk of logits, and its gradient in their place: two reads and one write of each row.

Letters: K labelled tokens, V vocabulary.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from torch import Tensor

from halfbyte.layers.kernels.cpu.parallel import array, block_rows, per_dtype, run
from halfbyte.layers.kernels.cpu.scalar import Value, exp_f32, inlined, instruction, load, store, take


@instruction(types.int32, types.float32)
def _rank(b: Value, x: Value) -> Value:
    """A whole number, the larger the larger x is; NaN is above all where its sign is +, else below."""
    bits = b.bitcast(x, ir.IntType(32))
    return b.xor(bits, b.lshr(b.ashr(bits, bits.type(31)), bits.type(1)))


@instruction(types.float32, types.int32)
def _ranked(b: Value, rank: Value) -> Value:
    """The number of this rank."""
    return b.bitcast(b.xor(rank, b.lshr(b.ashr(rank, rank.type(31)), rank.type(1))), ir.FloatType())


@inlined
def _largest(a):  # type: ignore[no-untyped-def]
    # of ranks: where NaN counts LLVM compares floats one after another, and that took four fifths of the kernel
    top = _rank(np.float32(-3.0e38))
    for j in range(a.shape[0]):
        top = max(top, _rank(load(a[j])))
    return _ranked(top)


# Summed in fp32 at once; beyond, in fp64. A vocabulary in one fp32 sum would lose as many bits as vectors are short.
PART = 2048


@inlined
def _sum(a, top, exponential):  # type: ignore[no-untyped-def]
    """The sum of a, or of exp(a - top)."""
    total = np.float64(0.0)
    for first in range(0, a.shape[0], PART):
        some, part = a[first : first + PART], np.float32(0.0)
        for j in range(some.shape[0]):
            part += exp_f32(load(some[j]) - top) if exponential else load(some[j])
        total += np.float64(part)
    return np.float32(total)


@inlined
def _gradient(a, lse, low):  # type: ignore[no-untyped-def]
    for j in range(a.shape[0]):
        a[j] = store(exp_f32(load(a[j]) - lse) - low, a)


@per_dtype
def _kernel(element: type) -> object:
    # One loop of its own, not `each_block`: split in two, LLVM rounds the gradient's last bit in another way.
    def cross_entropy(p):  # type: ignore[no-untyped-def]
        s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
        n, width = s[1], s[6]
        smoothing = np.float32(f[8])
        low = smoothing / np.float32(width)
        counter = array(s[0], (1,), np.int64)
        logits = array(s[3], (n, width), element)
        target, loss = array(s[4], (n,), np.int64), array(s[5], (n,), np.float32)
        while True:
            first = take(counter) * s[2]
            if first >= n:
                break
            for i in range(first, min(n, first + s[2])):
                a = logits[i]
                top = _largest(a)
                lse = top + np.log(_sum(a, top, True))
                wanted = load(a[target[i]])
                loss[i] = lse - (np.float32(1.0) - smoothing) * wanted
                if smoothing > np.float32(0.0):
                    loss[i] -= low * _sum(a, top, False)
                if s[7]:
                    hit = exp_f32(wanted - lse)
                    _gradient(a, lse, low)
                    a[target[i]] = store(hit - low - (np.float32(1.0) - smoothing), a)

    return cross_entropy


def cross_entropy_(logits: Tensor, targets: Tensor, *, smoothing: float, gradient: bool) -> Tensor:
    """-log softmax(logits[i])[targets[i]] (label-smoothed), (K,) fp32; with `gradient`, logits become its gradient.
    logits: (K, V) contiguous, targets: (K,) int64. A row that is not finite gives a loss that is not."""
    n, width = logits.shape
    losses = torch.empty(n, dtype=torch.float32)
    block = block_rows(4 * width)
    run(_kernel(logits.dtype), n, block, logits, targets, losses, width, int(gradient), float(smoothing))
    return losses
