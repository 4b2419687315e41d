"""Rows of 4-bit codes times one or many vectors in whole numbers of 16 bits: the products of processors with AVX2.

Why: in fp32 a register multiplies 8 numbers, in whole numbers of 16 bits 16; levels come out of the table as such.
What: levels are whole numbers of up to LEVEL, x of up to NUMBER, with a step for each block of 64. `vpmaddwd`
multiplies 16 pairs and adds neighbours, in 32 bits. A block's sum is exact, whatever its order; it is scaled and added
in fp32, block after block. So a text has the same bits whatever stands beside it. Always eight rows of codes at once:
    near  1, 2 or 4 vectors: a register holds 16 codes of a row; a tree adds up the sums of eight rows.
    wide  8 or 16, or several times 16: a register holds two neighbouring numbers of eight vectors. Codes are unpacked
          once, into the first cache, and two of them at a time are spread over a register.
Error: a level is off by up to 1/8192 of its block's largest weight, a number of x by 1/16382 of its block's largest. A
NaN or Inf makes the block's step one.
Source: VPMADDWD, VPSHUFB in Intel's SDM volume 2; the order is ours.
Cost: 64 weights, cycles of Zen 3: see docs/log, "Several texts at once".
"""

from collections.abc import Callable

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from halfbyte.layers.kernels.cpu.decoding.nibbles import BLOCK, Code, Value, mask, zeros

LEVEL, NUMBER = 4096, 8191  # 64 products of them are below 2^31
ROWS = 8
KEPT = 1024  # bytes of scratch that a product uses
TINY = 2.0**-100  # a block whose largest number is below is taken for zeros
_I8, _I16, _I32, _I64, _F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_LANES, _BYTES = ir.VectorType(_F32, 8), ir.VectorType(_I8, 32)
_INTS, _WORDS = ir.VectorType(_I32, 8), ir.VectorType(_I16, 16)


def table(levels: np.ndarray) -> np.ndarray:
    """16 levels, as two planes of 32 bytes: the lower and the upper bytes of whole numbers of 16 bits."""
    words = np.rint(levels.astype(np.float64) * LEVEL).astype(np.int16).view(np.uint16)
    low, high = (words & 0xFF).astype(np.uint8), (words >> 8).astype(np.uint8)
    return np.concatenate([low, low, high, high])


def _store(code: Code, value: Value, at: Value) -> None:
    code.b.store(value, code.b.inttoptr(at, value.type.as_pointer()), align=1)


def _dot(code: Code, a: Value, b: Value) -> Value:
    """16 products of 16 bits, neighbours added."""
    return code.call("llvm.x86.avx2.pmadd.wd", _INTS, code.b.bitcast(a, _WORDS), code.b.bitcast(b, _WORDS))


def _unpacked(code: Code, planes: list[Value], w: Value) -> list[Value]:
    """64 codes -> 4 registers of 16 levels: weights 1, 3 .. 15 and 33 .. 47, then 17 .. and 49 ..; so the even ones."""
    b, low = code.b, ir.Constant(_BYTES, [15] * 32)
    upper = b.bitcast(b.lshr(b.bitcast(w, _WORDS), ir.Constant(_WORDS, [4] * 16)), _BYTES)
    made = []
    for index in (b.and_(w, low), b.and_(upper, low)):
        halves = [code.call("llvm.x86.avx2.pshuf.b", _BYTES, plane, index) for plane in planes]
        for part in (0, 8):
            places = [lane * 16 + part + i + 32 * side for lane in (0, 1) for i in range(8) for side in (0, 1)]
            made.append(b.bitcast(b.shuffle_vector(*halves, mask(places)), _WORDS))
    return made


def _halves(code: Code, a: Value, b: Value, by: int) -> tuple[Value, Value]:
    """In each half of the register: the first `by` numbers of a and of b in turns, and the last ones."""
    low, high = list[int](), list[int]()
    for lane in (0, 4):
        for first, to in ((0, low), (2, high)):
            for i in range(0, 2, by):
                for side in (0, 8):
                    to += [lane + first + i + k + side for k in range(by)]
    return code.b.shuffle_vector(a, b, mask(low)), code.b.shuffle_vector(a, b, mask(high))


def _sums(code: Code, vectors: list[Value]) -> Value:
    """The sums of 8 vectors' lanes, as one vector; the lanes are whole numbers or fp32."""
    b = code.b
    add = b.add if vectors[0].type == _INTS else b.fadd
    pairs = [add(*_halves(code, vectors[i], vectors[i + 1], 1)) for i in range(0, 8, 2)]
    fours = [add(*_halves(code, pairs[i], pairs[i + 1], 2)) for i in (0, 2)]
    lower = b.shuffle_vector(*fours, mask([0, 1, 2, 3, 8, 9, 10, 11]))
    upper = b.shuffle_vector(*fours, mask([4, 5, 6, 7, 12, 13, 14, 15]))
    return add(lower, upper)


def _turned(code: Code, rows: list[Value]) -> list[Value]:
    """8 vectors of 8 -> row i's lane j is row j's lane i."""
    pairs = [_halves(code, rows[i], rows[i + 1], 1) for i in range(0, 8, 2)]
    fours = [[half for k in (0, 1) for half in _halves(code, pairs[i][k], pairs[i + 1][k], 2)] for i in (0, 2)]
    places = ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])
    return [code.b.shuffle_vector(fours[0][k], fours[1][k], mask(place)) for place in places for k in range(4)]


def _variables(code: Code, kind: Value, count: int) -> list[Value]:
    made = [cgutils.alloca_once(code.b, kind) for _ in range(count)]
    for one in made:
        code.b.store(zeros(kind), one)
    return made


def _row(code: Code, args: dict[str, Value], i: Value) -> Value:
    """The address of row i; where there are fewer, the last one's."""
    b, last = code.b, code.b.sub(args["rows"], _I64(1))
    return code.at(args["w"], (args["w_row"], b.select(b.icmp_signed("<", i, last), i, last)))


def _near(code: Code, vectors: int, args: dict[str, Value]) -> None:
    b = code.b
    planes = [code.load(code.at(args["table"], 32 * n), _BYTES) for n in (0, 1)]
    totals = _variables(code, _LANES, vectors)
    with code.rolled(args["blocks"]) as c:
        x = [[code.at(args["x"], (args["x_part"], m), (c, 128), 32 * k) for k in range(4)] for m in range(vectors)]
        numbers = [[code.load(at, _WORDS) for at in own] for own in x] if vectors == 1 else []
        with code.rolled(_I64(ROWS)) as i:
            at = code.at(_row(code, args, i), (c, 32))
            code.prefetch(code.at(at, (args["w_row"], ROWS)))
            levels = _unpacked(code, planes, code.load(at, _BYTES))
            for m in range(vectors):
                own = numbers[m] if numbers else [code.load(place, _WORDS) for place in x[m]]
                d = [_dot(code, level, part) for level, part in zip(levels, own, strict=True)]
                _store(code, b.add(b.add(d[0], d[1]), b.add(d[2], d[3])), code.at(args["kept"], 256 * m, (i, 32)))
        scales = code.load(code.at(args["scales"], (c, 32)), _LANES)
        for m, total in enumerate(totals):
            sums = _sums(code, [code.load(code.at(args["kept"], 256 * m + 32 * i), _INTS) for i in range(ROWS)])
            step = code.load(code.at(args["steps"], (args["steps_part"], m), (c, 4)), _F32)
            share = b.fmul(scales, code.every(step, 8))
            b.store(code.fma(b.sitofp(sums, _LANES), share, b.load(total)), total)
    for m, total in enumerate(totals):
        _store(code, b.load(total), code.at(args["out"], 32 * m))


def _wide(code: Code, groups: int, args: dict[str, Value]) -> None:
    b, rows, size = code.b, ROWS // groups, 256 * groups  # of a set's totals: (groups, eight rows, eight vectors)
    planes = [code.load(code.at(args["table"], 32 * n), _BYTES) for n in (0, 1)]
    with code.rolled(b.mul(args["sets"], _I64(groups * ROWS))) as n:
        _store(code, zeros(_LANES), code.at(args["out"], (n, 32)))
    with code.rolled(_I64(groups)) as half, code.rolled(args["blocks"]) as c:
        first = b.mul(half, _I64(rows))
        with code.rolled(_I64(rows)) as r:
            at = code.at(_row(code, args, b.add(first, r)), (c, 32))
            code.prefetch(code.at(at, (args["w_row"], ROWS)))
            for k, level in enumerate(_unpacked(code, planes, code.load(at, _BYTES))):
                _store(code, level, code.at(args["kept"], (r, 128), 32 * k))
        with code.rolled(args["sets"]) as own:
            group = b.mul(own, _I64(groups))
            sums = [_variables(code, _INTS, rows) for _ in range(groups)]
            with code.rolled(_I64(8)) as p:
                for k in range(4):
                    pair = code.at(args["x"], 32 * k, (args["x_part"], group), (c, 1024), (p, 128))
                    x = [code.load(code.at(pair, (args["x_part"], g)), _WORDS) for g in range(groups)]
                    for r in range(rows):
                        two = code.every(code.load(code.at(args["kept"], 128 * r + 4 * k, (p, 16)), _I32), 8)
                        for g in range(groups):
                            b.store(b.add(b.load(sums[g][r]), _dot(code, two, x[g])), sums[g][r])
            at = code.at(args["steps"], (args["steps_part"], group), (c, 32))
            steps = [code.load(code.at(at, (args["steps_part"], g)), _LANES) for g in range(groups)]
            for r in range(rows):
                scale = code.every(code.load(code.at(args["scales"], (c, 32), (first, 4), 4 * r), _F32), 8)
                for g in range(groups):
                    at = code.at(args["out"], (own, size), 256 * g + 32 * r, (first, 32))
                    share = b.fmul(scale, steps[g])
                    _store(code, code.fma(b.sitofp(b.load(sums[g][r]), _LANES), share, code.load(at, _LANES)), at)
    with code.rolled(b.mul(args["sets"], _I64(groups))) as group:
        at = code.at(args["out"], (group, 256))
        own = [code.load(code.at(at, 32 * r), _LANES) for r in range(ROWS)]
        for t, text in enumerate(_turned(code, own)):
            _store(code, text, code.at(at, 32 * t))


_ARGUMENTS = (
    "w", "w_row", "rows", "x", "x_part", "steps", "steps_part", "scales", "blocks", "table", "kept", "out", "sets",
)  # fmt: skip


def _product(build_sums: Callable[[Code, int, dict[str, Value]], None], count: int) -> Callable[..., None]:
    """An intrinsic: eight rows of codes times vectors -> out (vectors, 8) in fp32.

    Its arguments: like: an array of float32; of another type nothing is done. Then int64 (addresses, bytes, counts).
    w, w_row, rows: codes of up to 8 rows. x, x_part: whole numbers, bytes from a vector (near) or from eight (wide) to
    the next. steps, steps_part: of x's blocks. scales: (blocks, 8) fp32. kept: KEPT bytes of scratch. sets: of vectors,
    for which codes are unpacked once; 1 where it is near.
    """

    @intrinsic
    def eight_rows(  # type: ignore[no-untyped-def]
        typing_context, like, w, w_row, rows, x, x_part, steps, steps_part, scales, blocks, table, kept, out, sets
    ):
        def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
            if like.dtype == types.float32:
                build_sums(Code(builder), count, dict(zip(_ARGUMENTS, args[1:], strict=True)))
            return context.get_dummy_value()

        return types.void(like, *(len(_ARGUMENTS) * [types.int64])), build

    made: Callable[..., None] = eight_rows
    return made


near_1, near_2, near_4 = (_product(_near, n) for n in (1, 2, 4))
wide_8, wide_16 = (_product(_wide, n) for n in (1, 2))


@intrinsic
def scales_of(typing_context, like, at, lookup, first, blocks, rows, out):  # type: ignore[no-untyped-def]
    """The scales of up to eight rows' blocks -> out (blocks, 8) in fp32; of rows that are not there any.

    Its arguments: like. Then int64. at: scales of the first row, fp32; or where `lookup` is not 0, bytes: block n's is
    lookup[(first + n) / 256][byte].
    """

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if like.dtype != types.float32:
            return context.get_dummy_value()
        code, b, (at, lookup, first, blocks, rows, out) = Code(builder), builder, args[1:]
        last = b.sub(rows, _I64(1))
        starts = [b.mul(blocks, b.select(b.icmp_signed("<", _I64(i), last), _I64(i), last)) for i in range(ROWS)]

        def passed(nested: bool) -> None:
            with code.rolled(blocks) as c:
                for i, start in enumerate(starts):
                    n = code.at(c, start)
                    if nested:
                        index = b.zext(code.load(code.at(at, n), _I8), _I64)
                        group = b.lshr(b.add(first, n), _I64(8))
                        scale = code.load(code.at(lookup, (group, 1024), (index, 4)), _I32)
                    else:
                        scale = code.load(code.at(at, (n, 4)), _I32)
                    _store(code, scale, code.at(out, (c, 32), 4 * i))

        with b.if_else(b.icmp_signed("!=", lookup, _I64(0))) as (then, otherwise):
            with then:
                passed(True)
            with otherwise:
                passed(False)
        return context.get_dummy_value()

    return types.void(like, *(6 * [types.int64])), build


def _onto(count: int) -> Callable[..., None]:
    """An intrinsic: sums (count, 8) += h (count, R) times up (R, 8), one rank after the other.

    Its arguments: like. Then int64. sums. up, up_row: bytes from a rank to the next. h, h_row, ranks.
    """

    @intrinsic
    def add(typing_context, like, sums, up, up_row, h, h_row, ranks):  # type: ignore[no-untyped-def]
        def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
            if like.dtype != types.float32:
                return context.get_dummy_value()
            code, (sums, up, up_row, h, h_row, ranks) = Code(builder), args[1:]
            totals = _variables(code, _LANES, count)
            for m, total in enumerate(totals):
                builder.store(code.load(code.at(sums, 32 * m), _LANES), total)
            with code.rolled(ranks) as r:
                b = code.load(code.at(up, (up_row, r)), _LANES)
                for m, total in enumerate(totals):
                    one = code.every(code.load(code.at(h, (h_row, m), (r, 4)), _F32), 8)
                    builder.store(code.fma(b, one, builder.load(total)), total)
            for m, total in enumerate(totals):
                _store(code, builder.load(total), code.at(sums, 32 * m))
            return context.get_dummy_value()

        return types.void(like, *(6 * [types.int64])), build

    made: Callable[..., None] = add
    return made


onto_1, onto_2, onto_4, onto_8 = (_onto(n) for n in (1, 2, 4, 8))


def _peak(code: Code, parts: list[Value]) -> Value:
    """The largest of |parts|, in the order of their bits: a NaN is the largest."""
    b, least = code.b, ir.Constant(_INTS, [0x7FFFFFFF] * 8)
    bits = [b.and_(b.bitcast(part, _INTS), least) for part in parts]
    while len(bits) > 1:
        bits = [b.select(b.icmp_signed(">", x, y), x, y) for x, y in zip(bits[::2], bits[1::2], strict=True)]
    return b.bitcast(code.call("llvm.vector.reduce.smax.v8i32", _I32, bits[0]), _F32)


def _whole(code: Code, part: Value, factor: Value) -> Value:
    """8 numbers times a factor, to nearest, in 32 bits."""
    return code.call("llvm.x86.avx.cvt.ps2dq.256", _INTS, code.b.fmul(part, factor))


@intrinsic
def rounded(typing_context, like, x, numbers, step, turned, turned_step):  # type: ignore[no-untyped-def]
    """A block of x in fp32 -> 64 whole numbers of 16 bits in the order of `_unpacked`, and their step.

    Its arguments: like. Then int64, addresses. turned, turned_step: the same among seven other vectors', 32 bytes from
    two numbers to the next two; 0 for none.
    """

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if like.dtype != types.float32:
            return context.get_dummy_value()
        code, b, (x, numbers, step, turned, turned_step) = Code(builder), builder, args[1:]
        parts = [code.load(code.at(x, 32 * k), _LANES) for k in range(8)]
        peak = _peak(code, parts)
        tiny = b.fcmp_ordered("<", peak, _F32(TINY))
        one = b.select(tiny, _F32(0.0), b.fmul(peak, _F32(float(np.float32(1 / NUMBER / LEVEL)))))
        factor = code.every(b.select(tiny, _F32(0.0), b.fdiv(_F32(float(NUMBER)), peak)), 8)
        halves = [b.trunc(_whole(code, part, factor), ir.VectorType(_I16, 8)) for part in parts]
        n = [b.shuffle_vector(halves[k], halves[k + 1], mask(range(16))) for k in range(0, 8, 2)]
        every_second = [[first + 2 * i for i in range(16)] for first in (1, 0)]
        made = [b.shuffle_vector(n[k], n[k + 2], mask(places)) for places in every_second for k in (0, 1)]
        for k, words in enumerate(made):
            _store(code, words, code.at(numbers, 32 * k))
        _store(code, one, step)
        with b.if_then(b.icmp_signed("!=", turned, _I64(0))):
            _store(code, one, turned_step)
            for k, words in enumerate(made):
                pairs = b.bitcast(words, _INTS)
                for i in range(8):
                    _store(code, b.extract_element(pairs, _I32(i)), code.at(turned, 32 * (8 * k + i)))
        return context.get_dummy_value()

    return types.void(like, *(5 * [types.int64])), build


@intrinsic
def rounded_whole(typing_context, like, x, count, most, numbers, step):  # type: ignore[no-untyped-def]
    """`count` numbers in fp32, a multiple of 64, -> whole ones up to `most`, in their order, with one step.

    Its arguments: like. Then int64: addresses, and `count`; most is fp32.
    """

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        code, b, (x, count, most, numbers, step) = Code(builder), builder, args[1:]
        largest = cgutils.alloca_once_value(b, _F32(0.0))
        blocks = b.lshr(count, _I64(6))
        with code.rolled(blocks) as c:
            peak = b.bitcast(_peak(code, [code.load(code.at(x, (c, 256), 32 * k), _LANES) for k in range(8)]), _I32)
            seen = b.bitcast(b.load(largest), _I32)
            b.store(b.bitcast(b.select(b.icmp_signed(">", peak, seen), peak, seen), _F32), largest)
        peak = b.load(largest)
        tiny = b.fcmp_ordered("<", peak, _F32(TINY))
        _store(code, b.select(tiny, _F32(0.0), b.fdiv(peak, most)), step)
        factor = code.every(b.select(tiny, _F32(0.0), b.fdiv(most, peak)), 8)
        with code.rolled(b.lshr(count, _I64(3))) as c:
            words = b.trunc(_whole(code, code.load(code.at(x, (c, 32)), _LANES), factor), ir.VectorType(_I16, 8))
            _store(code, words, code.at(numbers, (c, 16)))
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64, types.float32, types.int64, types.int64), build


def _eights(vectors: int) -> Callable[..., None]:
    """An intrinsic: a row of whole numbers of 8 bits times vectors of whole numbers of 16 -> out (vectors,) in fp32.

    Its arguments: like. Then int64. w: the row. x, x_row: bytes from one vector to the next. wholes: of 64 numbers.
    """

    @intrinsic
    def row_dots(typing_context, like, w, x, x_row, wholes, out):  # type: ignore[no-untyped-def]
        def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
            if like.dtype != types.float32:
                return context.get_dummy_value()
            code, (w, x, x_row, wholes, out) = Code(builder), args[1:]
            sums = _variables(code, _INTS, vectors)
            with code.rolled(wholes) as whole:
                for k in range(BLOCK // 16):
                    eight = code.load(code.at(w, (whole, BLOCK), 16 * k), ir.VectorType(_I8, 16))
                    row = builder.sext(eight, _WORDS)
                    for m, own in enumerate(sums):
                        part = code.load(code.at(x, (x_row, m), (whole, 2 * BLOCK), 32 * k), _WORDS)
                        builder.store(builder.add(_dot(code, row, part), builder.load(own)), own)
            floats = [builder.sitofp(builder.load(own), _LANES) for own in sums]
            if vectors == 8:
                _store(code, _sums(code, floats), out)
            else:
                for m, own in enumerate(floats):
                    _store(code, code.total(own), code.at(out, 4 * m))
            return context.get_dummy_value()

        return types.void(like, *(5 * [types.int64])), build

    made: Callable[..., None] = row_dots
    return made


eights_1, eights_2, eights_4, eights_8 = (_eights(n) for n in (1, 2, 4, 8))
