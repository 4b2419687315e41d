"""Attention of one token of each text over its cache: rotary embedding, keys and values kept, scores, their sums.

What: a head's keys and values lie as (T, d'), d' whole registers, so that both are read from beginning to end, once for
up to three queries; while keys are read their values are asked for, and then the next head's keys. Scores of a
register's lanes of tokens are added up together; values are summed in registers, four tokens in turns. A register of
bf16 is two of fp32, of every second number; a query is laid out like that once.
Source: the formulas of attention; rotary embedding as in transformers' Llama.

Letters: M texts, H query heads, K key heads, T max_tokens of the cache, R rotary width.
"""

import math

import numpy as np
from llvmlite import ir

from halfbyte.layers.kernels.cpu.decoding import slots

from halfbyte.layers.kernels.cpu.decoding.emit import (  # isort: skip
    F32, F32X8, F32X16, I32X16, I64, Code, emitted, mask,
)  # fmt: skip
from halfbyte.layers.kernels.cpu.parallel import array
from halfbyte.layers.kernels.cpu.scalar import Value, exp_f32, inlined, load, store

CHUNK_BYTES = {2: 64, 4: 32}  # of a cache's row, that are read at once: its type's bytes
AT_ONCE = 3  # queries that read keys and values together
_PRODUCTS_BYTES = AT_ONCE * 1024  # of scratch, for their products with a register's lanes of keys
_TURNS = 4  # tokens whose values have sums of their own


class _CacheType:
    """How numbers of a cache's type are read."""

    def __init__(self, code: Code) -> None:
        self.code, self.is_bf16 = code, code.is_bf16
        self.floats, self.lanes = (F32X16, 16) if self.is_bf16 else (F32X8, 8)
        self.bytes, self.count = (64, 32) if self.is_bf16 else (32, 8)  # of a chunk

    def parts(self, at: Value) -> list[Value]:
        """A chunk of a cache, as registers of fp32."""
        code, b = self.code, self.code.b
        if not self.is_bf16:
            return [code.load(at, self.floats)]
        both, upper = code.load(at, I32X16), ir.Constant(I32X16, [-65536] * 16)
        parts = b.shl(both, ir.Constant(I32X16, [16] * 16)), b.and_(both, upper)
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

    def products(self, head: int) -> int:
        """Where a query's registers begin in the scratch."""
        return head * 4 * self.lanes**2

    def pair(self, one: Value, other: Value) -> list[Value]:
        """Products of two tokens, as they lie in the scratch: of bf16 each in a half of a register."""
        return self.code.halves([one, other]) if self.is_bf16 else [one, other]

    def sums(self, products: Value) -> Value:
        """The sums of the products of a register's lanes of tokens, from that address on."""
        count = self.lanes // 2 if self.is_bf16 else self.lanes
        registers = [self.code.load(self.code.at(products, 4 * self.lanes * n), self.floats) for n in range(count)]
        return self.code.sums_of_16(registers, width=8) if self.is_bf16 else self.code.sums_of_8(registers)


@emitted("q d scale:f out")
def _spread(code: Code, args: Value) -> None:
    """q (d) fp32 times scale -> out (d') as caches are read."""
    numbers, b = _CacheType(code), code.b
    with code.rolled(b.sdiv(code.at(args.d, numbers.count - 1), I64(numbers.count))) as c:
        first = [code.at(I64(0), (c, numbers.count), lane) for lane in range(0, numbers.count, numbers.lanes)]
        parts = []
        for n in first:
            there = code.row_mask(b.sub(args.d, n), numbers.lanes)
            parts.append(code.masked_load(code.at(args.q, (n, 4)), numbers.floats, there))
        for n, part in zip(first, numbers.apart(parts), strict=True):
            code.store(b.fmul(part, code.every(args.scale, numbers.lanes)), code.at(args.out, (n, 4)))


@emitted("queries q q_row chunks keys row n far products s s_row largest")
def _scores(code: Code, args: Value) -> None:
    """Up to three queries as `_spread` has them times n keys, `row` bytes apart -> s, whole registers. q_row, s_row:
    bytes from a query to the next. far: what lies so many bytes after the keys is asked for. products: _PRODUCTS_BYTES
    of scratch. largest: (queries,) fp32, the largest of each."""
    for queries in code.cases(args.queries, range(AT_ONCE, 0, -1)):
        _scores_of(code, args, queries)


def _scores_of(code: Code, args: Value, queries: int) -> None:
    numbers, b = _CacheType(code), code.b
    floats, lanes = numbers.floats, numbers.lanes
    largest = code.variables(floats, queries)
    for one in largest:
        b.store(code.every(ir.Constant(F32, float(np.float32(-3.0e38))), lanes), one)
    last = b.sub(args.n, I64(1))
    with code.rolled(b.sdiv(code.at(args.n, lanes - 1), I64(lanes))) as tile:
        first = b.mul(tile, I64(lanes))
        with code.rolled(I64(lanes // 2)) as pair:
            tokens = [code.at(first, (pair, 2), i) for i in (0, 1)]
            tokens = [b.select(b.icmp_signed("<", token, last), token, last) for token in tokens]
            keys = [code.at(args.keys, (token, args.row)) for token in tokens]
            totals = [code.variables(floats, queries) for _ in tokens]
            with code.rolled(args.chunks) as c:
                for key in keys:
                    code.prefetch(code.at(key, (c, numbers.bytes), args.far))
                parts = [numbers.parts(code.at(key, (c, numbers.bytes))) for key in keys]
                for query in range(queries):
                    q = code.at(args.q, (args.q_row, query), (c, 4 * numbers.count))
                    for k in range(len(parts[0])):
                        number = code.load(code.at(q, 4 * lanes * k), floats)
                        for part, total in zip(parts, totals, strict=True):
                            b.store(code.fma(part[k], number, b.load(total[query])), total[query])
            for query in range(queries):
                pairs = numbers.pair(*(b.load(total[query]) for total in totals))
                for k, one in enumerate(pairs):
                    at = code.at(args.products, numbers.products(query), (pair, len(pairs) * 4 * lanes), 4 * lanes * k)
                    code.store(one, at)
        for query, one in enumerate(largest):
            scores = numbers.sums(code.at(args.products, numbers.products(query)))
            code.store(scores, code.at(args.s, (args.s_row, query), (first, 4)))
            b.store(code.call(f"llvm.maxnum.v{lanes}f32", floats, b.load(one), scores), one)
    for query, one in enumerate(largest):
        score = code.call(f"llvm.vector.reduce.fmax.v{lanes}f32", F32, b.load(one))
        code.store(score, code.at(args.largest, 4 * query))


@emitted("queries s s_row n values row d shares far out out_row")
def _weighted_sums(code: Code, args: Value) -> None:
    """For each of up to three queries s (n) times its share, times n values of d numbers -> out (d). shares: (queries,)
    fp32. far: what lies so many bytes after the values is asked for."""
    for queries in code.cases(args.queries, range(AT_ONCE, 0, -1)):
        _weighted_sums_of(code, args, queries)


def _weighted_sums_of(code: Code, args: Value, queries: int) -> None:
    numbers, b = _CacheType(code), code.b
    floats, lanes = numbers.floats, numbers.lanes

    def add(t: Value, values: Value, totals: list[list[Value]]) -> None:
        code.prefetch(code.at(values, (t, args.row), args.far))
        parts = numbers.parts(code.at(values, (t, args.row)))
        for query, sums in enumerate(totals):
            one = code.every(code.load(code.at(args.s, (args.s_row, query), (t, 4)), F32), lanes)
            for part, total in zip(parts, sums, strict=True):
                b.store(code.fma(part, one, b.load(total)), total)

    turns = b.sdiv(args.n, I64(_TURNS))
    with code.rolled(b.sdiv(code.at(args.d, numbers.count - 1), I64(numbers.count))) as c:
        values = code.at(args.values, (c, numbers.bytes))
        totals = [[code.variables(floats, numbers.count // lanes) for _ in range(queries)] for _ in range(_TURNS)]
        with code.rolled(turns) as turn:
            for i, sums in enumerate(totals):
                add(code.at(b.mul(turn, I64(_TURNS)), i), values, sums)
        done = b.mul(turns, I64(_TURNS))
        with code.rolled(b.sub(args.n, done)) as t:
            add(b.add(done, t), values, totals[0])
        for query in range(queries):
            share = code.every(code.load(code.at(args.shares, 4 * query), F32), lanes)
            of_turns = [[b.load(one) for one in turn[query]] for turn in totals]
            pairs = [[b.fadd(x, y) for x, y in zip(*of_turns[i : i + 2], strict=True)] for i in (0, 2)]
            weighted = [b.fmul(b.fadd(x, y), share) for x, y in zip(*pairs, strict=True)]
            for k, part in enumerate(numbers.together(weighted)):
                first = code.at(I64(k * lanes), (c, numbers.count))
                there = code.row_mask(b.sub(args.d, first), lanes)
                code.masked_store(part, code.at(args.out, (args.out_row, query), (first, 4)), there)


def scratch_bytes(row: int, itemsize: int) -> int:
    """What `attend` needs where a cache's row has so many bytes."""
    return 2 * 64 + _PRODUCTS_BYTES + AT_ONCE * 4 * row // itemsize


@inlined
def _place(op, m):  # type: ignore[no-untyped-def]
    """Whose cache vector m reads and writes."""
    return array(op[slots.ATTEND_PLACES], (m + 1,), np.int64)[m] if op[slots.ATTEND_PLACES] != 0 else m


@inlined
def _head_at(op, m, head):  # type: ignore[no-untyped-def]
    """The address of a head's numbers (d): queries, then keys, then values."""
    heads, key_heads = op[slots.ATTEND_HEADS], op[slots.ATTEND_KEY_HEADS]
    place = head % heads * 3 + head // heads if op[slots.ATTEND_LAYOUT] & 1 else head  # as many keys as queries
    count = heads + 2 * key_heads
    if op[slots.ATTEND_LAYOUT] & 4:
        place, count = (2 * head if head < heads else heads + head), count + heads
    return op[slots.ATTEND_QKV] + (m * count + place) * op[slots.ATTEND_HEAD_SIZE] * 4


@inlined
def _rotated(op, number, like, m, head):  # type: ignore[no-untyped-def]
    """One head's numbers (d) of `rotate`, in their place."""
    heads, d, rotary = op[slots.ATTEND_HEADS], op[slots.ATTEND_HEAD_SIZE], op[slots.ATTEND_ROTARY]
    x = array(_head_at(op, m, head), (d,), np.float32)
    norm = op[slots.ATTEND_Q_NORM] if head < heads else op[slots.ATTEND_K_NORM]
    if norm != 0:
        weight, total = array(norm, (d,), like.dtype), np.float32(0.0)
        for j in range(d):
            total += x[j] * x[j]
        mean = total / np.float32(d) + np.float32(number[slots.ATTEND_EPS])
        share = np.float32(1.0) / np.float32(math.sqrt(mean))
        for j in range(d):
            x[j] *= share * (load(weight[j]) + np.float32(op[slots.ATTEND_ONE_PLUS]))
    cos, sin, half = op[slots.ATTEND_COS] + m * rotary * 4, op[slots.ATTEND_SIN] + m * rotary * 4, rotary // 2
    cos_low, cos_high = array(cos, (half,), np.float32), array(cos + 4 * half, (half,), np.float32)
    sin_low, sin_high = array(sin, (half,), np.float32), array(sin + 4 * half, (half,), np.float32)
    low, high = x[:half], array(x.ctypes.data + 4 * half, (half,), np.float32)
    if op[slots.ATTEND_LAYOUT] & 2:
        for j in range(half):
            a, b = x[2 * j], x[2 * j + 1]
            x[2 * j], x[2 * j + 1] = a * cos_low[j] - b * sin_low[j], b * cos_low[j] + a * sin_low[j]
        return x
    for j in range(half):
        a, b = low[j], high[j]
        low[j], high[j] = a * cos_low[j] - b * sin_low[j], b * cos_high[j] + a * sin_high[j]
    return x


@inlined
def rotate(op, number, like, item):  # type: ignore[no-untyped-def]
    """ROTATE: a text's key head, and the query heads that it has, rotated; key and value to the cache."""
    heads, key_heads, d = op[slots.ATTEND_HEADS], op[slots.ATTEND_KEY_HEADS], op[slots.ATTEND_HEAD_SIZE]
    m, head = item // key_heads, item % key_heads
    position = array(op[slots.ATTEND_POSITIONS], (m + 1,), np.int64)[m]
    if m >= op[slots.USED] or position < 0:
        return
    for query in range(heads * head // key_heads, heads * (head + 1) // key_heads):
        _rotated(op, number, like, m, query)
    x = _rotated(op, number, like, m, heads + head)
    row = (_place(op, m) * key_heads + head) * op[slots.ATTEND_MAX_TOKENS] + position
    at = row * op[slots.ATTEND_CACHE_ROW]
    keys = array(op[slots.ATTEND_KEYS] + at, (d,), like.dtype)
    values = array(op[slots.ATTEND_VALUES] + at, (d,), like.dtype)
    v = array(_head_at(op, m, heads + key_heads + head), (d,), np.float32)
    for j in range(d):
        keys[j] = store(x[j], keys)
    for j in range(d):
        values[j] = store(v[j], values)


@inlined
def _chances(s, largest, cap):  # type: ignore[no-untyped-def]
    """Scores (n) -> how much each counts, times `largest`: their largest, then what makes their sum 1."""
    highest, total = largest[0], np.float32(0.0)
    if cap != np.float32(0.0):
        for t in range(len(s)):
            s[t] = cap * np.float32(math.tanh(s[t] / cap))
        highest = cap * np.float32(math.tanh(highest / cap))
    for t in range(len(s)):
        e = exp_f32(s[t] - highest)
        s[t] = e
        total += e
    largest[0] = np.float32(1.0) / total


@inlined
def attend(op, number, like, s, scratch, item):  # type: ignore[no-untyped-def]
    """ATTEND: a text's key head and the query heads that it has over the cache -> their output."""
    heads, key_heads, d = op[slots.ATTEND_HEADS], op[slots.ATTEND_KEY_HEADS], op[slots.ATTEND_HEAD_SIZE]
    row, all_keys, all_values = op[slots.ATTEND_CACHE_ROW], op[slots.ATTEND_KEYS], op[slots.ATTEND_VALUES]
    m, head, cap = item // key_heads, item % key_heads, np.float32(number[slots.ATTEND_CAP])
    end = array(op[slots.ATTEND_POSITIONS], (m + 1,), np.int64)[m] + 1
    if m >= op[slots.USED] or end <= 0:
        return
    first = max(0, end - op[slots.ATTEND_WINDOW]) if op[slots.ATTEND_WINDOW] > 0 else 0
    n, max_tokens = end - first, op[slots.ATTEND_MAX_TOKENS]
    at = ((_place(op, m) * key_heads + head) * max_tokens + first) * row
    to_values, to_next = all_values - all_keys, all_keys - all_values + max_tokens * row  # this head's; the next keys
    ends = (scratch.ctypes.data + 63) // 64 * 64  # the largest score of each query, and its share; 64 bytes
    products, spread = ends + 64, ends + 64 + _PRODUCTS_BYTES
    q_row, chunks = 4 * row // like.itemsize, row // (64 if like.itemsize == 2 else 32)
    keys, values, s_row = all_keys + at, all_values + at, 4 * max_tokens
    query, last = heads * head // key_heads, heads * (head + 1) // key_heads
    while query < last:
        count = min(AT_ONCE, last - query) if last - query != 4 else 2  # four are two and two, not three and one
        for i in range(count):
            q = _head_at(op, m, query + i)
            _spread(like, q, d, np.float32(number[slots.ATTEND_SCALE]), spread + i * q_row)
        _scores(like, count, spread, q_row, chunks, keys, row, n, to_values, products, s.ctypes.data, s_row, ends)
        if op[slots.ATTEND_SLOPES] != 0:
            slopes = array(op[slots.ATTEND_SLOPES], (heads,), np.float32)
            for i in range(count):
                one = array(s.ctypes.data + i * s_row, (n,), np.float32)
                highest = np.float32(-np.inf)
                for t in range(n):
                    one[t] += slopes[query + i] * np.float32(t + 1 - n)
                    highest = max(highest, one[t])
                array(ends + 4 * i, (1,), np.float32)[0] = highest
        for i in range(count):
            _chances(array(s.ctypes.data + i * s_row, (n,), np.float32), array(ends + 4 * i, (1,), np.float32), cap)
        out = op[slots.ATTEND_OUT] + (m * op[slots.ATTEND_OUT_ROW] + query * d) * 4
        _weighted_sums(like, count, s.ctypes.data, s_row, n, values, row, d, ends, to_next, out, 4 * d)
        to_values = to_next = 0
        query += count
