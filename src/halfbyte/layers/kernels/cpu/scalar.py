"""Scalar building blocks that LLVM turns into vector code: bf16 loads and stores, exp, and an atomic counter.

Why: numba knows no bf16 and calls libm for exp, one number at a time. A bf16 is the upper half of an fp32, so loading
is a shift and storing a rounded shift; exp is a polynomial of degree 6 on [-ln2/2, ln2/2] times a power of two.
Source: rounding to nearest even as in `c10/util/BFloat16.h`; exp after Cephes (relative error below 2e-7).
Cost: none of their own; each is inlined.
"""

import inspect
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils, config
from numba.extending import intrinsic

Value: TypeAlias = Any  # of LLVM's, a type of it, or a builder of them: llvmlite has no types
_I16, _I32, _I64 = (ir.IntType(bits) for bits in (16, 32, 64))
_F32 = ir.FloatType()
_FLUSH, _ZEROS = 1 << 15, 1 << 6  # of MXCSR: results and operands below 2^-126 are 0
# No `nnan`/`ninf`: a loss that is not finite must stay visible.
FASTMATH = {"contract", "reassoc", "nsz", "arcp"}
# By force: a part that is compiled on its own as well is there twice, and a process that compiles uses another copy,
# with other last bits, than one that takes the kernel from the cache.
inlined: Any = njit(forceinline=True, fastmath=FASTMATH, error_model="numpy", no_cfunc_wrapper=True)
# Of parts that hold whole kernels: numba inlines them itself, where LLVM would compile all that is in them once more
# for each level. For integers alone, since its arithmetic is then the kernel's own.
spliced: Any = njit(inline="always", error_model="numpy")


class BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


@cache
def has(feature: str) -> bool:
    """Whether the processor that numba compiles for has instructions of this name of LLVM's."""
    asked = config.CPU_FEATURES
    if asked is not None:
        return f"+{feature}" in asked.split(",")
    return bool(binding.get_host_cpu_features().get(feature, False))


def _i32(value: int) -> Value:
    return ir.Constant(_I32, value)


def instruction(result: Value, *kinds: Value) -> Callable[[Callable[..., Value]], Any]:
    """A decorator: `build(builder, *arguments)`, which writes LLVM's instructions -> a function that kernels call. Its
    arguments are of these types of numba's; None: an array, with `data`, where it begins, and its `dtype`."""

    def decorate(build: Callable[..., Value]) -> Any:
        def define(typing_context, *given):  # type: ignore[no-untyped-def]
            def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
                arguments = list(values)
                for i, kind in enumerate(signature.args):
                    if kinds[i] is None:
                        data = context.make_array(kind)(context, builder, values[i]).data
                        arguments[i] = SimpleNamespace(data=data, dtype=kind.dtype)
                written = build(builder, *arguments)
                return context.get_dummy_value() if result is types.void else written

            return result(*(one if kind is None else kind for one, kind in zip(given, kinds, strict=True))), generate

        names = ("typing_context", *list(inspect.signature(build).parameters)[1:])
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in names]
        define.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        define.__name__, define.__doc__ = build.__name__, build.__doc__
        return intrinsic(define)

    return decorate


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
    if has("avx512bf16"):  # one instruction; what is below 2^-126 is 0
        return builder.bitcast(builder.fptrunc(value, BFloat()), _I16)
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


@instruction(types.void)
def fill_registers(b: Value) -> None:
    """Loops of the function that calls this fill whole registers; else LLVM fills half of one on Intel's processors."""
    set.add(b.function.attributes, '"prefer-vector-width"="512"')


@instruction(types.float32, types.float32)
def _two_to(b: Value, n: Value) -> Value:
    """2 to the power of a whole float32 in [-126, 127]."""
    return b.bitcast(b.shl(b.add(b.fptosi(n, _I32), _i32(127)), _i32(23)), _F32)


@instruction(types.float32, types.float32)
def _floor(b: Value, x: Value) -> Value:
    return b.call(b.module.declare_intrinsic("llvm.floor", [_F32]), [x])


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


SILU, GELU_TANH, GELU = range(3)  # as in `norm_gate.py`


@njit(inline="always", error_model="numpy")
def sigmoid(v):  # type: ignore[no-untyped-def]
    return np.float32(1.0) / (np.float32(1.0) + exp_f32(-v))


@njit(inline="always", error_model="numpy")
def normal_share(v):  # type: ignore[no-untyped-def]
    """(how much of a normal distribution lies below v, to 1.5e-7; its density there): Abramowitz and Stegun, 7.1.26."""
    f = np.float32
    bell = exp_f32(f(-0.5) * v * v)
    t = f(1.0) / (f(1.0) + f(0.23164190) * abs(v))  # 0.3275911 / sqrt(2)
    p = f(1.061405429) * t + f(-1.453152027)
    p = p * t + f(1.421413741)
    p = p * t + f(-0.284496736)
    p = p * t + f(0.254829592)
    above = f(0.5) * p * t * bell
    return (above if v < f(0.0) else f(1.0) - above), f(0.39894228) * bell


@inlined
def up(n, step):  # type: ignore[no-untyped-def]
    return (n + step - 1) // step * step


@instruction(types.int64, None)
def take(b: Value, counter: Value) -> Value:
    """counter[0]++, atomically; returns the value before."""
    return b.atomic_rmw("add", counter.data, _I64(1), "acq_rel")


@instruction(types.void, None, types.int64)
def give(b: Value, counter: Value, n: Value) -> Value:
    """counter[0] += n, atomically; what this thread wrote before is there for who reads it."""
    b.atomic_rmw("add", counter.data, n, "acq_rel")


@instruction(types.int64, None)
def read(b: Value, counter: Value) -> Value:
    """counter[0] as other threads have left it; what they wrote before is there too."""
    return b.load_atomic(counter.data, "acquire", 8)


@instruction(types.void, types.int64)
def pause(b: Value, function: Value) -> Value:
    """Wait a moment while looking at a counter; give the core to others by `int function()` if that is not 0."""
    call(b, "llvm.x86.sse2.pause", ir.VoidType())
    with b.if_then(b.icmp_signed("!=", function, _I64(0))):
        b.call(b.inttoptr(function, ir.FunctionType(_I32, []).as_pointer()), [])


def _has_mxcsr(b: Value) -> bool:
    return bool(b.module.triple.startswith("x86_64"))


def _mxcsr(b: Value, what: str, place: Value) -> None:
    """st: this thread's float mode goes to the place; ld: it comes from there."""
    call(b, f"llvm.x86.sse.{what}mxcsr", ir.VoidType(), b.bitcast(place, ir.IntType(8).as_pointer()))


@instruction(types.int32)
def flush_subnormals(b: Value) -> Value:
    """Numbers below 2^-126 are 0 in this thread from here on; returns what goes to `set_float_mode` at the end.

    An operation on such a number takes 100 cycles and more on Intel's processors. Arm's have no such cost.
    """
    if not _has_mxcsr(b):
        return _i32(0)
    place = cgutils.alloca_once(b, _I32)
    _mxcsr(b, "st", place)
    before = b.load(place)
    b.store(b.or_(before, _i32(_FLUSH | _ZEROS)), place)
    _mxcsr(b, "ld", place)
    return before


@instruction(types.void, types.int32)
def set_float_mode(b: Value, mode: Value) -> None:
    """As `flush_subnormals` found it."""
    if _has_mxcsr(b):
        place = cgutils.alloca_once(b, _I32)
        b.store(mode, place)
        _mxcsr(b, "ld", place)


@instruction(types.void, None)
def fetch(b: Value, x: Value) -> Value:
    """Ask for the line of the cache in which the array x begins."""
    place = b.bitcast(x.data, ir.IntType(8).as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
    b.call(b.module.declare_intrinsic("llvm.prefetch", [place.type], kind), [place, _i32(0), _i32(3), _i32(1)])


@instruction(types.voidptr, types.int64)
def pointer(b: Value, address: Value) -> Value:
    return b.inttoptr(address, ir.IntType(8).as_pointer())


def hash_words(builder: Value, value: Value, constant: Callable[[int], Value]) -> Value:
    """`hash_u32` of a word, or of a register of words, of which `constant` makes constants."""

    def shift_xor(value: Value, by: int) -> Value:
        return builder.xor(value, builder.lshr(value, constant(by)))

    value = shift_xor(value, 16)
    value = shift_xor(builder.mul(value, constant(0x7FEB352D)), 15)
    return shift_xor(builder.mul(value, constant(0x846CA68B)), 16)


@instruction(types.uint32, types.uint32)
def hash_u32(b: Value, x: Value) -> Value:
    """A 32-bit mixing function (two multiplications), for random bits from a counter.

    Source: "lowbias32" by C. Wellons (bias 0.17), github.com/skeeto/hash-prospector, public domain.
    """
    return hash_words(b, x, _i32)


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


@instruction(types.uint32, types.uint32, types.intp, types.uint32)
def counter_bits(b: Value, start: Value, j: Value, seed: Value) -> Value:
    """The hash input of pair `start + j` under `seed`, in 32 bits."""
    return b.xor(b.add(start, b.trunc(j, _I32)), seed)
