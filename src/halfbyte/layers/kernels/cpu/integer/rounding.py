"""Matrices on their way into 8-bit integers and back: mixed by a Hadamard transform, rounded with a scale for each row;
and what integer products sum up to, scaled and added to a result.

Why: a single large number in a row makes the step of all the others coarse. A Hadamard transform along the axis that is
summed over spreads it over its group, and on both factors it cancels: (x H)(W H)^T = x W^T.
What: a row is taken in registers of 16 numbers, filled up with zeros. Those of a register are mixed with one another,
and so are F registers as far apart as they can be, up to 256 numbers in all (`rows`). Where that is less and registers
come by three, those a third apart are mirrored before (each less two thirds of their sum). For a weight whose rows
lie on that axis (`groups`) 16 rows that follow each other are mixed.
    q = round(mixed / step), step = largest / 127 of the row. Rows that hold a NaN or Inf get a step of NaN or Inf.
Source: QuaRot, arXiv:2404.00456 (rotations that cancel); rounding by adding 1.5 x 2^23, as in fdlibm.
Cost: about one instruction a number for rounding in, half of one for the way back.
Letters: N rows, D width, F registers that are mixed.
"""

from typing import TypeAlias

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from torch import Tensor

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu.parallel import array, block_rows, each_block, per_dtype, run
from halfbyte.layers.kernels.cpu.scalar import Value, broadcast, call, inlined, instruction, load, store

LANES = 16  # numbers of a register
MOST = 16  # registers, or rows, that are mixed with one another
LARGEST = 127.0
# A row whose largest number is below this is taken for zeros: 127 / largest must be finite.
TINY = 2.0**-100
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOATS, _WORDS = (ir.VectorType(element, LANES) for element in (ir.FloatType(), _I32))
_FMA = f"llvm.fma.v{LANES}f32"
_MAGIC = 1.5 * 2**23


def padded_width(width: int) -> int:
    """Numbers of whole registers that hold a row of this width."""
    return -(-width // LANES) * LANES


def registers_mixed(width: int) -> int:
    """How many registers of a row of this width are mixed with one another: a power of two."""
    registers = padded_width(width) // LANES
    return min(MOST, registers & -registers)


def mirrors_thirds(width: int) -> bool:
    """Whether registers a third of the row apart are mixed, too."""
    return registers_mixed(width) < MOST and padded_width(width) // LANES % 3 == 0


def square_gain(width: int) -> int:
    """By what `rows` multiplies the square of the norm of a row of this width: 16 F."""
    return LANES * registers_mixed(width)


class _Vector:
    """Loads and stores of 16 numbers, or of the last ones of a row."""

    def __init__(self, builder: Value, left: Value = None) -> None:
        self.b, self.mask = builder, None
        if left is not None:
            places = ir.Constant(_WORDS, list(range(LANES)))
            self.mask = builder.icmp_signed("<", places, broadcast(builder, builder.trunc(left, _I32), LANES))

    def _masked(self, name: str, kind: Value, *args: Value) -> Value:
        """`llvm.masked.load` or `store`."""
        result = kind if name == "load" else ir.VoidType()
        suffix = f"v{LANES}{'f32' if kind is _FLOATS else f'i{kind.element.width}'}.p0"
        return call(self.b, f"llvm.masked.{name}.{suffix}", result, *args)

    def load(self, at: Value, kind: Value) -> Value:
        pointer = self.b.inttoptr(at, kind.as_pointer())
        if self.mask is None:
            return self.b.load(pointer, align=1)
        return self._masked("load", kind, pointer, _I32(1), self.mask, ir.Constant(kind, None))

    def store(self, value: Value, at: Value) -> None:
        pointer = self.b.inttoptr(at, value.type.as_pointer())
        if self.mask is None:
            self.b.store(value, pointer, align=1)
        else:
            self._masked("store", value.type, value, pointer, _I32(1), self.mask)

    def floats(self, at: Value, *, bf16: bool) -> Value:
        if not bf16:
            return self.load(at, _FLOATS)
        words = self.b.zext(self.load(at, ir.VectorType(_I16, LANES)), _WORDS)
        return self.b.bitcast(self.b.shl(words, ir.Constant(_WORDS, [16] * LANES)), _FLOATS)


def _over(builder: Value, count: Value, body: Value) -> None:
    """body(vector, first number) for every 16 of `count` numbers, and for what is left."""
    whole = builder.lshr(count, _I64(4))
    with cgutils.for_range(builder, whole, intp=_I64) as loop:
        body(_Vector(builder), builder.shl(loop.index, _I64(4)))
    left = builder.and_(count, _I64(LANES - 1))
    with builder.if_then(builder.icmp_signed("!=", left, _I64(0))):
        body(_Vector(builder, left), builder.shl(whole, _I64(4)))


def _butterflies(builder: Value, values: list[Value]) -> list[Value]:
    """A Hadamard transform over these registers, number by number: additions alone."""
    v, half = list(values), 1
    while half < len(v):
        for k in range(0, len(v), 2 * half):
            for i in range(k, k + half):
                v[i], v[i + half] = builder.fadd(v[i], v[i + half]), builder.fsub(v[i], v[i + half])
        half *= 2
    return v


def _in_register(builder: Value, value: Value) -> Value:
    """A Hadamard transform over the 16 numbers of a register: each plus or minus the one `half` places away."""
    for half in (1, 2, 4, 8):
        signs = ir.Constant(_FLOATS, [-1.0 if i & half else 1.0 for i in range(LANES)])
        other = builder.shuffle_vector(value, value, ir.Constant(_WORDS, [i ^ half for i in range(LANES)]))
        value = call(builder, _FMA, _FLOATS, value, signs, other)
    return value


def _larger(builder: Value, most: Value, value: Value) -> None:
    """Keep the bits of the larger sizes in `most`, those of a NaN among them."""
    bits = builder.and_(builder.bitcast(value, _WORDS), ir.Constant(_WORDS, [0x7FFFFFFF] * LANES))
    seen = builder.load(most)
    builder.store(builder.select(builder.icmp_signed(">", bits, seen), bits, seen), most)


def _largest(builder: Value, most: Value) -> Value:
    return call(builder, f"llvm.vector.reduce.smax.v{LANES}i32", _I32, builder.load(most))


def _read(b: Value, vector: _Vector, like: Value, base: Value, number: Value) -> Value:
    """A register of a row at `base`, in the dtype of `like` (uint16 for bf16), from this number on; as fp32."""
    bf16 = like.dtype == types.uint16
    return vector.floats(b.add(base, b.mul(number, _I64(2 if bf16 else 4))), bf16=bf16)


def _write(b: Value, vector: _Vector, value: Value, base: Value, number: Value) -> None:
    vector.store(value, b.add(base, b.mul(number, _I64(4))))


def _apart(b: Value, index: Value, distance: Value, count: int) -> list[Value]:
    """The first numbers of register `index` and of those `distance`, 2 `distance`, ... registers after it."""
    return [b.mul(b.add(index, b.mul(distance, _I64(k))), _I64(LANES)) for k in range(count)]


@instruction(types.int32, types.int64, None, types.int64, types.int64, types.int64, types.int64)
def mix(b: Value, count: Value, like: Value, source: Value, factors: Value, out: Value, distance: Value) -> Value:
    """A row of count x distance registers, each mixed in itself and with those `distance` apart; or, times factors, in
    itself alone. Returns the bits of the largest size, those of a NaN if one is among them.

    Args: count: 1, 2, 4, 8 or 16. like: an array of the source's dtype, uint16 for bf16. Then int64: addresses of the
        row, of fp32 factors or 0, of the fp32 result; and registers from one to the next that it is mixed with.
    """
    vector, most = _Vector(b), cgutils.alloca_once_value(b, ir.Constant(_WORDS, None))
    b.store(ir.Constant(_WORDS, None), most)

    def rows_of(together: int, distance: Value, *, weighted: bool) -> None:
        with cgutils.for_range(b, distance, intp=_I64) as loop:
            first = _apart(b, loop.index, distance, together)
            v = [_read(b, vector, like, source, at) for at in first]
            for at, value in zip(first, _butterflies(b, v), strict=True):
                value = _in_register(b, value)
                if weighted:
                    value = b.fmul(value, vector.load(b.add(factors, b.mul(at, _I64(4))), _FLOATS))
                _write(b, vector, value, out, at)
                _larger(b, most, value)

    with b.if_else(b.icmp_signed("!=", factors, _I64(0))) as (times_factors, plain):
        with times_factors:
            rows_of(1, b.mul(count, distance), weighted=True)
        with plain:
            for together in (16, 8, 4, 2, 1):
                with b.if_then(b.icmp_signed("==", count, _I64(together))):
                    rows_of(together, distance, weighted=False)
    return _largest(b, most)


@instruction(types.void, None, types.int64, types.int64, types.int64)
def mirror(b: Value, like: Value, source: Value, out: Value, distance: Value) -> None:
    """Registers i, i + distance and i + 2 distance of a row, each less two thirds of their sum, as fp32: a reflection,
    so an orthogonal matrix. Addresses as in `mix`."""
    vector = _Vector(b)
    with cgutils.for_range(b, distance, intp=_I64) as loop:
        first = _apart(b, loop.index, distance, 3)
        v = [_read(b, vector, like, source, at) for at in first]
        two = b.fmul(b.fadd(b.fadd(v[0], v[1]), v[2]), ir.Constant(_FLOATS, [2 / 3] * LANES))
        for at, value in zip(first, v, strict=True):
            _write(b, vector, b.fsub(value, two), out, at)


@instruction(types.void, None, *[types.int64] * 6)
def mix_group(
    b: Value, like: Value, source: Value, source_row: Value, out: Value, out_row: Value, width: Value, peaks: Value
) -> None:
    """out[k, j] = sum over i of H[k, i] source[i, j] for 16 rows of this width; peaks[k]: the bits of the largest
    |out[k]|, those of a NaN if one is among them. Addresses as in `mix`; numbers from a row to the next. `out` may be
    `source`."""
    most = [cgutils.alloca_once_value(b, ir.Constant(_WORDS, None)) for _ in range(MOST)]
    for one in most:
        b.store(ir.Constant(_WORDS, None), one)

    def body(vector: _Vector, first: Value) -> None:
        v = [_read(b, vector, like, source, b.add(b.mul(source_row, _I64(k)), first)) for k in range(MOST)]
        for k, value in enumerate(_butterflies(b, v)):
            _write(b, vector, value, out, b.add(b.mul(out_row, _I64(k)), first))
            _larger(b, most[k], value)

    _over(b, width, body)
    for k in range(MOST):
        b.store(_largest(b, most[k]), b.inttoptr(b.add(peaks, _I64(4 * k)), _I32.as_pointer()))


@instruction(types.void, types.int64, types.float32, types.int64, types.int64)
def to_bytes(b: Value, source: Value, factor: Value, out: Value, width: Value) -> None:
    """out[j] = round(source[j] x factor) as int8, for products of at most 127; fp32 at an address -> bytes at one."""
    times, magic = broadcast(b, factor, LANES), ir.Constant(_FLOATS, [_MAGIC] * LANES)

    def body(vector: _Vector, first: Value) -> None:
        value = vector.load(b.add(source, b.mul(first, _I64(4))), _FLOATS)
        bits = b.bitcast(call(b, _FMA, _FLOATS, value, times, magic), _WORDS)
        vector.store(b.trunc(bits, ir.VectorType(_I8, LANES)), b.add(out, first))

    _over(b, width, body)


@inlined
def row_in_cache(width):  # type: ignore[no-untyped-def]
    """Numbers from a row of fp32 to the next, of 16 that are passed over at once: no multiple of a page, or all would
    compete for the same lines of the cache."""
    return width + LANES


@inlined
def step_of(peak):  # type: ignore[no-untyped-def]
    """The step of a row with this largest number, and what to multiply with before rounding."""
    if peak < np.float32(TINY):
        return np.float32(0.0), np.float32(0.0)
    return peak / np.float32(LARGEST), np.float32(LARGEST) / peak


@inlined
def round_row(mixed, peak, q, width):  # type: ignore[no-untyped-def]
    """A mixed row at an address -> int8 at another; returns its step. peak: of its largest size, as fp32."""
    step, times = step_of(peak)
    to_bytes(mixed, times, q, width)
    return step


@inlined
def round_group(mixed, wide, peaks, q, steps, group, width, share):  # type: ignore[no-untyped-def]
    """The 16 rows of a group, `wide` numbers apart, into their places."""
    for k in range(MOST):
        row = group * MOST + k
        steps[row] = round_row(mixed + k * wide * 4, peaks.view(np.float32)[k], q + row * width, width) * share


@inlined
def decoded_rows(decode, how, q, steps, width, count, thirds, share, first, last):  # type: ignore[no-untyped-def]
    """Rows of a weight that `decode(how, row, to, width, scratch)` writes in fp32 -> as `_rows` rounds them, in one
    pass. `scratch`: a number for each register."""
    mixed, peak = np.empty(width, np.float32), np.empty(1, np.int32)
    here, scratch = mixed.ctypes.data, np.empty(width // LANES, np.float32)
    for i in range(first, last):
        decode(how, i, here, width, scratch.ctypes.data)
        if thirds:
            mirror(mixed, here, here, width // LANES // 3)
        peak[0] = mix(count, mixed, here, 0, here, width // LANES // count)
        steps[i] = round_row(here, peak.view(np.float32)[0], q + i * width, width) * share


@inlined
def decoded_groups(decode, how, q, steps, width, rows, share, first, last):  # type: ignore[no-untyped-def]
    """The same as `_groups` rounds them."""
    wide = row_in_cache(width)
    mixed, peaks = np.empty(wide * MOST, np.float32), np.empty(MOST, np.int32)
    here, scratch = mixed.ctypes.data, np.empty(width // LANES, np.float32)
    for i in range(first, last):
        have = min(MOST, rows - i * MOST)
        mixed[have * wide :] = 0
        for k in range(have):
            decode(how, i * MOST + k, here + k * wide * 4, width, scratch.ctypes.data)
        mix_group(mixed, here, wide, here, wide, width, peaks.ctypes.data)
        round_group(here, wide, peaks, q, steps, i, width, share)


@inlined
def _rows(like, factors, q, steps, count, thirds, itemsize, share, first, last):  # type: ignore[no-untyped-def]
    width = like.shape[1]
    padded = -(-width // LANES) * LANES
    mixed, whole = np.empty(padded, np.float32), np.zeros(padded, like.dtype)
    peak = np.empty(1, np.int32)
    for i in range(first, last):
        row = like.ctypes.data + i * width * itemsize
        if padded != width:
            for j in range(width):
                whole[j] = like[i, j]
            row = whole.ctypes.data
        if thirds and factors == 0:
            mirror(like, row, mixed.ctypes.data, padded // LANES // 3)
            peak[0] = mix(count, mixed, mixed.ctypes.data, 0, mixed.ctypes.data, padded // LANES // count)
        else:
            peak[0] = mix(count, like, row, factors, mixed.ctypes.data, padded // LANES // count)
        steps[i] = round_row(mixed.ctypes.data, peak.view(np.float32)[0], q + i * padded, padded) * share


@inlined
def _groups(like, q, steps, itemsize, share, first, last):  # type: ignore[no-untyped-def]
    rows, width = like.shape
    wide = row_in_cache(width)
    mixed, peaks = np.empty(wide * MOST, np.float32), np.empty(MOST, np.int32)
    for i in range(first, last):
        source, count = like.ctypes.data + i * MOST * width * itemsize, min(MOST, rows - i * MOST)
        if count < MOST:
            whole = np.zeros((MOST, width), like.dtype)
            for k in range(count):
                for j in range(width):
                    whole[k, j] = like[i * MOST + k, j]
            source = whole.ctypes.data
        mix_group(like, source, width, mixed.ctypes.data, wide, width, peaks.ctypes.data)
        round_group(mixed.ctypes.data, wide, peaks, q, steps, i, width, share)


@inlined
def _onto(y, sums, rows, columns, add, first, last):  # type: ignore[no-untyped-def]
    for i in range(first, last):
        a, b = sums[i], y[i]
        row = rows[i]
        if add:
            for j in range(columns.shape[0]):
                b[j] = store(load(b[j]) + np.float32(a[j]) * (row * columns[j]), b)
        else:
            for j in range(columns.shape[0]):
                b[j] = store(np.float32(a[j]) * (row * columns[j]), b)


@inlined
def _onto_evenly(y, sums, rows, add, first, last):  # type: ignore[no-untyped-def]
    for i in range(first, last):
        a, b = sums[i], y[i]
        row = rows[i]
        if add:
            for j in range(a.shape[0]):
                b[j] = store(load(b[j]) + np.float32(a[j]) * row, b)
        else:
            for j in range(a.shape[0]):
                b[j] = store(np.float32(a[j]) * row, b)


@per_dtype
def _rows_kernel(element: type) -> object:
    size = 2 if element is np.uint16 else 4

    def rounded_rows(p):  # type: ignore[no-untyped-def]
        s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
        like, steps = array(s[3], (s[1], s[7]), element), array(s[6], (s[1],), np.float32)
        each_block(s, _rows, (like, s[4], s[5], steps, s[8], s[9], size, np.float32(f[10])))

    return rounded_rows


@per_dtype
def _groups_kernel(element: type) -> object:
    size = 2 if element is np.uint16 else 4

    def rounded_groups(p):  # type: ignore[no-untyped-def]
        s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
        like, steps = array(s[3], (s[6], s[7]), element), array(s[5], (s[1] * MOST,), np.float32)
        each_block(s, _groups, (like, s[4], steps, size, np.float32(f[8])))

    return rounded_groups


@per_dtype
def _onto_kernel(element: type) -> object:
    def scaled_onto(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        shape = (s[1], s[7])
        y, sums = array(s[3], shape, element), array(s[4], shape, np.int32)
        rows = array(s[5], (s[1],), np.float32)
        if s[6] != 0:
            each_block(s, _onto, (y, sums, rows, array(s[6], (s[7],), np.float32), s[8]))
        else:
            each_block(s, _onto_evenly, (y, sums, rows, s[8]))

    return scaled_onto


Int8Matrix: TypeAlias = tuple[Tensor, Tensor]  # int8 rows and the steps of each


def rows(x: Tensor, factors: Tensor | None = None, *, share: float = 1.0, out: Int8Matrix | None = None) -> Int8Matrix:
    """Rows of x, mixed along their width and rounded: (N, D) bf16 or fp32 -> int8 (N, padded D), share x steps (N,).
    `factors`: (padded D,) fp32, multiplied with the mixed numbers before they are rounded; then only 16 neighbours are
    mixed, as in `groups`. `out`: where to; contiguous."""
    n, d = x.shape
    q, steps = out or _new(n, padded_width(d), x)
    mixing = 0 if factors is None else factors, q, steps, d, registers_mixed(d), int(mirrors_thirds(d))
    run(_rows_kernel(x.dtype), n, block_rows(d), x, *mixing, float(share))
    return q, steps


def groups(w: Tensor, *, share: float = 1.0, out: Int8Matrix | None = None) -> Int8Matrix:
    """Rows of w, 16 that follow each other mixed with one another, and rounded: (O, D) bf16 or fp32 -> int8
    (padded O, D), share x steps fp32 (padded O,)."""
    o, d = w.shape
    q, steps = out or _new(padded_width(o), d, w)
    run(_groups_kernel(w.dtype), padded_width(o) // MOST, block_rows(d * MOST), w, q, steps, o, d, float(share))
    return q, steps


def _new(rows: int, width: int, like: Tensor) -> Int8Matrix:
    return pool.empty((rows, width), like, torch.int8), torch.empty(rows, dtype=torch.float32)


def onto(y: Tensor, sums: Tensor, row_steps: Tensor, column_steps: Tensor | None = None, *, add: bool) -> None:
    """y = sums x steps of their row and column, or y += that, rounded once.

    Args:
        y: (N, D) bf16 or fp32, contiguous. sums: (N, D) int32. row_steps: (N,) fp32. column_steps: (D,) fp32 or None.
    """
    n, d = y.shape
    across = 0 if column_steps is None else column_steps
    run(_onto_kernel(y.dtype), n, block_rows(d), y, sums, row_steps, across, d, int(add))
