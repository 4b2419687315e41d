"""Attention of one token of each text over its cache: rotary embedding, keys and values kept, scores, their sums.

What: a head's keys and values lie as (T, d'), d' whole registers, so that both are read from beginning to end, once for
up to three queries; while keys are read their values are asked for, and then the next head's keys. Scores of a
register's lanes of tokens are added up together; values are summed in registers, four tokens in turns. A register of
bf16 is two of fp32, of every second number; a query is laid out like that once.
Source: the formulas of attention; rotary embedding as in transformers' Llama.

Letters: M texts, H query heads, K key heads, T room of the cache, R rotary width.
"""

import math
from collections.abc import Callable

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
AT_ONCE = 3  # queries that read keys and values together
_KEPT = AT_ONCE * 1024  # bytes of scratch for their products
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

    def kept(self, head: int) -> int:
        """Where a query's registers begin in the scratch."""
        return head * 4 * self.lanes**2

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

    def pair(self, one: Value, other: Value) -> list[Value]:
        """Products of two tokens, as they are kept: of bf16 each in a half of a register."""
        return single._halves(self.code, [one, other]) if self.is_bf16 else [one, other]

    def sums(self, kept: Value) -> Value:
        """The sums of the products of a register's lanes of tokens, from address `kept` on."""
        count = self.lanes // 2 if self.is_bf16 else self.lanes
        products = [self.code.load(self.code.at(kept, 4 * self.lanes * n), self.floats) for n in range(count)]
        return single._all_sums(self.code, products, width=8) if self.is_bf16 else words._sums(self.code, products)

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


def _scores(heads: int) -> Callable[..., None]:
    """An intrinsic: `heads` queries as `_spread` has them times n keys, `row` bytes apart -> s, whole registers.

    Its arguments: like: an array of a cache's type. Then int64 (addresses, bytes, counts). q, q_row: bytes from a query
    to the next. chunks, keys, row, n. far: what lies so many bytes after the keys is asked for. kept: heads times
    lanes registers of scratch. s, s_row. most: (heads,) fp32, the largest of each.
    """

    @intrinsic
    def scores(  # type: ignore[no-untyped-def]
        typing_context, like, q, q_row, chunks, keys, row, n, far, kept, s, s_row, most
    ):
        def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
            _, q, q_row, chunks, keys, row, n, far, kept, s, s_row, most = args
            code, b = Code(builder), builder
            kind = _Kind(code, like)
            lowest = code.every(ir.Constant(_F32, float(np.float32(-3.0e38))), kind.lanes)
            largest = kind.variables(heads)
            for one in largest:
                b.store(lowest, one)
            last = b.sub(n, _I64(1))
            with code.rolled(b.sdiv(code.at(n, kind.lanes - 1), _I64(kind.lanes))) as tile:
                first = b.mul(tile, _I64(kind.lanes))
                with code.rolled(_I64(kind.lanes // 2)) as pair:
                    tokens = [code.at(first, (pair, 2), i) for i in (0, 1)]
                    places = [code.at(keys, (b.select(b.icmp_signed("<", t, last), t, last), row)) for t in tokens]
                    totals = [kind.variables(heads) for _ in tokens]
                    with code.rolled(chunks) as c:
                        for place in places:
                            code.prefetch(code.at(place, (c, kind.bytes), far))
                        parts = [kind.parts(code.at(place, (c, kind.bytes))) for place in places]
                        for head in range(heads):
                            own = code.at(q, (q_row, head), (c, 4 * kind.count))
                            for k in range(len(parts[0])):
                                number = code.load(code.at(own, 4 * kind.lanes * k), kind.floats)
                                for part, total in zip(parts, totals, strict=True):
                                    b.store(code.fma(part[k], number, b.load(total[head])), total[head])
                    for head in range(heads):
                        made = kind.pair(*(b.load(total[head]) for total in totals))
                        for k, one in enumerate(made):
                            at = code.at(kept, kind.kept(head), (pair, len(made) * 4 * kind.lanes), 4 * kind.lanes * k)
                            single._store(code, one, at)
                for head, one in enumerate(largest):
                    found = kind.sums(code.at(kept, kind.kept(head)))
                    single._store(code, found, code.at(s, (s_row, head), (first, 4)))
                    b.store(code.call(f"llvm.maxnum.v{kind.lanes}f32", kind.floats, b.load(one), found), one)
            for head, one in enumerate(largest):
                found = code.call(f"llvm.vector.reduce.fmax.v{kind.lanes}f32", _F32, b.load(one))
                b.store(found, b.inttoptr(code.at(most, 4 * head), _F32.as_pointer()))
            return context.get_dummy_value()

        return types.void(like, *(11 * [types.int64])), build

    made: Callable[..., None] = scores
    return made


def _weighed(heads: int) -> Callable[..., None]:
    """An intrinsic: for each of `heads` s (n) times its share, times n values of d numbers -> out (d).

    Its arguments: like: an array of a cache's type. Then int64 (addresses, bytes, counts). s, s_row, n. values, row,
    d. shares: (heads,) fp32. far: what lies so many bytes after the values is asked for. out, out_row.
    """

    @intrinsic
    def weighed(  # type: ignore[no-untyped-def]
        typing_context, like, s, s_row, n, values, row, d, shares, far, out, out_row
    ):
        def build(context, builder, signature, args):  # type: ignore[no-untyped-def]
            _, s, s_row, n, values, row, d, shares, far, out, out_row = args
            code, b = Code(builder), builder
            kind = _Kind(code, like)

            def onto(t: Value, place: Value, totals: list[list[Value]]) -> None:
                code.prefetch(code.at(place, (t, row), far))
                parts = kind.parts(code.at(place, (t, row)))
                for head, own in enumerate(totals):
                    one = code.every(code.load(code.at(s, (s_row, head), (t, 4)), _F32), kind.lanes)
                    for part, total in zip(parts, own, strict=True):
                        b.store(code.fma(part, one, b.load(total)), total)

            turns = b.sdiv(n, _I64(_TURNS))
            with code.rolled(b.sdiv(code.at(d, kind.count - 1), _I64(kind.count))) as c:
                place = code.at(values, (c, kind.bytes))
                totals = [[kind.variables(kind.count // kind.lanes) for _ in range(heads)] for _ in range(_TURNS)]
                with code.rolled(turns) as turn:
                    for i, own in enumerate(totals):
                        onto(code.at(b.mul(turn, _I64(_TURNS)), i), place, own)
                done = b.mul(turns, _I64(_TURNS))
                with code.rolled(b.sub(n, done)) as t:
                    onto(b.add(done, t), place, totals[0])
                for head in range(heads):
                    share = code.every(code.load(code.at(shares, 4 * head), _F32), kind.lanes)
                    numbers = [[b.load(one) for one in turn[head]] for turn in totals]
                    pairs = [[b.fadd(x, y) for x, y in zip(*numbers[i : i + 2], strict=True)] for i in (0, 2)]
                    made = [b.fmul(b.fadd(x, y), share) for x, y in zip(*pairs, strict=True)]
                    for k, part in enumerate(kind.together(made)):
                        first = code.at(_I64(k * kind.lanes), (c, kind.count))
                        kind.store(part, code.at(out, (out_row, head), (first, 4)), b.sub(d, first))
            return context.get_dummy_value()

        return types.void(like, *(10 * [types.int64])), build

    made: Callable[..., None] = weighed
    return made


_scores_1, _scores_2, _scores_3 = (_scores(n) for n in (1, 2, 3))
_weighed_1, _weighed_2, _weighed_3 = (_weighed(n) for n in (1, 2, 3))


def scratch_bytes(row: int, itemsize: int) -> int:
    """What `attend` needs where a cache's row has so many bytes."""
    return 2 * 64 + _KEPT + AT_ONCE * 4 * row // itemsize


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
def _chances(s, most, cap):  # type: ignore[no-untyped-def]
    """Scores (n) -> how much each counts, times `most`: their largest, then what makes their sum 1."""
    highest, total = most[0], np.float32(0.0)
    if cap != np.float32(0.0):
        for t in range(len(s)):
            s[t] = cap * np.float32(math.tanh(s[t] / cap))
        highest = cap * np.float32(math.tanh(highest / cap))
    for t in range(len(s)):
        e = exp_f32(s[t] - highest)
        s[t] = e
        total += e
    most[0] = np.float32(1.0) / total


@inlined
def attend(op, number, like, s, scratch, item):  # type: ignore[no-untyped-def]
    """4 .. 18, 25, 26 as in `rotate`, which is done first where 9 is not 0; 19 scale, 20 cap, 21 window, 22 plain out
    (M, D'), 24 D'."""
    heads, key_heads, d, row = op[5], op[6], op[7], op[26]
    m, head, cap = item // key_heads, item % key_heads, np.float32(number[20])
    if m >= op[USED]:
        return
    last = array(op[18], (m + 1,), np.int64)[m] + 1
    first = max(0, last - op[21]) if op[21] > 0 else 0
    at, n = ((_place(op, m) * key_heads + head) * op[17] + first) * row, last - first
    to_values, to_next = op[16] - op[15], op[15] - op[16] + op[17] * row  # of this head, and the keys of the next one
    ends = (scratch.ctypes.data + 63) // 64 * 64  # the largest score of each query, and its share; 64 bytes
    kept, spread = ends + 64, ends + 64 + _KEPT
    q_row, chunks = 4 * row // like.itemsize, row // (64 if like.itemsize == 2 else 32)
    keys, values, s_row, out_row = op[15] + at, op[16] + at, 4 * op[17], 4 * d
    own, last = heads * head // key_heads, heads * (head + 1) // key_heads
    while own < last:
        count = min(AT_ONCE, last - own) if last - own != 4 else 2  # four are two and two, not three and one
        for i in range(count):
            q = op[4] + (m * (heads + 2 * key_heads) + own + i) * d * 4
            _spread(like, q, d, np.float32(number[19]), spread + i * q_row)
        if count == 3:
            _scores_3(like, spread, q_row, chunks, keys, row, n, to_values, kept, s.ctypes.data, s_row, ends)
        elif count == 2:
            _scores_2(like, spread, q_row, chunks, keys, row, n, to_values, kept, s.ctypes.data, s_row, ends)
        else:
            _scores_1(like, spread, q_row, chunks, keys, row, n, to_values, kept, s.ctypes.data, s_row, ends)
        for i in range(count):
            _chances(array(s.ctypes.data + i * s_row, (n,), np.float32), array(ends + 4 * i, (1,), np.float32), cap)
        out = op[22] + (m * op[24] + own * d) * 4
        if count == 3:
            _weighed_3(like, s.ctypes.data, s_row, n, values, row, d, ends, to_next, out, out_row)
        elif count == 2:
            _weighed_2(like, s.ctypes.data, s_row, n, values, row, d, ends, to_next, out, out_row)
        else:
            _weighed_1(like, s.ctypes.data, s_row, n, values, row, d, ends, to_next, out, out_row)
        to_values = to_next = 0
        own += count
