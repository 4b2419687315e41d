"""Matrix products without a graph, in memory of the pool: by torch, or by kernels of our own where these are faster.

On two threads and AMX, oneDNN gives a bf16 product of N to 2 N rows of N columns, up to 1,024, to one of them. Half of
its columns at a time then takes two thirds of the time. Three threads and more are not so (docs/log/2026-12.md).
"""

from functools import cache

import torch
from torch import Tensor

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu import available, works
from halfbyte.system import device

NARROW, DEEP = 1024, 256  # the most columns, and the least depth, of a product that oneDNN gives to one thread


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias: (N, D), (D, O), (O,) -> (N, O)."""
    out = pool.empty((a.shape[0], b.shape[1]), a)
    if bias is None:
        return into(out, a, b)
    in_steps = by_kernel(out, a, b) or on_one_thread(out, a)
    return into(out.copy_(bias), a, b, add=True) if in_steps else torch.addmm(bias, a, b, out=out)


def into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """out = a b, or out += a b. Returns out."""
    if by_kernel(out, a, b):
        from halfbyte.layers.kernels.cpu import product

        return product.product_(out, a, b, add=add)
    if on_one_thread(out, a):
        for c, right in zip(out.chunk(2, 1), b.chunk(2, 1), strict=True):
            c.addmm_(a, right, beta=int(add))
        return out
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def on_one_thread(out: Tensor, a: Tensor) -> bool:
    """Whether oneDNN would give this product, (N, D) @ (D, O), to one of two threads."""
    rows, columns = out.shape
    narrow = columns <= rows < 2 * columns <= 2 * NARROW and a.shape[1] >= DEEP and out.dtype == torch.bfloat16
    return narrow and out.device.type == "cpu" and torch.get_num_threads() == 2 and _has_amx()


@cache
def _has_amx() -> bool:
    return "amx_bf16" in device.detect().isa


def by_kernel(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether `into` takes our kernel for these."""
    if out.dtype != torch.float32 or not available(out, a, b):
        return False
    from halfbyte.layers.kernels.cpu import product

    return product.takes(out, a, b) and works("product")
