"""A frozen weight from its 4-bit codes into 8-bit integers, in one pass: decoded, mixed and rounded in a core's cache.

Why: dequantised to memory first and then rounded, a weight is written and read twice more than it has to be, and in
pieces that stay in a cache the calls cost as much as the arithmetic: half of what is around 7B's products.
What: the same numbers to the bit. A thread decodes a row (`rows`), or 16 rows (`groups`), into fp32: the 16 values of a
block's codes are multiplied with its scale and rounded to the weight's dtype once, and a number is then one permutation
of a register. What follows is `rounding.py`'s.
Source: QLoRA, arXiv:2305.14314, for the codes: two a byte, the earlier in the upper half.
Cost: half a byte read and one written a number; about 25 instructions for 16 of them.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from torch import Tensor

from halfbyte.layers.kernels.cpu import tiles
from halfbyte.layers.kernels.cpu.integer import rounding

from halfbyte.layers.kernels.cpu.integer.rounding import (  # isort: skip
    LANES, MOST, Int8Matrix, decoded_groups, decoded_rows, mirrors_thirds, padded_width, registers_mixed,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.parallel import array, block_rows, each_block, kernel, run
from halfbyte.layers.kernels.cpu.scalar import Value, broadcast, call, inlined, instruction
from halfbyte.quant import dequantise
from halfbyte.quant.number_format import Codes, Nested

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_F32 = ir.FloatType()
_FLOATS, _WORDS = (ir.VectorType(element, LANES) for element in (_F32, _I32))
_EIGHT = ir.VectorType(_I64, LANES // 2)


if not tiles.has("avx512f"):
    raise ImportError("these kernels look 16 values up at once, which this processor does not (avx512f)")


def _to_bf16(b: Value, value: Value) -> Value:
    """16 floats, rounded to nearest even bf16. (A NaN of a scale keeps its upper bits, so it stays one.)"""

    def words(n: int) -> Value:
        return ir.Constant(_WORDS, [n] * LANES)

    bits = b.bitcast(value, _WORDS)
    odd = b.and_(b.lshr(bits, words(16)), words(1))
    up = b.and_(b.add(b.add(bits, words(0x7FFF)), odd), words(0xFFFF0000))
    return b.bitcast(b.select(b.fcmp_unordered("uno", value, value), bits, up), _FLOATS)


@instruction(types.void, *[types.int64] * 7)
def _decode(
    b: Value, codes: Value, scales: Value, table: Value, out: Value, blocks: Value, registers: Value, bf16: Value
) -> None:
    """`blocks` blocks of `registers` x 16 codes -> fp32 at `out`. Addresses: of bytes, of fp32 scales, of the 16 fp32
    values of the codes; bf16: whether a value times its scale is rounded to bf16."""
    values = b.load(b.inttoptr(table, _FLOATS.as_pointer()), align=4)
    size = b.mul(registers, _I64(LANES))
    with cgutils.for_range(b, blocks, intp=_I64) as block:
        scale = b.load(b.inttoptr(b.add(scales, b.mul(block.index, _I64(4))), _F32.as_pointer()))
        exact = b.fmul(values, broadcast(b, scale, LANES))
        scaled = b.select(b.icmp_signed("!=", bf16, _I64(0)), _to_bf16(b, exact), exact)
        first = b.mul(block.index, size)
        with cgutils.for_range(b, registers, intp=_I64) as register:
            at = b.add(first, b.mul(register.index, _I64(LANES)))
            place = b.inttoptr(b.add(codes, b.lshr(at, _I64(1))), ir.VectorType(_I8, LANES // 2).as_pointer())
            pairs = b.zext(b.load(place, align=1), _EIGHT)  # a byte in each: its upper half is the earlier code
            halves = [ir.Constant(_EIGHT, [n] * (LANES // 2)) for n in (4, 32)]
            which = b.bitcast(b.or_(b.lshr(pairs, halves[0]), b.shl(pairs, halves[1])), _WORDS)
            numbers = call(b, "llvm.x86.avx512.permvar.sf.512", _FLOATS, scaled, which)  # looks at 4 bits of each
            b.store(numbers, b.inttoptr(b.add(out, b.mul(at, _I64(4))), _FLOATS.as_pointer()), align=4)


@instruction(
    types.void, types.int64, types.Tuple((*[types.int64] * 3, types.float32)), types.int64, types.int64, types.int64
)
def _scales(b: Value, scales: Value, nested: Value, first: Value, count: Value, out: Value) -> None:
    """`count` scales from number `first` on, as fp32 at `out`; a product and a sum, each rounded.

    Args: scales: address of fp32, or of bytes where they are nested. nested: addresses of the 256 values (0 where they
        are not nested) and of fp32 scales of so many bytes, and an offset.
    """
    values, outer, size, offset = cgutils.unpack_tuple(b, nested)

    def read(base: Value, number: Value, kind: Value, size: int) -> Value:
        return b.load(b.inttoptr(b.add(base, b.mul(number, _I64(size))), kind.as_pointer()), align=size)

    with cgutils.for_range(b, count, intp=_I64) as loop:
        number, place = b.add(first, loop.index), b.add(out, b.mul(loop.index, _I64(4)))
        to = b.inttoptr(place, _F32.as_pointer())
        with b.if_else(b.icmp_signed("!=", values, _I64(0))) as (inner, plain):
            with inner:
                value = read(values, b.zext(read(scales, number, _I8, 1), _I64), _F32, 4)
                product = b.fmul(value, read(outer, b.udiv(number, size), _F32, 4))
                # fenced, or both would be one operation, with other last bits
                b.store(b.fadd(call(b, "llvm.arithmetic.fence.f32", _F32, product), offset), to)
            with plain:
                b.store(read(scales, number, _F32, 4), to)


@inlined
def _row(how, row, to, width, row_scales):  # type: ignore[no-untyped-def]
    codes, scales, nested, table, block, bf16 = how
    _scales(scales, nested, row * width // block, width // block, row_scales)
    _decode(codes + row * width // 2, row_scales, table, to, width // block, block // LANES, bf16)


@inlined
def _rows(how, q, steps, width, count, thirds, share, first, last):  # type: ignore[no-untyped-def]
    decoded_rows(_row, how, q, steps, width, count, thirds, share, first, last)


@inlined
def _groups(how, q, steps, width, rows, share, first, last):  # type: ignore[no-untyped-def]
    decoded_groups(_row, how, q, steps, width, rows, share, first, last)


@kernel
def decode_rows(p):  # type: ignore[no-untyped-def]
    s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
    steps, share = array(s[7], (s[1],), np.float32), np.float32(f[13])
    nested = (s[14], s[15], s[16], np.float32(f[17]))
    how = (s[3], s[4], nested, s[5], s[9], s[10])
    each_block(s, _rows, (how, s[6], steps, s[8], s[11], s[12], share))


@kernel
def decode_groups(p):  # type: ignore[no-untyped-def]
    s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
    steps, share = array(s[7], (s[1] * MOST,), np.float32), np.float32(f[12])
    nested = (s[13], s[14], s[15], np.float32(f[16]))
    how = (s[3], s[4], nested, s[5], s[9], s[10])
    each_block(s, _groups, (how, s[6], steps, s[8], s[11], share))


def takes(codes: Codes) -> bool:
    """Whether these kernels take a weight in 4 bits: rows of whole blocks, blocks of whole registers, on the CPU."""
    width, block = codes.shape[1], codes.block
    fits = width % block == 0 and block % LANES == 0 and codes.dtype in (torch.bfloat16, torch.float32)
    scales = codes.nested.scales if codes.nested else codes.scales
    return fits and codes.packed.device.type == "cpu" and scales.dtype == torch.float32 and scales.is_contiguous()


def _given(codes: Codes, out: Int8Matrix) -> tuple[tuple[Tensor | int, ...], tuple[Tensor | int | float, ...]]:
    """What both kernels take: first codes, where to and sizes; then what says of scales that are nested."""
    first = (codes.packed, codes.scales, codes.values, *out, codes.shape[1], codes.block)
    nested = codes.nested
    last = (0, 0, 1, 0.0) if nested is None else (nested.values, nested.scales, nested.block, nested.offset)
    return (*first, int(codes.dtype == torch.bfloat16)), last


def rows(codes: Codes, *, share: float = 1.0, out: Int8Matrix) -> Int8Matrix:
    """As `rounding.rows` of the weight that these codes stand for."""
    (o, d), (given, nested) = codes.shape, _given(codes, out)
    run(decode_rows, o, block_rows(d), *given, registers_mixed(d), int(mirrors_thirds(d)), float(share), *nested)
    return out


def groups(codes: Codes, *, share: float = 1.0, out: Int8Matrix) -> Int8Matrix:
    """As `rounding.groups` of the weight that these codes stand for."""
    (o, d), (given, nested) = codes.shape, _given(codes, out)
    run(decode_groups, padded_width(o) // MOST, block_rows(d * MOST), *given, o, float(share), *nested)
    return out


def fault() -> str | None:
    """What these kernels get wrong on this machine, seen once on small weights beside plain torch; None where nothing
    is. Widths are those of three registers and of sixteen; rows are no whole group."""
    draw = torch.Generator().manual_seed(0)
    for kind, dtype, (o, d), block in (("nf4", torch.bfloat16, (37, 192), 64), ("fp4", torch.float32, (16, 256), 32)):
        packed = torch.randint(256, (o * d // 2,), generator=draw, dtype=torch.uint8)
        bytes_ = torch.randint(256, (o * d // block,), generator=draw, dtype=torch.uint8)
        nested = Nested(torch.rand(256, generator=draw), torch.rand(o * d // block // 8 + 1, generator=draw), 8, 0.01)
        codes = Codes(packed, bytes_, dequantise.values(kind), (o, d), block, dtype, nested)
        plain, scales = torch.empty(o * d, dtype=dtype), nested.values[bytes_.int()]
        scales = scales * nested.scales.repeat_interleave(8)[: len(scales)] + nested.offset
        dequantise.write_by_table(packed, scales, plain, block, kind)
        for ours, known, count in ((rows, rounding.rows, o), (groups, rounding.groups, padded_width(o))):
            out = torch.empty(count, d, dtype=torch.int8), torch.empty(count)
            if not all(map(torch.equal, ours(codes, out=out), known(plain.view(o, d)))):
                return f"a weight in {kind} is rounded to other numbers"
    return None
