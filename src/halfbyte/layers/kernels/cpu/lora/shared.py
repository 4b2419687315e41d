"""What LoRA's products in bf16 and in fp32 share: how a mask is told to a kernel, and how each is proven once."""

from collections.abc import Callable

import torch
from torch import Tensor

from halfbyte.layers.kernels import dropout
from halfbyte.layers.kernels.cpu import gate

PART = 512  # rows that a sum over rows is made of
TAKEN = 96  # rows that a thread takes at once: a multiple of a tile's

Seed = int | dropout.Keyed


def mask_of(p: float, seed: Seed) -> tuple[tuple[int, int, Tensor | int], int]:
    """What each kernel takes: below what a number's 16 random bits drop it, the seed, a key for each row or none; and
    how many keys."""
    low = round(p * 65536)
    if isinstance(seed, dropout.Keyed):
        return (low, seed.seed & 0xFFFFFFFF, seed.keys), len(seed.keys)
    return (low, seed & 0xFFFFFFFF, 0), 0


def fault_of(
    down: Callable[..., Tensor],
    gradient: Callable[..., Tensor],
    up: Callable[..., Tensor],
    dtype: torch.dtype,
    *,
    ranks: tuple[int, ...],
) -> str | None:
    """What these products get wrong on this machine, seen once on small ones beside torch's; None where nothing is."""
    draw = torch.Generator().manual_seed(0)
    for rank in ranks:
        shapes = (PART + 13, 64), (rank, 64), (PART + 13, rank)
        x, a, dh = (torch.randn(s, generator=draw).to(dtype) for s in shapes)
        dropped = torch.empty_like(x)
        gate.dropped(x, dropped, 0.5, 7)
        kept, dropped64, a64, dh64 = (t.double() for t in (dropped != 0, dropped, a, dh))
        wanted = {
            "drop(x) A^T": (down(x, a, 0.5, 7), dropped64 @ a64.T),
            "dh^T drop(x)": (gradient(dh, x, 0.5, 7), dh64.T @ dropped64),
            "drop(dh A)": (up(dh, a, 0.5, 7), (dh64 @ a64) * kept),
        }
        for name, (got, right) in wanted.items():
            # a rounding to the dtype, and sums in another order
            slack = torch.finfo(dtype).eps * right.abs() + 1e-4 * right.abs().amax()
            if not bool(((got.double() - right).abs() <= slack).all()):
                return f"{name} of LoRA is wrong"
    return None
