"""Scalar building blocks that LLVM turns into vector code: bf16 loads and stores, exp, and an atomic counter.

Why: numba knows no bf16 and calls libm for exp, one number at a time. A bf16 is the upper half of an fp32, so loading
is a shift and storing a rounded shift; exp is a polynomial of degree 6 on [-ln2/2, ln2/2] times a power of two.
Source: rounding to nearest even as in `c10/util/BFloat16.h`; exp after Cephes (relative error below 2e-7).
Cost: none of their own; each is inlined.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

Value: TypeAlias = Any  # of LLVM's, a type of it, or a builder of them: llvmlite has no types
_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_F32 = ir.FloatType()
# No `nnan`/`ninf`: a loss that is not finite must stay visible.
FASTMATH = {"contract", "reassoc", "nsz", "arcp"}
# By force: a part that is compiled on its own as well is there twice, and a process that compiles uses another copy,
# with other last bits, than one that takes the kernel from the cache.
inlined: Any = njit(forceinline=True, fastmath=FASTMATH, error_model="numpy")


def _i32(value: int) -> Value:
    return ir.Constant(_I32, value)


def call(builder: Value, name: str, result: Value, *args: Value) -> Value:
    """A call of one of LLVM's functions."""
    kind = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def broadcast(builder: Value, value: Value, lanes: int) -> Value:
    """A register with this number in each lane."""
    vector, first = ir.VectorType(value.type, lanes), ir.Constant(ir.VectorType(_I32, lanes), None)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _i32(0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), first)


def _rounded(builder: Value, value: Value) -> Value:
    """bf16 bits of a float, to nearest even. NaN stays NaN for the quiet NaNs that arithmetic makes."""
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, _i32(16)), _i32(1))
    rounded = builder.add(builder.add(bits, _i32(0x7FFF)), odd)
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.lshr(builder.select(is_nan, bits, rounded), _i32(16)), _I16)


@intrinsic
def load(typing_context, x):  # type: ignore[no-untyped-def]
    """An element of an array of bf16 (as uint16) or float32 -> float32."""

    def bf16(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), _i32(16)), _F32)

    def fp32(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return args[0]

    return types.float32(x), bf16 if x == types.uint16 else fp32


@intrinsic
def store(typing_context, x, array):  # type: ignore[no-untyped-def]
    """float32 -> an element of `array`, which holds bf16 (as uint16) or float32."""

    def bf16(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _rounded(builder, args[0])

    def fp32(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return args[0]

    return array.dtype(types.float32, array), bf16 if array.dtype == types.uint16 else fp32


@intrinsic
def _two_to(typing_context, n):  # type: ignore[no-untyped-def]
    """2 to the power of a whole float32 in [-126, 127]."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        whole = builder.fptosi(args[0], _I32)
        return builder.bitcast(builder.shl(builder.add(whole, _i32(127)), _i32(23)), _F32)

    return types.float32(types.float32), build


@intrinsic
def _floor(typing_context, x):  # type: ignore[no-untyped-def]
    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.call(builder.module.declare_intrinsic("llvm.floor", [_F32]), args)

    return types.float32(types.float32), build


@njit(inline="always", fastmath={"contract"})
def exp_f32(x):  # type: ignore[no-untyped-def]
    """exp in fp32, clamped to [-87, 88]: 1.6e-38 below, 1.7e38 above; NaN stays NaN."""
    f = np.float32
    x = f(-87.0) if x < f(-87.0) else x
    x = f(88.0) if x > f(88.0) else x
    n = _floor(x * f(1.44269504) + f(0.5))
    r = x - n * f(0.693359375)
    r = r + n * f(2.12194440e-4)
    p = f(1.9875691500e-4)
    p = p * r + f(1.3981999507e-3)
    p = p * r + f(8.3334519073e-3)
    p = p * r + f(4.1665795894e-2)
    p = p * r + f(1.6666665459e-1)
    p = p * r + f(5.0000001201e-1)
    return (p * r * r + r + f(1.0)) * _two_to(n)


@inlined
def up(n, step):  # type: ignore[no-untyped-def]
    return (n + step - 1) // step * step


@intrinsic
def take(typing_context, counter):  # type: ignore[no-untyped-def]
    """counter[0]++, atomically; returns the value before."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(_I64, 1), "acq_rel")

    return types.int64(counter), build


@intrinsic
def give(typing_context, counter, n):  # type: ignore[no-untyped-def]
    """counter[0] += n, atomically; what this thread wrote before is there for who reads it."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, args[0])
        builder.atomic_rmw("add", array.data, args[1], "acq_rel")
        return context.get_dummy_value()

    return types.void(counter, types.int64), build


@intrinsic
def read(typing_context, counter):  # type: ignore[no-untyped-def]
    """counter[0] as other threads have left it; what they wrote before is there too."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.load_atomic(array.data, "acquire", 8)

    return types.int64(counter), build


@intrinsic
def pause(typing_context, function):  # type: ignore[no-untyped-def]
    """Wait a moment while looking at a counter; give the core to others by `int function()` if that is not 0."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        with builder.if_then(builder.icmp_signed("!=", args[0], ir.Constant(_I64, 0))):
            yielding = ir.FunctionType(_I32, []).as_pointer()
            builder.call(builder.inttoptr(args[0], yielding), [])
        return context.get_dummy_value()

    return types.void(types.int64), build


@intrinsic
def fetch(typing_context, x):  # type: ignore[no-untyped-def]
    """Ask for the line of the cache in which the array x begins."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, args[0])
        place = builder.bitcast(array.data, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(ask, [place, _i32(0), _i32(3), _i32(1)])
        return context.get_dummy_value()

    return types.void(x), build


@intrinsic
def pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """int64 -> void*."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), build


def hash_words(builder: Value, value: Value, constant: Callable[[int], Value]) -> Value:
    """`hash_u32` of a word, or of a register of words, of which `constant` makes constants."""

    def shift_xor(value: Value, by: int) -> Value:
        return builder.xor(value, builder.lshr(value, constant(by)))

    value = shift_xor(value, 16)
    value = shift_xor(builder.mul(value, constant(0x7FEB352D)), 15)
    return shift_xor(builder.mul(value, constant(0x846CA68B)), 16)


@intrinsic
def hash_u32(typing_context, x):  # type: ignore[no-untyped-def]
    """A 32-bit mixing function (two multiplications), for random bits from a counter. Source: "lowbias32" by C. Wellons
    (bias 0.17), github.com/skeeto/hash-prospector, public domain."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return hash_words(builder, args[0], _i32)

    return types.uint32(types.uint32), build


@intrinsic
def drop_pair(typing_context, pair, bits, low):  # type: ignore[no-untyped-def]
    """Two numbers in a word of 32 (bf16) or 64 (fp32) bits, each 0 where its half of the random bits is below `low`."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        word = ir.IntType(pair.bitwidth)
        lower = 2 ** (pair.bitwidth // 2) - 1
        first = builder.icmp_unsigned(">=", builder.and_(args[1], _i32(0xFFFF)), args[2])
        second = builder.icmp_unsigned(">=", builder.lshr(args[1], _i32(16)), args[2])
        kept_first = builder.select(first, word(lower), word(0))
        kept_second = builder.select(second, word(lower << pair.bitwidth // 2), word(0))
        return builder.and_(args[0], builder.or_(kept_first, kept_second))

    return pair(pair, types.uint32, types.uint32), build


@intrinsic
def counter_bits(typing_context, start, j, seed):  # type: ignore[no-untyped-def]
    """The hash input of pair `start + j` under `seed`, in 32 bits."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.xor(builder.add(args[0], builder.trunc(args[1], _I32)), args[2])

    return types.uint32(types.uint32, types.intp, types.uint32), build
