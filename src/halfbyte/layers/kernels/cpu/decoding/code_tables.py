"""4-bit codes and their scales, looked up: tables of levels for the kernels, and scales of blocks.

What: blocks of 64 weights, two codes a byte, the earlier in the upper half. A scale is fp32, or a byte: a number of a
table of 256 times an outer scale of each 256 blocks, and an offset. In bf16 the table is four planes of bytes in
registers, 64 scales at once; in fp32 it is multiplied out once for each outer scale.
Source: bitsandbytes' double quantisation; VPERMI2B in Intel's SDM volume 2.
"""

import numpy as np
from numba.core import cgutils

from halfbyte.layers.kernels.cpu import tiles

from halfbyte.layers.kernels.cpu.decoding.emit import (  # isort: skip
    BF16, F32, F32X8, F32X16, FP32, I8, I8X64, I16X16, I32, I64, Code, emitted, mask, zeros,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.scalar import Value

BLOCK = 64  # weights of a scale
GROUP = 256  # blocks that have one outer scale, and numbers that a scale of 8 bits stands for
LEVEL = 4096  # the largest level in whole numbers


def has_planes() -> bool:
    """Whether the processor that numba compiles for looks bytes up in tables of 256."""
    return tiles.available() and tiles.has("avx512vbmi")


def bf16_levels(levels: np.ndarray) -> np.ndarray:
    """16 levels as `codes_bf16` looks them up: 32 words of bf16."""
    bits = levels.astype(np.float32).view(np.uint32)
    words = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest even
    return np.concatenate([words, words]).view(np.uint8)


def int16_levels(levels: np.ndarray) -> np.ndarray:
    """16 levels as `codes_int16` looks them up: whole numbers, in two planes of 32 bytes, the lower and the upper."""
    words = np.rint(levels.astype(np.float64) * LEVEL).astype(np.int16).view(np.uint16)
    low, high = (words & 0xFF).astype(np.uint8), (words >> 8).astype(np.uint8)
    return np.concatenate([low, low, high, high])


def planes(table: np.ndarray) -> np.ndarray:
    """A table of 256 numbers in fp32, (256,) -> (4, 256) bytes: the first of each, the second, ..."""
    return table.view(np.uint8).reshape(256, 4).T.copy()


@emitted("at planes outer offset:f first last out", only=BF16)
def scales_of_planes(code: Code, args: Value) -> None:
    """Scales of blocks first .. last -> out, which begins with the one before `first` that is a multiple of 64.

    at: a byte for each block. planes: (4, 256), see `planes`. outer: fp32, for each 256 blocks. out: fp32, for whole
    64. A scale is planes[byte] * outer[block / 256] + offset.
    """
    if not has_planes():
        return
    b = code.b
    start = b.and_(args.first, I64(-64))
    tables = [[code.load(code.at(args.planes, 256 * p + 64 * k), I8X64) for k in range(4)] for p in range(4)]
    offset = code.every(args.offset, 16)
    with code.rolled(b.lshr(code.at(b.sub(args.last, start), 63), I64(6))) as n:
        block = code.at(start, (n, 64))
        index = code.masked_load(code.at(args.at, block), I8X64, code.row_mask(b.sub(args.last, block), 64))
        outer = code.every(code.load(code.at(args.outer, (b.lshr(block, I64(8)), 4)), F32), 16)
        chosen = [_chosen(code, table, index) for table in tables]
        for k, values in enumerate(_floats(code, chosen)):
            code.store(code.fma(values, outer, offset), code.at(args.out, (n, 256), 64 * k))


def _chosen(code: Code, table: list[Value], index: Value) -> Value:
    """64 bytes of a table of 256, which is four registers."""
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    halves = [code.call(name, I8X64, table[k], index, table[k + 1]) for k in (0, 2)]
    return code.b.select(code.b.icmp_signed("<", index, zeros(I8X64)), halves[1], halves[0])


def _floats(code: Code, planes: list[Value]) -> list[Value]:
    """Four registers of 64 bytes -> 64 numbers of four bytes each, in four registers."""
    b, registers = code.b, []
    for k in range(4):
        places = [16 * k + i + 64 * side for i in range(16) for side in (0, 1)]
        pairs = [b.bitcast(b.shuffle_vector(planes[p], planes[p + 1], mask(places)), I16X16) for p in (0, 2)]
        words = b.shuffle_vector(pairs[0], pairs[1], mask([i + 16 * side for i in range(16) for side in (0, 1)]))
        registers.append(b.bitcast(words, F32X16))
    return registers


@emitted("table outer offset:f group groups out")
def lookups(code: Code, args: Value) -> None:
    """out[g, j] = table[j] * outer[group + g] + offset, j < 256. Written here since an index into an array of numba's
    may be negative, which keeps a loop from being vectorised."""
    with cgutils.for_range(code.b, args.groups, intp=I64) as loop:
        outer = code.every(code.load(code.at(args.outer, (args.group, 4), (loop.index, 4)), F32), 8)
        for j in range(0, 4 * GROUP, 32):
            values = code.fma(code.load(code.at(args.table, j), F32X8), outer, code.every(args.offset, 8))
            code.store(values, code.at(args.out, (loop.index, 4 * GROUP), j))


@emitted("at lookup first blocks rows out", only=FP32)
def scales_of_8_rows(code: Code, args: Value) -> None:
    """The scales of up to eight rows' blocks -> out (blocks, 8) in fp32; of rows that are not there any. at: scales of
    the first row, fp32; or where `lookup` is not 0, bytes: block n's is lookup[(first + n) / 256][byte]."""
    b, last = code.b, code.b.sub(args.rows, I64(1))
    starts = [b.mul(args.blocks, b.select(b.icmp_signed("<", I64(i), last), I64(i), last)) for i in range(8)]

    def write(nested: bool) -> None:
        with code.rolled(args.blocks) as c:
            for i, start in enumerate(starts):
                n = code.at(c, start)
                if nested:
                    index = b.zext(code.load(code.at(args.at, n), I8), I64)
                    group = b.lshr(b.add(args.first, n), I64(8))
                    scale = code.load(code.at(args.lookup, (group, 1024), (index, 4)), I32)
                else:
                    scale = code.load(code.at(args.at, (n, 4)), I32)
                code.store(scale, code.at(args.out, (c, 32), 4 * i))

    with b.if_else(b.icmp_signed("!=", args.lookup, I64(0))) as (then, otherwise):
        with then:
            write(True)
        with otherwise:
            write(False)
