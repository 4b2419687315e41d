"""The head in 8 bits: all logits roughly, then those that may be the largest as they are (`layers/decoding/head.py`).

What: rows of 8-bit integers times vectors in 16-bit integers, exactly summed in 32 bits, then times both steps. In bf16
(AVX-512) 16 rows at a time, whose sums are added up together; in fp32 (AVX2) a row at a time.
Source: VPMADDWD in Intel's SDM volume 2.

Letters: M vectors (texts at once), D in, O out.
"""

from llvmlite import ir

from halfbyte.layers.kernels.cpu.decoding.codes_bf16 import ROWS, SUMS
from halfbyte.layers.kernels.cpu.decoding.codes_int16 import int16_dot

from halfbyte.layers.kernels.cpu.decoding.emit import (  # isort: skip
    AHEAD_BYTES, BF16, F32, F32X8, F32X16, FP32, I8, I8X32, I16X16, I16X32, I32X8, I32X16, I64, Code, emitted,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.scalar import Value

PIECE = 64  # numbers that a row is a multiple of


@emitted("vectors w x x_row pieces out", only=FP32)
def int8_dots(code: Code, args: Value) -> None:
    """A row of 8-bit integers times vectors of 16-bit ones, `x_row` bytes apart -> out (vectors,) in fp32."""
    b = code.b
    for size, first in code.ladder(args.vectors):
        x, out = code.at(args.x, (args.x_row, first)), code.at(args.out, (first, 4))
        sums = code.variables(I32X8, size)
        with code.rolled(args.pieces) as piece:
            for k in range(PIECE // 16):
                row = b.sext(code.load(code.at(args.w, (piece, PIECE), 16 * k), ir.VectorType(I8, 16)), I16X16)
                for m, total in enumerate(sums):
                    part = code.load(code.at(x, (args.x_row, m), (piece, 2 * PIECE), 32 * k), I16X16)
                    b.store(b.add(int16_dot(code, row, part), b.load(total)), total)
        floats = [b.sitofp(b.load(total), F32X8) for total in sums]
        if size == 8:
            code.store(code.sums_of_8(floats), out)
        else:
            for m, total in enumerate(floats):
                code.store(code.total(total), code.at(out, 4 * m))


def _dot_of_32(code: Code, row: Value, x: Value) -> Value:
    return code.call("llvm.x86.avx512.pmaddw.d.512", I32X16, row, x)


@emitted("w pieces x step:f scales bounds length:f sums out ends", only=BF16)
def rows_times_one(code: Code, args: Value) -> None:
    """16 rows of 8-bit integers times one vector of 16-bit ones -> out (16,) in fp32. x, step: integers, of how much.
    scales, bounds: of the rows. length: of x. sums: SUMS bytes of scratch. ends: (2, 16) fp32, raised to what each
    number of `out` is at least and at most, as far as those are numbers."""
    b = code.b
    with code.rolled(I64(ROWS)) as r:
        totals = code.variables(I32X16, 2)
        with code.rolled(args.pieces) as n:
            place = code.at(args.w, (b.mul(r, args.pieces), 64), (n, 64))
            code.prefetch(code.at(place, AHEAD_BYTES))
            for k, total in enumerate(totals):
                row = b.sext(code.load(code.at(place, 32 * k), I8X32), I16X32)
                numbers = code.load(code.at(args.x, (n, 128), 64 * k), I16X32)
                b.store(b.add(b.load(total), _dot_of_32(code, row, numbers)), total)
        code.store(b.add(*(b.load(total) for total in totals)), code.at(args.sums, (r, 64)))
    sums = code.sums_of_16([code.load(code.at(args.sums, 64 * r), I32X16) for r in range(ROWS)])
    about = b.fmul(b.sitofp(sums, F32X16), code.every(args.step, 16))
    about = b.fmul(about, code.load(args.scales, F32X16))
    code.store(about, args.out)
    off = b.fmul(code.load(args.bounds, F32X16), code.every(args.length, 16))
    for k, end in enumerate((b.fsub(about, off), b.fadd(about, off))):
        at = code.at(args.ends, 64 * k)
        code.store(code.call("llvm.maxnum.v16f32", F32X16, end, code.load(at, F32X16)), at)


@emitted("w rows pieces vectors x x_row steps scales bounds lengths sums out out_row ends", only=BF16)
def rows_times_vectors(code: Code, args: Value) -> None:
    """Up to 16 rows times vectors, `x_row` and `out_row` bytes apart. steps, lengths: (vectors,). sums: SUMS bytes of
    scratch for each of up to eight. ends: (vectors, 2, 16)."""
    b = code.b
    there = code.row_mask(args.rows, ROWS)
    for size, first in code.ladder(args.vectors):
        x = code.at(args.x, (args.x_row, first))
        with code.rolled(b.lshr(code.at(args.rows, 1), I64(1))) as two:
            _two_rows(code, args, two, x, size)
        scales, bounds = (code.masked_load(at, F32X16, there) for at in (args.scales, args.bounds))
        for m in range(size):
            at, m_th = code.at(args.sums, SUMS * m), code.at(first, m)
            sums = code.sums_of_16([code.load(code.at(at, 64 * r), I32X16) for r in range(ROWS)])
            finish(code, args, sums, m_th, scales, bounds, there)


def finish(code: Code, args: Value, sums: Value, m: Value, scales: Value, bounds: Value, there: Value) -> None:
    """Vector m's whole numbers (16,) -> its logits, and what they are at least and at most."""
    b = code.b
    step, length = (code.load(code.at(at, (m, 4)), F32) for at in (args.steps, args.lengths))
    about = b.fmul(b.fmul(b.sitofp(sums, F32X16), code.every(step, ROWS)), scales)
    code.masked_store(about, code.at(args.out, (args.out_row, m)), there)
    off = b.fmul(bounds, code.every(length, ROWS))
    for k, end in enumerate((b.fsub(about, off), b.fadd(about, off))):
        at = code.at(args.ends, (m, 128), 64 * k)
        before = code.load(at, F32X16)
        code.store(b.select(there, code.call("llvm.maxnum.v16f32", F32X16, end, before), before), at)


def _two_rows(code: Code, args: Value, two: Value, x: Value, vectors: int) -> None:
    """The sums of rows 2 two and 2 two + 1 to their places in the scratch; where there is no second one, any."""
    b, first, row_bytes = code.b, code.b.shl(two, I64(1)), code.b.shl(args.pieces, I64(6))
    second = code.at(first, 1)
    rows = (first, b.select(b.icmp_signed("<", second, args.rows), second, first))
    w = [code.at(args.w, (row, row_bytes)) for row in rows]
    totals = [code.variables(I32X16, vectors) for _ in w]
    with code.rolled(args.pieces) as n:
        for row in w:
            code.prefetch(code.at(row, (n, 64), AHEAD_BYTES), once=True)
        for k in (0, 1):
            numbers = [b.sext(code.load(code.at(row, (n, 64), 32 * k), I8X32), I16X32) for row in w]
            for m in range(vectors):
                part = code.load(code.at(x, (args.x_row, m), (n, 128), 64 * k), I16X32)
                for number, row_totals in zip(numbers, totals, strict=True):
                    b.store(b.add(b.load(row_totals[m]), _dot_of_32(code, number, part)), row_totals[m])
    for row, row_totals in zip((first, second), totals, strict=True):
        for m, total in enumerate(row_totals):
            code.store(b.load(total), code.at(args.sums, (row, 64), SUMS * m))
