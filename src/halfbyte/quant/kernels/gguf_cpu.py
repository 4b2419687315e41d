"""Blocks of a GGUF file back to weights: bit for bit what the gguf package's numpy gives, rounded once to the dtype.

What: a block is a few scales and the codes of 32 or 256 weights. Each type is written once, in LLVM's vectors of 16 and
32 numbers, which the processor's own registers are made of: AVX2, AVX-512 or NEON. A row may come from another row of
the file, so that what a converter has permuted is read in the model's order and nothing is copied.
Source: `gguf.quants`, whose operations are repeated one by one in fp32: no fused multiply-add, no other order.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from llvmlite import ir
from numba import carray, njit, types

from halfbyte.layers.kernels.cpu import parallel
from halfbyte.layers.kernels.cpu.parallel import array, each_block, per_dtype
from halfbyte.layers.kernels.cpu.scalar import Value, broadcast, instruction
from halfbyte.models.gguf.blocks import BLOCKS

if TYPE_CHECKING:
    from torch import Tensor

I8, I16, I32 = map(ir.IntType, (8, 16, 32))
F32 = ir.FloatType()
IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class _OneBlock:
    """LLVM's instructions for one block: at `w` its bytes, at `out` its weights."""

    def __init__(self, builder: Value, w: Value, out: Value) -> None:
        self.b, self.out = builder, out
        self.w = builder.inttoptr(w, I8.as_pointer())

    def load(self, at: int, kind: Value) -> Value:
        place = self.b.gep(self.w, [ir.Constant(I32, at)])
        value = self.b.load(self.b.bitcast(place, kind.as_pointer()))
        value.align = 1
        return value

    def bytes(self, at: int, n: int) -> Value:
        return self.load(at, ir.VectorType(I8, n))

    def byte(self, at: int) -> Value:
        """One byte, in 32 bits."""
        return self.b.zext(self.load(at, I8), I32)

    def half(self, at: int) -> Value:
        """An fp16, subnormal numbers too, in fp32."""
        return self.b.fpext(self.load(at, ir.HalfType()), F32)

    def wide(self, codes: Value) -> Value:
        return self.b.zext(codes, ir.VectorType(I32, codes.type.count))

    def number(self, codes: Value, *, signed: bool = False) -> Value:
        kind = ir.VectorType(F32, codes.type.count)
        return self.b.sitofp(codes, kind) if signed else self.b.uitofp(codes, kind)

    def low(self, codes: Value) -> Value:
        return self.b.and_(codes, _every(codes.type, 15))

    def high(self, codes: Value) -> Value:
        return self.b.lshr(codes, _every(codes.type, 4))

    def times(self, scale: Value, numbers: Value) -> Value:
        return self.b.fmul(broadcast(self.b, scale, numbers.type.count), numbers)

    def less(self, numbers: Value, by: float) -> Value:
        return self.b.fsub(numbers, _every(numbers.type, by))

    def plus(self, numbers: Value, value: Value) -> Value:
        return self.b.fadd(numbers, broadcast(self.b, value, numbers.type.count))

    def minus(self, numbers: Value, value: Value) -> Value:
        return self.b.fsub(numbers, broadcast(self.b, value, numbers.type.count))

    def level(self, codes: Value, levels: tuple[int, ...]) -> Value:
        """What 4-bit codes stand for, in fp32."""
        found = _every(codes.type, levels[0])
        for code, level in enumerate(levels[1:], 1):
            is_it = self.b.icmp_unsigned("==", codes, _every(codes.type, code))
            found = self.b.select(is_it, _every(codes.type, level), found)
        return self.number(found, signed=True)

    def scale_and_least(self, j: int) -> tuple[Value, Value]:
        """The 6-bit scale and minimum of a K block's part j, of 12 bytes from the fifth on."""
        b, six = self.b, ir.Constant(I32, 63)
        if j < 4:
            return b.and_(self.byte(4 + j), six), b.and_(self.byte(8 + j), six)
        both = self.byte(8 + j)
        upper = [b.shl(b.lshr(self.byte(at), ir.Constant(I32, 6)), ir.Constant(I32, 4)) for at in (j, 4 + j)]
        return b.or_(b.and_(both, ir.Constant(I32, 15)), upper[0]), b.or_(b.lshr(both, ir.Constant(I32, 4)), upper[1])

    def put(self, at: int, numbers: Value) -> None:
        """Weights from `at` on, rounded to nearest even where `out` holds bf16 (as uint16)."""
        b, n = self.b, numbers.type.count
        if self.out.dtype == types.uint16:
            words = ir.VectorType(I32, n)
            bits = b.bitcast(numbers, words)
            odd = b.and_(b.lshr(bits, _every(words, 16)), _every(words, 1))
            rounded = b.add(b.add(bits, _every(words, 0x7FFF)), odd)
            bits = b.select(b.fcmp_unordered("uno", numbers, numbers), bits, rounded)
            numbers = b.trunc(b.lshr(bits, _every(words, 16)), ir.VectorType(I16, n))
        place = b.gep(self.out.data, [ir.Constant(I32, at)])
        b.store(numbers, b.bitcast(place, numbers.type.as_pointer()), align=2)


def _every(kind: Value, value: float) -> Value:
    return ir.Constant(kind, [value] * kind.count)


def _fifth(block: _OneBlock, at: int, codes: Value, first: int) -> Value:
    """4-bit codes with a fifth bit each: of a word of 32 bits, from its bit `first` on."""
    b, n = block.b, codes.type.count
    word = broadcast(b, block.load(at, I32), n)
    bits = b.lshr(word, ir.Constant(word.type, list(range(first, first + n))))
    return b.or_(block.wide(codes), b.shl(b.and_(bits, _every(word.type, 1)), _every(word.type, 4)))


def _block_of_32(block: _OneBlock, *, less: int = 0, least: bool = False, fifth: bool = False) -> None:
    """32 weights of 4 bits, the lower halves of bytes first: d x (code - less), or d x code + m where the block has a
    `least` value; `fifth`: each has one bit more, in a word before the codes."""
    d, at = block.half(0), 4 if least else 2
    codes = block.bytes(at + 4 * fifth, 16)
    for first, part in ((0, block.low(codes)), (16, block.high(codes))):
        numbers = block.number(_fifth(block, at, part, first) if fifth else part)
        numbers = block.times(d, block.less(numbers, less) if less else numbers)
        block.put(first, block.plus(numbers, block.half(2)) if least else numbers)


def _q8_0(block: _OneBlock) -> None:
    d = block.half(0)
    for first in (0, 16):
        block.put(first, block.times(d, block.number(block.bytes(2 + first, 16), signed=True)))


def _k_block(block: _OneBlock, codes_at: int, bits_at: int | None) -> None:
    """256 weights in 8 parts, each d x scale x code - dmin x minimum; `bits_at`: where each weight has a fifth bit."""
    b, d = block.b, block.half(0)
    dmin = block.half(2)
    for chunk in range(4):
        bytes_ = block.bytes(codes_at + 32 * chunk, 32)
        for part, codes in ((2 * chunk, block.low(bytes_)), (2 * chunk + 1, block.high(bytes_))):
            scale, least = block.scale_and_least(part)
            if bits_at is not None:
                bits = b.lshr(block.bytes(bits_at, 32), _every(codes.type, part))
                codes = b.or_(codes, b.shl(b.and_(bits, _every(codes.type, 1)), _every(codes.type, 4)))
            numbers = block.times(b.fmul(d, b.uitofp(scale, F32)), block.number(codes))
            block.put(32 * part, block.minus(numbers, b.fmul(dmin, b.uitofp(least, F32))))


def _q6_k(block: _OneBlock) -> None:
    b, d = block.b, block.half(208)
    for n in range(8):  # of 32 weights: four of each half, by the two bits that they have in a byte of 32
        half, quarter = divmod(n, 4)
        for k in (0, 16):
            lower = block.bytes(64 * half + 32 * (quarter % 2) + k, 16)
            lower = block.low(lower) if quarter < 2 else block.high(lower)
            bits = b.lshr(block.bytes(128 + 32 * half + k, 16), _every(lower.type, 2 * quarter))
            codes = b.or_(lower, b.shl(b.and_(bits, _every(lower.type, 3)), _every(lower.type, 4)))
            scale = b.fmul(d, b.sitofp(block.load(192 + 2 * n + k // 16, I8), F32))
            block.put(32 * n + k, block.times(scale, block.less(block.number(codes), 32)))


def _levels_by_codes(block: _OneBlock, d: Value, at: int, levels: tuple[int, ...]) -> None:
    """32 weights, each d x what its 4-bit code stands for; the codes are from byte `at` on."""
    codes = block.bytes(at, 16)
    block.put(0, block.times(d, block.level(block.low(codes), levels)))
    block.put(16, block.times(d, block.level(block.high(codes), levels)))


def _iq4_nl(block: _OneBlock) -> None:
    _levels_by_codes(block, block.half(0), 2, IQ4_NL)


def _mxfp4(block: _OneBlock) -> None:
    b, e = block.b, block.byte(0)
    # half of 2^(e - 127); the two smallest are subnormal
    small = b.shl(ir.Constant(I32, 0x00200000), b.and_(e, ir.Constant(I32, 1)))
    usual = b.shl(b.sub(e, ir.Constant(I32, 1)), ir.Constant(I32, 23))
    d = b.bitcast(b.select(b.icmp_unsigned("<", e, ir.Constant(I32, 2)), small, usual), F32)
    _levels_by_codes(block, d, 1, MXFP4)


_WRITERS: dict[str, Callable[[_OneBlock], None]] = {
    "Q4_0": partial(_block_of_32, less=8),
    "Q4_1": partial(_block_of_32, least=True),
    "Q5_0": partial(_block_of_32, less=16, fifth=True),
    "Q5_1": partial(_block_of_32, least=True, fifth=True),
    "Q8_0": _q8_0,
    "Q4_K": partial(_k_block, codes_at=16, bits_at=None),
    "Q5_K": partial(_k_block, codes_at=48, bits_at=16),
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4,
}


@instruction(types.void, types.int64, types.int64, types.int64, None)
def _block(b: Value, kind: Value, w: Value, i: Value, out: Value) -> None:
    """Block `i` of those from address `w` on -> `out`, by ggml's number of its type."""
    end = b.append_basic_block()
    switch = b.switch(kind, end)
    for name, write_block in _WRITERS.items():
        number, _, nbytes = BLOCKS[name]
        here = b.append_basic_block(name)
        switch.add_case(ir.Constant(kind.type, number), here)
        b.position_at_end(here)
        write_block(_OneBlock(b, b.add(w, b.mul(i, ir.Constant(i.type, nbytes))), out))
        b.branch(end)
    b.position_at_end(end)


# No fastmath: with it a product and a sum may become one operation, which rounds once.
_inlined = njit(forceinline=True, error_model="numpy")


@_inlined
def row(kind, w, out, blocks):  # type: ignore[no-untyped-def]
    """The blocks of one row, from address `w` on -> `out`, bf16 (as uint16) or fp32."""
    n = out.size // blocks
    for i in range(blocks):
        _block(kind, w, i, out[i * n : (i + 1) * n])


@_inlined
def _rows(slots, like, first, last):  # type: ignore[no-untyped-def]
    codes, order = slots[3], slots[4]
    row_bytes, kind = slots[5], slots[6]
    blocks, width = slots[7], slots[8]
    places = array(order, (slots[1],), np.int32)
    for r in range(first, last):
        place = np.int64(places[r]) if order != 0 else r
        out = array(slots[9] + r * width * like.itemsize, (width,), like.dtype)
        row(kind, codes + place * row_bytes, out, blocks)


@per_dtype
def _kernel(element: type) -> object:
    def dequantise(p):  # type: ignore[no-untyped-def]
        slots = carray(p, (parallel.SLOTS,), np.int64)
        each_block(slots, _rows, (slots, array(slots[9], (1,), element)))

    return dequantise


def write(codes: "Tensor", kind: str, out: "Tensor", order: "Tensor | None" = None) -> None:
    """Dequantise into `out`.

    Args:
        codes: (rows, bytes of a row) uint8, contiguous. kind: one of `BLOCKS`.
        out: (rows, columns) bf16 or fp32, contiguous.
        order: (rows of `out`,) int32: which row of `codes` each one is; None: they are in order.
    """
    number, weights, _ = BLOCKS[kind]
    rows, columns = out.shape
    at_once = parallel.block_rows(columns)
    where = (codes, 0 if order is None else order, codes.stride(0))
    parallel.run(_kernel(out.dtype), rows, at_once, *where, number, columns // weights, columns, out)
