"""Rows of 4-bit codes times vectors in bf16, for processors with AVX-512: what a token spends its time on.

Why: a token multiplies each weight once, so its time is that of reading the weights; dequantised first, they are read
and written as 16 bits again. Here the bytes of the store are looked up in a table in a register and multiplied at once.
What: 64 bytes of codes at a time. A word of 16 bits holds four codes; shifted by 0, 4, 8 and 12 its lowest bits select
from the table (`vpermw`: 5 bits, so the table is there twice). So each register holds every fourth weight, and the
vector x is laid out in that order once. `vdpbf16ps` multiplies; scales multiply a block's sum, in fp32. The sums of 16
rows are added up together.
    one_vector  Memory gives two cores hardly more than one of them asks for, so what counts is that it is asked all the
                time. Rows of an odd number of blocks lie two and two in whole registers; x lies there once more, from
                its last block on, for the second one, whose sums so stand in the other half of the register.
    vectors     With eight texts a step waits for products, so what counts is what stands beside them. Two rows at a
                time: codes are looked up once for all vectors, and a register of x is read once for both rows. The last
                blocks of two rows share a register. Codes are asked for past the larger caches, where the texts' keys
                and values then stay.
The products are the same to the bit in both: a vector has the same bits whatever stands beside it.
Error: levels are rounded to bf16, which moves each by at most 2^-9 of itself; products and sums are fp32.
Source: VPERMW, VDPBF16PS in Intel's SDM volume 2; the order is ours.
Cost: of one vector 20 instructions for 128 weights, 4 for a row; of eight 80 products for two times 128 weights, 24
instructions beside. Two rows at a time make one text 6 to 10% slower on Zen 4.
"""

from types import SimpleNamespace

from llvmlite import binding, ir
from numba.core import cgutils

from halfbyte.layers.kernels.cpu.decoding.code_tables import BLOCK

from halfbyte.layers.kernels.cpu.decoding.emit import (  # isort: skip
    AHEAD_BYTES, BF16, BF16X32, F32, F32X16, I1, I16X16, I16X32, I64, Code, emitted, mask, zeros,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.scalar import Value

binding.initialize_native_asmparser()
CHUNK = 2 * BLOCK  # weights that x is laid out by
ROWS = 16
SUMS = 64 * ROWS  # bytes of scratch: a register for each row
_LOWER = ir.Constant(ir.VectorType(I1, 16), [1] * 8 + [0] * 8)
_UPPER = ir.Constant(ir.VectorType(I1, 16), [0] * 8 + [1] * 8)
_WIDENED = mask(range(32))  # 32 bytes as the lower half of a register, beside zeros
_SWAPPED = mask([*range(8, 16), *range(8)])
_TWICE, _BELOW = mask([*range(16), *range(16)]), mask([*range(8), *range(16, 24)])


@emitted("x chunks out", only=BF16)
def order_vector(code: Code, args: Value) -> None:
    """Chunks of 128 numbers in fp32 -> in bf16, in the order in which codes are looked up: 1, 5, .. 125; 0, 4, ..; 3,
    7, ..; 2, 6, .."""
    b = code.b
    with code.rolled(args.chunks) as c:
        numbers = [code.load(code.at(args.x, (c, 4 * CHUNK), 64 * k), F32X16) for k in range(8)]
        words = [rounded_pair(code, *two) for two in zip(numbers[::2], numbers[1::2], strict=True)]
        for n, places in enumerate(((1, 0), (3, 2))):
            fourth = mask([4 * j + place for place in places for j in range(16)])
            lower, upper = (b.shuffle_vector(*words[k : k + 2], fourth) for k in (0, 2))
            for k in (0, 1):
                halves = mask([16 * k + i + side for side in (0, 32) for i in range(16)])
                ordered = b.shuffle_vector(lower, upper, halves)
                code.store(ordered, code.at(args.out, (c, 2 * CHUNK), 128 * n + 64 * k))


# ----------------------------------------------------------- what both products do
def rounded_pair(code: Code, low: Value, high: Value) -> Value:
    """Two registers of fp32 -> one of bf16."""
    return code.b.bitcast(code.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", BF16X32, high, low), I16X32)


def multiplied(code: Code, total: Value, a: Value, b: Value) -> Value:
    pairs = [code.b.bitcast(v, BF16X32) for v in (a, b)]
    return code.call("llvm.x86.avx512bf16.dpbf16ps.512", F32X16, total, *pairs)


def _levels(code: Code, table: Value, words: Value) -> list[Value]:
    """128 codes, a register of them, as four registers of bf16."""
    shifted = [words, *(code.b.lshr(words, ir.Constant(I16X32, [n] * 32)) for n in (4, 8, 12))]
    return [code.call("llvm.x86.avx512.permvar.hi.512", I16X32, table, one) for one in shifted]


def _dot(code: Code, levels: list[Value], x: list[Value]) -> Value:
    """128 weights times x, two blocks' sums in the halves of a register."""
    total = zeros(F32X16)
    for level, part in zip(levels, x, strict=True):
        total = multiplied(code, total, level, part)
    return total


def _chunk_of_x(code: Code, at: Value) -> list[Value]:
    return [code.load(code.at(at, 64 * k), I16X32) for k in range(4)]


def _two_scales(code: Code, at: Value) -> Value:
    first, second = (code.every(code.load(code.at(at, 4 * n), F32), 16) for n in (0, 1))
    return code.b.select(_UPPER, second, first)


def _row_sizes(code: Code, args: Value) -> None:
    """Bytes of a row of codes and of its scales; whole registers of codes."""
    args.row, args.scale_row = code.b.shl(args.blocks, I64(5)), code.b.shl(args.blocks, I64(2))
    args.chunks = code.b.lshr(args.blocks, I64(1))


def finish(code: Code, sums: Value, args: Value, out: Value) -> None:
    """The sums of up to 16 rows, and their bias, to or, where `add` is not 0, onto `out`: in this order, which numba
    would leave open."""
    b, rows = code.b, args.rows
    for flag, place in ((args.bias, args.bias), (args.add, out)):  # nothing is read where there is none: it may be far
        is_there = b.icmp_signed("!=", flag, I64(0))
        fenced = code.call("llvm.arithmetic.fence.v16f32", F32X16, sums)
        there = code.row_mask(b.select(is_there, rows, I64(0)), ROWS)
        sums = b.fadd(fenced, code.masked_load(b.select(is_there, place, args.sums), F32X16, there))
    code.masked_store(sums, out, code.row_mask(rows, ROWS))


@emitted("rows vectors up up_row h h_row pieces sums bias add out out_row", only=BF16)
def finish_rows(code: Code, args: Value) -> None:
    """Registers of sums of up to 16 rows, SUMS bytes from a vector to the next, with LoRA's -> or onto `out`."""
    with code.rolled(args.vectors) as m:
        of_one = SimpleNamespace(**vars(args))
        of_one.sums, of_one.h = code.at(args.sums, (m, SUMS)), code.at(args.h, (args.h_row, m))
        with code.when(args.pieces), code.rolled(args.rows) as r:
            at = code.at(of_one.sums, (r, 64))
            code.store(_row_lora(code, of_one, r, code.load(at, F32X16), upper=False), at)
        sums = code.sums_of_16([code.load(code.at(of_one.sums, 64 * r), F32X16) for r in range(ROWS)])
        finish(code, sums, of_one, code.at(args.out, (args.out_row, m)))


# ---------------------------------------------------------------------- one vector
@emitted("w rows blocks x x_after scales table up up_row h pieces sums bias add out", only=BF16)
def rows_times_one(code: Code, args: Value) -> None:
    """Up to 16 rows of codes times a vector -> or, where `add` is not 0, onto `out`, in fp32.

    w, rows, blocks: codes of rows, blocks of a row. x: in order; x_after: from its last block on, where `blocks` is
    odd. scales: (rows, blocks) fp32. table: `bf16_levels`. up, up_row, h, pieces: LoRA's B, bytes of its row, and A x
    in pieces of 32 bytes. sums: SUMS bytes of scratch. bias: fp32, or 0.
    """
    b = code.b
    _row_sizes(code, args)
    table = code.load(args.table, I16X32)
    with b.if_else(b.icmp_signed("==", b.and_(args.blocks, I64(1)), I64(0))) as (then, otherwise):
        with then:
            _even_rows(code, table, args)
        with otherwise:
            _odd_rows(code, table, args)
    finish(code, code.sums_of_16([code.load(code.at(args.sums, 64 * r), F32X16) for r in range(ROWS)]), args, args.out)


def _row_chunks(code: Code, table: Value, args: Value, w: Value, x: Value, scale: Value, total: Value) -> None:
    """Whole registers of a row, onto `total`."""
    with code.rolled(args.chunks) as c:
        place = code.at(w, (c, 64))
        code.prefetch(code.at(place, AHEAD_BYTES))
        dot = _dot(code, _levels(code, table, code.load(place, I16X32)), _chunk_of_x(code, code.at(x, (c, 256))))
        code.b.store(code.fma(dot, _two_scales(code, code.at(scale, (c, 8))), code.b.load(total)), total)


def _row_lora(code: Code, args: Value, row: Value, total: Value, *, upper: bool) -> Value:
    """A row's sums with those of LoRA, 16 ranks at a time, in the half of the register where the first block is."""
    b, sums = code.b, cgutils.alloca_once(code.b, F32X16)
    b.store(total, sums)
    places = mask([*range(16, 32), *range(16)]) if upper else _WIDENED
    with cgutils.for_range(b, args.pieces, intp=I64) as loop:
        up, h = (
            b.shuffle_vector(code.load(at, I16X16), zeros(I16X16), places)
            for at in (code.at(args.up, (row, args.up_row), (loop.index, 32)), code.at(args.h, (loop.index, 32)))
        )
        b.store(multiplied(code, b.load(sums), up, h), sums)
    return b.load(sums)


def _even_rows(code: Code, table: Value, args: Value) -> None:
    """Rows of whole registers."""
    total = cgutils.alloca_once(code.b, F32X16)
    with code.rolled(args.rows) as r:
        code.b.store(zeros(F32X16), total)
        w, scale = code.at(args.w, (r, args.row)), code.at(args.scales, (r, args.scale_row))
        _row_chunks(code, table, args, w, args.x, scale, total)
        code.store(_row_lora(code, args, r, code.b.load(total), upper=False), code.at(args.sums, (r, 64)))


def _odd_rows(code: Code, table: Value, args: Value) -> None:
    """Two rows at a time; where a last one is alone, what is read as its neighbour counts nothing."""
    b, total, after = code.b, cgutils.alloca_once(code.b, F32X16), cgutils.alloca_once(code.b, F32X16)
    with code.rolled(b.lshr(code.at(args.rows, 1), I64(1))) as two:
        r = b.shl(two, I64(1))
        w, scale = code.at(args.w, (r, args.row)), code.at(args.scales, (r, args.scale_row))
        b.store(zeros(F32X16), total)
        b.store(zeros(F32X16), after)
        _row_chunks(code, table, args, w, args.x, scale, total)
        is_two = b.icmp_signed("<", code.at(r, 1), args.rows)
        w, scale = code.at(w, (args.chunks, 64)), code.at(scale, (args.chunks, 8))
        with b.if_else(is_two) as (then, otherwise):
            with then:  # the last block of the one and the first of the other
                code.prefetch(code.at(w, AHEAD_BYTES))
                dot = _dot(code, _levels(code, table, code.load(w, I16X32)), _chunk_of_x(code, args.x_after))
                scales = _two_scales(code, scale)
                for sums, half in ((total, _LOWER), (after, _UPPER)):
                    b.store(b.select(half, code.fma(dot, scales, b.load(sums)), b.load(sums)), sums)
                _row_chunks(code, table, args, code.at(w, 64), code.at(args.x_after, 256), code.at(scale, 8), after)
                sums = _row_lora(code, args, code.at(r, 1), b.load(after), upper=True)
                code.store(sums, code.at(args.sums, (r, 64), 64))
            with otherwise:
                words = b.shuffle_vector(code.load(w, I16X16), zeros(I16X16), _WIDENED)
                dot = _dot(code, _levels(code, table, words), _chunk_of_x(code, code.at(args.x, (args.chunks, 256))))
                b.store(code.fma(dot, code.every(code.load(scale, F32), 16), b.load(total)), total)
        code.store(_row_lora(code, args, r, b.load(total), upper=False), code.at(args.sums, (r, 64)))


# ----------------------------------------------------------------- several vectors
@emitted("w rows blocks vectors x x_row scales table up up_row h h_row pieces sums bias add out out_row", only=BF16)
def rows_times_vectors(code: Code, args: Value) -> None:
    """Up to 16 rows of codes times vectors, as `rows_times_one`. x_row, h_row, out_row: bytes from a vector to the
    next. sums: SUMS bytes of scratch for each of up to eight vectors."""
    _row_sizes(code, args)
    for size, first in code.ladder(args.vectors):
        table = code.load(args.table, I16X32)
        x, h = code.at(args.x, (args.x_row, first)), code.at(args.h, (args.h_row, first))
        with code.rolled(code.b.lshr(code.at(args.rows, 1), I64(1))) as two:
            _two_rows(code, table, args, two, x, h, size)
        for m in range(size):
            sums = code.at(args.sums, SUMS * m)
            halves = [code.load(code.at(sums, 64 * n), F32X16) for n in range(ROWS // 2)]
            out = code.at(args.out, (args.out_row, first), (args.out_row, m))
            finish(code, code.sums_of_16(halves, width=8), args, out)


def _two_rows(code: Code, table: Value, args: Value, two: Value, x: Value, h: Value, vectors: int) -> None:
    """The sums of rows 2 two and 2 two + 1 to their places in the scratch, by halves; where there is no second one, of
    the first once more."""
    b, first = code.b, code.b.shl(two, I64(1))
    second = code.at(first, 1)
    rows = [first, b.select(b.icmp_signed("<", second, args.rows), second, first)]
    totals = [code.variables(F32X16, vectors) for _ in rows]
    w = [code.at(args.w, (row, args.row)) for row in rows]
    scales = [code.at(args.scales, (row, args.scale_row)) for row in rows]
    _two_rows_chunks(code, table, args, w, scales, x, totals)
    with code.when(b.and_(args.blocks, I64(1))):
        _two_last_blocks(code, table, args, w, scales, x, totals)
    _two_rows_lora(code, args, rows, h, totals)
    for m, both in enumerate(zip(*totals, strict=True)):
        (sums,) = code.halves([b.load(total) for total in both])
        code.store(sums, code.at(args.sums, (two, 64), SUMS * m))


def _two_rows_chunks(
    code: Code, table: Value, args: Value, w: list[Value], scales: list[Value], x: Value, totals: list[list[Value]]
) -> None:
    """Whole registers of the rows, onto `totals`, one for each row and vector."""
    with code.rolled(args.chunks) as c:
        levels, shares = [], []
        for row, scale in zip(w, scales, strict=True):
            place = code.at(row, (c, 64))
            code.prefetch(code.at(place, AHEAD_BYTES), once=True)
            levels.append(_levels(code, table, code.load(place, I16X32)))
            shares.append(_two_scales(code, code.at(scale, (c, 8))))
        for m in range(len(totals[0])):
            at = code.at(x, (args.x_row, m), (c, 256))
            _two_rows_chunk(code, [total[m] for total in totals], levels, shares, at)


def _two_rows_chunk(code: Code, totals: list[Value], levels: list[list[Value]], shares: list[Value], x: Value) -> None:
    """128 weights of two rows times 128 numbers of a vector, at address x, onto the rows' totals. As text, since LLVM
    would load all vectors first, and put the half of its registers into memory."""
    # 0, 1 totals; 2, 3 sums; 4 x; 5 .. 8 and 9 .. 12 levels; 13, 14 shares
    lines = [f"vpxord ${n}, ${n}, ${n}" for n in (2, 3)]
    for k in range(4):
        lines += [f"vdpbf16ps {64 * k}($4), ${first + k}, ${to}" for first, to in ((5, 2), (9, 3))]
    lines += [f"vfmadd231ps ${share}, ${dot}, ${total}" for share, dot, total in ((13, 2, 0), (14, 3, 1))]
    inputs = [x, *levels[0], *levels[1], *shares, *(code.b.load(total) for total in totals)]
    kind = ir.FunctionType(ir.LiteralStructType([F32X16] * 4), [one.type for one in inputs])
    names = ",".join(["=&v"] * 4 + ["r"] + ["v"] * 10 + ["0", "1", "~{memory}"])
    results = code.b.asm(kind, "\n".join(lines), names, inputs, side_effect=True)
    for n, total in enumerate(totals):
        code.b.store(code.b.extract_value(results, n), total)


def _two_last_blocks(
    code: Code, table: Value, args: Value, w: list[Value], scales: list[Value], x: Value, totals: list[list[Value]]
) -> None:
    """The last blocks of two rows, each in a half of one register, onto the lower halves of `totals`."""
    b, c = code.b, args.chunks
    halves = [code.load(code.at(row, (c, 64)), I16X16) for row in w]
    levels = _levels(code, table, b.shuffle_vector(*halves, _WIDENED))
    shares = [code.every(code.load(code.at(scale, (c, 8)), F32), 16) for scale in scales]
    shares = [b.shuffle_vector(share, zeros(F32X16), _BELOW) for share in shares]
    for m in range(len(totals[0])):
        at = code.at(x, (args.x_row, m), (c, 256))
        parts = [code.load(code.at(at, 64 * k), I16X16) for k in range(4)]
        dot = _dot(code, levels, [b.shuffle_vector(part, part, _TWICE) for part in parts])
        for one, share, total in zip((dot, b.shuffle_vector(dot, dot, _SWAPPED)), shares, totals, strict=True):
            b.store(code.fma(one, share, b.load(total[m])), total[m])


def _two_rows_lora(code: Code, args: Value, rows: list[Value], h: Value, totals: list[list[Value]]) -> None:
    """LoRA's B (these rows) times A x of each vector, 16 ranks at a time, onto the lower halves of `totals`."""

    def piece_of(at: Value) -> Value:
        return code.b.shuffle_vector(code.load(at, I16X16), zeros(I16X16), _WIDENED)

    with code.rolled(args.pieces) as piece:
        ups = [piece_of(code.at(args.up, (row, args.up_row), (piece, 32))) for row in rows]
        for m in range(len(totals[0])):
            numbers = piece_of(code.at(h, (args.h_row, m), (piece, 32)))
            for up, total in zip(ups, totals, strict=True):
                code.b.store(multiplied(code, code.b.load(total[m]), up, numbers), total[m])
