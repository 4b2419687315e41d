"""Rows of 4-bit codes times vectors in bf16, for processors with AMX: sixteen vectors at the price of a few.

Why: with several texts a step waits for products, and a tile of AMX multiplies 16 rows of 32 weights with 16 vectors in
one instruction, where `codes_bf16.py` multiplies 32 weights with one.
What: 16 rows at a time, AT_ONCE blocks of 64 weights at a time. Codes are looked up (`vpermw`) into memory that stays
in the first cache and is read from there as tiles. A block's products are summed in a tile of their own, in fp32; its
rows times their scales are added to 16 totals. The vectors lie in pairs, as AMX reads a right side: 32 bits are two
numbers of a vector, neighbours are the same two of other vectors. LoRA's B is multiplied as a tile too.
The products are the same to the bit whatever stands beside a vector, and however many vectors there are.
Error: levels are rounded to bf16, which moves each by at most 2^-9 of itself; products and sums are fp32, where what is
below 2^-126 counts as zero.
Source: TDPBF16PS, VPERMW in Intel's SDM volume 2; the order is ours.
Cost: of 1,024 weights 112 instructions to look up, 2 products of tiles, 16 registers of sums.
"""

from collections.abc import Callable
from functools import partial

from llvmlite import ir

from halfbyte.layers.kernels.cpu.decoding.code_tables import BLOCK
from halfbyte.layers.kernels.cpu.decoding.codes_bf16 import finish, rounded_pair

from halfbyte.layers.kernels.cpu.decoding.emit import (  # isort: skip
    BF16, F32, F32X16, I16X16, I16X32, I32, I32X16, I64, Code, emitted, mask, zeros,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.scalar import Value, inlined
from halfbyte.layers.kernels.cpu.tiles import AMX_HALF, AMX_LEFT, amx_call

ROWS = 16
MOST_VECTORS = 16
AT_ONCE = 2
PAIRS_BLOCKS = 2  # of vectors that a thread puts in pairs at once
PIECE_PAIRS = 8  # of LoRA's ranks, which come in pieces of 16
_TILE, _LINE = 1024, 64  # bytes
_AHEAD = 24576  # bytes of codes, that are asked for before they are needed
_NARROW = 4  # bytes of a pair of one vector
_RIGHT = 5  # an AMX register; the first AT_ONCE are sums
# Scratch: of two groups of blocks their levels, two tiles each, and scales (AT_ONCE, 16); sums; LoRA's A x in pairs.
_GROUP = 2 * AT_ONCE * _TILE + 4 * AT_ONCE * ROWS
_SUMS = 2 * _GROUP
H_PAIRS = _SUMS + AT_ONCE * _TILE
# The order of a block's numbers: of every four in turn the second, first, fourth and third, as their codes come.
_ORDER = [4 * i + place for place in (1, 0, 3, 2) for i in range(16)]
_SHIFTS = [ir.Constant(I16X32, [low] * 16 + [low + 4] * 16) for low in (0, 8)]


@inlined
def pair_bytes(vectors):  # type: ignore[no-untyped-def]
    """From a pair of numbers of all vectors to the next: whole parts of a line."""
    columns = 1
    while columns < vectors:
        columns *= 2
    return 4 * columns


def ordered_bytes(vectors: int, width: int) -> int:
    """Bytes of vectors (M, D') in pairs: with what a tile reads behind the last one."""
    return width // 2 * int(pair_bytes.py_func(vectors)) + _LINE


def scratch_bytes(vectors: int, ranks: int) -> int:
    """Memory of a thread, with what aligns it and what a tile reads behind the last one."""
    return H_PAIRS + ranks // 2 * int(pair_bytes.py_func(vectors)) + 2 * _LINE


@emitted("x x_row vectors blocks out pair_bytes", only=BF16)
def order_vectors(code: Code, args: Value) -> None:
    """Blocks of 64 numbers of vectors, `x_row` bytes apart, in fp32 -> in bf16, in pairs."""
    b, row = code.b, args.pair_bytes
    with code.rolled(args.blocks) as c:
        x, out = code.at(args.x, (c, 4 * BLOCK)), code.at(args.out, (b.mul(c, I64(BLOCK // 2)), row))
        with b.if_else(b.icmp_signed("==", row, I64(_NARROW))) as (then, otherwise):
            with then:
                for n in (0, 1):
                    code.store(_ordered(code, x, n), code.at(out, _LINE * n))
            with otherwise, code.rolled(b.lshr(code.at(args.vectors, MOST_VECTORS - 1), I64(4))) as sixteen:
                first = b.shl(sixteen, I64(4))
                there, last = code.row_mask(b.sub(args.vectors, first), MOST_VECTORS), b.sub(args.vectors, I64(1))
                places = [code.at(first, m) for m in range(MOST_VECTORS)]
                places = [b.select(b.icmp_signed("<", place, last), place, last) for place in places]
                for n in (0, 1):
                    columns = [_ordered(code, code.at(x, (place, args.x_row)), n) for place in places]
                    for p, pair in enumerate(code.turned_16(columns)):
                        code.masked_store(pair, code.at(out, (row, 16 * n + p), (sixteen, _LINE)), there)


def _ordered(code: Code, x: Value, n: int) -> Value:
    """Half of a block of a vector in bf16, in order, as 16 pairs."""
    numbers = [code.load(code.at(x, _LINE * k), F32X16) for k in range(4)]
    words = [rounded_pair(code, *two) for two in zip(numbers[::2], numbers[1::2], strict=True)]
    return code.b.bitcast(code.b.shuffle_vector(*words, mask(_ORDER[32 * n : 32 * n + 32])), I32X16)


@emitted("h h_row vectors pieces pair_bytes out", only=BF16)
def order_lora(code: Code, args: Value) -> None:
    """A x of each vector, in pieces of 32 bytes -> in pairs."""
    with code.rolled(args.vectors) as m, code.rolled(code.b.mul(args.pieces, I64(PIECE_PAIRS))) as p:
        pair = code.load(code.at(args.h, (m, args.h_row), (p, 4)), I32)
        code.store(pair, code.at(args.out, (p, args.pair_bytes), (m, 4)))


@emitted("w rows blocks vectors x pair_bytes scales table up up_row h pieces scratch bias add out out_row", only=BF16)
def rows_times_vectors(code: Code, args: Value) -> None:
    """Up to 16 rows of codes times up to 16 vectors -> or, where `add` is not 0, onto `out`, in fp32.

    w, rows, blocks: codes of rows, blocks of a row. x, pair_bytes: vectors in pairs. scales: (rows, blocks) fp32.
    table: `bf16_levels`. up, up_row: LoRA's B, whole 16 rows, bytes of a row; h: A x in pairs; pieces of both. scratch:
    `scratch_bytes`, aligned. bias: fp32, or 0. out, out_row: of the first vector, bytes to the next.
    """
    with code.b.if_else(code.b.icmp_signed("==", args.pair_bytes, I64(_NARROW))) as (then, otherwise):
        with then:  # registers are laid out for one vector: a tile's sums are then a register
            (sums,) = _totals(code, args, 1)
            finish(code, sums, args, args.out)
        with otherwise:
            for m, sums in enumerate(code.turned_16(_totals(code, args, ROWS))):
                with code.b.if_then(code.b.icmp_signed("<", I64(m), args.vectors)):
                    finish(code, sums, args, code.at(args.out, (args.out_row, m)))


def _totals(code: Code, args: Value, count: int) -> list[Value]:
    """Sums of 16 rows: a register of vectors for each, or where `count` is 1 a register of rows. While blocks are
    multiplied the next ones are looked up, row by row: a core looks a few hundred instructions ahead, not further."""
    b, totals = code.b, code.variables(F32X16, count)
    args.levels, args.sums = code.load(args.table, I16X32), args.scratch
    args.sums_row = I64(_LINE if count > 1 else _NARROW)
    for r in range(ROWS):
        _look_up(code, args, r, I64(0))
    groups = b.lshr(code.at(args.blocks, AT_ONCE - 1), I64(AT_ONCE.bit_length() - 1))
    with code.rolled(groups) as group:
        following = code.at(group, 1)
        with b.if_else(b.icmp_signed("<", following, groups)) as (then, otherwise):
            for branch, is_last in ((then, False), (otherwise, True)):
                with branch:
                    for r, multiply in enumerate(_products(code, args, group)):
                        if not is_last and r < ROWS:
                            _look_up(code, args, r, following)
                        multiply()
        scales = code.at(_half(code, args, group), 2 * AT_ONCE * _TILE)
        for q in range(AT_ONCE):
            for r, total in enumerate(totals):
                at = code.at(scales, 4 * (ROWS * q + r))
                factor = code.every(code.load(at, F32), 16) if count > 1 else code.load(at, F32X16)
                b.store(code.fma(_sums_of(code, args, q, r), factor, b.load(total)), total)
    with code.when(args.pieces):
        _lora(code, args)
        for r, total in enumerate(totals):
            b.store(b.fadd(b.load(total), _sums_of(code, args, 0, r)), total)
    return [b.load(total) for total in totals]


def _half(code: Code, args: Value, group: Value) -> Value:
    """The part of scratch where a group of blocks lies, in turns."""
    return code.at(args.scratch, (code.b.and_(group, I64(1)), _GROUP))


def _sums_of(code: Code, args: Value, q: int, r: int) -> Value:
    return code.load(code.at(args.scratch, _SUMS + _TILE * q + _LINE * r), F32X16)


def _look_up(code: Code, args: Value, r: int, group: Value) -> None:
    """A group's blocks of row r as levels and scales in scratch: of a row that is not there, those of the last; of a
    block, the last once more, with 0 as its scale."""
    b, to = code.b, code.at(_half(code, args, group), _LINE * r)
    row, last = (b.sub(n, I64(1)) for n in (args.rows, args.blocks))
    row = b.select(b.icmp_signed("<", I64(r), row), I64(r), row)
    for q in range(AT_ONCE):
        block = code.at(b.mul(group, I64(AT_ONCE)), q)
        is_there = b.icmp_signed("<=", block, last)
        at = b.add(b.mul(row, args.blocks), b.select(is_there, block, last))
        words = code.load(code.at(args.w, (at, BLOCK // 2)), I16X16)
        words = b.shuffle_vector(words, zeros(I16X16), mask([*range(16)] * 2))
        for n, shift in enumerate(_SHIFTS):
            levels = code.call("llvm.x86.avx512.permvar.hi.512", I16X32, args.levels, b.lshr(words, shift))
            code.store(levels, code.at(to, _TILE * (2 * q + n)))
        scale = b.select(is_there, code.load(code.at(args.scales, (at, 4)), F32), F32(0.0))
        code.store(scale, code.at(_half(code, args, group), 2 * AT_ONCE * _TILE + 4 * (ROWS * q + r)))
    code.prefetch(code.at(args.w, _AHEAD + _LINE * r, (group, ROWS * AT_ONCE * BLOCK // 2)))


def _products(code: Code, args: Value, group: Value) -> list[Callable[[], None]]:
    """A group's levels in scratch times the vectors -> a tile of sums for each block, in steps."""
    steps = list[Callable[[], None]]()
    half = _half(code, args, group)
    first = code.b.mul(group, I64(AT_ONCE * BLOCK // 2))
    for n in (0, 1):
        for q in range(AT_ONCE):
            left = partial(move, code, "tileloadd64", AMX_LEFT, code.at(half, _TILE * (2 * q + n)), I64(_LINE))
            pairs = code.at(args.x, (code.at(first, BLOCK // 2 * q + 16 * n), args.pair_bytes))
            right = partial(move, code, "tileloadd64", _RIGHT, pairs, args.pair_bytes)
            if n == 0:
                steps.append(partial(amx_call, code.b, "tilezero", q))
            steps += [left, right, partial(amx_call, code.b, "tdpbf16ps", q, AMX_LEFT, _RIGHT)]
    to = [code.at(args.scratch, _SUMS + _TILE * q) for q in range(AT_ONCE)]
    return steps + [partial(move, code, "tilestored64", q, at, args.sums_row) for q, at in enumerate(to)]


def _lora(code: Code, args: Value) -> None:
    """LoRA's B times A x -> the first tile of sums."""
    left, right = AMX_HALF
    amx_call(code.b, "tilezero", 0)
    with code.rolled(args.pieces) as n:
        move(code, "tileloadd64", left, code.at(args.up, (n, 4 * PIECE_PAIRS)), args.up_row)
        pairs = code.at(args.h, (code.b.mul(n, I64(PIECE_PAIRS)), args.pair_bytes))
        move(code, "tileloadd64", right, pairs, args.pair_bytes)
        amx_call(code.b, "tdpbf16ps", 0, left, right)
    move(code, "tilestored64", 0, code.at(args.scratch, _SUMS), args.sums_row)


def move(code: Code, name: str, register: int, at: Value, row: Value) -> None:
    amx_call(code.b, name, register, code.b.inttoptr(at, ir.IntType(8).as_pointer()), row)
