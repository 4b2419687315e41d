"""Rows of 4-bit codes times one vector in bf16: what a text that is written alone spends its time on.

Why: memory gives two cores hardly more than one of them asks for, so what counts is that it is asked all the time.
What: the products of `nibbles.py`, the same to the bit, with less beside them.
    An item's scales are looked up before its rows, 64 at once: a table of 256 numbers of fp32 is four planes of bytes.
    Rows of an odd number of blocks lie two and two in whole registers; x lies there once more, from its last block on,
    for the second one, whose sums so stand in the other half of the register.
    The sums of 16 rows are added up together.
Source: VPERMI2B, VPERMW, VDPBF16PS in Intel's SDM volume 2; the order is ours.
Cost: 20 instructions for 128 weights, 4 for a row.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from halfbyte.layers.kernels.cpu import tiles
from halfbyte.layers.kernels.cpu.decoding import nibbles
from halfbyte.layers.kernels.cpu.decoding.nibbles import Code, Value, mask, zeros

ROWS = 16
SUMS = 64 * ROWS  # bytes of scratch: a register for each row
_I1, _I8, _I64, _F32 = ir.IntType(1), ir.IntType(8), ir.IntType(64), ir.FloatType()
_LANES, _WORDS, _HALF = ir.VectorType(_F32, 16), ir.VectorType(ir.IntType(16), 32), ir.VectorType(ir.IntType(16), 16)
_BYTES, _INTS = ir.VectorType(_I8, 64), ir.VectorType(ir.IntType(32), 16)
_LOWER = ir.Constant(ir.VectorType(_I1, 16), [1] * 8 + [0] * 8)
_UPPER = ir.Constant(ir.VectorType(_I1, 16), [0] * 8 + [1] * 8)


def available(nested: bool) -> bool:
    """Whether the processor that numba compiles for has what these products need."""
    return tiles.available() and (not nested or tiles.has("avx512vbmi"))


def _store(code: Code, value: Value, at: Value) -> None:
    code.b.store(value, code.b.inttoptr(at, value.type.as_pointer()), align=4)


def _chosen(code: Code, table: list[Value], index: Value) -> Value:
    """64 bytes of a table of 256, which is four registers."""
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    halves = [code.call(name, _BYTES, table[k], index, table[k + 1]) for k in (0, 2)]
    is_upper = code.b.icmp_signed("<", index, zeros(_BYTES))
    return code.b.select(is_upper, halves[1], halves[0])


@intrinsic
def scales_of(typing_context, like, at, planes, nested, offset, first, last, out):  # type: ignore[no-untyped-def]
    """Scales of blocks first .. last -> out, which begins with the one before `first` that is a multiple of 64.

    Its arguments: like: an array of uint16; of another type nothing is done. Then int64: at: a byte for each block;
    planes: (4, 256), see `planes`. nested: fp32, for each 256 blocks. first, last. out: fp32, room for whole 64. A
    scale is planes[byte] * nested[block / 256] + offset, which is fp32.
    """

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if like.dtype != types.uint16 or not available(nested=True):
            return context.get_dummy_value()
        at, planes, nested, offset, first, last, out = args[1:]
        code, b = Code(builder), builder
        start = b.and_(first, _I64(-64))
        kept = [[code.load(code.at(planes, 256 * p + 64 * k), _BYTES) for k in range(4)] for p in range(4)]
        shift = code.every(offset, 16)
        lanes = ir.Constant(ir.VectorType(_I64, 64), list(range(64)))
        with code.rolled(b.lshr(code.at(b.sub(last, start), 63), _I64(6))) as n:
            block = code.at(start, (n, 64))
            there = b.icmp_signed("<", lanes, code.every(b.sub(last, block), 64))
            pointer = b.inttoptr(code.at(at, block), _BYTES.as_pointer())
            index = code.call(
                "llvm.masked.load.v64i8.p0", _BYTES, pointer, ir.Constant(ir.IntType(32), 1), there, zeros(_BYTES)
            )
            outer = code.every(code.load(code.at(nested, (b.lshr(block, _I64(8)), 4)), _F32), 16)
            bytes_ = [_chosen(code, table, index) for table in kept]
            for k, values in enumerate(_floats(code, bytes_)):
                _store(code, code.fma(values, outer, shift), code.at(out, (n, 256), 64 * k))
        return context.get_dummy_value()

    n = types.int64
    return types.void(like, n, n, n, types.float32, n, n, n), build


def _floats(code: Code, planes: list[Value]) -> list[Value]:
    """Four registers of 64 bytes -> 64 numbers of four bytes each, in four registers."""
    b = code.b
    made = []
    for k in range(4):
        places = [16 * k + i + 64 * side for i in range(16) for side in (0, 1)]
        pairs = [b.bitcast(b.shuffle_vector(planes[p], planes[p + 1], mask(places)), _HALF) for p in (0, 2)]
        words = b.shuffle_vector(pairs[0], pairs[1], mask([i + 16 * side for i in range(16) for side in (0, 1)]))
        made.append(b.bitcast(words, _LANES))
    return made


def _product(code: Code, table: Value, w: Value, x: Value) -> Value:
    """128 weights times x, two blocks' sums in the halves of a register."""
    words = code.load(w, _WORDS)
    total = zeros(_LANES)
    for k in range(4):
        shifted = code.b.lshr(words, ir.Constant(_WORDS, [4 * k] * 32)) if k else words
        levels = code.call(nibbles._CALLS["permute"], _WORDS, table, shifted)
        total = nibbles._dp(code, total, levels, code.load(code.at(x, 64 * k), _WORDS))
    return total


def _two_scales(code: Code, at: Value) -> Value:
    first, second = (code.every(code.load(code.at(at, 4 * n), _F32), 16) for n in (0, 1))
    return code.b.select(_UPPER, second, first)


def _chunks(code: Code, table: Value, args: dict[str, Value], w: Value, x: Value, scale: Value, total: Value) -> None:
    """Whole registers of a row, onto `total`."""
    with code.rolled(args["chunks"]) as c:
        place = code.at(w, (c, 64))
        code.prefetch(code.at(place, nibbles._AHEAD_BYTES))
        dot = _product(code, table, place, code.at(x, (c, 256)))
        code.b.store(code.fma(dot, _two_scales(code, code.at(scale, (c, 8))), code.b.load(total)), total)


def _with_lora(code: Code, args: dict[str, Value], row: Value, total: Value, *, upper: bool) -> Value:
    """A row's sums with those of LoRA, 16 ranks at a time, in the half of the register where the first block is."""
    b, made = code.b, cgutils.alloca_once(code.b, _LANES)
    b.store(total, made)
    places = mask([*range(16, 32), *range(16)] if upper else range(32))
    with cgutils.for_range(b, args["pieces"], intp=_I64) as loop:
        up, h = (
            b.shuffle_vector(code.load(at, _HALF), zeros(_HALF), places)
            for at in (
                code.at(args["up"], (row, args["up_row"]), (loop.index, 32)),
                code.at(args["h"], (loop.index, 32)),
            )
        )
        b.store(nibbles._dp(code, b.load(made), up, h), made)
    return b.load(made)


def _even(code: Code, table: Value, args: dict[str, Value]) -> None:
    """Rows of whole registers."""
    total = cgutils.alloca_once(code.b, _LANES)
    with code.rolled(args["rows"]) as r:
        code.b.store(zeros(_LANES), total)
        w, scale = code.at(args["w"], (r, args["row"])), code.at(args["scales"], (r, args["scale_row"]))
        _chunks(code, table, args, w, args["x"], scale, total)
        sums = _with_lora(code, args, r, code.b.load(total), upper=False)
        _store(code, sums, code.at(args["sums"], (r, 64)))


def _odd(code: Code, table: Value, args: dict[str, Value]) -> None:
    """Two rows at a time; where a last one is alone, what is read as its neighbour counts nothing."""
    b, total, after = code.b, cgutils.alloca_once(code.b, _LANES), cgutils.alloca_once(code.b, _LANES)
    with code.rolled(b.lshr(code.at(args["rows"], 1), _I64(1))) as two:
        r = b.shl(two, _I64(1))
        w, scale = code.at(args["w"], (r, args["row"])), code.at(args["scales"], (r, args["scale_row"]))
        b.store(zeros(_LANES), total)
        b.store(zeros(_LANES), after)
        _chunks(code, table, args, w, args["x"], scale, total)
        is_two = b.icmp_signed("<", code.at(r, 1), args["rows"])
        w, scale = code.at(w, (args["chunks"], 64)), code.at(scale, (args["chunks"], 8))
        with b.if_else(is_two) as (then, otherwise):
            with then:  # the last block of the one and the first of the other
                code.prefetch(code.at(w, nibbles._AHEAD_BYTES))
                dot, both = _product(code, table, w, args["x_after"]), _two_scales(code, scale)
                for kept, half in ((total, _LOWER), (after, _UPPER)):
                    b.store(b.select(half, code.fma(dot, both, b.load(kept)), b.load(kept)), kept)
                _chunks(code, table, args, code.at(w, 64), code.at(args["x_after"], 256), code.at(scale, 8), after)
                sums = _with_lora(code, args, code.at(r, 1), b.load(after), upper=True)
                _store(code, sums, code.at(args["sums"], (r, 64), 64))
            with otherwise:
                words = b.shuffle_vector(code.load(w, _HALF), zeros(_HALF), mask(range(32)))
                dot = zeros(_LANES)
                for k in range(4):
                    levels = code.call(
                        nibbles._CALLS["permute"], _WORDS, table, b.lshr(words, ir.Constant(_WORDS, [4 * k] * 32))
                    )
                    x = code.load(code.at(args["x"], (args["chunks"], 256), 64 * k), _WORDS)
                    dot = nibbles._dp(code, dot, levels, x)
                one = code.every(code.load(scale, _F32), 16)
                b.store(code.fma(dot, one, b.load(total)), total)
        sums = _with_lora(code, args, r, b.load(total), upper=False)
        _store(code, sums, code.at(args["sums"], (r, 64)))


def _halves(code: Code, vectors: list[Value], width: int = ROWS) -> list[Value]:
    """Neighbours, each of rows of `width` lanes -> one register of the sums of these rows' halves."""
    b, half, pairs = code.b, width // 2, zip(vectors[::2], vectors[1::2], strict=True)
    add = b.fadd if vectors[0].type == _LANES else b.add
    low = [16 * side + first + i for side in (0, 1) for first in range(0, 16, width) for i in range(half)]
    high = [place + half for place in low]
    return [add(b.shuffle_vector(x, y, mask(low)), b.shuffle_vector(x, y, mask(high))) for x, y in pairs]


def _all_sums(code: Code, rows: list[Value], width: int = ROWS) -> Value:
    """The sums of 16 registers' lanes, as one register; each added up as `Code.total` does. width: lanes of a row that
    are left, where a register holds several."""
    while width > 1:
        rows, width = _halves(code, rows, width), width // 2
    return rows[0]


def _there(code: Code, rows: Value, address: Value | None = None) -> Value:
    """Of 16 rows those that are there, each a bit; none where there is an address and it is 0."""
    lanes, b = ir.Constant(ir.VectorType(_I64, ROWS), list(range(ROWS))), code.b
    if address is not None:
        rows = b.select(b.icmp_signed("!=", address, _I64(0)), rows, _I64(0))
    return b.icmp_signed("<", lanes, code.every(rows, ROWS))


def _some(code: Code, at: Value, there: Value) -> Value:
    """16 numbers of fp32, zeros for those that are not there."""
    pointer, align = code.b.inttoptr(at, _LANES.as_pointer()), ir.Constant(ir.IntType(32), 4)
    return code.call("llvm.masked.load.v16f32.p0", _LANES, pointer, align, there, zeros(_LANES))


def _give(code: Code, value: Value, at: Value, there: Value) -> None:
    pointer, align = code.b.inttoptr(at, _LANES.as_pointer()), ir.Constant(ir.IntType(32), 4)
    code.call("llvm.masked.store.v16f32.p0", ir.VoidType(), value, pointer, align, there)


def _finish(code: Code, found: Value, args: dict[str, Value], out: Value) -> None:
    """The sums of up to 16 rows, and their bias, to or onto `out`: in this order, which numba would leave open."""
    b, rows = code.b, args["rows"]
    for name, place in (("bias", args["bias"]), ("onto", out)):  # nothing is read where there is none: it may be far
        at = b.select(b.icmp_signed("!=", args[name], _I64(0)), place, args["sums"])
        sums = code.call("llvm.arithmetic.fence.v16f32", _LANES, found)
        found = b.fadd(sums, _some(code, at, _there(code, rows, args[name])))
    _give(code, found, out, _there(code, rows))


_ARGUMENTS = (
    "w", "rows", "blocks", "x", "x_after", "scales", "table", "up", "up_row", "h", "pieces", "sums", "bias", "onto",
    "out",
)  # fmt: skip


@intrinsic
def rows_of_16(  # type: ignore[no-untyped-def]
    typing_context, like, w, rows, blocks, x, x_after, scales, table, up, up_row, h, pieces, sums, bias, onto, out
):
    """Up to 16 rows of codes times a vector -> or, where `onto` is not 0, onto `out`, in fp32.

    Its arguments: like: an array of uint16; of another type nothing is done. Then int64 (addresses, bytes, counts).
    w, rows, blocks: codes of rows, blocks of a row. x: in order; x_after: from its last block on, where `blocks` is
    odd. scales: (rows, blocks) fp32. table: see `nibbles.table`. up, up_row, h, pieces: LoRA's B, bytes of its row,
    and A x in pieces of 32 bytes. sums: SUMS bytes of scratch. bias: fp32, or 0.
    """

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if like.dtype != types.uint16 or not available(nested=False):
            return context.get_dummy_value()
        code, b, named = Code(builder), builder, dict(zip(_ARGUMENTS, args[1:], strict=True))
        blocks = named["blocks"]
        named |= {"row": b.shl(blocks, _I64(5)), "scale_row": b.shl(blocks, _I64(2)), "chunks": b.lshr(blocks, _I64(1))}
        table = code.load(named["table"], _WORDS)
        with b.if_else(b.icmp_signed("==", b.and_(blocks, _I64(1)), _I64(0))) as (then, otherwise):
            with then:
                _even(code, table, named)
            with otherwise:
                _odd(code, table, named)
        found = _all_sums(code, [code.load(code.at(named["sums"], 64 * r), _LANES) for r in range(ROWS)])
        _finish(code, found, named, named["out"])
        return context.get_dummy_value()

    return types.void(like, *(len(_ARGUMENTS) * [types.int64])), build


_OF_EIGHTS = ("w", "wholes", "x", "step", "scales", "bounds", "length", "sums", "out", "found")


@intrinsic
def eights_of_16(  # type: ignore[no-untyped-def]
    typing_context, like, w, wholes, x, step, scales, bounds, length, sums, out, found
):
    """16 rows of whole numbers of 8 bits times one vector of whole numbers of 16 -> out (16,) in fp32.

    Its arguments: like: an array of uint16; of another type nothing is done. Then int64 (addresses, counts), but for
    step and length, which are fp32. w. wholes: of 64 numbers in a row. x, step: whole numbers, of how much. scales,
    bounds: of the rows. length: of x. sums: SUMS bytes of scratch. found: (2, 16) fp32, raised to what each number of
    `out` is at least and at most, as far as those are numbers.
    """

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if like.dtype != types.uint16 or not available(nested=False):
            return context.get_dummy_value()
        code, b, named = Code(builder), builder, dict(zip(_OF_EIGHTS, args[1:], strict=True))
        with code.rolled(_I64(ROWS)) as r:
            _eight(code, named, r)
        sums = _all_sums(code, [code.load(code.at(named["sums"], 64 * r), _INTS) for r in range(ROWS)])
        about = b.fmul(b.sitofp(sums, _LANES), code.every(named["step"], 16))
        about = b.fmul(about, code.load(named["scales"], _LANES))
        _store(code, about, named["out"])
        off = b.fmul(code.load(named["bounds"], _LANES), code.every(named["length"], 16))
        for k, end in enumerate((b.fsub(about, off), b.fadd(about, off))):
            at = code.at(named["found"], 64 * k)
            _store(code, code.call("llvm.maxnum.v16f32", _LANES, end, code.load(at, _LANES)), at)
        return context.get_dummy_value()

    n, f = types.int64, types.float32
    return types.void(like, n, n, n, f, n, n, f, n, n, n), build


def _eight(code: Code, args: dict[str, Value], r: Value) -> None:
    """A row's sums, 16 whole numbers, to its place in the scratch."""
    b, totals = code.b, [cgutils.alloca_once(code.b, _INTS) for _ in range(2)]
    for total in totals:
        b.store(zeros(_INTS), total)
    with code.rolled(args["wholes"]) as n:
        place = code.at(args["w"], (b.mul(r, args["wholes"]), 64), (n, 64))
        code.prefetch(code.at(place, nibbles._AHEAD_BYTES))
        for k, total in enumerate(totals):
            row = b.sext(code.load(code.at(place, 32 * k), ir.VectorType(_I8, 32)), _WORDS)
            numbers = code.load(code.at(args["x"], (n, 128), 64 * k), _WORDS)
            b.store(b.add(b.load(total), code.call("llvm.x86.avx512.pmaddw.d.512", _INTS, row, numbers)), total)
    _store(code, b.add(*(b.load(total) for total in totals)), code.at(args["sums"], (r, 64)))


def planes(table: np.ndarray) -> np.ndarray:
    """A table of 256 numbers in fp32, (256,) -> (4, 256) bytes: the first of each, the second, ..."""
    return table.view(np.uint8).reshape(256, 4).T.copy()
