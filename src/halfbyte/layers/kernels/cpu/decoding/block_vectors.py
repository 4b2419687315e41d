"""A vector x as products with a GGUF file's blocks read it: in the order in which codes are unpacked, with its sums.

What: what two codes of a byte are differs between types, so there are four orders; x is there in those that its
products ask for. 128 numbers are four registers of 64 bytes in bf16, and twice four of 32 bytes in whole numbers of 16
bits, up to 32,767, with a step for each 128. Beside them are sums of x by the lanes of a product's sums: a block's
minimum is multiplied by them (`block_rows.py`).
Cost: about 40 instructions for 128 numbers.
"""

from collections.abc import Iterator

import numpy as np
from llvmlite import ir

from halfbyte.layers.kernels.cpu.decoding.codes_bf16 import multiplied
from halfbyte.layers.kernels.cpu.decoding.codes_int16 import TINY, int16_dot, peak_of

from halfbyte.layers.kernels.cpu.decoding.emit import (  # isort: skip
    BF16X32, F32, F32X8, F32X16, I16, I16X16, I16X32, I32, I32X8, Code, emitted, mask, zeros,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.scalar import Value, inlined

CHUNK = 128  # numbers that an order is of
LARGEST = 32767  # in whole numbers
ORDERS = 4
OF_32, OF_K, OF_Q6_K, OF_BYTES = range(ORDERS)
# Registers of 128 numbers in bf16, of 64 in fp32: four of x, two of sums, one of the step; one is free.
REGISTERS = 8
SUMS_AT, STEP_AT = 4, 7
# Of each order: registers of x that are summed.
_SUMMED = {OF_32: ((0, 1, 2, 3),), OF_K: ((0, 2), (1, 3)), OF_Q6_K: (), OF_BYTES: ()}


def places(order: int, width: int) -> list[list[int]]:
    """Which of 128 numbers stand in each register of x, of `width` words: four registers after another, those of codes
    shifted by 0, 4, 8 and 12."""
    registers = []
    for first in range(0, CHUNK, 4 * width):
        for upper, odd in ((0, 0), (1, 0), (0, 1), (1, 1)):
            if order == OF_BYTES:  # of a register of bytes the even ones and the odd ones, then of the next
                registers.append([first + 2 * width * odd + 2 * i + upper for i in range(width)])
                continue
            half = {OF_32: 16, OF_K: 32, OF_Q6_K: 64}[order]  # from a byte's lower code to its upper one
            register = []
            for i in range(width):
                byte = first // 2 + 2 * i + odd
                register.append(byte // half * 2 * half + byte % half + upper * half)
            registers.append(register)
    return registers


@inlined
def ordered_row(width):  # type: ignore[no-untyped-def]
    """Bytes of a vector in an order; `width` is a multiple of CHUNK."""
    return width // CHUNK * REGISTERS * 64


def joined(code: Code, registers: list[Value]) -> Value:
    """Registers side by side."""
    while len(registers) > 1:
        count = registers[0].type.count
        pairs = zip(registers[::2], registers[1::2], strict=True)
        registers = [code.b.shuffle_vector(a, b, mask(range(2 * count))) for a, b in pairs]
    return registers[0]


@emitted("x order chunks out")
def order_blocks(code: Code, args: Value) -> None:
    """Chunks of 128 numbers in fp32 -> in an order, with their sums."""
    with code.rolled(args.chunks) as c:
        x, out = code.at(args.x, (c, 4 * CHUNK)), code.at(args.out, (c, 64 * REGISTERS))
        words, step = _bf16_words(code, x) if code.is_bf16 else _int16_words(code, x)
        width, size = (32, 64) if code.is_bf16 else (16, 32)
        for order in code.cases(args.order, range(ORDERS)):
            ordered = [code.b.shuffle_vector(words, words, mask(each)) for each in places(order, width)]
            for n in range(0, len(ordered), 4):
                at = code.at(out, n // 4 * REGISTERS * size)
                for k, register in enumerate(ordered[n : n + 4]):
                    code.store(register, code.at(at, size * k))
                for k, total in enumerate(_sums(code, order, ordered[n : n + 4])):
                    code.store(total, code.at(at, size * (SUMS_AT + k)))
                code.store(code.every(step, size // 4), code.at(at, size * STEP_AT))


def _bf16_words(code: Code, x: Value) -> tuple[Value, Value]:
    numbers = [code.load(code.at(x, 64 * k), F32X16) for k in range(8)]
    pairs = zip(numbers[::2], numbers[1::2], strict=True)
    words = [code.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", BF16X32, high, low) for low, high in pairs]
    return joined(code, [code.b.bitcast(each, I16X32) for each in words]), F32(1.0)


def _int16_words(code: Code, x: Value) -> tuple[Value, Value]:
    b = code.b
    parts = [code.load(code.at(x, 32 * k), F32X8) for k in range(16)]
    peak = peak_of(code, parts)
    tiny = b.fcmp_ordered("<", peak, F32(TINY))
    factor = code.every(b.select(tiny, F32(0.0), b.fdiv(F32(float(LARGEST)), peak)), 8)
    whole = [code.call("llvm.x86.avx.cvt.ps2dq.256", I32X8, b.fmul(part, factor)) for part in parts]
    step = b.select(tiny, F32(0.0), b.fmul(peak, F32(float(np.float32(1 / LARGEST)))))
    return joined(code, [b.trunc(each, ir.VectorType(I16, 8)) for each in whole]), step


def _sums(code: Code, order: int, x: list[Value]) -> Iterator[Value]:
    """What minima are multiplied by, by lanes; of blocks of 256 weights less than 0, as these are subtracted. There in
    bf16: of each half of a block its four parts' sums, where their minima stand beside the scales."""
    b, sums = code.b, [_sum(code, [x[i] for i in which]) for which in _SUMMED[order]]
    if order != OF_K:
        yield from sums
        return
    sums = [b.fneg(each) for each in sums]
    if not code.is_bf16:
        yield from sums
        return
    of_parts = [
        code.total(b.shuffle_vector(sums[n % 2], sums[n % 2], mask(range(8 * (n // 2), 8 * (n // 2) + 8))))
        for n in range(4)
    ]
    for half in (0, 1):
        register = zeros(F32X16)
        for n, total in enumerate(of_parts):
            register = b.insert_element(register, total, I32(8 + 4 * half + n))
        yield register


def _sum(code: Code, registers: list[Value]) -> Value:
    """Of neighbours and of registers, in fp32."""
    if code.is_bf16:
        ones, total = ir.Constant(I16X32, [0x3F80] * 32), zeros(F32X16)
        for register in registers:
            total = multiplied(code, total, ones, register)
        return total
    ones, whole = ir.Constant(I16X16, [1] * 16), zeros(I32X8)
    for register in registers:
        whole = code.b.add(whole, int16_dot(code, ones, register))
    return code.b.sitofp(whole, F32X8)
