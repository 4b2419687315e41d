"""Matrix products without a graph, in memory of the pool: by torch, or by kernels of our own where these are faster."""

import torch
from torch import Tensor

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu import available, works


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b + bias: (N, D), (D, O), (O,) -> (N, O)."""
    out = pool.empty((a.shape[0], b.shape[1]), a)
    if bias is None:
        return into(out, a, b)
    return into(out.copy_(bias), a, b, add=True) if by_kernel(out, a, b) else torch.addmm(bias, a, b, out=out)


def into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """out = a b, or out += a b. Returns out."""
    if by_kernel(out, a, b):
        from halfbyte.layers.kernels.cpu import product

        return product.product_(out, a, b, add=add)
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)


def by_kernel(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether `into` takes our kernel for these."""
    if out.dtype != torch.float32 or not available(out, a, b):
        return False
    from halfbyte.layers.kernels.cpu import product

    return product.takes(out, a, b) and works("product")
