"""What LoRA's products in bf16 and in fp32 share: how they are called, and how they are proven once on a machine.

Letters: N tokens, D in, R rank. A word of a kernel is two neighbours of 16 bits, or one number of 32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.layers.kernels import dropout, pool
from halfbyte.layers.kernels.cpu import gate
from halfbyte.layers.kernels.cpu.parallel import run

PART = 512  # rows that a sum over rows is made of
TAKEN = 96  # rows that a thread takes at once: a multiple of a tile's

Seed = int | dropout.TokenSeed


def mask_of(p: float, seed: Seed) -> tuple[tuple[int, int, Tensor | int], int]:
    """What each kernel takes: below what a number's 16 random bits drop it, the seed, a key for each row or none; and
    how many keys."""
    low = round(p * 65536)
    if isinstance(seed, dropout.TokenSeed):
        return (low, seed.seed & 0xFFFFFFFF, seed.keys), seed.keys.shape[0]
    return (low, seed & 0xFFFFFFFF, 0), 0


@dataclass
class LoraProducts:
    """Three kernels as functions of tensors. None of them scales by 1 / (1 - p); the mask is `gate.drop`'s. `columns`,
    `ranks`: columns of all tiles that hold a rank, and rows; `step`: words that a tile takes at a time."""

    down_kernel: object
    up_kernel: object
    gradient_kernel: object
    dtype: torch.dtype
    numbers: int  # of a word
    columns: Callable[[int], int]
    ranks: Callable[[int], int]
    step: int = 1  # words that a tile takes at once

    def down(self, x: Tensor, a: Tensor, p: float, seed: Seed) -> Tensor:
        """drop(x) A^T: x (N, D), A (R, D) -> (N, R)."""
        (n, width), rank = x.shape, a.shape[0]
        h, columns = pool.empty((n, rank), x), self.columns(rank)
        a, words = self._words(a), width // self.numbers
        turned = torch.zeros(words, columns, dtype=a.dtype)
        turned[:, :rank] = a.T
        mask, keys = mask_of(p, seed)
        run(self.down_kernel, n, TAKEN, x, turned, h, *mask, words, rank, columns, keys)
        return h

    def up(self, dh: Tensor, a: Tensor, p: float, seed: Seed, total: Tensor | None = None) -> Tensor:
        """drop(dh A): dh (N, R), A (R, D) -> (N, D), in memory of the pool, or added to `total`."""
        (rank, width), n = a.shape, dh.shape[0]
        out, (mask, keys) = pool.empty((n, width), a) if total is None else total, mask_of(p, seed)
        ranks = rank // self.numbers
        if self.numbers > 1:
            a = a.view(ranks, self.numbers, width).transpose(1, 2)
        words, more = self._words(a).reshape(ranks, width), -ranks % self.step
        words = torch.cat([words, words.new_zeros(more, width)]) if more else words.contiguous()
        sizes = (width // self.numbers, ranks, keys, ranks + more, int(total is not None))
        run(self.up_kernel, n, TAKEN, dh.contiguous(), words, out, *mask, *sizes)
        return out

    def gradient(self, dh: Tensor, x: Tensor, p: float, seed: Seed) -> Tensor:
        """dh^T drop(x): dh (N, R), x (N, D) -> (R, D) fp32."""
        (n, width), rank = x.shape, dh.shape[1]
        parts, words = -(-n // PART), width // self.numbers
        ranks = self.ranks(rank)
        out, (mask, keys) = pool.empty((parts, ranks, width), x, torch.float32), mask_of(p, seed)
        run(self.gradient_kernel, parts, 1, dh.contiguous(), x, out, *mask, words, rank, ranks, n, keys)
        total = out[:, :rank].sum(0) if parts > 1 else out[0, :rank]
        if self.numbers == 1:
            return total
        return total.view(rank, self.numbers, words).transpose(1, 2).reshape(rank, width)

    def _words(self, x: Tensor) -> Tensor:
        return x if self.numbers == 1 else x.contiguous().view(torch.int32)

    def fault(self, *ranks: int) -> str | None:
        """What is wrong on this machine, seen once on small products beside torch's; None where nothing is."""
        draw = torch.Generator().manual_seed(0)
        for rank in ranks:
            shapes = (PART + 13, 64), (rank, 64), (PART + 13, rank)
            x, a, dh = (torch.randn(s, generator=draw).to(self.dtype) for s in shapes)
            dropped = torch.empty_like(x)
            gate.drop(x, dropped, 0.5, 7)
            mask, dropped64, a64, dh64 = (t.double() for t in (dropped != 0, dropped, a, dh))
            products = {
                "drop(x) A^T": (self.down(x, a, 0.5, 7), dropped64 @ a64.T),
                "dh^T drop(x)": (self.gradient(dh, x, 0.5, 7), dh64.T @ dropped64),
                "drop(dh A)": (self.up(dh, a, 0.5, 7), (dh64 @ a64) * mask),
                "drop(dh A), added": (self.up(dh, a, 0.5, 7, x.clone()), x.double() + (dh64 @ a64) * mask),
            }
            for name, (got, right) in products.items():
                # a rounding to the dtype, and sums in another order
                slack = torch.finfo(self.dtype).eps * right.abs() + 1e-4 * right.abs().amax()
                if not bool(((got.double() - right).abs() <= slack).all()):
                    return f"{name} of LoRA is wrong"
        return None
