"""Registers of sixteen numbers (AVX-512), for loops that LLVM left alone makes slowly: on Intel's processors it fills
half a register, and it rounds to bf16 in nine instructions instead of one.

Source: exp as `scalar.exp_f32`, its power of two by VSCALEFPS; rounding by VCVTNEPS2BF16 (Intel SDM volume 2).
"""

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.core import cgutils

from halfbyte.layers.kernels.cpu.scalar import BFloat, Value, broadcast, call, instruction

LANES = 16
_F32, _I32 = ir.FloatType(), ir.IntType(32)
I64 = ir.IntType(64)
VECTOR, WORDS, HALVES = (ir.VectorType(kind, LANES) for kind in (_F32, _I32, ir.IntType(16)))
ZERO = ir.Constant(VECTOR, None)


def each(value: float) -> Value:
    return ir.Constant(VECTOR, [ir.Constant(_F32, value)] * LANES)


def fma(b: Value, x: Value, y: Value, z: Value) -> Value:
    return call(b, f"llvm.fma.v{LANES}f32", VECTOR, x, y, z)


def exp(b: Value, x: Value) -> Value:
    n = call(b, f"llvm.roundeven.v{LANES}f32", VECTOR, b.fmul(x, each(1.44269504)))
    r = fma(b, n, each(2.12194440e-4), fma(b, n, each(-0.693359375), x))
    p = each(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = fma(b, p, r, each(c))
    y = b.fadd(fma(b, p, b.fmul(r, r), r), each(1.0))
    name = "llvm.x86.avx512.mask.scalef.ps.512"
    return call(b, name, VECTOR, y, n, ZERO, ir.IntType(16)(-1), _I32(4))


def bf16(b: Value, x: Value) -> Value:
    """Sixteen numbers rounded to nearest even, as words of 16 bits."""
    narrow = call(b, "llvm.x86.avx512bf16.cvtneps2bf16.512", ir.VectorType(BFloat(), LANES), x)
    return b.bitcast(narrow, HALVES)


def _place(b: Value, array: Value, column: Value, kind: Value) -> Value:
    """Where a register of `kind` begins at a column of an array."""
    first = b.gep(b.bitcast(array.data, kind.element.as_pointer()), [column])
    return b.bitcast(first, kind.as_pointer())


def get(b: Value, array: Value, column: Value) -> Value:
    return b.load(_place(b, array, column, VECTOR), align=4)


def put(b: Value, value: Value, array: Value, column: Value) -> None:
    b.store(value, _place(b, array, column, value.type), align=2)


def reduced(b: Value, columns: Value, start: Value, step: Callable[[Value, Value], Value]) -> Value:
    """total = step(column, total) for each register of `columns` columns, from `start` on."""
    total = cgutils.alloca_once_value(b, start)
    with cgutils.for_range_slice(b, I64(0), columns, I64(LANES), intp=I64) as (column, _):
        b.store(step(column, b.load(total)), total)
    return b.load(total)


@instruction(types.void, None, types.int64, None, types.int64)
def turn_words(b: Value, x: Value, x_row: Value, out: Value, out_row: Value) -> None:
    """Sixteen rows of as many words -> their transpose; from a row to the next so many words."""
    rows = [b.load(_place(b, x, b.mul(x_row, I64(r)), WORDS), align=4) for r in range(LANES)]
    for step in (1, 2, 4, 8):  # squares of this size beside the diagonal change places
        for r in (r for r in range(LANES) if not r & step):
            upper, lower = rows[r], rows[r + step]
            first = [lane if not lane & step else LANES + lane - step for lane in range(LANES)]
            second = [lane + step if not lane & step else LANES + lane for lane in range(LANES)]
            rows[r], rows[r + step] = (b.shuffle_vector(upper, lower, ir.Constant(WORDS, m)) for m in (first, second))
    for r, row in enumerate(rows):
        b.store(row, _place(b, out, b.mul(out_row, I64(r)), WORDS), align=4)


@instruction(types.void, None, types.int64, None, types.int64)
def pair_rows(b: Value, x: Value, second: Value, out: Value, columns: Value) -> None:
    """Of 16 bits: x, and what lies `second` behind it -> words with x in their lower half, of whole registers."""
    with cgutils.for_range_slice(b, I64(0), columns, I64(LANES), intp=I64) as (column, _):
        at = (column, b.add(second, column))
        low, high = (b.zext(b.load(_place(b, x, i, HALVES), align=2), WORDS) for i in at)
        put(b, b.or_(low, b.shl(high, ir.Constant(WORDS, [16] * LANES))), out, column)


@instruction(types.void, types.float32, None, None, types.int64)
def decay_row(b: Value, gamma: Value, gammas: Value, out: Value, columns: Value) -> None:
    """out = e^(gamma - gammas), of whole registers; 0 below e^-104."""
    here = broadcast(b, gamma, LANES)
    with cgutils.for_range_slice(b, I64(0), columns, I64(LANES), intp=I64) as (column, _):
        x = b.fsub(here, get(b, gammas, column))
        put(b, exp(b, b.select(b.fcmp_ordered("<", x, each(-104.0)), each(-104.0), x)), out, column)


@instruction(types.void, None, None, types.int64)
def round_row(b: Value, x: Value, out: Value, columns: Value) -> None:
    """x in fp32 -> out in bf16, of whole registers."""
    with cgutils.for_range_slice(b, I64(0), columns, I64(LANES), intp=I64) as (column, _):
        put(b, bf16(b, get(b, x, column)), out, column)
