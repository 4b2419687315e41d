"""From 4-bit codes back to weights, right for every width.

Why: on CPUs with AVX-512, bitsandbytes' C function looks for the scales of row r at r * (width // block). That is their
place only where a row holds whole blocks: unit weights of shape (64, 96) come back with errors of 2. So the function is
asked for rows of one block each, whatever the shape; the rest of a last block goes through the table of codes.
Where a processor looks 16 values up at once a kernel of ours makes whole rows of blocks (`four_bit_cpu.py`).
Source: bitsandbytes, `csrc/cpu_ops.cpp`, `dequantizeBlockwise4bitCpu`; its caller `backends/cpu/ops.py`.
Cost: that of the C function, in memory that a thread keeps. Through the table alone about 50 times as much.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from halfbyte.quant.kernels import nf4_cpu
from halfbyte.quant.number_format import Codes, Nested, NumberFormat
from halfbyte.upstream.bitsandbytes import c_dequantise

_NATIVE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# From this block size on, the C function is inaccurate on AVX-512 (`bitsandbytes/backends/cpu/ops.py`).
_NATIVE_BELOW = 2048
# Codes that go through the table at a time: a multiple of every block size; bounds its temporaries to 50 MB.
_TABLE_ELEMENTS = 1 << 22
# (format, dtype) of functions that `proofs/dequantising.py` has seen to be wrong on this machine.
_distrusted: set[tuple[str, torch.dtype]] = set()
_memory = threading.local()


def dequantised(module: nn.Module) -> Tensor:
    """The 16-bit weight that a 4-bit layer computes with, (out, in), in its quant state's dtype; on a CPU in memory
    that this thread keeps, which the next call overwrites. The C library gives a block of this size back to the system
    each time, and fresh pages cost seven times what the arithmetic does (8192 x 28672: 0.135 s against 0.020 s)."""
    packed, state = _codes_and_state(module)
    if packed.device.type != "cpu" and not is_distrusted(state.quant_type, state.dtype):
        import bitsandbytes.functional as bnb_f

        return bnb_f.dequantize_4bit(packed, state)
    out = scratch(state.shape, dtype=state.dtype, device=packed.device)
    if not _by_kernel(module, out):
        write(packed, block_scales(state), out, state.blocksize, state.quant_type)
    return out


def _by_kernel(module: nn.Module, out: Tensor) -> bool:
    """Dequantise with a kernel of ours where there is one for this weight, into `out`; whether it was."""
    from halfbyte.layers.kernels.cpu import available, tiles

    state = module.weight.quant_state
    if not available(out) or not tiles.has("avx512f") or is_distrusted(state.quant_type, state.dtype):
        return False
    from halfbyte.quant import four_bit_cpu as kernels

    codes = codes_of(module)
    if not kernels.takes(codes):
        return False
    kernels.write(codes, out)
    return True


def _codes_and_state(module: nn.Module) -> tuple[Tensor, Any]:
    """A layer's codes, two a byte, and bitsandbytes' quant state."""
    weight = module.weight
    return weight.data, weight.quant_state


def in_pieces(module: nn.Module, rows: int) -> Iterator[Tensor]:
    """`dequantised`, so many rows at a time where they are whole blocks: whoever uses them finds them in a cache. Each
    is in memory that the next overwrites."""
    packed, state = _codes_and_state(module)
    count, width = state.shape
    if packed.device.type != "cpu" or rows >= count or rows * width % state.blocksize:
        yield dequantised(module)
        return
    codes, scales = packed.contiguous().view(-1).view(torch.uint8), block_scales(state)
    for first in range(0, count, rows):
        out = scratch(torch.Size((min(rows, count - first), width)), dtype=state.dtype, device=packed.device)
        at = first * width
        write(codes[at // 2 :], scales[at // state.blocksize :], out, state.blocksize, state.quant_type)
        yield out


def codes_of(module: nn.Module) -> Codes:
    """A 4-bit layer's weight as a kernel takes it; nothing is copied."""
    packed, state = _codes_and_state(module)
    codes, (rows, width) = packed.contiguous().view(-1).view(torch.uint8), state.shape
    nested = None
    if state.nested:
        outer = state.state2
        nested = Nested(outer.code, outer.absmax, outer.blocksize, float(state.offset))
    return Codes(codes, state.absmax, values(state.quant_type), (rows, width), state.blocksize, state.dtype, nested)


@cache
def values(kind: str) -> Tensor:
    """What the 16 codes of `nf4` or `fp4` stand for, (16,) fp32."""
    return torch.from_numpy(nf4_cpu.code(kind))


def upstream_is_wrong(state: Any) -> bool:
    """Whether bitsandbytes' own dequantising is not to be used: blocks cross the ends of rows, or a proof failed."""
    return bool(state.shape[-1] % state.blocksize) or is_distrusted(state.quant_type, state.dtype)


def distrust(state: Any) -> None:
    """From now on, what is held like this goes through the table of codes."""
    _distrusted.add((state.quant_type, state.dtype))


def is_distrusted(kind: str, dtype: torch.dtype) -> bool:
    return (kind, dtype) in _distrusted


def block_scales(state: Any) -> Tensor:
    """The scale of each block, (blocks,) fp32; with double quantisation they are dequantised."""
    scales: Tensor = state.absmax
    native = c_dequantise("", "fp32") if state.nested and scales.device.type == "cpu" else None
    if native is None or not scales.is_contiguous() or is_distrusted(state.quant_type, state.dtype):
        return some_scales(state, 0, len(scales))
    outer, out = state.state2, torch.empty(scales.shape, dtype=torch.float32)
    places = (ctypes.c_void_p(x.data_ptr()) for x in (outer.code, scales, outer.absmax, out))
    native(*places, ctypes.c_longlong(outer.blocksize), ctypes.c_longlong(scales.numel()))
    return out.add_(state.offset)


def some_scales(state: Any, first: int, last: int) -> Tensor:
    """`block_scales` of the blocks from `first` up to `last` alone, with the same numbers."""
    scales: Tensor = state.absmax[first:last]
    if not state.nested:
        return scales.float()
    outer = state.state2
    start, end = first // outer.blocksize, -(-last // outer.blocksize)
    factors = outer.absmax[start:end].repeat_interleave(outer.blocksize)
    factors = factors[first - start * outer.blocksize :][: len(scales)]
    return (outer.code[scales.int()] * factors).add_(state.offset)


def write(packed: Tensor, scales: Tensor, out: Tensor, block_size: int, kind: str) -> None:
    """Dequantise into `out`.

    Args:
        packed: two codes a byte, the earlier in its upper half; any shape and storage dtype.
        scales: (blocks,) fp32.
        out: n numbers, contiguous, in bf16, fp16 or fp32.
        kind: nf4 or fp4.
    """
    packed = packed.contiguous()
    native = c_dequantise(kind, _NATIVE[out.dtype]) if block_size < _NATIVE_BELOW and out.device.type == "cpu" else None
    done = 0
    if native is not None and not is_distrusted(kind, out.dtype):
        blocks = out.numel() // block_size
        sizes = (ctypes.c_longlong(n) for n in (block_size, blocks, block_size))  # (blocks, block): whole rows
        native(*(ctypes.c_void_p(t.data_ptr()) for t in (packed, scales.contiguous(), out)), *sizes)
        done = blocks * block_size
    for first in range(done, out.numel(), _TABLE_ELEMENTS):
        codes, part = packed.view(-1).view(torch.uint8), out.view(-1)[first : first + _TABLE_ELEMENTS]
        write_by_table(codes[first // 2 :], scales[first // block_size :], part, block_size, kind)


def write_by_table(codes: Tensor, scales: Tensor, out: Tensor, block_size: int, kind: str) -> None:
    """`write` in plain torch: the value of each code times the scale of its block."""
    n = out.numel()
    codes = codes[: -(-n // 2)]
    of_codes = values(kind).to(out.device)[torch.stack([codes >> 4, codes & 15], 1).view(-1)[:n].int()]
    out.copy_(of_codes * scales[: -(-n // block_size)].repeat_interleave(block_size)[:n])


def forget() -> None:
    """Give back the memory that this thread keeps; the next call takes as much as it needs."""
    _memory.bytes = None


def scratch(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor in memory that this thread keeps, as large as the largest that was asked for; on a card, a new one."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = shape.numel() * dtype.itemsize
    memory: Tensor | None = getattr(_memory, "bytes", None)
    if memory is None or memory.numel() < size:
        _memory.bytes = None  # before the larger one is made, not after
        _memory.bytes = memory = torch.empty(size, dtype=torch.uint8)
    return memory[:size].view(dtype).view(shape)


class FrozenLinear(torch.autograd.Function):
    """x W^T + b for a frozen W, which is dequantised again in backward: nothing but the layer is kept for it.

    Args of `apply`:
        x: (..., D). bias: (O,) or None; it may train. layer: the module that holds W.
        forward: (layer, x, bias in x's dtype) -> (..., O). backward: (layer, dy, x's dtype) -> (..., D).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, bias: Tensor | None, layer: nn.Module,
        forward: Callable[..., Tensor], backward: Callable[..., Tensor],
    ) -> Tensor:  # fmt: skip
        ctx.layer, ctx.gradient = layer, backward
        ctx.dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        return forward(layer, x, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[object, ...]:
        (dy,) = grads
        dx = ctx.gradient(ctx.layer, dy, ctx.dtype) if ctx.needs_input_grad[0] else None
        db = dy.flatten(0, -2).sum(0, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        return dx, None if db is None else db.to(ctx.bias_dtype), None, None, None


def frozen_product(x: Tensor, layer: nn.Module, number_format: NumberFormat) -> Tensor:
    """x W^T + b (..., O) in x's dtype for a layer whose frozen W is held in a format."""

    def forward(layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = number_format.weight(layer, x.dtype).to(x.dtype)
        return nn.functional.linear(number_format.inputs(layer, x), weight, bias)

    def backward(layer: nn.Module, dy: Tensor, dtype: torch.dtype) -> Tensor:
        return dy @ number_format.weight(layer, dtype).to(dtype)

    return FrozenLinear.apply(x, layer.bias, layer, forward, backward)
