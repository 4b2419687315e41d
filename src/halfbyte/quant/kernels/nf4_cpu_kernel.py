"""The quantiser's compiled loop, over the bits of bf16, fp16 or fp32.

Why: numba knows no bf16 and computes with fp16 through calls; from its bits, a number is one instruction. The type of
the bits says which is meant: uint16 is bf16, int16 is fp16, uint32 is fp32.
Cost: compiled once a machine. Nothing here is a closure: numba never finds one over intrinsics in its cache again.
"""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numba.np.unsafe.ndarray import to_fixed_tuple

_I32, _F32 = ir.IntType(32), ir.FloatType()
# The first magnitude that is no finite number.
_FINITE_BELOW = {types.uint16: 0x7F80, types.int16: 0x7C00, types.uint32: 0x7F800000}


@intrinsic
def _load(typing_context, bits):  # type: ignore[no-untyped-def]
    """The number in fp32."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        if bits == types.int16:
            return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _F32)
        if bits == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)
        return builder.bitcast(args[0], _F32)

    return types.float32(bits), build


@intrinsic
def _larger(typing_context, most, bits):  # type: ignore[no-untyped-def]
    """The larger magnitude of two numbers given as bits: without the sign they order as the numbers do, NaN last."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        mask = ir.Constant(args[0].type, (1 << (args[0].type.width - 1)) - 1)
        a, b = builder.and_(args[0], mask), builder.and_(args[1], mask)
        return builder.select(builder.icmp_unsigned(">", a, b), a, b)

    return bits(bits, bits), build


@intrinsic
def _is_finite(typing_context, magnitude):  # type: ignore[no-untyped-def]
    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.icmp_unsigned("<", args[0], ir.Constant(args[0].type, _FINITE_BELOW[magnitude]))

    return types.boolean(magnitude), build


@intrinsic
def _code(typing_context, v, bounds, deltas):  # type: ignore[no-untyped-def]
    """The code of v in [-1, 1]: the first one, and what each bound below v adds to it; in 32 bits, unrolled."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        total = builder.extract_value(args[2], 0)
        for i in range(bounds.count):
            above = builder.fcmp_ordered(">", args[0], builder.extract_value(args[1], i))
            delta = builder.extract_value(args[2], i + 1)
            total = builder.add(total, builder.select(above, delta, ir.Constant(_I32, 0)))
        return total

    return types.int32(v, bounds, deltas), build


@intrinsic
def _join(typing_context, first, second):  # type: ignore[no-untyped-def]
    """Two codes in one byte, the first in its upper half."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        high = builder.shl(args[0], ir.Constant(_I32, 4))
        return builder.trunc(builder.or_(high, args[1]), ir.IntType(8))

    return types.uint8(types.int32, types.int32), build


# No fastmath: each operation rounds as bitsandbytes' does. Its clamp would change nothing: what rounds to beyond 1 is
# beyond the last bound anyway.
@njit(nogil=True, cache=True, error_model="numpy")
def run(bits, packed, absmax, bounds_, deltas_, block, begin, end):  # type: ignore[no-untyped-def]
    """Quantise the elements from `begin` on, a multiple of `block`. Returns where NaN or Inf is first met, or -1."""
    bounds, deltas = to_fixed_tuple(bounds_, 15), to_fixed_tuple(deltas_, 16)
    bad = -1
    for first in range(begin, end, block):
        n = min(block, end - first)
        x, out = bits[first : first + n], packed[first // 2 : (first + n + 1) // 2]
        most = _larger(x[0], x[0])
        for i in range(n):
            most = _larger(most, x[i])
        if bad < 0 and not _is_finite(most):
            bad = first
        top = _load(most)
        held = max(top, np.float32(1e-38))
        if n == block:
            absmax[first // block] = top
            scale = np.float32(1.0) / held
            for j in range(n // 2):
                a = _code(_load(x[2 * j]) * scale, bounds, deltas)
                out[j] = _join(a, _code(_load(x[2 * j + 1]) * scale, bounds, deltas))
        else:
            absmax[first // block] = held
            for j in range(len(out)):
                a = _code(_load(x[2 * j]) / held, bounds, deltas)
                v = _load(x[2 * j + 1]) / held if 2 * j + 1 < n else np.float32(0.0)
                out[j] = _join(a, _code(v, bounds, deltas))
    return bad
