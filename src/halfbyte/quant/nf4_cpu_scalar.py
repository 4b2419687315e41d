"""Reading a floating number from its bits, for the quantiser's loop: bf16, fp16 and fp32 to fp32.

Why: numba knows no bf16 and computes with fp16 through calls; both are one instruction. Cost: each is inlined.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I16, _I32, _HALF, _F32 = ir.IntType(16), ir.IntType(32), ir.HalfType(), ir.FloatType()


@intrinsic
def _bf16(typing_context, bits):  # type: ignore[no-untyped-def]
    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)

    return types.float32(types.uint16), build


@intrinsic
def _fp16(typing_context, bits):  # type: ignore[no-untyped-def]
    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.fpext(builder.bitcast(args[0], _HALF), _F32)

    return types.float32(types.uint16), build


@intrinsic
def _fp32(typing_context, bits):  # type: ignore[no-untyped-def]
    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(args[0], _F32)

    return types.float32(types.uint32), build


@intrinsic
def larger(typing_context, most, bits):  # type: ignore[no-untyped-def]
    """The larger magnitude of two numbers given as bits: without the sign they order as the numbers do, NaN last."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = args[0].type
        mask = ir.Constant(kind, (1 << (kind.width - 1)) - 1)
        a, b = builder.and_(args[0], mask), builder.and_(args[1], mask)
        return builder.select(builder.icmp_unsigned(">", a, b), a, b)

    return bits(bits, bits), build


@intrinsic
def step(typing_context, total, v, bound, delta):  # type: ignore[no-untyped-def]
    """total + delta if v > bound, in 32 bits, where numba would go on in 64."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        above = builder.fcmp_ordered(">", args[1], args[2])
        return builder.add(args[0], builder.select(above, args[3], ir.Constant(_I32, 0)))

    return types.int32(types.int32, types.float32, types.float32, types.int32), build


@intrinsic
def join(typing_context, first, second):  # type: ignore[no-untyped-def]
    """Two codes in one byte, the first in its upper half."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        high = builder.shl(args[0], ir.Constant(_I32, 4))
        return builder.trunc(builder.or_(high, args[1]), ir.IntType(8))

    return types.uint8(types.int32, types.int32), build


LOAD: dict[str, Any] = {"bf16": _bf16, "fp16": _fp16, "fp32": _fp32}
# The first magnitude that is no finite number.
FINITE_BELOW: dict[str, Any] = {"bf16": np.uint16(0x7F80), "fp16": np.uint16(0x7C00), "fp32": np.uint32(0x7F800000)}
