"""Rows of a GGUF file's blocks times vectors: a token's products on the bytes of the file.

What: codes are unpacked into registers of 16-bit numbers and multiplied at once; a block's sum is scaled in fp32. A
word of 16 bits holds four codes of 4 bits; shifted by 0, 4, 8 and 12 each is in the lowest bits, so a vector x is laid
out in the order in which that finds its numbers (`block_vectors.py`).
    bf16    AVX-512: 128 weights at a time. Levels come from a table in a register (`vpermw`); Q8_0's are two, of its
            lower half and its upper one. Of rows that end in half a chunk two share a register.
    fp32    AVX2: whole numbers of 16 bits, 64 weights at a time; a block's sum is exact.
Error: levels are exact, so what is rounded is x, as the model's own forward rounds it in bf16; sums are fp32.
Source: ggml's block formats (`quant/kernels/gguf_cpu.py` dequantises them); VPERMW, VPERMI2W in Intel's SDM volume 2.
Cost: in bf16 of one vector about 23 instructions for 128 weights of Q4_0. A vector has the same bits whatever stands
beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
from llvmlite import ir

from halfbyte.layers.kernels.cpu import tiles

from halfbyte.layers.kernels.cpu.decoding.block_vectors import (  # isort: skip
    CHUNK, OF_32, OF_BYTES, OF_K, OF_Q6_K, REGISTERS, SUMS_AT, joined,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.decoding.codes_bf16 import SUMS, multiplied
from halfbyte.layers.kernels.cpu.decoding.codes_int16 import int16_dot

from halfbyte.layers.kernels.cpu.decoding.emit import (  # isort: skip
    AHEAD_BYTES, F32, F32X8, F32X16, I8, I16X16, I16X32, I32, I64, Code, emitted, mask, zeros,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.scalar import Value
from halfbyte.models.gguf.blocks import BLOCKS
from halfbyte.quant.kernels.gguf_cpu import IQ4_NL

HALF = ir.HalfType()
_UNIT = 64  # weights that a row is a multiple of


@dataclass(frozen=True)
class Kind:
    """A type of blocks: its order of x, weights and bytes of a block; where codes begin, and fifth bits; what is added
    to a code, or all levels; whether a block has a minimum."""

    order: int
    weights: int
    nbytes: int
    codes: int
    fifth: int | None = None
    first: int = 0
    levels: tuple[int, ...] = ()
    least: bool = False


_BY_NAME = {
    "Q4_0": Kind(OF_32, *BLOCKS["Q4_0"][1:], 2, first=-8),
    "Q4_1": Kind(OF_32, *BLOCKS["Q4_1"][1:], 4, least=True),
    "Q5_0": Kind(OF_32, *BLOCKS["Q5_0"][1:], 6, fifth=2, first=-16),
    "Q5_1": Kind(OF_32, *BLOCKS["Q5_1"][1:], 8, fifth=4, least=True),
    "Q8_0": Kind(OF_BYTES, *BLOCKS["Q8_0"][1:], 2),
    "Q4_K": Kind(OF_K, *BLOCKS["Q4_K"][1:], 16, least=True),
    "Q5_K": Kind(OF_K, *BLOCKS["Q5_K"][1:], 48, fifth=16, least=True),
    "Q6_K": Kind(OF_Q6_K, *BLOCKS["Q6_K"][1:], 0, first=-32),
    "IQ4_NL": Kind(OF_32, *BLOCKS["IQ4_NL"][1:], 2, levels=IQ4_NL),
}
KINDS = {BLOCKS[name][0]: kind for name, kind in _BY_NAME.items()}  # by ggml's number
_AVX2 = tuple(BLOCKS[name][0] for name in ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"))


def multiplies(kind: int, width: int, isa: str) -> bool:
    """Whether there is a product of rows of this type and width here; else rows are dequantised."""
    return kind in (_AVX2 if isa == "avx2" else KINDS) and width % _UNIT == 0


# -------------------------------------------------------------------- products
@dataclass
class _Term:
    """Registers of levels, each with its place among those of x, and the scale of their sum; or no levels, and which of
    x's sums are scaled. `at`: of the chunk, in bytes."""

    scale: Value
    at: int = 0
    levels: list[tuple[Value, int]] = field(default_factory=list)
    sums: int = 0


@emitted("kind w row_bytes order first rows all_rows d vectors x x_row sums")
def rows_times_vectors(code: Code, args: Value) -> None:
    """Rows `first` .. `first` + `rows` of a matrix of blocks times vectors, in the order of their kind, `x_row` bytes
    apart -> sums. bf16: up to 16 rows, each a register of sums at 64 * row + SUMS * vector. fp32: up to 8 rows ->
    (vectors, 8).

    order: (all_rows,) int32, which row of `w` each one is, or 0.
    """
    if code.is_bf16 and not tiles.available():
        return
    for number in code.cases(args.kind, list(KINDS if code.is_bf16 else _AVX2)):
        for size, m in code.ladder(args.vectors):
            of_these = SimpleNamespace(**vars(args))
            of_these.x = code.at(args.x, (args.x_row, m))
            of_these.sums = code.at(args.sums, (m, SUMS if code.is_bf16 else 32))
            _rows(code, KINDS[number], of_these, size)


def _rows(code: Code, kind: Kind, args: Value, vectors: int) -> None:
    b, size = code.b, CHUNK if kind.weights == 32 else 256
    x_bytes, whole = size // CHUNK * 64 * REGISTERS, b.udiv(args.d, I64(size))
    halves = b.and_(b.lshr(args.d, I64(6)), I64(1)) if kind.weights == 32 else I64(0)
    x_half = code.at(args.x, (whole, x_bytes))
    is_shared = code.is_bf16 and kind.order == OF_32
    with code.rolled(args.rows) as r:
        w, totals = _row(code, args, r), code.variables(F32X16 if code.is_bf16 else F32X8, vectors)
        nbytes = size // kind.weights * kind.nbytes
        terms_of = _OF[code.is_bf16, kind.order]

        def chunk(n: Value, w: Value = w, totals: list[Value] = totals) -> None:
            at = code.at(w, (n, nbytes))
            _onto(code, terms_of(code, kind, at, halves=2), args, code.at(args.x, (n, x_bytes)), totals)

        for several, first in code.ladder(whole, (2, 1) if vectors == 1 and kind.weights == 32 else (1,)):
            for k in range(0, several * nbytes, 64):  # every line: a part of a row is no whole number of them
                code.prefetch(code.at(w, (first, nbytes), AHEAD_BYTES + k), once=vectors > 1)
            for k in range(several):
                chunk(code.at(first, k))
        if kind.weights == 32 and not is_shared:
            with code.when(halves):
                _onto(code, terms_of(code, kind, code.at(w, (whole, nbytes)), halves=1), args, x_half, totals)
        for k, total in enumerate(totals):
            if code.is_bf16:
                code.store(b.load(total), code.at(args.sums, SUMS * k, (r, 64)))
            else:
                code.store(code.total(b.load(total)), code.at(args.sums, 32 * k, (r, 4)))
    if is_shared:
        with code.when(halves), code.rolled(b.lshr(code.at(args.rows, 1), I64(1))) as two:
            _two_halves(code, kind, args, vectors, b.shl(two, I64(1)), b.mul(whole, I64(4 * kind.nbytes)), x_half)


def _row(code: Code, args: Value, r: Value) -> Value:
    """The address of a row, of those that there are."""
    b, last, row = code.b, code.b.sub(args.all_rows, I64(1)), code.b.add(args.first, r)
    row = b.select(b.icmp_signed("<", row, last), row, last)
    is_ordered = b.icmp_signed("!=", args.order, I64(0))
    place = b.select(is_ordered, code.at(args.order, (row, 4)), args.w)  # in order, what is read counts nothing
    row = b.select(is_ordered, b.sext(code.load(place, I32), I64), row)
    return code.at(args.w, (row, args.row_bytes))


def _two_halves(code: Code, kind: Kind, args: Value, vectors: int, r: Value, at: Value, x: Value) -> None:
    """The last 64 weights of rows r and r + 1, in the halves of registers, onto these rows' sums. Where there is no
    second one, what is added to its place counts nothing."""
    b = code.b
    rows = [code.at(_row(code, args, row), at) for row in (r, code.at(r, 1))]
    terms = list(_bf16_terms(code, kind, _half_chunks(code, rows, 2 * kind.nbytes)))
    lower = ir.Constant(ir.VectorType(ir.IntType(1), 16), [1] * 8 + [0] * 8)
    twice = [*range(16)] * 2
    for m in range(vectors):
        places = [code.at(args.sums, SUMS * m, (r, 64), 64 * k) for k in (0, 1)]
        both = [code.load(place, F32X16) for place in places]
        x_m = code.at(x, (args.x_row, m))
        for term in terms:
            dot = zeros(F32X16)
            if not term.levels:
                dot = code.load(code.at(x_m, 64 * (SUMS_AT + term.sums)), F32X8)
                dot = b.shuffle_vector(dot, dot, mask([*range(8)] * 2))
            for level, k in term.levels:
                numbers = code.load(code.at(x_m, 64 * k), I16X16)
                dot = multiplied(code, dot, level, b.shuffle_vector(numbers, numbers, mask(twice)))
            none = zeros(F32X16)
            scales = b.select(lower, term.scale, none), b.select(lower, none, term.scale)
            both = [code.fma(dot, scale, total) for scale, total in zip(scales, both, strict=True)]
        for place, total in zip(places, both, strict=True):
            code.store(total, place)


def _onto(code: Code, terms: Iterator[_Term], args: Value, x: Value, totals: list[Value]) -> None:
    b, size = code.b, 64 if code.is_bf16 else 32
    for term in terms:
        for m, total in enumerate(totals):
            at = code.at(x, (args.x_row, m), term.at)
            dot, scale = _dot(code, term, at, size), term.scale
            if not code.is_bf16:
                scale = b.fmul(scale, code.load(code.at(at, size * (REGISTERS - 1)), F32X8))
            b.store(code.fma(dot, scale, b.load(total)), total)


def _dot(code: Code, term: _Term, x: Value, size: int) -> Value:
    b, register = code.b, I16X32 if code.is_bf16 else I16X16
    if not term.levels:
        return code.load(code.at(x, size * (SUMS_AT + term.sums)), F32X16 if code.is_bf16 else F32X8)
    if code.is_bf16:
        dot = zeros(F32X16)
        for level, k in term.levels:
            dot = multiplied(code, dot, level, code.load(code.at(x, size * k), register))
        return dot
    dots = [int16_dot(code, level, code.load(code.at(x, size * k), register)) for level, k in term.levels]
    while len(dots) > 1:
        dots = [b.add(one, other) for one, other in zip(dots[::2], dots[1::2], strict=True)]
    return b.sitofp(dots[0], F32X8)


# ------------------------------------------------------------------ what all unpack
def _shifted(code: Code, words: Value) -> list[Value]:
    return [words, *(code.b.lshr(words, _every(words, n)) for n in (4, 8, 12))]


def _every(words: Value, number: int) -> Value:
    return ir.Constant(words.type, [number] * words.type.count)


def _table(levels: Sequence[int]) -> Value:
    """32 words of bf16, which holds all levels exactly."""
    words = np.array(levels, np.float32).view(np.uint32) >> 16
    return ir.Constant(I16X32, [int(word) for word in words])


def _looked_up(code: Code, levels: Sequence[int], index: Value) -> Value:
    """16 levels by the lowest bits of `index`."""
    return code.call("llvm.x86.avx512.permvar.hi.512", I16X32, _table([*levels, *levels]), index)


def _levels(code: Code, kind: Kind, words: Value, fifth: list[tuple[Value, list[int]]] | None = None) -> list[Value]:
    """Words of four codes -> four registers of levels; `fifth`: for each, words with a bit more, and which bit."""
    b, levels = code.b, []
    for n, index in enumerate(_shifted(code, words)):
        if not code.is_bf16:
            level = b.and_(index, _every(words, 15)) if n < 3 else index
            levels.append(b.add(level, _every(level, kind.first)) if kind.first else level)
            continue
        level = _looked_up(code, kind.levels or [kind.first + i for i in range(16)], index)
        if fifth is not None:
            where, bits = fifth[n]
            there = b.icmp_signed("!=", b.and_(where, ir.Constant(I16X32, bits)), zeros(I16X32))
            level = b.select(there, _looked_up(code, [kind.first + 16 + i for i in range(16)], index), level)
        levels.append(level)
    return levels


def _pairs(levels: list[Value], scales: list[Value], at: int) -> Iterator[_Term]:
    """Registers of lower codes and of upper ones, which have a scale each."""
    for n, scale in enumerate(scales):
        yield _Term(scale, at, [(levels[n], n), (levels[n + 2], n + 2)])


def _half(code: Code, at: Value) -> Value:
    return code.b.fpext(code.load(at, HALF), F32)


def _spread(code: Code, values: Value, lanes: list[int]) -> Value:
    return code.b.shuffle_vector(values, values, mask(lanes))


# --------------------------------------------------------------- blocks of 32 weights
Pick = Callable[[int, int], int]


def _chunk(code: Code, at: Value, nbytes: int) -> tuple[list[Value], Pick]:
    """`nbytes` of memory, 64 to 128, in two registers of words; where a block's word is found in them."""
    skipped = (nbytes - 64) // 2
    loads = [code.load(code.at(at, first), I16X32) for first in (0, nbytes - 64)]

    def find(block: int, word: int) -> int:
        place = block * nbytes // 8 + word
        return place if place < 32 else 32 + place - skipped

    return loads, find


def _half_chunks(code: Code, rows: list[Value], nbytes: int) -> tuple[list[Value], Pick]:
    """The same of two blocks of each of two rows, `nbytes` of 32 to 64."""
    skipped = (nbytes - 32) // 2
    loads = [joined(code, [code.load(code.at(at, first), I16X16) for at in rows]) for first in (0, nbytes - 32)]

    def find(block: int, word: int) -> int:
        row, place = block // 2, block % 2 * nbytes // 4 + word
        return 16 * row + (place if place < 16 else 32 + place - skipped)

    return loads, find


def _halves_of(code: Code, words: Value) -> Value:
    return code.b.fpext(code.b.bitcast(words, ir.VectorType(HALF, 16)), F32X16)


def _bf16_of_32(code: Code, kind: Kind, at: Value, halves: int) -> Iterator[_Term]:
    return _bf16_terms(code, kind, _chunk(code, at, 4 * kind.nbytes))


def _bf16_terms(code: Code, kind: Kind, there: tuple[list[Value], Pick]) -> Iterator[_Term]:
    """Four blocks, whose sums stand in four lanes each."""
    loads, find = there

    def of_blocks(byte: int, count: int, step: int = 0) -> Value:
        """`count` words of each block, from this byte on."""
        places = [find(n, byte // 2 + step * i) for n in range(4) for i in range(count)]
        return code.b.shuffle_vector(*loads, mask(places))

    fifth = None
    if kind.fifth is not None:
        low, high = of_blocks(kind.fifth, 8), of_blocks(kind.fifth + 2, 8)
        bits = [[1 << 2 * (i % 8) + odd for i in range(32)] for odd in (0, 1)]
        fifth = [(low, bits[0]), (high, bits[0]), (low, bits[1]), (high, bits[1])]
    levels = list(zip(_levels(code, kind, of_blocks(kind.codes, 8, 1), fifth), range(4), strict=True))
    yield _Term(_halves_of(code, of_blocks(0, 4)), levels=levels)
    if kind.least:
        yield _Term(_halves_of(code, of_blocks(2, 4)))


def _bf16_of_bytes(code: Code, kind: Kind, at: Value, halves: int) -> Iterator[_Term]:
    lower, upper = range(16), [16 * (i if i < 8 else i - 16) for i in range(16)]
    for n in range(halves):  # of two blocks each
        loads, _ = _chunk(code, code.at(at, 2 * n * kind.nbytes), 2 * kind.nbytes)
        words = code.b.shuffle_vector(*loads, mask([*range(1, 17), *range(18, 32), 62, 63]))
        tables, places = (lower, upper, lower, upper), (2 * n, 2 * n, 2 * n + 1, 2 * n + 1)
        each = zip(tables, _shifted(code, words), places, strict=True)
        levels = [(_looked_up(code, table, index), k) for table, index, k in each]
        scale = code.b.shuffle_vector(*loads, mask([0] * 8 + [17] * 8))
        yield _Term(_halves_of(code, scale), levels=levels)


def _two(code: Code, blocks: list[Value], byte: int) -> Value:
    """A scale of each of two blocks, four times."""
    first, second = (code.every(_half(code, code.at(block, byte)), 4) for block in blocks)
    return code.b.shuffle_vector(first, second, mask(range(8)))


def _int16_of_32(code: Code, kind: Kind, at: Value, halves: int) -> Iterator[_Term]:
    for n in range(halves):
        place, blocks = n * REGISTERS * 32, [code.at(at, (2 * n + i) * kind.nbytes) for i in (0, 1)]
        bytes_ = [code.load(code.at(block, kind.codes), ir.VectorType(I8, 16)) for block in blocks]
        levels = _levels(code, kind, code.b.bitcast(joined(code, bytes_), I16X16))
        yield _Term(_two(code, blocks, 0), place, list(zip(levels, range(4), strict=True)))
        if kind.least:
            yield _Term(_two(code, blocks, 2), place)


def _int16_of_bytes(code: Code, kind: Kind, at: Value, halves: int) -> Iterator[_Term]:
    b = code.b
    for n in range(2 * halves):
        block = code.at(at, n * kind.nbytes)
        words = code.load(code.at(block, kind.codes), I16X16)
        even, odd = (b.ashr(each, _every(words, 8)) for each in (b.shl(words, _every(words, 8)), words))
        first = 2 * (n % 2)
        levels = [(even, first), (odd, first + 1)]
        yield _Term(code.every(_half(code, block), 8), n // 2 * REGISTERS * 32, levels)


# -------------------------------------------------------------- blocks of 256 weights
def _scales_and_leasts(code: Code, at: Value) -> Value:
    """d times the eight scales of 6 bits and dmin times the eight minima, of the 12 bytes from the fifth on."""
    b, four = code.b, ir.VectorType(I32, 4)
    words = code.load(at, four)

    def part(which: list[int], shifts: list[int], bits: list[int]) -> Value:
        some = b.lshr(b.shuffle_vector(words, words, mask(which)), ir.Constant(four, shifts))
        return b.and_(some, ir.Constant(four, [each * 0x01010101 for each in bits]))

    lower = part([1, 3, 2, 3], [0, 0, 0, 4], [63, 15, 63, 15])
    both = b.or_(lower, part([1, 1, 2, 2], [0, 2, 0, 2], [0, 48, 0, 48]))
    numbers = b.uitofp(b.zext(b.bitcast(both, ir.VectorType(I8, 16)), ir.VectorType(I32, 16)), F32X16)
    factors = b.fpext(code.load(at, ir.VectorType(HALF, 2)), ir.VectorType(F32, 2))
    return b.fmul(numbers, b.shuffle_vector(factors, factors, mask([0] * 8 + [1] * 8)))


def _bf16_of_k(code: Code, kind: Kind, at: Value, halves: int) -> Iterator[_Term]:
    scales, bits = _scales_and_leasts(code, at), None
    if kind.fifth is not None:
        bits = _spread(code, code.load(code.at(at, kind.fifth), I16X16), [*range(16)] * 2)
    for chunk in (0, 1):
        place, fifth = chunk * REGISTERS * 64, None
        parts = [[4 * chunk + n] * 8 + [4 * chunk + 2 + n] * 8 for n in (0, 1)]
        if bits is not None:
            which = [[1 << 4 * chunk + 2 * (i // 16) + n % 2 + 8 * (n // 2) for i in range(32)] for n in range(4)]
            fifth = [(bits, each) for each in which]
        levels = _levels(code, kind, code.load(code.at(at, kind.codes + 64 * chunk), I16X32), fifth)
        yield from _pairs(levels, [_spread(code, scales, part) for part in parts], place)
        yield _Term(scales, place, sums=chunk)


def _int16_of_k(code: Code, kind: Kind, at: Value, halves: int) -> Iterator[_Term]:
    scales = _scales_and_leasts(code, at)
    for n in range(4):
        place = n * REGISTERS * 32
        levels = _levels(code, kind, code.load(code.at(at, kind.codes + 32 * n), I16X16))
        parts = [[2 * n + k] * 8 for k in (0, 1)]
        yield from _pairs(levels, [_spread(code, scales, part) for part in parts], place)
        for k, part in enumerate(parts):
            yield _Term(_spread(code, scales, [8 + each for each in part]), place, sums=k)


def _six_bits(code: Code, lower: Value, bits: Value, shifts: list[list[int]]) -> Iterator[Value]:
    """Codes of 6 bits: 4 from `lower`, shifted by 0, 4, 8 and 12, and 2 of `bits`, whose words are each shifted to the
    right by so much."""
    b = code.b
    for words, by in zip(_shifted(code, lower), shifts, strict=True):
        amount = ir.Constant(bits.type, [abs(n) for n in by])
        upper = b.shl(bits, amount) if by[0] < 0 else b.lshr(bits, amount)
        yield b.or_(b.and_(words, _every(words, 15)), b.and_(upper, _every(words, 48)))


def _q6_k_scales(code: Code, at: Value) -> Value:
    """d times the 16 scales."""
    numbers = code.b.sext(code.load(code.at(at, 192), ir.VectorType(I8, 16)), ir.VectorType(I32, 16))
    return code.b.fmul(code.b.sitofp(numbers, F32X16), code.every(_half(code, code.at(at, 208)), 16))


def _bf16_of_q6_k(code: Code, kind: Kind, at: Value, halves: int) -> Iterator[_Term]:
    tables = [_table([kind.first + 32 * n + i for i in range(32)]) for n in (0, 1)]
    scales = _q6_k_scales(code, at)
    for half in (0, 1):
        bits = _spread(code, code.load(code.at(at, 128 + 32 * half), I16X16), [*range(16)] * 2)
        shifts = [[first + 2 * (i // 16) for i in range(32)] for first in (-4, 0, 4, 8)]
        name, levels = "llvm.x86.avx512.vpermi2var.hi.512", []
        for index in _six_bits(code, code.load(code.at(at, 64 * half), I16X32), bits, shifts):
            levels.append(code.call(name, I16X32, tables[0], index, tables[1]))
        of_pairs = [_spread(code, scales, [8 * half + 4 * n + i // 4 for i in range(16)]) for n in (0, 1)]
        yield from _pairs(levels, of_pairs, half * REGISTERS * 64)


def _int16_of_q6_k(code: Code, kind: Kind, at: Value, halves: int) -> Iterator[_Term]:
    b, scales = code.b, _q6_k_scales(code, at)
    for n in range(4):
        half, quarter = divmod(n, 2)
        bits = code.load(code.at(at, 128 + 32 * half), I16X16)
        shifts = [[first + 2 * quarter] * 16 for first in (-4, 0, 4, 8)]
        lower = code.load(code.at(at, 64 * half + 32 * quarter), I16X16)
        levels = [b.add(each, _every(each, kind.first)) for each in _six_bits(code, lower, bits, shifts)]
        of_pairs = [_spread(code, scales, [8 * half + 2 * quarter + 4 * k + i // 4 for i in range(8)]) for k in (0, 1)]
        yield from _pairs(levels, of_pairs, n * REGISTERS * 32)


_OF = {
    (True, OF_32): _bf16_of_32, (True, OF_K): _bf16_of_k, (True, OF_Q6_K): _bf16_of_q6_k,
    (True, OF_BYTES): _bf16_of_bytes, (False, OF_32): _int16_of_32, (False, OF_K): _int16_of_k,
    (False, OF_Q6_K): _int16_of_q6_k, (False, OF_BYTES): _int16_of_bytes,
}  # fmt: skip
