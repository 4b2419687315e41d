"""Rows of 4-bit codes times vectors in whole numbers of 16 bits: the products of processors with AVX2, in fp32.

Why: in fp32 a register multiplies 8 numbers, in whole numbers of 16 bits 16; levels come out of the table as such.
What: levels are whole numbers of up to LEVEL, x of up to NUMBER, with a step for each block of 64. `vpmaddwd`
multiplies 16 pairs and adds neighbours, in 32 bits. A block's sum is exact, whatever its order; it is scaled and added
in fp32, block after block. So a text has the same bits whatever stands beside it. Always eight rows of codes at once:
    few   1, 2 or 4 vectors: a register holds 16 codes of a row; a tree adds up the sums of eight rows.
    many  8 or 16, or several times 16: a register holds two neighbouring numbers of eight vectors. Codes are unpacked
          once, into the first cache, and two of them at a time are spread over a register.
Error: a level is off by up to 1/8192 of its block's largest weight, a number of x by 1/16382 of its block's largest. A
NaN or Inf makes the block's step one.
Source: VPMADDWD, VPSHUFB in Intel's SDM volume 2; the order is ours.
Cost: 64 weights, cycles of Zen 3: see docs/log.md, "Several texts at once".
"""

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from halfbyte.layers.kernels.cpu.decoding.code_tables import BLOCK, LEVEL

from halfbyte.layers.kernels.cpu.decoding.emit import (  # isort: skip
    F32, F32X8, FP32, I8X32, I16, I16X16, I32, I32X8, I64, Code, emitted, mask, zeros,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.scalar import Value, inlined

NUMBER = 8191  # the largest number of x: 64 products with levels are below 2^31
ROWS = 8
LEVELS_BYTES = 1024  # of scratch, that a product uses
FEWEST_OF_MANY = 5  # vectors for which eight at once are faster than one, two and four
TINY = 2.0**-100  # a block whose largest number is below is taken for zeros


def ordered_bytes(vectors: int, width: int) -> int:
    """Bytes of M vectors (M, D') as products read them: see `ordered_parts`."""
    groups, blocks = -(-vectors // 8), width // BLOCK
    return 2 * vectors * width + 16 * groups * width + 32 * groups * blocks + 4 * vectors * blocks


@inlined
def ordered_parts(ordered, vectors, width):  # type: ignore[no-untyped-def]
    """Where vectors lie in whole numbers: (M, D') each alone, at `ordered` itself; in pairs among eight vectors
    (M / 8, D' / 2, 8, 2); and the steps of blocks: of these (M / 8, D' / 64, 8), of each alone (M, D' / 64)."""
    groups, blocks = (vectors + 7) // 8, width // BLOCK
    pairs = ordered + 2 * vectors * width
    pair_steps = pairs + 16 * groups * width
    return pairs, pair_steps, pair_steps + 32 * groups * blocks


# --------------------------------------------------------------- products of 8 rows
@emitted("w w_row rows vectors x steps pairs pair_steps width scales blocks table levels out", only=FP32)
def rows_times_vectors(code: Code, args: Value) -> None:
    """Up to eight rows of codes times vectors -> out (vectors, 8) in fp32. w, w_row, rows: codes. x, steps, pairs,
    pair_steps: `ordered_parts`; width: D'. scales: (blocks, 8) fp32. table: `int16_levels`. levels: LEVELS_BYTES of
    scratch."""
    b = code.b
    sets = b.lshr(code.at(args.vectors, 3), I64(4))  # 13 vectors are one set of 16
    with code.when(sets):
        _many_vectors(code, 2, args, I64(0), sets)
    done = b.shl(sets, I64(4))
    is_eight = b.icmp_signed(">=", b.sub(args.vectors, done), I64(FEWEST_OF_MANY))
    with b.if_then(is_eight):
        _many_vectors(code, 1, args, done, I64(1))
    done = b.select(is_eight, code.at(done, 8), done)
    left = b.select(b.icmp_signed(">", args.vectors, done), b.sub(args.vectors, done), I64(0))
    for size, first in code.ladder(left, (4, 2, 1)):
        _few_vectors(code, size, args, b.add(done, first))


def _few_vectors(code: Code, vectors: int, args: Value, first: Value) -> None:
    b, x_row, steps_row = code.b, code.b.shl(args.width, I64(1)), code.b.lshr(args.width, I64(4))
    tables = [code.load(code.at(args.table, 32 * n), I8X32) for n in (0, 1)]
    x_first, steps_first, out = (
        code.at(base, (first, row)) for base, row in ((args.x, x_row), (args.steps, steps_row), (args.out, 32))
    )
    totals = code.variables(F32X8, vectors)
    with code.rolled(args.blocks) as c:
        x = [[code.at(x_first, (x_row, m), (c, 128), 32 * k) for k in range(4)] for m in range(vectors)]
        of_one = [code.load(at, I16X16) for at in x[0]] if vectors == 1 else []
        with code.rolled(I64(ROWS)) as i:
            at = code.at(_row(code, args, i), (c, 32))
            code.prefetch(code.at(at, (args.w_row, ROWS)))
            levels = _unpacked(code, tables, code.load(at, I8X32))
            for m in range(vectors):
                numbers = of_one or [code.load(place, I16X16) for place in x[m]]
                d = [int16_dot(code, level, part) for level, part in zip(levels, numbers, strict=True)]
                code.store(b.add(b.add(d[0], d[1]), b.add(d[2], d[3])), code.at(args.levels, 256 * m, (i, 32)))
        scales = code.load(code.at(args.scales, (c, 32)), F32X8)
        for m, total in enumerate(totals):
            sums = code.sums_of_8([code.load(code.at(args.levels, 256 * m + 32 * i), I32X8) for i in range(ROWS)])
            step = code.load(code.at(steps_first, (steps_row, m), (c, 4)), F32)
            share = b.fmul(scales, code.every(step, 8))
            b.store(code.fma(b.sitofp(sums, F32X8), share, b.load(total)), total)
    for m, total in enumerate(totals):
        code.store(b.load(total), code.at(out, 32 * m))


def _many_vectors(code: Code, groups: int, args: Value, first: Value, sets: Value) -> None:
    """`sets` of `groups` of eight vectors, for which codes are unpacked once."""
    b, rows, size = code.b, ROWS // groups, 256 * groups  # of a set's totals: (groups, eight rows, eight vectors)
    x_part, steps_part = code.b.shl(args.width, I64(4)), code.b.lshr(args.width, I64(1))
    tables = [code.load(code.at(args.table, 32 * n), I8X32) for n in (0, 1)]
    eighth = code.b.lshr(first, I64(3))
    pairs, pair_steps = code.at(args.pairs, (eighth, x_part)), code.at(args.pair_steps, (eighth, steps_part))
    out = code.at(args.out, (first, 32))
    with code.rolled(b.mul(sets, I64(groups * ROWS))) as n:
        code.store(zeros(F32X8), code.at(out, (n, 32)))
    with code.rolled(I64(groups)) as half, code.rolled(args.blocks) as c:
        first_row = b.mul(half, I64(rows))
        with code.rolled(I64(rows)) as r:
            at = code.at(_row(code, args, b.add(first_row, r)), (c, 32))
            code.prefetch(code.at(at, (args.w_row, ROWS)))
            for k, level in enumerate(_unpacked(code, tables, code.load(at, I8X32))):
                code.store(level, code.at(args.levels, (r, 128), 32 * k))
        with code.rolled(sets) as one:
            group = b.mul(one, I64(groups))
            sums = [code.variables(I32X8, rows) for _ in range(groups)]
            with code.rolled(I64(8)) as p:
                for k in range(4):
                    pair = code.at(pairs, 32 * k, (x_part, group), (c, 1024), (p, 128))
                    x = [code.load(code.at(pair, (x_part, g)), I16X16) for g in range(groups)]
                    for r in range(rows):
                        two = code.every(code.load(code.at(args.levels, 128 * r + 4 * k, (p, 16)), I32), 8)
                        for g in range(groups):
                            b.store(b.add(b.load(sums[g][r]), int16_dot(code, two, x[g])), sums[g][r])
            at = code.at(pair_steps, (steps_part, group), (c, 32))
            steps = [code.load(code.at(at, (steps_part, g)), F32X8) for g in range(groups)]
            for r in range(rows):
                scale = code.every(code.load(code.at(args.scales, (c, 32), (first_row, 4), 4 * r), F32), 8)
                for g in range(groups):
                    at = code.at(out, (one, size), 256 * g + 32 * r, (first_row, 32))
                    share = b.fmul(scale, steps[g])
                    code.store(code.fma(b.sitofp(b.load(sums[g][r]), F32X8), share, code.load(at, F32X8)), at)
    with code.rolled(b.mul(sets, I64(groups))) as group:
        at = code.at(out, (group, 256))
        for t, text in enumerate(code.turned([code.load(code.at(at, 32 * r), F32X8) for r in range(ROWS)])):
            code.store(text, code.at(at, 32 * t))


def int16_dot(code: Code, a: Value, b: Value) -> Value:
    """16 products of 16 bits, neighbours added."""
    return code.call("llvm.x86.avx2.pmadd.wd", I32X8, code.b.bitcast(a, I16X16), code.b.bitcast(b, I16X16))


def _unpacked(code: Code, tables: list[Value], w: Value) -> list[Value]:
    """64 codes -> 4 registers of 16 levels: weights 1, 3 .. 15 and 33 .. 47, then 17 .. and 49 ..; so the even ones."""
    b, low = code.b, ir.Constant(I8X32, [15] * 32)
    upper = b.bitcast(b.lshr(b.bitcast(w, I16X16), ir.Constant(I16X16, [4] * 16)), I8X32)
    levels = []
    for index in (b.and_(w, low), b.and_(upper, low)):
        halves = [code.call("llvm.x86.avx2.pshuf.b", I8X32, table, index) for table in tables]
        for part in (0, 8):
            places = [lane * 16 + part + i + 32 * side for lane in (0, 1) for i in range(8) for side in (0, 1)]
            levels.append(b.bitcast(b.shuffle_vector(*halves, mask(places)), I16X16))
    return levels


def _row(code: Code, args: Value, i: Value) -> Value:
    """The address of row i; where there are fewer, the last one's."""
    b, last = code.b, code.b.sub(args.rows, I64(1))
    return code.at(args.w, (args.w_row, b.select(b.icmp_signed("<", i, last), i, last)))


@emitted("vectors sums up up_row h h_row ranks", only=FP32)
def add_lora(code: Code, args: Value) -> None:
    """sums (vectors, 8) += h (vectors, R) times up (R, 8), one rank after the other. up_row, h_row: bytes from a rank
    and from a vector to the next."""
    for size, first in code.ladder(args.vectors):
        sums, h = code.at(args.sums, (first, 32)), code.at(args.h, (first, args.h_row))
        totals = code.variables(F32X8, size)
        for m, total in enumerate(totals):
            code.b.store(code.load(code.at(sums, 32 * m), F32X8), total)
        with code.rolled(args.ranks) as r:
            up = code.load(code.at(args.up, (args.up_row, r)), F32X8)
            for m, total in enumerate(totals):
                one = code.every(code.load(code.at(h, (args.h_row, m), (r, 4)), F32), 8)
                code.b.store(code.fma(up, one, code.b.load(total)), total)
        for m, total in enumerate(totals):
            code.store(code.b.load(total), code.at(sums, 32 * m))


# ----------------------------------------------------------- vectors in whole numbers
def peak_of(code: Code, parts: list[Value]) -> Value:
    """The largest of |parts|, in the order of their bits: a NaN is the largest."""
    b, least = code.b, ir.Constant(I32X8, [0x7FFFFFFF] * 8)
    bits = [b.and_(b.bitcast(part, I32X8), least) for part in parts]
    while len(bits) > 1:
        bits = [b.select(b.icmp_signed(">", x, y), x, y) for x, y in zip(bits[::2], bits[1::2], strict=True)]
    return b.bitcast(code.call("llvm.vector.reduce.smax.v8i32", I32, bits[0]), F32)


def _integers(code: Code, part: Value, factor: Value) -> Value:
    """8 numbers times a factor, to nearest, in 16 bits."""
    whole = code.call("llvm.x86.avx.cvt.ps2dq.256", I32X8, code.b.fmul(part, factor))
    return code.b.trunc(whole, ir.VectorType(I16, 8))


@emitted("x numbers step pairs pair_step", only=FP32)
def round_block(code: Code, args: Value) -> None:
    """A block of x in fp32 -> 64 whole numbers of 16 bits in the order of `_unpacked`, and their step. pairs,
    pair_step: the same among seven other vectors', 32 bytes from two numbers to the next two; 0 for none."""
    b = code.b
    parts = [code.load(code.at(args.x, 32 * k), F32X8) for k in range(8)]
    peak = peak_of(code, parts)
    tiny = b.fcmp_ordered("<", peak, F32(TINY))
    step = b.select(tiny, F32(0.0), b.fmul(peak, F32(float(np.float32(1 / NUMBER / LEVEL)))))
    factor = code.every(b.select(tiny, F32(0.0), b.fdiv(F32(float(NUMBER)), peak)), 8)
    halves = [_integers(code, part, factor) for part in parts]
    n = [b.shuffle_vector(halves[k], halves[k + 1], mask(range(16))) for k in range(0, 8, 2)]
    every_second = [[first + 2 * i for i in range(16)] for first in (1, 0)]
    ordered = [b.shuffle_vector(n[k], n[k + 2], mask(places)) for places in every_second for k in (0, 1)]
    for k, words in enumerate(ordered):
        code.store(words, code.at(args.numbers, 32 * k))
    code.store(step, args.step)
    with code.when(args.pairs):
        code.store(step, args.pair_step)
        for k, words in enumerate(ordered):
            pairs = b.bitcast(words, I32X8)
            for i in range(8):
                code.store(b.extract_element(pairs, I32(i)), code.at(args.pairs, 32 * (8 * k + i)))


@emitted("x count largest:f numbers step")
def round_vector(code: Code, args: Value) -> None:
    """`count` numbers in fp32, a multiple of 64, -> whole ones up to `largest`, in their order, with one step."""
    b = code.b
    seen = cgutils.alloca_once_value(b, F32(0.0))
    with code.rolled(b.lshr(args.count, I64(6))) as c:
        peak = b.bitcast(peak_of(code, [code.load(code.at(args.x, (c, 256), 32 * k), F32X8) for k in range(8)]), I32)
        before = b.bitcast(b.load(seen), I32)
        b.store(b.bitcast(b.select(b.icmp_signed(">", peak, before), peak, before), F32), seen)
    peak = b.load(seen)
    tiny = b.fcmp_ordered("<", peak, F32(TINY))
    code.store(b.select(tiny, F32(0.0), b.fdiv(peak, args.largest)), args.step)
    factor = code.every(b.select(tiny, F32(0.0), b.fdiv(args.largest, peak)), 8)
    with code.rolled(b.lshr(args.count, I64(3))) as c:
        words = _integers(code, code.load(code.at(args.x, (c, 32)), F32X8), factor)
        code.store(words, code.at(args.numbers, (c, 16)))
