"""A frozen weight from its 4-bit codes back to numbers, in one pass, its scales dequantised on the way.

Why: bitsandbytes has one C function for scales of scales and another for the codes, with torch's calls around them:
4096 x 4096 took 4.0 ms on two threads, and takes 2.5 here. A small matrix takes as long as before (docs/log).
What: the same numbers to the bit. The 16 values of a block's codes are multiplied with its scale and rounded to the
weight's dtype once, and a number is then one permutation of a register.
Source: QLoRA, arXiv:2305.14314, for the codes: two a byte, the earlier in the upper half.
Cost: half a byte read and a number written; about eight instructions for 16 of them.
"""

from collections.abc import Callable

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from torch import Tensor

from halfbyte.layers.kernels.cpu import tiles
from halfbyte.layers.kernels.cpu.parallel import BLOCK_ELEMENTS, array, each_block, per_dtype, run
from halfbyte.layers.kernels.cpu.scalar import Value, broadcast, call, inlined, instruction
from halfbyte.quant.number_format import Codes

LANES = 16  # numbers of a register
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_F32 = ir.FloatType()
_FLOATS, _WORDS, _HALVES = (ir.VectorType(element, LANES) for element in (_F32, _I32, _I16))
_EIGHT = ir.VectorType(_I64, LANES // 2)
_NESTED = types.Tuple((*[types.int64] * 3, types.float32))

if not tiles.has("avx512f"):
    raise ImportError("these kernels look 16 values up at once, which this processor does not (avx512f)")


def _all(n: int) -> Value:
    return ir.Constant(_WORDS, [n] * LANES)


def _to_bf16(b: Value, value: Value) -> Value:
    """16 floats, rounded to nearest even bf16. (A NaN of a scale keeps its upper bits, so it stays one.)"""
    bits = b.bitcast(value, _WORDS)
    odd = b.and_(b.lshr(bits, _all(16)), _all(1))
    up = b.and_(b.add(b.add(bits, _all(0x7FFF)), odd), _all(0xFFFF0000))
    return b.bitcast(b.select(b.fcmp_unordered("uno", value, value), bits, up), _FLOATS)


def _load(b: Value, base: Value, number: Value, kind: Value, size: int) -> Value:
    return b.load(b.inttoptr(b.add(base, b.mul(number, _I64(size))), kind.as_pointer()), align=size)


def _decode_block(
    b: Value, codes: Value, scaled: Value, first: Value, registers: Value, store: Callable[..., None]
) -> None:
    """A block of `registers` x 16 codes, the first of them number `first`: store(numbers, where they stand). `scaled`:
    what its 16 codes stand for."""
    with cgutils.for_range(b, registers, intp=_I64) as register:
        at = b.add(first, b.mul(register.index, _I64(LANES)))
        place = b.inttoptr(b.add(codes, b.lshr(at, _I64(1))), ir.VectorType(_I8, LANES // 2).as_pointer())
        pairs = b.zext(b.load(place, align=1), _EIGHT)  # a byte in each: its upper half is the earlier code
        halves = [ir.Constant(_EIGHT, [n] * (LANES // 2)) for n in (4, 32)]
        which = b.bitcast(b.or_(b.lshr(pairs, halves[0]), b.shl(pairs, halves[1])), _WORDS)
        store(call(b, "llvm.x86.avx512.permvar.sf.512", _FLOATS, scaled, which), at)  # looks at 4 bits of each


def _scaled(b: Value, table: Value, scale: Value, bf16: Value) -> Value:
    """The 16 values at `table` times a scale; bf16: whether they are rounded to bf16."""
    values = b.load(b.inttoptr(table, _FLOATS.as_pointer()), align=4)
    exact = b.fmul(values, broadcast(b, scale, LANES))
    return b.select(b.icmp_signed("!=", bf16, _I64(0)), _to_bf16(b, exact), exact)


@instruction(types.void, *[types.int64] * 7)
def decode(
    b: Value, codes: Value, scales: Value, table: Value, out: Value, blocks: Value, registers: Value, bf16: Value
) -> None:
    """`blocks` blocks of `registers` x 16 codes -> fp32 at `out`. Addresses: of bytes, of fp32 scales, of the 16 fp32
    values of the codes; bf16: whether a value times its scale is rounded to bf16."""

    def store(numbers: Value, at: Value) -> None:
        b.store(numbers, b.inttoptr(b.add(out, b.mul(at, _I64(4))), _FLOATS.as_pointer()), align=4)

    with cgutils.for_range(b, blocks, intp=_I64) as block:
        scaled = _scaled(b, table, _load(b, scales, block.index, _F32, 4), bf16)
        first = b.mul(block.index, b.mul(registers, _I64(LANES)))
        _decode_block(b, codes, scaled, first, registers, store)


@instruction(types.void, types.int64, _NESTED, types.int64, types.int64, types.int64)
def scales_of(b: Value, scales: Value, nested: Value, first: Value, count: Value, out: Value) -> None:
    """`count` scales from number `first` on, as fp32 at `out`; a product and a sum, each rounded.

    Args: scales: address of fp32, or of bytes where they are nested. nested: addresses of the 256 values (0 where they
        are not nested) and of fp32 scales of so many bytes, and an offset.
    """
    values, outer, size, offset = cgutils.unpack_tuple(b, nested)
    with cgutils.for_range(b, count, intp=_I64) as loop:
        number, place = b.add(first, loop.index), b.add(out, b.mul(loop.index, _I64(4)))
        to = b.inttoptr(place, _F32.as_pointer())
        with b.if_else(b.icmp_signed("!=", values, _I64(0))) as (inner, plain):
            with inner:
                value = _load(b, values, b.zext(_load(b, scales, number, _I8, 1), _I64), _F32, 4)
                product = b.fmul(value, _load(b, outer, b.udiv(number, size), _F32, 4))
                # fenced, or both would be one operation, with other last bits
                b.store(b.fadd(call(b, "llvm.arithmetic.fence.f32", _F32, product), offset), to)
            with plain:
                b.store(_load(b, scales, number, _F32, 4), to)


@instruction(types.void, *[types.int64] * 2, types.float32, *[types.int64] * 2, None)
def _write_block(
    b: Value, codes: Value, table: Value, scale: Value, number: Value, registers: Value, out: Value
) -> None:
    """Block `number` of a weight -> its place in `out`, (n,) fp32, or bf16 as uint16."""
    narrow = out.dtype == types.uint16

    def store(numbers: Value, at: Value) -> None:
        if narrow:  # they are bf16 already
            numbers = b.trunc(b.lshr(b.bitcast(numbers, _WORDS), _all(16)), _HALVES)
        b.store(numbers, b.bitcast(b.gep(out.data, [at]), numbers.type.as_pointer()), align=2)

    first = b.mul(number, b.mul(registers, _I64(LANES)))
    _decode_block(b, codes, _scaled(b, table, scale, _I64(int(narrow))), first, registers, store)


@inlined
def _blocks(codes, scales, nested, table, registers, out, first, last):  # type: ignore[no-untyped-def]
    one = np.empty(1, np.float32)
    for number in range(first, last):
        scales_of(scales, nested, number, 1, one.ctypes.data)
        _write_block(codes, table, one[0], number, registers, out)


@per_dtype
def _write_kernel(element: type) -> object:
    def write_codes(p):  # type: ignore[no-untyped-def]
        s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
        out = array(s[6], (s[1] * s[7] * LANES,), element)
        nested = (s[8], s[9], s[10], np.float32(f[11]))
        each_block(s, _blocks, (s[3], s[4], nested, s[5], s[7], out))

    return write_codes


def nested_of(codes: Codes) -> tuple[Tensor | int | float, ...]:
    """What kernels take of scales that are nested."""
    nested = codes.nested
    return (0, 0, 1, 0.0) if nested is None else (nested.values, nested.scales, nested.block, nested.offset)


def takes(codes: Codes) -> bool:
    """Whether these kernels take a weight in 4 bits: rows of whole blocks, blocks of whole registers, on the CPU."""
    width, block = codes.shape[1], codes.block
    fits = width % block == 0 and block % LANES == 0 and codes.dtype in (torch.bfloat16, torch.float32)
    scales = codes.nested.scales if codes.nested else codes.scales
    return fits and codes.packed.device.type == "cpu" and scales.dtype == torch.float32 and scales.is_contiguous()


def write(codes: Codes, out: Tensor) -> Tensor:
    """The weight that these codes stand for into `out`, contiguous, of their dtype."""
    blocks, size = out.numel() // codes.block, codes.block // LANES
    given = (codes.packed, codes.scales, codes.values, out, size, *nested_of(codes))
    run(_write_kernel(out.dtype), blocks, max(1, BLOCK_ELEMENTS // codes.block), *given)
    return out
