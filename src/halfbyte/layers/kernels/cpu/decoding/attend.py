"""Attention of one token of each text over its cache: rotary embedding, keys and values kept, scores, their sums.

What: a head's keys and values lie as (T, d'), d' whole registers, so that both are read from beginning to end; while
keys are read their values are asked for, and then the next head's keys. Scores of a register's lanes of tokens are
added up together; values are summed in registers, four tokens in turns. A register of bf16 is two of fp32, of every
second number; a query is laid out like that once.
Source: the formulas of attention; rotary embedding as in transformers' Llama.

Letters: M texts, H query heads, K key heads, T room of the cache, R rotary width.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from halfbyte.layers.kernels.cpu.decoding import single, words
from halfbyte.layers.kernels.cpu.decoding.nibbles import Code, Value, mask, zeros
from halfbyte.layers.kernels.cpu.parallel import array
from halfbyte.layers.kernels.cpu.scalar import exp_f32, inlined, load, store

CHUNK_BYTES = {2: 64, 4: 32}  # of a cache's row, that are read at once: its type's bytes
USED = 27  # a slot of each operation: how many of its vectors there are now
_TURNS = 4  # tokens whose values have sums of their own
_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


class _Kind:
    """How numbers of a cache's type are read."""

    def __init__(self, code: Code, like: types.Array) -> None:
        self.code, self.is_bf16 = code, like.dtype == types.uint16
        self.lanes = 16 if self.is_bf16 else 8
        self.bytes, self.count = (64, 32) if self.is_bf16 else (32, 8)  # of a chunk
        self.floats = ir.VectorType(_F32, self.lanes)

    def parts(self, at: Value) -> list[Value]:
        """A chunk of a cache, as registers of fp32."""
        code, b = self.code, self.code.b
        if not self.is_bf16:
            return [code.load(at, self.floats)]
        ints = ir.VectorType(_I32, 16)
        both, upper = code.load(at, ints), ir.Constant(ints, [-65536] * 16)
        parts = b.shl(both, ir.Constant(ints, [16] * 16)), b.and_(both, upper)
        return [b.bitcast(part, self.floats) for part in parts]

    def apart(self, registers: list[Value]) -> list[Value]:
        """A chunk's numbers in their order -> as `parts` has them."""
        if not self.is_bf16:
            return registers
        return [self.code.b.shuffle_vector(*registers, mask(range(first, 32, 2))) for first in (0, 1)]

    def together(self, registers: list[Value]) -> list[Value]:
        """The other way round."""
        if not self.is_bf16:
            return registers
        places = [[i // 2 + 16 * (i % 2) for i in range(first, first + 16)] for first in (0, 16)]
        return [self.code.b.shuffle_vector(*registers, mask(place)) for place in places]

    def there(self, left: Value) -> Value:
        lanes = ir.Constant(ir.VectorType(_I64, self.lanes), list(range(self.lanes)))
        return self.code.b.icmp_signed("<", lanes, self.code.every(left, self.lanes))

    def load(self, at: Value, left: Value) -> Value:
        """Numbers of fp32, `left` of them, then zeros."""
        pointer = self.code.b.inttoptr(at, self.floats.as_pointer())
        name = f"llvm.masked.load.v{self.lanes}f32.p0"
        return self.code.call(name, self.floats, pointer, _I32(4), self.there(left), zeros(self.floats))

    def store(self, value: Value, at: Value, left: Value) -> None:
        pointer = self.code.b.inttoptr(at, self.floats.as_pointer())
        name = f"llvm.masked.store.v{self.lanes}f32.p0"
        self.code.call(name, ir.VoidType(), value, pointer, _I32(4), self.there(left))

    def sums(self, totals: list[Value]) -> Value:
        return single._all_sums(self.code, totals) if self.is_bf16 else words._sums(self.code, totals)

    def variables(self, count: int) -> list[Value]:
        made = [cgutils.alloca_once(self.code.b, self.floats) for _ in range(count)]
        for one in made:
            self.code.b.store(zeros(self.floats), one)
        return made


@intrinsic
def _spread(typing_context, like, q, d, scale, out):  # type: ignore[no-untyped-def]
    """q (d) fp32 times scale -> out (d') as caches are read. Addresses and d int64, scale fp32."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, q, d, scale, out = args
        code = Code(builder)
        kind = _Kind(code, like)
        with code.rolled(builder.sdiv(code.at(d, kind.count - 1), _I64(kind.count))) as c:
            first = [code.at(_I64(0), (c, kind.count), lane) for lane in range(0, kind.count, kind.lanes)]
            numbers = [kind.load(code.at(q, (n, 4)), builder.sub(d, n)) for n in first]
            for n, part in zip(first, kind.apart(numbers), strict=True):
                single._store(code, builder.fmul(part, code.every(scale, kind.lanes)), code.at(out, (n, 4)))
        return context.get_dummy_value()

    return types.void(like, types.int64, types.int64, types.float32, types.int64), build


@intrinsic
def _scores(typing_context, like, q, chunks, keys, row, n, far, s):  # type: ignore[no-untyped-def]
    """q as `_spread` has it times n keys, `row` bytes apart -> s, whole registers; returns the largest. All int64. What
    lies `far` bytes after them is asked for."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, q, chunks, keys, row, n, far, s = args
        code, b = Code(builder), builder
        kind = _Kind(code, like)
        most = cgutils.alloca_once(b, kind.floats)
        b.store(code.every(ir.Constant(_F32, float(np.float32(-3.0e38))), kind.lanes), most)
        last = b.sub(n, _I64(1))
        with code.rolled(b.sdiv(code.at(n, kind.lanes - 1), _I64(kind.lanes))) as tile:
            first, totals = b.mul(tile, _I64(kind.lanes)), kind.variables(kind.lanes)
            tokens = [code.at(first, i) for i in range(kind.lanes)]
            rows = [code.at(keys, (b.select(b.icmp_signed("<", t, last), t, last), row)) for t in tokens]
            with code.rolled(chunks) as c:
                at = code.at(q, (c, 4 * kind.count))
                own = [code.load(code.at(at, 4 * k), kind.floats) for k in range(0, kind.count, kind.lanes)]
                for place, total in zip(rows, totals, strict=True):
                    code.prefetch(code.at(place, (c, kind.bytes), far))
                    for part, number in zip(kind.parts(code.at(place, (c, kind.bytes))), own, strict=True):
                        b.store(code.fma(part, number, b.load(total)), total)
            found = kind.sums([b.load(total) for total in totals])
            single._store(code, found, code.at(s, (first, 4)))
            name = f"llvm.maxnum.v{kind.lanes}f32"
            b.store(code.call(name, kind.floats, b.load(most), found), most)
        return code.call(f"llvm.vector.reduce.fmax.v{kind.lanes}f32", _F32, b.load(most))

    return types.float32(like, *(7 * [types.int64])), build


@intrinsic
def _weighed(typing_context, like, s, n, values, row, d, share, far, out):  # type: ignore[no-untyped-def]
    """s (n) times share, times n values of d numbers, `row` bytes apart -> out (d). int64, but for share, fp32. What is
    `far` bytes after them is asked for."""

    def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, s, n, values, row, d, share, far, out = args
        code, b = Code(builder), builder
        kind = _Kind(code, like)
        parts = kind.count // kind.lanes

        def onto(t: Value, place: Value, totals: list[Value]) -> None:
            one = code.every(code.load(code.at(s, (t, 4)), _F32), kind.lanes)
            code.prefetch(code.at(place, (t, row), far))
            for part, total in zip(kind.parts(code.at(place, (t, row))), totals, strict=True):
                b.store(code.fma(part, one, b.load(total)), total)

        turns = b.sdiv(n, _I64(_TURNS))
        with code.rolled(b.sdiv(code.at(d, kind.count - 1), _I64(kind.count))) as c:
            totals, place = [kind.variables(parts) for _ in range(_TURNS)], code.at(values, (c, kind.bytes))
            with code.rolled(turns) as turn:
                for i, own in enumerate(totals):
                    onto(code.at(b.mul(turn, _I64(_TURNS)), i), place, own)
            done = b.mul(turns, _I64(_TURNS))
            with code.rolled(b.sub(n, done)) as t:
                onto(b.add(done, t), place, totals[0])
            numbers = [[b.load(one) for one in own] for own in totals]
            pairs = [[b.fadd(x, y) for x, y in zip(*numbers[i : i + 2], strict=True)] for i in (0, 2)]
            made = [b.fmul(b.fadd(x, y), code.every(share, kind.lanes)) for x, y in zip(*pairs, strict=True)]
            for k, part in enumerate(kind.together(made)):
                first = code.at(_I64(k * kind.lanes), (c, kind.count))
                kind.store(part, code.at(out, (first, 4)), b.sub(d, first))
        return context.get_dummy_value()

    n = types.int64
    return types.void(like, n, n, n, n, n, types.float32, n, n), build


@inlined
def _place(op, m):  # type: ignore[no-untyped-def]
    """Whose cache vector m reads and writes."""
    return array(op[25], (m + 1,), np.int64)[m] if op[25] != 0 else m


@inlined
def _rotated(op, number, like, m, head):  # type: ignore[no-untyped-def]
    """One head's numbers (d) of `rotate`, in their place."""
    heads, key_heads, d, wide = op[5], op[6], op[7], op[8]
    x = array(op[4] + (m * (heads + 2 * key_heads) + head) * d * 4, (d,), np.float32)
    weights = op[11] if head < heads else op[12]
    if weights != 0:
        weight, total = array(weights, (d,), like.dtype), np.float32(0.0)
        for j in range(d):
            total += x[j] * x[j]
        share = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(d) + np.float32(number[13])))
        for j in range(d):
            x[j] *= share * (load(weight[j]) + np.float32(op[14]))
    cos, sin, half = op[9] + m * wide * 4, op[10] + m * wide * 4, wide // 2
    cos_low, cos_high = array(cos, (half,), np.float32), array(cos + 4 * half, (half,), np.float32)
    sin_low, sin_high = array(sin, (half,), np.float32), array(sin + 4 * half, (half,), np.float32)
    low, high = x[:half], array(x.ctypes.data + 4 * half, (half,), np.float32)
    for j in range(half):
        a, b = low[j], high[j]
        low[j], high[j] = a * cos_low[j] - b * sin_low[j], b * cos_high[j] + a * sin_high[j]
    return x


@inlined
def rotate(op, number, like, item):  # type: ignore[no-untyped-def]
    """A text's key head, and the query heads that it has: 4 q, k, v (M, (H + 2 K) d), 5 H, 6 K, 7 d, 8 R, 9 cos (M, R),
    10 sin, 11 weight of q's norm, 12 of k's, 13 eps, 14 one_plus, 15 keys (M, K, T, d'), 16 values (M, K, T, d'), 17 T,
    18 positions (M), 25 whose cache (M) or 0, 26 bytes of d'."""
    heads, key_heads, d, room = op[5], op[6], op[7], op[17]
    m, head = item // key_heads, item % key_heads
    if m >= op[USED]:
        return
    for own in range(heads * head // key_heads, heads * (head + 1) // key_heads):
        _rotated(op, number, like, m, own)
    x = _rotated(op, number, like, m, heads + head)
    row = ((_place(op, m) * key_heads + head) * room + array(op[18], (m + 1,), np.int64)[m]) * op[26]
    keys, values = array(op[15] + row, (d,), like.dtype), array(op[16] + row, (d,), like.dtype)
    v = array(x.ctypes.data + 4 * key_heads * d, (d,), np.float32)
    for j in range(d):
        keys[j] = store(x[j], keys)
    for j in range(d):
        values[j] = store(v[j], values)


@inlined
def attend(op, number, like, s, scratch, item):  # type: ignore[no-untyped-def]
    """4..7, 15..18, 25, 26 as in `rotate`; 19 scale, 20 cap, 21 window, 22 plain out (M, D'), 24 D'."""
    heads, key_heads, d, row = op[5], op[6], op[7], op[26]
    m, head, cap = item // key_heads, item % key_heads, np.float32(number[20])
    if m >= op[USED]:
        return
    last = array(op[18], (m + 1,), np.int64)[m] + 1
    first = max(0, last - op[21]) if op[21] > 0 else 0
    at, n = ((_place(op, m) * key_heads + head) * op[17] + first) * row, last - first
    to_values, to_next = op[16] - op[15], op[15] - op[16] + op[17] * row  # of this head, and the keys of the next one
    spread, chunks = scratch.ctypes.data, row // (64 if like.itemsize == 2 else 32)
    for own in range(heads * head // key_heads, heads * (head + 1) // key_heads):
        q = op[4] + (m * (heads + 2 * key_heads) + own) * d * 4
        _spread(like, q, d, np.float32(number[19]), spread)
        most = _scores(like, spread, chunks, op[15] + at, row, n, to_values, s.ctypes.data)
        total = np.float32(0.0)
        if cap != np.float32(0.0):
            for t in range(n):
                s[t] = cap * np.float32(math.tanh(s[t] / cap))
            most = cap * np.float32(math.tanh(most / cap))
        for t in range(n):
            e = exp_f32(s[t] - most)
            s[t] = e
            total += e
        out = op[22] + (m * op[24] + own * d) * 4
        _weighed(like, s.ctypes.data, n, op[16] + at, row, d, np.float32(1.0) / total, to_next, out)
        to_values = to_next = 0
