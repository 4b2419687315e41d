"""A frozen weight from its 4-bit codes into 8-bit integers, in one pass: decoded, mixed and rounded in a core's cache.

Why: dequantised to memory first and then rounded, a weight is written and read twice more than it has to be, and in
pieces that stay in a cache the calls cost as much as the arithmetic: half of what is around 7B's products.
What: the same numbers to the bit. A thread decodes a row (`rows`), or 16 rows (`groups`), into fp32: the 16 values of a
block's codes are multiplied with its scale and rounded to the weight's dtype once, and a number is then one permutation
of a register. What follows is `rounding.py`'s.
Source: QLoRA, arXiv:2305.14314, for the codes: two a byte, the earlier in the upper half.
Cost: half a byte read and one written a number; about 25 instructions for 16 of them.
"""

import numpy as np
import torch
from numba import carray
from torch import Tensor

from halfbyte.layers.kernels.cpu.integer import rounding

from halfbyte.layers.kernels.cpu.integer.rounding import (  # isort: skip
    MOST, Int8Matrix, decoded_groups, decoded_rows, mirrors_thirds, padded_width, registers_mixed,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.parallel import array, block_rows, each_block, kernel, run
from halfbyte.layers.kernels.cpu.scalar import inlined
from halfbyte.quant import dequantise
from halfbyte.quant.four_bit_cpu import LANES, decode, nested_of, scales_of
from halfbyte.quant.number_format import Codes, Nested


@inlined
def _row(how, row, to, width, row_scales):  # type: ignore[no-untyped-def]
    codes, scales, nested, table, block, bf16 = how
    scales_of(scales, nested, row * width // block, width // block, row_scales)
    decode(codes + row * width // 2, row_scales, table, to, width // block, block // LANES, bf16)


@inlined
def _rows(how, q, steps, width, count, thirds, share, first, last):  # type: ignore[no-untyped-def]
    decoded_rows(_row, how, q, steps, width, count, thirds, share, first, last)


@inlined
def _groups(how, q, steps, width, rows, share, first, last):  # type: ignore[no-untyped-def]
    decoded_groups(_row, how, q, steps, width, rows, share, first, last)


@kernel
def decode_rows(p):  # type: ignore[no-untyped-def]
    s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
    steps, share = array(s[7], (s[1],), np.float32), np.float32(f[13])
    nested = (s[14], s[15], s[16], np.float32(f[17]))
    how = (s[3], s[4], nested, s[5], s[9], s[10])
    each_block(s, _rows, (how, s[6], steps, s[8], s[11], s[12], share))


@kernel
def decode_groups(p):  # type: ignore[no-untyped-def]
    s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
    steps, share = array(s[7], (s[1] * MOST,), np.float32), np.float32(f[12])
    nested = (s[13], s[14], s[15], np.float32(f[16]))
    how = (s[3], s[4], nested, s[5], s[9], s[10])
    each_block(s, _groups, (how, s[6], steps, s[8], s[11], share))


def _given(codes: Codes, out: Int8Matrix) -> tuple[tuple[Tensor | int, ...], tuple[Tensor | int | float, ...]]:
    """What both kernels take: first codes, where to and sizes; then what says of scales that are nested."""
    first = (codes.packed, codes.scales, codes.values, *out, codes.shape[1], codes.block)
    return (*first, int(codes.dtype == torch.bfloat16)), nested_of(codes)


def rows(codes: Codes, *, share: float = 1.0, out: Int8Matrix) -> Int8Matrix:
    """As `rounding.rows` of the weight that these codes stand for."""
    (o, d), (given, nested) = codes.shape, _given(codes, out)
    run(decode_rows, o, block_rows(d), *given, registers_mixed(d), int(mirrors_thirds(d)), float(share), *nested)
    return out


def groups(codes: Codes, *, share: float = 1.0, out: Int8Matrix) -> Int8Matrix:
    """As `rounding.groups` of the weight that these codes stand for."""
    (o, d), (given, nested) = codes.shape, _given(codes, out)
    run(decode_groups, padded_width(o) // MOST, block_rows(d * MOST), *given, o, float(share), *nested)
    return out


def fault() -> str | None:
    """What these kernels get wrong on this machine, seen once on small weights beside plain torch; None where nothing
    is. Widths are those of three registers and of sixteen; rows are no whole group."""
    draw = torch.Generator().manual_seed(0)
    for kind, dtype, (o, d), block in (("nf4", torch.bfloat16, (37, 192), 64), ("fp4", torch.float32, (16, 256), 32)):
        packed = torch.randint(256, (o * d // 2,), generator=draw, dtype=torch.uint8)
        bytes_ = torch.randint(256, (o * d // block,), generator=draw, dtype=torch.uint8)
        nested = Nested(torch.rand(256, generator=draw), torch.rand(o * d // block // 8 + 1, generator=draw), 8, 0.01)
        codes = Codes(packed, bytes_, dequantise.values(kind), (o, d), block, dtype, nested)
        plain, scales = torch.empty(o * d, dtype=dtype), nested.values[bytes_.int()]
        scales = scales * nested.scales.repeat_interleave(8)[: len(scales)] + nested.offset
        dequantise.write_by_table(packed, scales, plain, block, kind)
        for ours, known, count in ((rows, rounding.rows, o), (groups, rounding.groups, padded_width(o))):
            out = torch.empty(count, d, dtype=torch.int8), torch.empty(count)
            if not all(map(torch.equal, ours(codes, out=out), known(plain.view(o, d)))):
                return f"a weight in {kind} is rounded to other numbers"
    return None
