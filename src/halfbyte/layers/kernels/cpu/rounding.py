"""Matrices on their way into 8-bit integers and back: mixed by a Hadamard transform, rounded with a scale for each row;
and what integer products sum up to, scaled and added to a result.

Why: a single large number in a row makes the step of all the others coarse. A Hadamard transform along the axis that is
summed over spreads it over its group, and on both factors it cancels: (x H)(W H)^T = x W^T.
What: numbers i, i + D/F, i + 2 D/F ... of a row are mixed, F of them, so that the transform is additions of whole
registers and never a shuffle; then those of each F-th part of the row once more (`streams`), up to 256 in all. For a
weight's rows (`groups`) whole rows are mixed with one another, F of them.
    q = round(mixed / step), step = largest / 127 of the row. Rows that hold a NaN or Inf get a step of NaN or Inf.
Source: QuaRot, arXiv:2404.00456 (rotations that cancel); rounding by adding 1.5 x 2^23, as in fdlibm.
Cost: about one instruction a number for rounding in, half of one for the way back.
Letters: N rows, D width, F streams that are mixed.
"""

from typing import Any, TypeAlias

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu.parallel import array, block_rows, each_block, kernel, per_dtype, run
from halfbyte.layers.kernels.cpu.scalar import inlined, load, store

Value: TypeAlias = Any  # of LLVM's, or a builder of them: llvmlite has no types
STREAMS = 16  # that are mixed at once
LARGEST = 127.0
# A row whose largest number is below this is taken for zeros: 127 / largest must be finite.
TINY = 2.0**-100
_SHORTEST = 8  # numbers that a stream has at least
_LANES = 16
_I1, _I8, _I16, _I32, _I64, _F32 = (*(ir.IntType(n) for n in (1, 8, 16, 32, 64)), ir.FloatType())
_FLOATS, _WORDS = ir.VectorType(_F32, _LANES), ir.VectorType(_I32, _LANES)
_MAGIC = 1.5 * 2**23


def streams(width: int) -> int:
    """How many numbers of this many are mixed with one another at once: a power of two, 1 for none."""
    count = 1
    while count < STREAMS and width % (2 * count) == 0 and width // (2 * count) >= _SHORTEST:
        count *= 2
    return count


def mixed(width: int) -> int:
    """How many numbers of a row of this width are mixed with one another, in `rows`."""
    return streams(width) * streams(width // streams(width))


def _every(builder: Value, value: Value) -> Value:
    vector = ir.VectorType(value.type, _LANES)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(_WORDS, None))


class _Part:
    """Loads and stores of 16 numbers, or of the last ones of a stream."""

    def __init__(self, builder: Value, left: Value = None) -> None:
        self.b, self.mask = builder, None
        if left is not None:
            places = ir.Constant(_WORDS, list(range(_LANES)))
            self.mask = builder.icmp_signed("<", places, _every(builder, builder.trunc(left, _I32)))

    def _masked(self, name: str, kind: Value, *args: Value) -> Value:
        """`llvm.masked.load` or `store`."""
        result = kind if name == "load" else ir.VoidType()
        suffix = f"v{_LANES}{'f32' if kind is _FLOATS else f'i{kind.element.width}'}.p0"
        function = ir.FunctionType(result, [a.type for a in args])
        callee = cgutils.get_or_insert_function(self.b.module, function, f"llvm.masked.{name}.{suffix}")
        return self.b.call(callee, args)

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
        words = self.b.zext(self.load(at, ir.VectorType(_I16, _LANES)), _WORDS)
        return self.b.bitcast(self.b.shl(words, ir.Constant(_WORDS, [16] * _LANES)), _FLOATS)


def _over(builder: Value, count: Value, body: Value) -> None:
    """body(part, first number) for every 16 of `count` numbers, and for what is left."""
    whole = builder.lshr(count, _I64(4))
    with cgutils.for_range(builder, whole, intp=_I64) as loop:
        body(_Part(builder), builder.shl(loop.index, _I64(4)))
    left = builder.and_(count, _I64(_LANES - 1))
    with builder.if_then(builder.icmp_signed("!=", left, _I64(0))):
        body(_Part(builder, left), builder.shl(whole, _I64(4)))


def _mixing(count: int) -> Value:
    @intrinsic
    def mix(typing_context, like, source, source_step, factors, factors_step, out, out_step, width, peaks):  # type: ignore[no-untyped-def]
        """out[k, j] = factors[k, j] x sum over i of H[k, i] source[i, j]; peaks[k]: the bits of the largest |out[k]|,
        those of a NaN if one is among them.

        Args: like: an array of the source's dtype, uint16 for bf16. Then int64: addresses, bytes from a stream to the
            next, and `width`, numbers of a stream. factors: fp32, or 0 for none. out: fp32. peaks: int32 (count,).
        """
        bf16 = like.dtype == types.uint16

        def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
            _, source, source_step, factors, factors_step, out, out_step, width, peaks = args
            b, most = builder, [cgutils.alloca_once_value(builder, ir.Constant(_WORDS, None)) for _ in range(count)]
            for one in most:
                b.store(ir.Constant(_WORDS, None), one)

            def at(base: Value, step: Value, k: int, first: Value, size: int) -> Value:
                return b.add(b.add(base, b.mul(step, _I64(k))), b.mul(first, _I64(size)))

            def passed(weighted: bool) -> Value:
                def body(part: _Part, first: Value) -> None:
                    size = 2 if bf16 else 4
                    v = [part.floats(at(source, source_step, k, first, size), bf16=bf16) for k in range(count)]
                    half = 1
                    while half < count:
                        for k in range(0, count, 2 * half):
                            for i in range(k, k + half):
                                v[i], v[i + half] = b.fadd(v[i], v[i + half]), b.fsub(v[i], v[i + half])
                        half *= 2
                    for k in range(count):
                        value = v[k]
                        if weighted:
                            value = b.fmul(value, part.load(at(factors, factors_step, k, first, 4), _FLOATS))
                        part.store(value, at(out, out_step, k, first, 4))
                        bits = b.and_(b.bitcast(value, _WORDS), ir.Constant(_WORDS, [0x7FFFFFFF] * _LANES))
                        seen = b.load(most[k])
                        b.store(b.select(b.icmp_signed(">", bits, seen), bits, seen), most[k])

                return body

            with b.if_else(b.icmp_signed("!=", factors, _I64(0))) as (then, otherwise):
                with then:
                    _over(b, width, passed(True))
                with otherwise:
                    _over(b, width, passed(False))
            for k in range(count):
                reduce = ir.FunctionType(_I32, [_WORDS])
                callee = cgutils.get_or_insert_function(b.module, reduce, f"llvm.vector.reduce.smax.v{_LANES}i32")
                place = b.inttoptr(b.add(peaks, _I64(4 * k)), _I32.as_pointer())
                b.store(b.call(callee, [b.load(most[k])]), place)
            return context.get_dummy_value()

        n = types.int64
        return types.void(like, n, n, n, n, n, n, n, n), build

    return mix


_mix_1, _mix_2, _mix_4, _mix_8, _mix_16 = (_mixing(n) for n in (1, 2, 4, 8, 16))


@inlined
def _mix(count, like, source, source_step, factors, factors_step, out, out_step, width, peaks):  # type: ignore[no-untyped-def]
    if count == 16:
        _mix_16(like, source, source_step, factors, factors_step, out, out_step, width, peaks)
    elif count == 8:
        _mix_8(like, source, source_step, factors, factors_step, out, out_step, width, peaks)
    elif count == 4:
        _mix_4(like, source, source_step, factors, factors_step, out, out_step, width, peaks)
    elif count == 2:
        _mix_2(like, source, source_step, factors, factors_step, out, out_step, width, peaks)
    else:
        _mix_1(like, source, source_step, factors, factors_step, out, out_step, width, peaks)


@intrinsic
def _to_bytes(typing_context, source, factor, out, width):  # type: ignore[no-untyped-def]
    """out[j] = round(source[j] x factor) as int8, for products of at most 127; fp32 at an address -> bytes at one."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, factor, out, width = args
        times, magic = _every(builder, factor), ir.Constant(_FLOATS, [_MAGIC] * _LANES)
        callee = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fma.v{_LANES}f32"
        )

        def body(part: _Part, first: Value) -> None:
            value = part.load(builder.add(source, builder.mul(first, _I64(4))), _FLOATS)
            bits = builder.bitcast(builder.call(callee, [value, times, magic]), _WORDS)
            part.store(builder.trunc(bits, ir.VectorType(_I8, _LANES)), builder.add(out, first))

        _over(builder, width, body)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64, types.int64), build


@inlined
def _step(peak):  # type: ignore[no-untyped-def]
    """The step of a row with this largest number, and what to multiply with before rounding."""
    if peak < np.float32(TINY):
        return np.float32(0.0), np.float32(0.0)
    return peak / np.float32(LARGEST), np.float32(LARGEST) / peak


@inlined
def _rows(like, x, factors, q, steps, width, count, again, itemsize, share, first, last):  # type: ignore[no-untyped-def]
    mixed, peaks = np.empty(width, np.float32), np.empty(STREAMS, np.int32)
    part = width // count
    for i in range(first, last):
        _mix(
            count, like, x + i * width * itemsize, part * itemsize, factors, part * 4,
            mixed.ctypes.data, part * 4, part, peaks.ctypes.data,
        )  # fmt: skip
        peak = np.int32(0)
        if again > 1:
            short = part // again
            for p in range(count):
                at = mixed.ctypes.data + p * part * 4
                _mix(again, mixed, at, short * 4, 0, 0, at, short * 4, short, peaks.ctypes.data)
                for k in range(again):
                    peak = max(peak, peaks[k])
        else:
            for k in range(count):
                peak = max(peak, peaks[k])
        peaks[0] = peak
        step, times = _step(peaks.view(np.float32)[0])
        steps[i] = step * share
        _to_bytes(mixed.ctypes.data, times, q + i * width, width)


@inlined
def _groups(like, w, q, steps, width, count, apart, itemsize, share, first, last):  # type: ignore[no-untyped-def]
    mixed, peaks = np.empty(width * count, np.float32), np.empty(STREAMS, np.int32)
    for i in range(first, last):  # rows i, i + apart, i + 2 apart ...
        _mix(
            count, like, w + i * width * itemsize, apart * width * itemsize, 0, 0,
            mixed.ctypes.data, width * 4, width, peaks.ctypes.data,
        )  # fmt: skip
        for k in range(count):
            step, times = _step(peaks.view(np.float32)[k])
            row = i + k * apart
            steps[row] = step * share
            _to_bytes(mixed.ctypes.data + k * width * 4, times, q + row * width, width)


@inlined
def _onto(y, sums, rows, columns, add, first, last):  # type: ignore[no-untyped-def]
    for i in range(first, last):
        a, b, row = sums[i], y[i], rows[i]
        if add:
            for j in range(columns.shape[0]):
                b[j] = store(load(b[j]) + np.float32(a[j]) * (row * columns[j]), b)
        else:
            for j in range(columns.shape[0]):
                b[j] = store(np.float32(a[j]) * (row * columns[j]), b)


@inlined
def _onto_evenly(y, sums, rows, add, first, last):  # type: ignore[no-untyped-def]
    for i in range(first, last):
        a, b, row = sums[i], y[i], rows[i]
        if add:
            for j in range(a.shape[0]):
                b[j] = store(load(b[j]) + np.float32(a[j]) * row, b)
        else:
            for j in range(a.shape[0]):
                b[j] = store(np.float32(a[j]) * row, b)


def _rows_of(element: type) -> object:
    size = 2 if element is np.uint16 else 4

    @kernel
    def rounded_rows(p):  # type: ignore[no-untyped-def]
        s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
        like, steps = array(s[3], (1,), element), array(s[6], (s[1],), np.float32)
        each_block(s, _rows, (like, s[3], s[4], s[5], steps, s[7], s[8], s[9], size, np.float32(f[10])))

    return rounded_rows


def _groups_of(element: type) -> object:
    size = 2 if element is np.uint16 else 4

    @kernel
    def rounded_groups(p):  # type: ignore[no-untyped-def]
        s, f = carray(p, (32,), np.int64), carray(p, (32,), np.float64)
        like, steps = array(s[3], (1,), element), array(s[5], (s[1] * s[7],), np.float32)
        each_block(s, _groups, (like, s[3], s[4], steps, s[6], s[7], s[1], size, np.float32(f[8])))

    return rounded_groups


def _onto_of(element: type) -> object:
    @kernel
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


_rows_kernel, _groups_kernel, _onto_kernel = per_dtype(_rows_of), per_dtype(_groups_of), per_dtype(_onto_of)


def rows(x: Tensor, factors: Tensor | None = None, *, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rows of x, mixed along their width and rounded: (N, D) bf16 or fp32 -> int8 (N, D), share x steps fp32 (N,).

    Args:
        factors: (D,) fp32, multiplied with the mixed numbers before they are rounded; then only `streams` are mixed,
            as in `groups`.
    """
    n, d = x.shape
    count = streams(d)
    q, steps = pool.empty((n, d), x, torch.int8), torch.empty(n, dtype=torch.float32)
    by, again = (0, streams(d // count)) if factors is None else (factors, 1)
    run(_rows_kernel(x.dtype), n, block_rows(d), x, by, q, steps, d, count, again, float(share))
    return q, steps


def groups(w: Tensor, *, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rows of w, mixed with one another and rounded: (O, D) bf16 or fp32 -> int8 (O, D), share x steps fp32 (O,)."""
    o, d = w.shape
    count = streams(o)
    q, steps = pool.empty((o, d), w, torch.int8), torch.empty(o, dtype=torch.float32)
    run(_groups_kernel(w.dtype), o // count, block_rows(d * count), w, q, steps, d, count, float(share))
    return q, steps


def onto(y: Tensor, sums: Tensor, row_steps: Tensor, column_steps: Tensor | None = None, *, add: bool) -> None:
    """y = sums x steps of their row and column, or y += that, rounded once.

    Args:
        y: (N, D) bf16 or fp32, contiguous. sums: (N, D) int32. row_steps: (N,) fp32. column_steps: (D,) fp32 or None.
    """
    n, d = y.shape
    by = 0 if column_steps is None else column_steps
    run(_onto_kernel(y.dtype), n, block_rows(d), y, sums, row_steps, by, d, int(add))
