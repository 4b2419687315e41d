"""Sums of integer products scaled onto a result, with LoRA's part made where they are: y = drop(s L R) + sums x steps.

Why: as a product of its own, LoRA's part of a result is written to memory whole, and read again to be added to.
What: a thread multiplies a few rows of L with some columns of R in registers (`tiles.py`), rounds and drops them in its
cache as LoRA's own products do, and adds the sums: the same bits as by `lora.up`, or a library's product, and `onto`.
Source: LoRA, arXiv:2106.09685 section 4.1; the mask is `gate.py`'s.
Cost: N R D multiplications; sums are read and the result is written once.

Letters: N rows, R rank, D columns; a word is two neighbours of 16 bits.
"""

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from torch import Tensor

from halfbyte.layers.kernels.cpu import gate, tiles
from halfbyte.layers.kernels.cpu.integer.rounding import LANES
from halfbyte.layers.kernels.cpu.lora.common import mask_of
from halfbyte.layers.kernels.cpu.parallel import array, each_block, kernel, run
from halfbyte.layers.kernels.cpu.scalar import Value, broadcast, call, hash_u32, hash_words, inlined, instruction
from halfbyte.layers.kernels.cpu.tiles import COLUMNS, ROWS, BFloat, rows_into, tile
from halfbyte.layers.kernels.dropout import LoraPart

_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_FLOATS, _WORDS = (ir.VectorType(element, LANES) for element in (ir.FloatType(), _I32))
_PAIRS = ir.VectorType(BFloat(), 2 * LANES)
AT_ONCE = 6 * COLUMNS  # columns of a result that are made at once
TAKEN = 4 * ROWS  # rows that a thread takes at once

if not tiles.available():  # LLVM ends the process where it meets an instruction that the processor lacks
    raise ImportError("these kernels multiply pairs of bf16, which this processor does not (avx512_bf16)")


def _words(number: int) -> Value:
    """A register with this number in each of its 16 words."""
    return ir.Constant(_WORDS, [number] * LANES)


def _two(b: Value, at: Value, kind: Value) -> list[Value]:
    """Two registers of 16 numbers, from an address on."""
    places = (b.inttoptr(b.add(at, _I64(64 * k)), kind.as_pointer()) for k in range(2))
    return [b.load(place, align=4) for place in places]


@instruction(
    types.void, types.int64, types.float32, *[types.uint32] * 3, types.int64, types.float32, *[types.int64] * 3
)
def _finish(
    b: Value, product: Value, scale: Value, low: Value, start: Value, seed: Value, sums: Value, row: Value,
    columns: Value, y: Value, count: Value,
) -> None:  # fmt: skip
    """y = drop(bf16(product x scale)) + sums x row x columns as bf16, for `count` columns, whole tiles of them.

    Args: addresses of fp32, int32, fp32 (0 for none) and bf16; low: 0 for no mask; start: number of the first word of
        a mask of this seed.
    """

    bits = ir.VectorType(_I16, COLUMNS)
    by, steps, words_seed = (broadcast(b, each, LANES) for each in (scale, row, seed))
    least, lanes = broadcast(b, b.trunc(low, _I16), COLUMNS), ir.Constant(_WORDS, list(range(LANES)))

    def packed(two: list[Value]) -> Value:  # to nearest even, in one instruction; below 2^-126 it gives 0
        return b.bitcast(call(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _PAIRS, two[1], two[0]), bits)

    def body(first: Value, *, masked: bool, across: bool) -> None:
        four = b.mul(first, _I64(4))
        small = packed([b.fmul(each, by) for each in _two(b, b.add(product, four), _FLOATS)])
        if masked:
            word = b.add(start, b.trunc(b.lshr(first, _I64(1)), _I32))
            drawn = hash_words(b, b.xor(b.add(broadcast(b, word, LANES), lanes), words_seed), _words)
            keep = b.icmp_unsigned(">=", b.bitcast(drawn, bits), least)
            small = b.select(keep, small, ir.Constant(bits, None))
        results, times = [], _two(b, b.add(columns, four), _FLOATS) if across else None
        for k, sum_ in enumerate(_two(b, b.add(sums, four), _WORDS)):
            here = ir.Constant(_WORDS, list(range(LANES * k, LANES * (k + 1))))
            upper = b.zext(b.shuffle_vector(small, ir.Constant(bits, ir.Undefined), here), _WORDS)
            lora = b.bitcast(b.shl(upper, _words(16)), _FLOATS)
            step = b.fmul(steps, times[k]) if times else steps
            results.append(call(b, "llvm.fma.v16f32", _FLOATS, b.sitofp(sum_, _FLOATS), step, lora))
        b.store(packed(results), b.inttoptr(b.add(y, b.mul(first, _I64(2))), bits.as_pointer()), align=2)

    def loop(*, masked: bool, across: bool) -> None:
        with cgutils.for_range(b, b.lshr(count, _I64(5)), intp=_I64) as each:
            body(b.mul(each.index, _I64(COLUMNS)), masked=masked, across=across)

    with b.if_else(b.icmp_signed("!=", low, _I32(0))) as (dropped, whole):
        for branch, masked in ((dropped, True), (whole, False)):
            with branch, b.if_else(b.icmp_signed("!=", columns, _I64(0))) as (scaled, even):
                with scaled:
                    loop(masked=masked, across=True)
                with even:
                    loop(masked=masked, across=False)


@inlined
def _part(left, right, y, sums, rows, columns, width, scale, low, seed, keys, before, first, last):  # type: ignore[no-untyped-def]
    pairs, product = left.shape[1], np.empty(ROWS * AT_ONCE, np.float32)
    here = np.zeros(ROWS * pairs, np.uint32)
    for i in range(first, last, ROWS):
        many = min(ROWS, last - i)
        rows_into(here, left, i, many)
        for c in range(0, width, AT_ONCE):
            wide = min(AT_ONCE, width - c)
            for j in range(0, wide, COLUMNS):
                tile(product[j:], AT_ONCE, here, pairs, 1, right[c + j :], width, pairs, 0)
            for k in range(many):
                row = before + i + k
                if keys.shape[0] > 0:
                    start, row_seed = np.uint32(c // 2), hash_u32(keys[row] ^ seed)
                else:
                    start, row_seed = np.uint32((row * width + c) // 2), seed
                at, across = (i + k) * width + c, columns + c * 4 if columns != 0 else 0
                one = product.ctypes.data + k * AT_ONCE * 4
                _finish(one, scale, low, start, row_seed, sums + at * 4, rows[i + k], across, y + at * 2, wide)


@kernel
def lora_onto(p):  # type: ignore[no-untyped-def]
    s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
    width, pairs = s[9], s[10]
    rows, keys = array(s[5], (s[1],), np.float32), array(s[14], (s[15],), np.uint32)
    left, right = array(s[7], (s[1], pairs), np.uint32), array(s[8], (pairs * width,), np.uint32)
    low, seed = np.uint32(s[12]), np.uint32(s[13])
    each_block(s, _part, (left, right, s[3], s[4], rows, s[6], width, np.float32(f[11]), low, seed, keys, s[16]))


def pairs(right: Tensor) -> Tensor:
    """(R, D) bf16 -> (R / 2, D) words, of each column's neighbours."""
    if right.stride(0) == 1:
        return right.T.contiguous().view(torch.int32).T.contiguous()
    rank, width = right.shape
    return right.contiguous().view(rank // 2, 2, width).transpose(1, 2).contiguous().view(torch.int32)


def onto(
    y: Tensor, sums: Tensor, row_steps: Tensor, column_steps: Tensor | None, lora: LoraPart, right: Tensor, first: int
) -> None:
    """y = LoRA's part + sums x steps of their row and column, rounded once more.

    Args:
        y: (N, D) bf16, contiguous, rows from `first` on of the result. sums: (N, D) int32. row_steps: (N,) fp32.
        column_steps: (D,) fp32 or None. lora: of all rows of the result. right: its `pairs`.
    """
    n, d = y.shape
    left = lora.left[first : first + n].contiguous()
    across = 0 if column_steps is None else column_steps
    mask, keys = mask_of(lora.p, lora.seed)
    given = (y, sums, row_steps, across, left, right, d, left.shape[1] // 2, float(lora.scale))
    run(lora_onto, n, TAKEN, *given, *mask, keys, first)


def fault() -> str | None:
    """What this gets wrong on this machine, seen once beside torch's products; None where nothing is."""
    draw = torch.Generator().manual_seed(0)
    n, d = ROWS + 5, AT_ONCE + COLUMNS
    r, first = 6, 7
    left, right = (torch.randn(s, generator=draw).bfloat16() for s in ((first + n, r), (r, d)))
    sums = torch.randint(-(10**6), 10**6, (n, d), generator=draw, dtype=torch.int32)
    rows, columns = torch.rand(n, generator=draw) * 1e-6, torch.rand(d, generator=draw)
    mask, ones = torch.empty(first + n, d, dtype=torch.bfloat16), torch.ones(first + n, d, dtype=torch.bfloat16)
    gate.drop(ones, mask, 0.5, 7)
    for lora, by in ((LoraPart(left, right, 0.5), columns), (LoraPart(left, right, 1.0, 0.5, 7), None)):
        y = torch.empty(n, d, dtype=torch.bfloat16)
        onto(y, sums, rows, by, lora, pairs(right), first)
        wanted = (lora.scale * (left.float() @ right.float()) * (mask.float() if lora.p else 1))[first:]
        wanted = wanted + sums * rows[:, None] * (1.0 if by is None else by)
        # two roundings to bf16, the first of LoRA's part alone
        most = 2**-8 * (wanted.abs() + 2 * (wanted - sums * rows[:, None] * (1.0 if by is None else by)).abs()) + 1e-4
        if not bool(((y.float() - wanted).abs() <= most).all()):
            return "LoRA's part added to integer sums is wrong"
    return None
