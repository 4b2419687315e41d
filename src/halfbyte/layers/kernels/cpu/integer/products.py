"""Products with a frozen weight in 8-bit integers: x W^T forward, dy W for the gradient of the input.

Why: a CPU with VNNI multiplies int8 at twice the rate of bf16, and at four times that of fp32, which is all that most
laptops have. The base is frozen and rough already, and what trains (LoRA's own products) stays as it is.
What: x and W are mixed along the axis that is summed over, rounded with a scale a row (`rounding.py`), multiplied
by oneDNN in int8 with exact sums, and scaled onto the result, which is rounded once. In the input gradient a scale a
row of W lies on the axis that is summed over, so it is multiplied into dy before that is rounded.
    forward     y  = (x H) (W H)^T            W's rows are mixed in themselves, up to 256 numbers
    backward    dx = (dy H s) ((H W) / s)     W's rows are mixed with one another, 16 of them
Error: about 1% of each product forward, as of independent noise; docs/log has what that makes of gradients.
Source: QuaRot, arXiv:2404.00456; SwitchBack, arXiv:2304.13013; `torch._int_mm`, a product of oneDNN's.
Cost: 6 MB of int32 sums (more for a weight of over 3,072 outputs) and 8 bits a number of the largest W, kept from one
product to the next; 8 bits a number of x for as long as it is needed.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from timeit import timeit
from typing import Literal

import torch
from torch import Tensor, nn

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu import LARGEST_RANK, available, works
from halfbyte.layers.kernels.dropout import LoraPart
from halfbyte.quant.number_format import BlockRows, Codes
from halfbyte.system import pages
from halfbyte.system.device import detect, may_use_integers

# Under this name a frozen layer says which of its products are integer ones.
NAME = "_halfbyte_integer"
# Without one of these (LLVM's names) oneDNN multiplies int8 one by one, or with sums that saturate.
INSTRUCTIONS = ("avx512vnni", "avxvnni", "amx-int8")
# How much faster int8 has to be multiplied than the compute dtype, for rounding to pay.
PAYS = 1.3
# Of a result, at once: rows at least (for fewer, oneDNN's packing of the weight is felt), and numbers at most.
LEAST_ROWS, SUMS = 512, 3 << 19
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
class Int8Rows:
    """Rows in int8 (N, D), and the step of each (N,) fp32."""

    numbers: Tensor
    steps: Tensor


def products_of(layer: nn.Module, x: Tensor) -> Products | None:
    """What a frozen layer's products are to be now, None for exact ones. Integers are for training alone: whatever is
    computed without gradients, an evaluation or an answer, is exact."""
    products: Products | None = layer.__dict__.get(NAME)
    if products is None or not torch.is_grad_enabled() or x.numel() == 0 or not available(x):
        return None
    return products


def set_products(layers: list[nn.Module], products: Products | None) -> None:
    """Set what the products of these layers are from now on."""
    for layer in layers:
        layer.__dict__.pop(NAME, None)
        if products is not None:
            layer.__dict__[NAME] = products


# A frozen weight: its codes, where kernels take them (`takes`), or its rows in pieces.
Weight = Codes | BlockRows | Iterable[Tensor]


def takes(codes: Codes | BlockRows, dtype: torch.dtype) -> bool:
    """Whether a product in `dtype` takes a weight from its codes, without a matrix of them in between."""
    from halfbyte.layers.kernels.cpu import tiles

    if isinstance(codes, BlockRows):
        return codes.codes.device.type == "cpu"
    if codes.dtype != dtype or not tiles.has("avx512f"):
        return False
    from halfbyte.quant import four_bit_cpu as kernels

    return kernels.takes(codes) and works("integer.weights")


def takes_lora(lora: LoraPart) -> bool:
    """Whether LoRA's part is made where the sums are scaled, of bf16, pairs of ranks and whole tiles of columns."""
    from halfbyte.layers.kernels.cpu import tiles

    rank, width = lora.right.shape
    fits = rank % 2 == 0 and 0 < rank <= LARGEST_RANK and width % tiles.COLUMNS == 0 and tiles.available()
    return fits and {lora.left.dtype, lora.right.dtype} == {torch.bfloat16} and works("integer.sums")


class _Scratch(threading.local):
    """Memory of this thread for what a product needs for a moment, by name; the next call with a name overwrites it.
    Not the pool's: there a tensor that is kept for backward takes the block that a sum has just left, which is up to
    twice its size, and the next sum a new one (Llama-2-7B's shape, 512 tokens: 0.9 GB more than exact products)."""

    def __init__(self) -> None:
        self.blocks: dict[str, Tensor] = {}

    def empty(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        size = shape[0] * shape[1] * dtype.itemsize
        if name not in self.blocks or self.blocks[name].numel() < size:
            self.blocks.pop(name, None)  # before the larger one is made, not after
            self.blocks[name] = pages.Arena(size).empty((size,), torch.uint8)
        return self.blocks[name][:size].view(dtype).view(shape)


class _LastInput:
    """The input that was rounded last: several layers take the same one. Forgotten when that input is gone, and when a
    backward begins."""

    def __init__(self) -> None:
        self.entry: tuple[weakref.ref[Tensor], int, Int8Rows] | None = None

    def round(self, x: Tensor) -> Int8Rows:
        entry = self.entry
        if x.is_inference():  # it counts no changes
            return _round(x.reshape(-1, x.shape[-1]))
        if entry is not None and entry[1] == x._version and entry[0]() is x:
            return entry[2]
        self.entry = None  # its memory is there for the next
        rows = _round(x.detach().reshape(-1, x.shape[-1]))
        self.entry = (weakref.ref(x, self._forget), x._version, rows)
        return rows

    def _forget(self, reference: object) -> None:
        if self.entry is not None and self.entry[0] is reference:
            self.entry = None


_SCRATCH = _Scratch()
_INPUT = _LastInput()


def round_rows(x: Tensor) -> Int8Rows:
    """x (..., D) as the forward product takes it, as rows; made once for an input that several layers share."""
    return _INPUT.round(x)


def rows_of_piece(width: int) -> int:
    """Rows of a weight of this width that are rounded at once: whole groups of those that are mixed."""
    return max(1, PIECE // width // 16) * 16


def forward(y: Tensor, x: Int8Rows, weight: Weight, *, add: bool = False, lora: LoraPart | None = None) -> None:
    """y = x W^T, y += x W^T, or y = LoRA's part (`takes_lora`) + x W^T. y: (N, O) contiguous, weight: W (O, D)."""
    from halfbyte.layers.kernels.cpu.integer import rounding

    width = x.numbers.shape[1]
    numbers, steps = _rounded_weight("rows", weight, (y.shape[1], width), 1.0 / rounding.square_gain(width))
    finish = _finishing(lora, add=add)
    for part, memory in _parts(y):
        sums = torch._int_mm(x.numbers[part], numbers.T, out=memory)
        finish(y[part], sums, x.steps[part], steps, part.start)


def backward(dx: Tensor, dy: Tensor, weight: Weight, *, add: bool = False, lora: LoraPart | None = None) -> None:
    """dx = dy W, dx += dy W, or dx = LoRA's part + dy W. dx: (N, D) contiguous, dy: (N, O), weight: as in `forward`."""
    from halfbyte.layers.kernels.cpu.integer import rounding

    _INPUT.entry = None
    shape = rounding.padded_width(dy.shape[1]), dx.shape[1]
    numbers, steps = _rounded_weight("groups", weight, shape, 1.0 / rounding.MOST)
    dy, finish = dy.contiguous(), _finishing(lora, add=add)
    for part, memory in _parts(dx):
        out = _SCRATCH.empty("rows", (len(memory), len(numbers)), torch.int8), torch.empty(len(memory))
        gradient, gradient_steps = rounding.rows(dy[part], steps, out=out)
        sums = torch._int_mm(gradient, numbers, out=memory)
        finish(dx[part], sums, gradient_steps, None, part.start)


def _rounded_weight(
    how: Literal["rows", "groups"], weight: Weight, shape: tuple[int, int], share: float
) -> tuple[Tensor, Tensor]:
    """A weight in 8 bits, mixed and rounded by `rounding.rows` or `rounding.groups`; the next one overwrites it."""
    from halfbyte.layers.kernels.cpu.integer import rounding

    numbers, steps = _SCRATCH.empty("weight", shape, torch.int8), torch.empty(shape[0], dtype=torch.float32)
    if isinstance(weight, (Codes, BlockRows)):
        kernels = import_module(f"{__package__}.{'weights' if isinstance(weight, Codes) else 'block_weights'}")
        getattr(kernels, how)(weight, share=share, out=(numbers, steps))
        return numbers, steps
    first = 0
    for piece in weight:  # of whole groups but for the last
        rows = slice(first, first + rounding.padded_width(len(piece)))
        getattr(rounding, how)(piece.contiguous(), share=share, out=(numbers[rows], steps[rows]))
        first += len(piece)
    return numbers, steps


def _finishing(lora: LoraPart | None, *, add: bool) -> Callable[[Tensor, Tensor, Tensor, Tensor | None, int], None]:
    """What scales sums onto rows of a result: (rows, sums, steps of rows, of columns or None, number of the first)."""
    from halfbyte.layers.kernels.cpu.integer import rounding

    if lora is None:
        return lambda y, sums, rows, columns, first: rounding.onto(y, sums, rows, columns, add=add)
    from halfbyte.layers.kernels.cpu.integer import sums as kernel

    pairs = kernel.pairs(lora.right)
    return lambda y, sums, rows, columns, first: kernel.onto(y, sums, rows, columns, lora, pairs, first)


def _parts(y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a result (N, M) that are made at once, and where their sums go: they are still in cache when they are
    scaled."""
    pieces = -(-len(y) // max(LEAST_ROWS, SUMS // y.shape[1]))
    rows = -(-len(y) // max(1, pieces))
    memory = _SCRATCH.empty("sums", (rows, y.shape[1]), torch.int32)
    for first in range(0, len(y), rows or 1):
        yield slice(first, first + rows), memory[: len(y) - first]


def _round(x: Tensor) -> Int8Rows:
    """In a block of the size of a tensor like x, which such a tensor takes next; of a smaller size it would be taken by
    one that is kept."""
    from halfbyte.layers.kernels.cpu.integer import rounding

    n, wide = len(x), rounding.padded_width(x.shape[1])
    numbers = pool.empty((x.dtype.itemsize * n, wide), x, torch.int8)[:n]
    return Int8Rows(*rounding.rows(x.contiguous(), out=(numbers, torch.empty(n))))


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
    """How many times as fast as `dtype` this machine multiplies int8, on torch's threads now; 0 where it cannot, 1
    where that is known to be no faster."""
    if why_not():
        return 0.0
    if not may_use_integers(detect(), "bf16" if dtype == torch.bfloat16 else "fp32"):
        return 1.0
    n, k, m = _SAMPLE
    wide = [torch.ones(n, k, dtype=dtype), torch.ones(k, m, dtype=dtype)]
    narrow = [x.to(torch.int8) for x in wide]
    calls: list[Callable[[], Tensor]] = [lambda: torch.mm(*wide), lambda: torch._int_mm(*narrow)]
    tries = [[timeit(call, number=1) for call in calls] for _ in range(_TRIES)]
    exact, eight = map(min, zip(*tries, strict=True))
    return exact / eight
