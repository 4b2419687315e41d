"""Products with a frozen weight in 8-bit integers: x W^T forward, dy W for the gradient of the input.

Why: a CPU with VNNI multiplies int8 at twice the rate of bf16, and at four times that of fp32, which is all that most
laptops have. The base is frozen and rough already, and what trains (LoRA's own products) stays as it is.
What: x and W are mixed along the axis that is summed over, rounded with a scale a row (`rounding.py`), multiplied
by oneDNN in int8 with exact sums, and scaled onto the result, which is rounded once. In the input gradient a scale a
row of W lies on the axis that is summed over, so it is multiplied into dy before that is rounded.
    forward     y  = (x H) (W H)^T            W's rows are mixed in themselves, up to 256 numbers
    backward    dx = (dy H s) ((H W) / s)     W's rows are mixed with one another, 16 of them
Error: about 1% of each product forward, as of independent noise; docs/log.md has what that makes of gradients.
Source: QuaRot, arXiv:2404.00456; SwitchBack, arXiv:2304.13013; `torch._int_mm`, a product of oneDNN's.
Cost: 16 MB of int32 sums (more for a weight of over 8,192 outputs), and 8 bits a number of x, dy and W, for as long
as the product takes.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu import available

if TYPE_CHECKING:
    from torch import nn

# Under this name a frozen layer says which of its products are integer ones.
NAME = "_halfbyte_integer"
# Without one of these (LLVM's names) oneDNN multiplies int8 one by one, or with sums that saturate.
INSTRUCTIONS = ("avx512vnni", "avxvnni", "amx-int8")
# How much faster int8 has to be multiplied than the compute dtype, for rounding to pay.
PAYS = 1.3
# Of a result, at once: rows at least (for fewer, oneDNN's packing of the weight is felt), and numbers at most.
LEAST_ROWS, SUMS = 512, 1 << 22
# Of a weight that is rounded at once: numbers that stay in a core's cache from being dequantised on.
PIECE = 1 << 19
_SAMPLE = (512, 1024, 1024)  # rows, in, out of the products that the machine is timed with
_TRIES = 5


@dataclass(frozen=True)
class Products:
    """Which of a layer's two products are integer ones."""

    forward: bool = True
    backward: bool = True

    def __str__(self) -> str:
        names = ["forward"] * self.forward + ["input gradient"] * self.backward
        return " and ".join(names) or "none"


@dataclass(frozen=True)
class Rounded:
    """Rows in int8 (N, D), and the step of each (N,) fp32."""

    numbers: Tensor
    steps: Tensor


def asked(layer: nn.Module, x: Tensor) -> Products | None:
    """What a frozen layer's products are to be now, None for exact ones. Integers are for training alone: whatever is
    computed without gradients, an evaluation or an answer, is exact."""
    products: Products | None = layer.__dict__.get(NAME)
    if products is None or not torch.is_grad_enabled() or x.numel() == 0 or not available(x):
        return None
    return products


def ask(layers: list[nn.Module], products: Products | None) -> None:
    """Set what the products of these layers are from now on."""
    for layer in layers:
        layer.__dict__.pop(NAME, None)
        if products is not None:
            layer.__dict__[NAME] = products


class _Last:
    """The rows that were rounded last: several layers take the same input. Forgotten when that input is gone."""

    def __init__(self) -> None:
        self.held: tuple[weakref.ref[Tensor], int, Rounded] | None = None

    def of(self, x: Tensor) -> Rounded:
        held = self.held
        if x.is_inference():  # it counts no changes
            return _rows(x.reshape(-1, x.shape[-1]))
        if held is not None and held[1] == x._version and held[0]() is x:
            return held[2]
        made = _rows(x.detach().reshape(-1, x.shape[-1]))
        self.held = (weakref.ref(x, self._gone), x._version, made)
        return made

    def _gone(self, reference: object) -> None:
        if self.held is not None and self.held[0] is reference:
            self.held = None


_LAST = _Last()


def rounded(x: Tensor) -> Rounded:
    """x (..., D) as the forward product takes it, as rows; made once for an input that several layers share."""
    return _LAST.of(x)


def rows_of_piece(width: int) -> int:
    """Rows of a weight of this width that are rounded at once: whole groups of those that are mixed."""
    return max(1, PIECE // width // 16) * 16


def forward(y: Tensor, x: Rounded, weight: Iterable[Tensor], *, add: bool) -> None:
    """y = x W^T, or y += x W^T, rounded once. y: (N, O) contiguous, weight: the rows of W (O, D) in pieces."""
    from halfbyte.layers.kernels.cpu import rounding

    count, wide = y.shape[1], x.numbers.shape[1]
    numbers, steps = pool.empty((count, wide), y, torch.int8), torch.empty(count, dtype=torch.float32)
    first = 0
    for piece in weight:
        rows = slice(first, first + len(piece))
        share = 1.0 / rounding.mixed(piece.shape[1])
        rounding.rows(piece.contiguous(), share=share, out=(numbers[rows], steps[rows]))
        first += len(piece)
    _onto(y, x, numbers.T, steps, add=add)


def backward(dx: Tensor, dy: Tensor, weight: Iterable[Tensor], *, add: bool) -> None:
    """dx = dy W, or dx += dy W, rounded once. dx: (N, D) contiguous, dy: (N, O), weight: as in `forward`."""
    from halfbyte.layers.kernels.cpu import rounding

    count = rounding.filled(dy.shape[1])
    numbers, steps = pool.empty((count, dx.shape[1]), dx, torch.int8), torch.empty(count, dtype=torch.float32)
    first = 0
    for piece in weight:
        rows = slice(first, first + rounding.filled(len(piece)))
        rounding.groups(piece.contiguous(), share=1.0 / rounding.MOST, out=(numbers[rows], steps[rows]))
        first += len(piece)
    given = Rounded(*rounding.rows(dy.contiguous(), steps))
    _onto(dx, given, numbers, None, add=add)


def _rows(x: Tensor) -> Rounded:
    from halfbyte.layers.kernels.cpu import rounding

    return Rounded(*rounding.rows(x.contiguous()))


def _onto(y: Tensor, x: Rounded, b: Tensor, column_steps: Tensor | None, *, add: bool) -> None:
    """y = x b, or y += x b, in pieces of rows: their sums are still in cache when they are scaled."""
    from halfbyte.layers.kernels.cpu import rounding

    pieces = -(-len(y) // max(LEAST_ROWS, SUMS // b.shape[1]))
    rows = -(-len(y) // pieces)
    memory = pool.empty((rows, b.shape[1]), y, torch.int32)
    for first in range(0, len(y), rows):
        part = slice(first, first + rows)
        sums = torch._int_mm(x.numbers[part], b, out=memory[: len(y[part])])
        rounding.onto(y[part], sums, x.steps[part], column_steps, add=add)


@cache
def why_not() -> str:
    """Why this machine has no integer products; empty if it has."""
    if not available(torch.zeros(1)):
        return "the compiled kernels are switched off or do not work here"
    from halfbyte.layers.kernels.cpu import tiles

    if not any(map(tiles.has, INSTRUCTIONS)):
        return "this processor has no instruction for sums of int8 products (VNNI, AMX)"
    generator = torch.Generator().manual_seed(0)
    for shape in ((65, 129, 33), (1, 64, 16)):
        a, b = (torch.randint(-127, 128, s, generator=generator).to(torch.int8) for s in (shape[:2], shape[1:]))
        a[0], b[:, 0] = 127, 127  # sums that saturate 16 bits
        if not torch.equal(torch._int_mm(a, b), (a.double() @ b.double()).to(torch.int32)):
            return "torch._int_mm sums wrongly on this machine"
    return ""


@cache
def times_as_fast(dtype: torch.dtype) -> float:
    """How many times as fast as `dtype` this machine multiplies int8, on torch's threads now; 0 where it cannot."""
    if why_not():
        return 0.0
    n, k, m = _SAMPLE
    wide = [torch.ones(n, k, dtype=dtype), torch.ones(k, m, dtype=dtype)]
    narrow = [x.to(torch.int8) for x in wide]
    best = [float("inf")] * 2
    calls: list[Callable[[], Tensor]] = [lambda: torch.mm(*wide), lambda: torch._int_mm(*narrow)]
    for _ in range(_TRIES):
        for place, call in enumerate(calls):
            began = time.perf_counter()
            call()
            best[place] = min(best[place], time.perf_counter() - began)
    return best[0] / best[1]
