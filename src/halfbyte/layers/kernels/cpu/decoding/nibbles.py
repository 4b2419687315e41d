"""What products with 4-bit rows share: LLVM's language in short, tables of levels and scales, vectors in the order of
codes; and rows of plain numbers times a few vectors.

Why: a token multiplies each weight once, so its time is that of reading the weights; dequantised first, they are read
and written as 16 bits again. Here the bytes of the store are looked up in a table in a register and multiplied at once.
What: blocks of 64 weights, two codes a byte, the earlier in the upper half. A word of 16 bits holds four codes; shifted
by 0, 4, 8 and 12 its lowest bits select from the table. So each register holds every fourth weight, and the vector x is
laid out in that order once. Scales multiply a block's sum, in fp32; where they are codes of 8 bits themselves, each is
looked up in a table of the 256 numbers that they stand for there.
64 bytes at a time: `vpermw` (5 bits: the table is there twice), `vdpbf16ps`. Table and x are bf16 (`single.py` of one
vector, `several.py`). In fp32, and without AVX-512, products are those of `words.py`.
Error: levels are rounded to bf16, which moves each by at most 2^-9 of itself; products and sums are fp32.
Source: VPERMW, VDPBF16PS in Intel's SDM volume 2; the order is ours.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from halfbyte.layers.kernels.cpu.tiles import BFloat

Value: TypeAlias = Any  # of LLVM's, or a builder of them: llvmlite has no types
BLOCK = 64
_AHEAD_BYTES = 8192  # codes that are asked for before they are needed
GROUP = 256  # blocks that have one outer scale, and numbers that a scale of 8 bits stands for
CHUNK = 128  # weights that x is laid out by: two blocks
_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_CALLS = {
    "permute": "llvm.x86.avx512.permvar.hi.512",
    "multiply": "llvm.x86.avx512bf16.dpbf16ps.512",
    "round": "llvm.x86.avx512bf16.cvtne2ps2bf16.512",
}


class Code:
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

    @contextmanager
    def rolled(self, count: Value) -> Iterator[Value]:
        """A loop that is not unrolled; yields its index."""
        b = self.b
        before, head, end = b.block, b.append_basic_block("rolled"), b.append_basic_block("rolled.end")
        b.cbranch(b.icmp_signed(">", count, _I64(0)), head, end)
        b.position_at_end(head)
        index = b.phi(_I64)
        index.add_incoming(_I64(0), before)
        yield index
        after = b.add(index, _I64(1))
        index.add_incoming(after, b.block)
        back = b.cbranch(b.icmp_signed("<", after, count), head, end)
        known = b.module.add_metadata([ir.MetaDataString(b.module, "llvm.loop.unroll.disable")])
        loop = b.module.add_metadata([known])
        loop.operands = (loop, known)
        back.set_metadata("llvm.loop", loop)
        b.position_at_end(end)

    def prefetch(self, at: Value, *, once: bool = False) -> None:
        """Ask for a line, into the second cache; `once`: it is read once, and need not stay in any but the first."""
        pointer = self.b.inttoptr(at, _I8.as_pointer())
        self.call("llvm.prefetch.p0", ir.VoidType(), pointer, _I32(0), _I32(0 if once else 2), _I32(1))

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
_UPPER = ir.Constant(ir.VectorType(ir.IntType(1), 16), [0] * 8 + [1] * 8)


def _dp(code: Code, total: Value, a: Value, b: Value) -> Value:
    pairs = [code.b.bitcast(v, _PAIRS) for v in (a, b)]
    return code.call(_CALLS["multiply"], _LANES, total, *pairs)


def _wide(code: Code, at: Value) -> Value:
    """32 bytes in the lower half of a register, zeros above."""
    return code.b.shuffle_vector(code.load(at, _HALF), zeros(_HALF), mask(range(32)))


LANES_BF16, LANES_FP32 = 16, 8


def _plain(vectors: int) -> Callable[..., None]:
    """An intrinsic: a row of plain numbers (a head, LoRA's A) times vectors of fp32 -> out (vectors,) in fp32.

    A number of bf16 is widened once for all vectors: that was most of the time of a head. Each vector has one register
    of sums, over every 16th (fp32: 8th) number, so its sum is the same to the bit, whatever stands beside it.

    Its arguments: like: an array of uint16 (a row of bf16) or of float32. Then int64. w: the row. x, x_row: bytes from
    one vector to the next. pieces: of LANES numbers each. out.
    """

    @intrinsic
    def row_dots(typing_context, like, w, x, x_row, pieces, out):  # type: ignore[no-untyped-def]
        is_bf16 = like.dtype == types.uint16
        lanes = LANES_BF16 if is_bf16 else LANES_FP32

        def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
            code, (w, x, x_row, pieces, out) = Code(builder), args[1:]
            kind, half = ir.VectorType(_F32, lanes), ir.VectorType(_I16, lanes)
            sums = [cgutils.alloca_once_value(builder, zeros(kind)) for _ in range(vectors)]
            for one in sums:
                builder.store(zeros(kind), one)
            with code.rolled(pieces) as piece:
                if is_bf16:
                    wide = builder.zext(code.load(code.at(w, (piece, 2 * lanes)), half), ir.VectorType(_I32, lanes))
                    upper = ir.Constant(ir.VectorType(_I32, lanes), [16] * lanes)
                    row = builder.bitcast(builder.shl(wide, upper), kind)
                else:
                    row = code.load(code.at(w, (piece, 4 * lanes)), kind)
                for m, total in enumerate(sums):
                    part = code.load(code.at(x, (x_row, m), (piece, 4 * lanes)), kind)
                    builder.store(code.fma(row, part, builder.load(total)), total)
            for m, total in enumerate(sums):
                to = builder.inttoptr(code.at(out, 4 * m), _F32.as_pointer())
                builder.store(code.total(builder.load(total)), to)
            return context.get_dummy_value()

        return types.void(like, *(5 * [types.int64])), build

    made: Callable[..., None] = row_dots
    return made


plain_of_1, plain_of_2, plain_of_4, plain_of_8 = (_plain(n) for n in (1, 2, 4, 8))

WHOLE = 64  # numbers of 8 bits that a row is a multiple of


@intrinsic
def in_order(typing_context, like, x, chunks, out):  # type: ignore[no-untyped-def]
    """Chunks of 128 numbers in fp32 -> in bf16, in the order in which codes are looked up: 1, 5, .. 125; 0, 4, ..; 3,
    7, ..; 2, 6, ... Addresses and their number in int64; `like`: an array of uint16, of others nothing is done."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if like.dtype != types.uint16:
            return context.get_dummy_value()
        code, b, (x, chunks, out) = Code(builder), builder, args[1:]
        with code.rolled(chunks) as c:
            numbers = [code.load(code.at(x, (c, 4 * CHUNK), 64 * k), _LANES) for k in range(8)]
            words = [
                b.bitcast(code.call(_CALLS["round"], _PAIRS, high, low), _WORDS)
                for low, high in zip(numbers[::2], numbers[1::2], strict=True)
            ]
            for n, places in enumerate(((1, 0), (3, 2))):
                chosen = mask([4 * j + place for place in places for j in range(16)])
                lower, upper = (b.shuffle_vector(*words[k : k + 2], chosen) for k in (0, 2))
                for k in (0, 1):
                    made = b.shuffle_vector(
                        lower, upper, mask([16 * k + i + side for side in (0, 32) for i in range(16)])
                    )
                    to = b.inttoptr(code.at(out, (c, 2 * CHUNK), 128 * n + 64 * k), _WORDS.as_pointer())
                    b.store(made, to, align=2)
        return context.get_dummy_value()

    return types.void(like, *(3 * [types.int64])), build


@intrinsic
def ask(typing_context, at):  # type: ignore[no-untyped-def]
    """Ask for the line at an address, int64, into the second cache."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        Code(builder).prefetch(args[0])
        return context.get_dummy_value()

    return types.void(types.int64), build


def table(levels: np.ndarray) -> np.ndarray:
    """16 levels as the kernel looks them up: 32 words of bf16."""
    bits = levels.astype(np.float32).view(np.uint32)
    words = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest even
    return np.concatenate([words, words]).view(np.uint8)


@intrinsic
def lookups(typing_context, like, table, nested, offset, group, groups, out):  # type: ignore[no-untyped-def]
    """out[g, j] = table[j] * nested[group + g] + offset, j < 256; addresses and counts in int64, offset fp32.

    Written here since an index into an array of numba's may be negative, which keeps a loop from being vectorised.
    """
    lanes = 16 if like.dtype == types.uint16 else 8

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, table, nested, offset, group, groups, out = args
        code, kind = Code(builder), ir.VectorType(_F32, lanes)
        with cgutils.for_range(builder, groups, intp=_I64) as loop:
            g = loop.index
            outer = code.every(code.load(code.at(nested, (group, 4), (g, 4)), _F32), lanes)
            for j in range(0, 4 * GROUP, 4 * lanes):
                values = code.fma(code.load(code.at(table, j), kind), outer, code.every(offset, lanes))
                to = builder.inttoptr(code.at(out, (g, 4 * GROUP), j), kind.as_pointer())
                builder.store(values, to, align=4)
        return context.get_dummy_value()

    n = types.int64
    return types.void(like, n, n, types.float32, n, n, n), build
