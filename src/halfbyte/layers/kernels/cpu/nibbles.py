"""Dot products of rows of 4-bit codes with a few vectors, in registers: what decoding spends its time on.

Why: a token multiplies each weight once, so its time is that of reading the weights; dequantised first, they are read
and written as 16 bits again. Here the bytes of the store are looked up in a table in a register and multiplied at once.
What: blocks of 64 weights, two codes a byte, the earlier in the upper half. A word of 16 bits holds four codes; shifted
by 0, 4, 8 and 12 its lowest bits select from the table. So each register holds every fourth weight, and the vector x is
laid out in that order once (`ORDER`). Scales multiply a block's sum, in fp32.
    avx512  64 bytes at a time: `vpermw` (5 bits: the table is there twice), `vdpbf16ps`. Table and x are bf16.
    avx2    32 bytes at a time: `vpshufb` for the two bytes of a bf16 level; x is fp32.
Error: levels are rounded to bf16, which moves each by at most 2^-9 of itself; products and sums are fp32.
Source: VPERMW, VDPBF16PS, VPSHUFB in Intel's SDM volume 2; the order is ours.
Cost: about 14 instructions for 128 weights and one vector; memory is the limit on two cores.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from halfbyte.layers.kernels.cpu.tiles import BFloat

Value: TypeAlias = Any  # of LLVM's, or a builder of them: llvmlite has no types
BLOCK = 64
_AHEAD_BYTES = 2048  # codes that are asked for before they are needed: the memory answers after some 100 ns
CHUNK = 128  # weights that x is laid out by: two blocks
_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_CALLS = {
    "permute": "llvm.x86.avx512.permvar.hi.512",
    "multiply": "llvm.x86.avx512bf16.dpbf16ps.512",
    "shuffle": "llvm.x86.avx2.pshuf.b",
}


def order(isa: str) -> np.ndarray:
    """Which of a chunk's 128 numbers each place of x holds."""
    if isa == "avx512":  # register k, word j: code k of word j; a byte's upper half is the earlier
        return np.array([4 * j + k for k in (1, 0, 3, 2) for j in range(32)], np.int64)
    block = []
    for half in (1, 0):  # lower halves of the bytes first
        for part in (0, 8):  # unpacklo, unpackhi of each 128-bit lane
            for parity in (0, 1):
                block += [2 * (lane * 16 + part + 2 * i + parity) + half for lane in (0, 1) for i in range(4)]
    return np.array(block + [64 + e for e in block], np.int64)


class _Code:
    """Short names for what is written often in LLVM's language."""

    def __init__(self, builder: Value) -> None:
        self.b = builder

    def load(self, at: Value, kind: Value, align: int = 1) -> Value:
        return self.b.load(self.b.inttoptr(at, kind.as_pointer()), align=align)

    def at(self, base: Value, *terms: Value) -> Value:
        """base + the terms; a pair is multiplied, a number is one of bytes."""
        for term in terms:
            if isinstance(term, tuple):
                a, c = (_I64(t) if isinstance(t, int) else t for t in term)
                term = self.b.mul(a, c)
            base = self.b.add(base, _I64(term) if isinstance(term, int) else term)
        return base

    def call(self, name: str, kind: Value, *args: Value) -> Value:
        function = ir.FunctionType(kind, [a.type for a in args])
        return self.b.call(cgutils.get_or_insert_function(self.b.module, function, name), args)

    def prefetch(self, at: Value) -> None:
        pointer = self.b.inttoptr(at, _I8.as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, _I32(0), _I32(3), _I32(1))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        lanes = a.type.count
        return self.call(f"llvm.fma.v{lanes}f32", a.type, a, b, c)

    def every(self, value: Value, lanes: int) -> Value:
        vector = ir.VectorType(value.type, lanes)
        one = self.b.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
        return self.b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask([0] * lanes))

    def total(self, vector: Value) -> Value:
        """The sum of a vector's lanes, by halves."""
        lanes = vector.type.count
        while lanes > 1:
            lanes //= 2
            low = self.b.shuffle_vector(vector, vector, mask(range(lanes)))
            vector = self.b.fadd(low, self.b.shuffle_vector(vector, vector, mask(range(lanes, 2 * lanes))))
        return self.b.extract_element(vector, _I32(0))


def mask(places: Value) -> Value:
    places = list(places)
    return ir.Constant(ir.VectorType(_I32, len(places)), places)


def zeros(kind: Value) -> Value:
    return ir.Constant(kind, None)


_WORDS, _LANES = ir.VectorType(_I16, 32), ir.VectorType(_F32, 16)
_PAIRS, _HALF = ir.VectorType(BFloat(), 32), ir.VectorType(_I16, 16)
_LANES8, _BYTES, _INTS8 = ir.VectorType(_F32, 8), ir.VectorType(_I8, 32), ir.VectorType(_I32, 8)


def _dp(code: _Code, total: Value, a: Value, b: Value) -> Value:
    pairs = [code.b.bitcast(v, _PAIRS) for v in (a, b)]
    return code.call(_CALLS["multiply"], _LANES, total, *pairs)


def _wide(code: _Code, at: Value) -> Value:
    """32 bytes in the lower half of a register, zeros above."""
    return code.b.shuffle_vector(code.load(at, _HALF), zeros(_HALF), mask(range(32)))


def _chunk_avx512(
    code: _Code, table: Value, w: Value, x: list[Value], scales: list[Value], sums: list[list[Value]]
) -> None:
    """128 weights of each row (a register each) times each x, onto the sums."""
    four = []
    for words in w:
        shifted = [words, *(code.b.lshr(words, ir.Constant(_WORDS, [n] * 32)) for n in (4, 8, 12))]
        four.append([code.call(_CALLS["permute"], _WORDS, table, s) for s in shifted])
    for m, address in enumerate(x):
        xs = [code.load(code.at(address, 64 * k), _WORDS) for k in range(4)]
        for r, levels in enumerate(four):
            dot = zeros(_LANES)
            for k in range(4):
                dot = _dp(code, dot, levels[k], xs[k])
            code.b.store(code.fma(dot, scales[r], code.b.load(sums[r][m])), sums[r][m])


def _avx512(code: _Code, rows: int, vectors: int, args: dict[str, Value]) -> list[list[Value]]:
    b = code.b
    sums = [[cgutils.alloca_once_value(b, zeros(_LANES)) for _ in range(vectors)] for _ in range(rows)]
    for line in sums:
        for one in line:
            b.store(zeros(_LANES), one)
    table = code.load(args["table"], _WORDS)
    x = [code.at(args["x"], (args["x_row"], m)) for m in range(vectors)]

    def scale(r: int, chunk: Value) -> Value:
        at = code.at(args["scales"], (args["scales_row"], r), (chunk, 8))
        first, second = (code.every(code.load(code.at(at, n), _F32), 16) for n in (0, 4))
        return b.shuffle_vector(first, second, mask([*range(8), *range(24, 32)]))

    with cgutils.for_range(b, b.lshr(args["blocks"], _I64(1)), intp=_I64) as loop:
        c = loop.index
        rows_at = [code.at(args["w"], (args["w_row"], r), (c, 64)) for r in range(rows)]
        for at in rows_at:
            code.prefetch(code.at(at, _AHEAD_BYTES))
        w = [code.load(at, _WORDS) for at in rows_at]
        now = [code.at(at, (c, 256)) for at in x]
        _chunk_avx512(code, table, w, now, [scale(r, c) for r in range(rows)], sums)
    with b.if_then(b.icmp_signed("!=", b.and_(args["blocks"], _I64(1)), _I64(0))):
        c = b.lshr(args["blocks"], _I64(1))
        w = [_wide(code, code.at(args["w"], (args["w_row"], r), (c, 64))) for r in range(rows)]
        now = [code.at(at, (c, 256)) for at in x]
        _chunk_avx512(code, table, w, now, [scale(r, c) for r in range(rows)], sums)
    with cgutils.for_range(b, args["pieces"], intp=_I64) as loop:  # 16 ranks of LoRA at a time
        for m in range(vectors):
            h = _wide(code, code.at(args["h"], (args["h_row"], m), (loop.index, 32)))
            for r in range(rows):
                up = _wide(code, code.at(args["up"], (args["up_row"], r), (loop.index, 32)))
                b.store(_dp(code, b.load(sums[r][m]), up, h), sums[r][m])
    return sums


def _levels_avx2(code: _Code, planes: tuple[Value, Value], w: Value) -> list[Value]:
    """64 codes -> 8 registers of 8 levels in fp32, in the order that x has."""
    b, low = code.b, ir.Constant(_BYTES, [15] * 32)
    words = b.bitcast(w, ir.VectorType(_I16, 16))
    upper = b.bitcast(b.lshr(words, ir.Constant(words.type, [4] * 16)), _BYTES)
    found = []
    for index in (b.and_(w, low), b.and_(upper, low)):
        lo, hi = (code.call(_CALLS["shuffle"], _BYTES, plane, index) for plane in planes)
        for part in (0, 8):
            places = [lane * 16 + part + i + 32 * side for lane in (0, 1) for i in range(8) for side in (0, 1)]
            both = b.bitcast(b.shuffle_vector(lo, hi, mask(places)), _INTS8)
            found.append(b.bitcast(b.shl(both, ir.Constant(_INTS8, [16] * 8)), _LANES8))
            found.append(b.bitcast(b.and_(both, ir.Constant(_INTS8, [0xFFFF0000] * 8)), _LANES8))
    return found


def _avx2(code: _Code, rows: int, vectors: int, args: dict[str, Value]) -> list[list[Value]]:
    b = code.b
    sums = [[cgutils.alloca_once_value(b, zeros(_LANES8)) for _ in range(vectors)] for _ in range(rows)]
    for line in sums:
        for one in line:
            b.store(zeros(_LANES8), one)
    planes = tuple(code.load(code.at(args["table"], 32 * n), _BYTES) for n in (0, 1))
    x = [code.at(args["x"], (args["x_row"], m)) for m in range(vectors)]
    with cgutils.for_range(b, args["blocks"], intp=_I64) as loop:
        c = loop.index
        for r in range(rows):
            w = code.load(code.at(args["w"], (args["w_row"], r), (c, 32)), _BYTES)
            levels = _levels_avx2(code, planes, w)
            scale = code.every(code.load(code.at(args["scales"], (args["scales_row"], r), (c, 4)), _F32), 8)
            for m in range(vectors):
                dots = [zeros(_LANES8), zeros(_LANES8)]
                for k in range(8):
                    part = code.load(code.at(x[m], (c, 256), 32 * k), _LANES8)
                    dots[k % 2] = code.fma(levels[k], part, dots[k % 2])
                dot = b.fadd(*dots)
                b.store(code.fma(dot, scale, b.load(sums[r][m])), sums[r][m])
    with cgutils.for_range(b, args["pieces"], intp=_I64) as loop:  # 8 ranks of LoRA at a time
        for m in range(vectors):
            h = code.load(code.at(args["h"], (args["h_row"], m), (loop.index, 32)), _LANES8)
            for r in range(rows):
                up = code.load(code.at(args["up"], (args["up_row"], r), (loop.index, 32)), _LANES8)
                b.store(code.fma(up, h, b.load(sums[r][m])), sums[r][m])
    return sums


_ARGUMENTS = (
    "w",
    "w_row",
    "x",
    "x_row",
    "scales",
    "scales_row",
    "blocks",
    "table",
    "up",
    "up_row",
    "h",
    "h_row",
    "pieces",
    "out",
)


def _dots(rows: int, vectors: int) -> Callable[..., None]:
    """An intrinsic: `rows` rows of codes times `vectors` vectors -> out (vectors, rows) in fp32.

    Its arguments: like: an array of uint16 (avx512, x in bf16) or of float32 (avx2). Then int64 (addresses, bytes,
    counts). w, w_row: codes, bytes from a row to the next. x, x_row. scales, scales_row: fp32 a block; where `blocks`
    is odd one more number is read. table: see `table`. up, up_row, h, h_row, pieces: LoRA's B (rows) and A x (vectors)
    in pieces of 32 bytes.
    """

    @intrinsic
    def row_dots(  # type: ignore[no-untyped-def]
        typing_context, like, w, w_row, x, x_row, scales, scales_row, blocks, table, up, up_row, h, h_row, pieces, out
    ):
        build_sums = _avx512 if like.dtype == types.uint16 else _avx2

        def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
            code, named = _Code(builder), dict(zip(_ARGUMENTS, args[1:], strict=True))
            sums = build_sums(code, rows, vectors, named)
            for m in range(vectors):
                for r in range(rows):
                    to = builder.inttoptr(code.at(named["out"], 4 * (m * rows + r)), _F32.as_pointer())
                    builder.store(code.total(builder.load(sums[r][m])), to)
            return context.get_dummy_value()

        return types.void(like, *(14 * [types.int64])), build

    made: Callable[..., None] = row_dots
    return made


dots_of_1, dots_of_2, dots_of_4 = _dots(1, 1), _dots(1, 2), _dots(1, 4)


def table(levels: np.ndarray, isa: str) -> np.ndarray:
    """16 levels as the kernels look them up: 32 words of bf16, or two planes of 32 bytes."""
    bits = levels.astype(np.float32).view(np.uint32)
    words = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest even
    if isa == "avx512":
        return np.concatenate([words, words]).view(np.uint8)
    low, high = (words & 0xFF).astype(np.uint8), (words >> 8).astype(np.uint8)
    return np.concatenate([low, low, high, high])


def scale_table(values: np.ndarray, isa: str) -> np.ndarray:
    """The 256 numbers that 8-bit scales stand for, as kernels look them up: fp32, or their lower and upper halves."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    if isa != "avx512":
        return bits.view(np.uint8)
    return np.concatenate([(bits & 0xFFFF).astype(np.uint16), (bits >> 16).astype(np.uint16)]).view(np.uint8)


def _one_scale(code: _Code, isa: str, index: Value, table: Value) -> Value:
    if isa != "avx512":
        return code.load(code.at(table, (index, 4)), _F32)
    low, high = (code.b.zext(code.load(code.at(table, (index, 2), n), _I16), _I32) for n in (0, 512))
    return code.b.bitcast(code.b.or_(low, code.b.shl(high, _I32(16))), _F32)


def _32_scales(code: _Code, index: Value, table: Value) -> list[Value]:
    """Two registers of table[index], index (32) of 8 bits: four parts of 64 words each, for both halves of a number."""
    b, halves = code.b, []
    index = b.zext(index, _WORDS)
    bit = [b.icmp_unsigned("!=", b.and_(index, ir.Constant(_WORDS, [n] * 32)), zeros(_WORDS)) for n in (64, 128)]
    for half in (0, 512):
        parts = []
        for part in range(4):
            both = [code.load(code.at(table, half + 128 * part + n), _WORDS) for n in (0, 64)]
            parts.append(code.call("llvm.x86.avx512.vpermi2var.hi.512", _WORDS, both[0], index, both[1]))
        lower, upper = b.select(bit[0], parts[1], parts[0]), b.select(bit[0], parts[3], parts[2])
        halves.append(b.select(bit[1], upper, lower))
    places = [[n + i for i in range(first, first + 16) for n in (0, 32)] for first in (0, 16)]
    return [b.bitcast(b.shuffle_vector(*halves, mask(each)), _LANES) for each in places]


@intrinsic
def nested_scales(typing_context, like, absmax, table, nested, offset, first, count, out):  # type: ignore[no-untyped-def]
    """out[j] = t[absmax[first + j]] * nested[(first + j) / 256] + offset; addresses in int64, offset fp32.

    `table` holds t as `scale_table` gives it. Written here since an index into an array of numba's may be negative,
    which costs four times the rest, and since 32 at once in registers cost less than half of one by one.
    """
    isa = "avx512" if like.dtype == types.uint16 else "avx2"

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, absmax, table, nested, offset, first, count, out = args
        code, b, end = _Code(builder), builder, builder.add(first, count)

        def outer(j: Value) -> Value:
            return code.load(code.at(nested, (b.lshr(j, _I64(8)), 4)), _F32)

        def to(j: Value, kind: Value) -> Value:
            return b.inttoptr(code.at(out, (b.sub(j, first), 4)), kind.as_pointer())

        def singly(start: Value, stop: Value) -> None:
            with cgutils.for_range(b, b.sub(stop, start), intp=_I64) as loop:
                j = b.add(start, loop.index)
                value = _one_scale(code, isa, b.zext(code.load(b.add(absmax, j), _I8), _I64), table)
                b.store(code.call("llvm.fma.f32", _F32, value, outer(j), offset), to(j, _F32), align=4)

        if isa != "avx512":
            singly(first, end)
            return context.get_dummy_value()
        # From a multiple of 32 on, so that 32 have one outer scale.
        begin = b.and_(b.add(first, _I64(31)), _I64(-32))
        begin = b.select(b.icmp_signed("<", begin, end), begin, end)
        groups = b.lshr(b.sub(end, begin), _I64(5))
        singly(first, begin)
        with cgutils.for_range(b, groups, intp=_I64) as loop:
            j = code.at(begin, (loop.index, 32))
            many, add = code.every(outer(j), 16), code.every(offset, 16)
            for n, values in enumerate(_32_scales(code, code.load(b.add(absmax, j), _BYTES), table)):
                b.store(code.fma(values, many, add), to(b.add(j, _I64(16 * n)), _LANES), align=4)
        singly(code.at(begin, (groups, 32)), end)
        return context.get_dummy_value()

    n = types.int64
    return types.void(like, n, n, n, types.float32, n, n, n), build
