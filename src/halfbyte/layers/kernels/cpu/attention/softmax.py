"""Attention's softmax and its gradient on bf16 rows, sixteen scores in a register.

Why: left to LLVM these loops are most of the kernel: on Intel's processors it fills half a register, and it rounds to
bf16 in nine instructions instead of one.
What: functions that kernels call on rows of whole registers; columns outside [low, end) count as not seen and get zero.
Source: exp as `scalar.exp_f32`, its power of two by VSCALEFPS; rounding by VCVTNEPS2BF16 (Intel SDM volume 2).
Cost: 19 instructions for 16 scores forward, 50 for 32 of them backward.
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils

from halfbyte.layers.kernels.cpu.scalar import Value, broadcast, call, instruction
from halfbyte.layers.kernels.cpu.tiles import BFloat

LANES = 16
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR, _WORDS, _HALVES = (ir.VectorType(kind, LANES) for kind in (_F32, _I32, ir.IntType(16)))
_ZERO = ir.Constant(_VECTOR, None)


def _all(value: float) -> Value:
    return ir.Constant(_VECTOR, [ir.Constant(_F32, value)] * LANES)


def _fma(b: Value, x: Value, y: Value, z: Value) -> Value:
    return call(b, f"llvm.fma.v{LANES}f32", _VECTOR, x, y, z)


def _exp(b: Value, x: Value) -> Value:
    n = call(b, f"llvm.roundeven.v{LANES}f32", _VECTOR, b.fmul(x, _all(1.44269504)))
    r = _fma(b, n, _all(2.12194440e-4), _fma(b, n, _all(-0.693359375), x))
    p = _all(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = _fma(b, p, r, _all(c))
    y = b.fadd(_fma(b, p, b.fmul(r, r), r), _all(1.0))
    name = "llvm.x86.avx512.mask.scalef.ps.512"
    return call(b, name, _VECTOR, y, n, _ZERO, ir.IntType(16)(-1), _I32(4))


def _bf16(b: Value, x: Value) -> Value:
    """Sixteen numbers rounded to nearest even, as words of 16 bits."""
    narrow = call(b, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(BFloat(), LANES), x)
    return b.bitcast(narrow, _HALVES)


def _place(b: Value, array: Value, column: Value, kind: Value) -> Value:
    """Where a register of `kind` begins at a column of an array."""
    first = b.gep(b.bitcast(array.data, kind.element.as_pointer()), [column])
    return b.bitcast(first, kind.as_pointer())


def _get(b: Value, array: Value, column: Value) -> Value:
    return b.load(_place(b, array, column, _VECTOR), align=4)


def _put(b: Value, value: Value, array: Value, column: Value) -> None:
    b.store(value, _place(b, array, column, value.type), align=2)


def _seen(b: Value, column: Value, low: Value, end: Value) -> Value:
    """Which of sixteen columns from this one on lie in [low, end)."""
    number = ir.Constant(_WORDS, [_I32(i) for i in range(LANES)])
    columns = b.add(broadcast(b, b.trunc(column, _I32), LANES), number)
    above, below = (broadcast(b, b.trunc(x, _I32), LANES) for x in (low, end))
    return b.and_(b.icmp_signed(">=", columns, above), b.icmp_signed("<", columns, below))


def _reduced(b: Value, columns: Value, start: Value, step: Callable[[Value, Value], Value]) -> Value:
    """total = step(column, total) for each register of `columns` columns, from `start` on."""
    total = cgutils.alloca_once_value(b, start)
    with cgutils.for_range_slice(b, _I64(0), columns, _I64(LANES), intp=_I64) as (column, _):
        b.store(step(column, b.load(total)), total)
    return b.load(total)


@instruction(types.float32, None, types.int64, types.int64, types.int64)
def row_max(b: Value, s: Value, columns: Value, low: Value, end: Value) -> Value:
    """The largest of s in [low, end); a NaN may be passed over."""

    def step(column: Value, total: Value) -> Value:
        x = b.select(_seen(b, column, low, end), _get(b, s, column), _all(float("-inf")))
        return b.select(b.fcmp_ordered(">", x, total), x, total)

    total = _reduced(b, columns, _all(float("-inf")), step)
    return call(b, f"llvm.vector.reduce.fmax.v{LANES}f32", _F32, total)


@instruction(types.float32, None, None, types.int64, types.int64, types.int64, types.float32, types.float32)
def row_exp(b: Value, s: Value, p: Value, columns: Value, low: Value, end: Value, scale: Value, m: Value) -> Value:  # noqa: PLR0913, PLR0917
    """p = exp(scale s - m) in bf16 in [low, end), else 0. Returns the sum before rounding."""
    factor, less = broadcast(b, scale, LANES), b.fneg(broadcast(b, m, LANES))

    def step(column: Value, total: Value) -> Value:
        e = _exp(b, _fma(b, _get(b, s, column), factor, less))
        e = b.select(_seen(b, column, low, end), e, _ZERO)
        _put(b, _bf16(b, e), p, column)
        return b.fadd(total, e)

    total = _reduced(b, columns, _ZERO, step)
    return b.call(
        cgutils.get_or_insert_function(
            b.module, ir.FunctionType(_F32, [_F32, _VECTOR]), f"llvm.vector.reduce.fadd.v{LANES}f32"
        ),
        [ir.Constant(_F32, 0.0), total],
        fastmath=("reassoc",),
    )


def _gradients(b: Value, column: Value, row: tuple[Value, ...]) -> tuple[Value, Value]:
    """Of a row (s, dp, low, end, scale, lse, delta): p and ds, as words of 16 bits."""
    s, dp, low, end, scale, lse, delta = row
    p = _exp(b, _fma(b, _get(b, s, column), broadcast(b, scale, LANES), b.fneg(broadcast(b, lse, LANES))))
    p = b.select(_seen(b, column, low, end), p, _ZERO)
    difference = b.fsub(_get(b, dp, column), broadcast(b, delta, LANES))
    ds = b.fmul(b.fmul(p, difference), broadcast(b, scale, LANES))
    ds = b.select(_seen(b, column, low, end), ds, _ZERO)  # 0 times what is not a number is none
    return _bf16(b, p), _bf16(b, ds)


_ROW = (None, None, types.int64, types.int64, types.float32, types.float32)


@instruction(types.void, types.int64, types.float32, *_ROW, *_ROW, None, None, None, None)
def pair_gradients(  # noqa: PLR0913, PLR0917
    b, columns, scale, s_a, dp_a, low_a, end_a, lse_a, delta_a, s_b, dp_b, low_b, end_b, lse_b, delta_b, ds_a, ds_b,
    ds_pairs, p_pairs,
):  # type: ignore[no-untyped-def]  # fmt: skip
    """Of two rows of queries a and b: ds = p (dp - delta) scale by rows, p and ds by pairs of rows; columns outside
    [low, end) get 0."""
    with cgutils.for_range_slice(b, _I64(0), columns, _I64(LANES), intp=_I64) as (column, _):
        p, ds = _gradients(b, column, (s_a, dp_a, low_a, end_a, scale, lse_a, delta_a))
        p_2, ds_2 = _gradients(b, column, (s_b, dp_b, low_b, end_b, scale, lse_b, delta_b))
        _put(b, ds, ds_a, column)
        _put(b, ds_2, ds_b, column)
        high = ir.Constant(_WORDS, [_I32(16)] * LANES)
        for first, second, to in ((ds, ds_2, ds_pairs), (p, p_2, p_pairs)):
            _put(b, b.or_(b.zext(first, _WORDS), b.shl(b.zext(second, _WORDS), high)), to, column)
