"""A token's whole way through a model as one call: a list of operations that all threads walk through together.

Why: a small model has 210 matrix products a token; started one by one from Python, or one by one on a pool of threads,
the starts cost more than the products. Here each operation is split into items; a thread takes the next item from a
counter, and an operation begins when those that it names are done. No thread waits for a thread, only for work, so any
number of threads is right, one included.
What: an operation is a row of 32 int64 slots: kind, items, the range of operations that must be done before, then
addresses, sizes and floats (as float64 bits); `layers/decoding/tape.py` writes them. Activations between operations are
fp32; what a product reads is there twice, in order in fp32, and in the kernels' order and type. Each thread has a share
of an operation's items, neighbours in memory, before it takes another's; and while it waits it asks for the first bytes
of its share of the next matrix.
Source: products are in `single.py` and `several.py` (bf16) and `words.py` (fp32), attention in `attend.py`; the rest
are the formulas of `norm.py` and `gate.py`.
Cost: about 0.2 microseconds between two operations on two threads.

Letters: M vectors (texts at once), D in, O out, H query heads, K key heads, T room of the cache, R rotary width.
"""

import math

import numpy as np
from numba import carray, types
from numba.extending import overload

from halfbyte.layers.kernels.cpu.decoding import attend, heads, nibbles, several, single, words
from halfbyte.layers.kernels.cpu.gate import SILU, sigmoid
from halfbyte.layers.kernels.cpu.parallel import array, kernel, per_dtype
from halfbyte.layers.kernels.cpu.scalar import FASTMATH, give, inlined, load, pause, read, store, take

WIDTH = 32  # slots of an operation
USED = attend.USED  # of its slots: how many of the vectors there are now
LINE = 8  # int64 of a cache line: each counter has its own
KINDS = NORM, CODES, DENSE, ROTATE, ATTEND, GATE, EIGHTS, EXACT = range(8)
GATE_ELEMENTS = 1024
FEWEST_WIDE = 5  # vectors for which eight at once are faster than one, two and four (words.py)
_SPINS = 2000  # looks at a counter before the core is offered to others
_ASKED_BYTES = 32 * 1024  # of the next matrix, by each thread while it waits


@inlined
def _in_order(x, like, out, m, vectors, d, first, last):  # type: ignore[no-untyped-def]
    """Vector m's x[first:last] in fp32 -> `out`, as products read it; `first` and `last` are whole chunks.

    bf16: (M, D') in the order of `nibbles`; of one vector of an odd number of blocks also (D'), from its last block on.
    fp32: whole numbers (M, D') in the order of `words`, 16 bits each; the same
    in pairs among eight vectors (M / 8, D' / 2, 8, 2); and the steps of blocks, (M / 8, D' / 64, 8) and (M, D' / 64).
    """
    wide = len(x)
    if like.itemsize == 2:
        nibbles.in_order(
            like, x.ctypes.data + 4 * first, (last - first) // nibbles.CHUNK, out + (m * wide + first) * like.itemsize
        )
        if vectors == 1 and d % nibbles.CHUNK == nibbles.BLOCK:
            ordered, after = array(out, (wide,), like.dtype), array(out + wide * like.itemsize, (wide,), like.dtype)
            for c in range(first, last, nibbles.CHUNK):
                _from_last(ordered[c : c + nibbles.CHUNK], after, c, wide)
    else:
        blocks, groups, among = wide // nibbles.BLOCK, (vectors + 7) // 8, m // 8
        pairs = out + 2 * vectors * wide + 16 * among * wide + 4 * (m % 8)
        shared = out + 2 * vectors * wide + 16 * groups * wide + 32 * among * blocks + 4 * (m % 8)
        own = out + 2 * vectors * wide + 16 * groups * wide + 32 * groups * blocks + 4 * m * blocks
        for c in range(first // nibbles.BLOCK, last // nibbles.BLOCK):
            turned = pairs + 1024 * c if vectors >= FEWEST_WIDE else 0
            words.rounded(
                like, x.ctypes.data + 256 * c, out + 2 * m * wide + 128 * c, own + 4 * c, turned, shared + 32 * c
            )


@inlined
def _from_last(ordered, out, c, wide):  # type: ignore[no-untyped-def]
    """A chunk, numbers c .. c + 128 of a vector, to where `single.py` reads it for every second row."""
    for k in range(0, nibbles.CHUNK, 32):
        for j in range(16):
            out[c + k + 16 + j] = ordered[k + j]
        if c + nibbles.CHUNK < wide:
            for j in range(16):
                out[c + nibbles.CHUNK + k + j] = ordered[k + 16 + j]
        else:
            for j in range(16):
                out[k + j] = ordered[k + j]


@inlined
def _norm(op, number, like, m):  # type: ignore[no-untyped-def]
    """4 x (M, D), 5 its row, 6 weight, 7 D, 8 eps, 9 one_plus, 10 plain out (M, D'), 11 ordered out, 12 D', 13 onto,
    14 length of what comes out (M) or 0, 15 where it goes in whole numbers (M, D') or 0, 16 their steps (M), 17 the
    largest, float; a weight of 0: no norm, only the order."""
    d, wide = op[7], op[12]
    if m >= op[USED]:
        return
    x = array(op[4] + m * op[5] * 4, (d,), np.float32)
    share, one = np.float32(1.0), np.float32(0.0)
    weight = array(op[6], (d,), like.dtype)
    if op[6] != 0:
        total = np.float32(0.0)
        for j in range(d):
            total += x[j] * x[j]
        share = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(d) + np.float32(number[8])))
        one = np.float32(op[9])
    if op[13] != 0:
        onto = array(op[13] + m * d * 4, (d,), np.float32)
        for j in range(d):
            onto[j] += x[j] * share * (load(weight[j]) + one)
        return
    out = array(op[10] + m * wide * 4, (wide,), np.float32)
    if op[6] != 0:
        for j in range(d):
            out[j] = x[j] * share * (load(weight[j]) + one)
    else:
        for j in range(d):
            out[j] = x[j]
    if op[14] != 0:
        total = np.float32(0.0)
        for j in range(d):
            total += out[j] * out[j]
        array(op[14], (m + 1,), np.float32)[m] = np.float32(math.sqrt(total))
    if op[15] != 0:
        most = np.float32(number[17])
        words.rounded_whole(like, out.ctypes.data, wide, most, op[15] + m * wide * 2, op[16] + 4 * m)
    _in_order(out, like, op[11], m, op[1], d, 0, wide)


@inlined
def _near_or_wide(op, like, at, n, scales, kept, sums):  # type: ignore[no-untyped-def]
    """`n` rows of codes from address `at` times all vectors -> sums (M, 8); the arguments of `_words`."""
    d, row, vectors, wide = op[9], op[9] // 2, op[24], op[12] // 2
    blocks, groups = wide // nibbles.BLOCK, (vectors + 7) // 8
    pairs = op[11] + 2 * vectors * wide
    shared = pairs + 16 * groups * wide
    own, count = shared + 32 * groups * blocks, d // nibbles.BLOCK
    m = 0
    while m < vectors:
        left, to = vectors - m, sums + 32 * m
        x, steps = op[11] + 2 * m * wide, own + 4 * m * blocks
        if left >= FEWEST_WIDE:
            x, steps = pairs + 2 * m * wide, shared + 4 * m * blocks
        if left > 12:
            words.wide_16(
                like, at, row, n, x, 16 * wide, steps, 32 * blocks, scales, count, op[22], kept, to, (left + 3) // 16
            )
            m += (left + 3) // 16 * 16
        elif left >= FEWEST_WIDE:
            words.wide_8(like, at, row, n, x, 16 * wide, steps, 32 * blocks, scales, count, op[22], kept, to, 1)
            m += 8
        elif left == 4:
            words.near_4(like, at, row, n, x, 2 * wide, steps, 4 * blocks, scales, count, op[22], kept, to, 1)
            m += 4
        elif left >= 2:
            words.near_2(like, at, row, n, x, 2 * wide, steps, 4 * blocks, scales, count, op[22], kept, to, 1)
            m += 2
        else:
            words.near_1(like, at, row, n, x, 2 * wide, steps, 4 * blocks, scales, count, op[22], kept, to, 1)
            m += 1


def _words(op, number, like, lookups, sums, scratch, item):  # type: ignore[no-untyped-def]
    """`_codes` in whole numbers of 16 bits, eight rows at a time. 17: B (R, O'), 18 its row, 21 ranks."""
    blocks, vectors, begin, end = op[9] // nibbles.BLOCK, op[24], item * op[23], min(op[10], item * op[23] + op[23])
    kept = (scratch.ctypes.data + 63) // 64 * 64
    found = array(kept + words.KEPT, (vectors, words.ROWS), np.float32)
    scales = array(kept + words.KEPT + 32 * (vectors + 16), (blocks, words.ROWS), np.float32)
    bias, start = array(op[16], (op[10],), np.float32), begin * blocks // nibbles.GROUP * nibbles.GROUP
    for r in range(begin, end, words.ROWS):
        n = min(words.ROWS, end - r)
        if op[6] != 0:
            table, first = lookups.ctypes.data, r * blocks - start
            words.scales_of(like, op[5] + r * blocks, table, first, blocks, n, scales.ctypes.data)
        else:
            words.scales_of(like, op[5] + 4 * r * blocks, 0, 0, blocks, n, scales.ctypes.data)
        _near_or_wide(op, like, op[4] + r * (op[9] // 2), n, scales.ctypes.data, kept, found.ctypes.data)
        m = 0
        while m < vectors and op[17] != 0:
            to, up, h = found.ctypes.data + 32 * m, op[17] + 4 * r, op[19] + m * op[20]
            if vectors - m >= 8:
                words.onto_8(like, to, up, op[18], h, op[20], op[21])
                m += 8
            elif vectors - m >= 4:
                words.onto_4(like, to, up, op[18], h, op[20], op[21])
                m += 4
            elif vectors - m >= 2:
                words.onto_2(like, to, up, op[18], h, op[20], op[21])
                m += 2
            else:
                words.onto_1(like, to, up, op[18], h, op[20], op[21])
                m += 1
        for m in range(vectors):
            out = array(op[13] + (m * op[14] + r) * 4, (n,), np.float32)
            for k in range(n):
                total = found[m, k] + (bias[r + k] if op[16] != 0 else np.float32(0.0))
                out[k] = total + out[k] if op[15] != 0 else total


@inlined
def _scales(op, number, like, looked_up, begin, end):  # type: ignore[no-untyped-def]
    """The scales of rows begin .. end, which are codes of 8 bits -> `looked_up`, from a block that is a multiple of
    64."""
    blocks = op[9] // nibbles.BLOCK
    first, last = begin * blocks, end * blocks
    for at in range(last, min(op[10], end + op[23]) * blocks, 64):  # those of the next item
        nibbles.ask(op[5] + at)
    if op[25] != 0:
        single.scales_of(like, op[5], op[6], op[7], np.float32(number[8]), first, last, looked_up)
        return
    codes, table = array(op[5], (last,), np.uint8), array(op[6], (nibbles.GROUP,), np.float32)
    nested, offset = array(op[7], (last // nibbles.GROUP + 1,), np.float32), np.float32(number[8])
    scales, start = array(looked_up, (last - first + 64,), np.float32), first // 64 * 64
    for n in range(first, last):
        scales[n - start] = table[codes[n]] * nested[n // nibbles.GROUP] + offset


@inlined
def _rows_of_16(op, like, r, n, scales, sums):  # type: ignore[no-untyped-def]
    """Rows r .. r + n of codes, at most 16, times all vectors, by `several.py`."""
    blocks, vectors, row, h_row, out_row = op[9] // nibbles.BLOCK, op[USED], op[12], op[20], 4 * op[14]
    w, up, bias = op[4] + r * (op[9] // 2), op[17] + r * op[18], op[16] + 4 * r if op[16] != 0 else 0
    table, up_row, pieces, onto, m = op[22], op[18], op[21], op[15], 0
    while m < vectors:
        left, x, h, out = vectors - m, op[11] + m * row, op[19] + m * h_row, op[13] + m * out_row + 4 * r
        if left >= 8:
            several.rows_of_8(
                like, w, n, blocks, x, row, scales, table, up, up_row, h, h_row, pieces, sums, bias, onto, out, out_row
            )
            m += 8
        elif left >= 4:
            several.rows_of_4(
                like, w, n, blocks, x, row, scales, table, up, up_row, h, h_row, pieces, sums, bias, onto, out, out_row
            )
            m += 4
        elif left >= 2:
            several.rows_of_2(
                like, w, n, blocks, x, row, scales, table, up, up_row, h, h_row, pieces, sums, bias, onto, out, out_row
            )
            m += 2
        else:
            several.rows_of_1(
                like, w, n, blocks, x, row, scales, table, up, up_row, h, h_row, pieces, sums, bias, onto, out, out_row
            )
            m += 1


def _nibbles(op, number, like, lookups, sums, scratch, item):  # type: ignore[no-untyped-def]
    """`_codes` in bf16. 6: a table of 256, or its planes."""
    begin, end = item * op[23], min(op[10], item * op[23] + op[23])
    kept, looked_up, scales = (np.int64(scratch.ctypes.data) + 63) // 64 * 64, np.int64(lookups.ctypes.data), op[5]
    blocks = op[9] // nibbles.BLOCK
    if op[6] != 0:
        _scales(op, number, like, looked_up, begin, end)
        scales = looked_up - 4 * (begin * blocks // 64 * 64)
    for r in range(begin, end, single.ROWS):
        n, share = min(single.ROWS, end - r), scales + 4 * r * blocks
        if op[24] == 1:
            single.rows_of_16(
                like, op[4] + r * (op[9] // 2), n, blocks, op[11], op[11] + op[12], share, op[22], op[17] + r * op[18],
                op[18], op[19], op[21], kept, op[16] + 4 * r if op[16] != 0 else 0, op[15], op[13] + 4 * r,
            )  # fmt: skip
        else:
            _rows_of_16(op, like, r, n, share, kept)


def _by_type(op, number, like, lookups, sums, scratch, item) -> None:  # type: ignore[no-untyped-def]
    raise NotImplementedError


@overload(_by_type, jit_options={"forceinline": True, "fastmath": FASTMATH, "error_model": "numpy"})
def _chosen(op, number, like, lookups, sums, scratch, item):  # type: ignore[no-untyped-def]
    """The other one is not compiled."""
    return _nibbles if like.dtype == types.uint16 else _words


@inlined
def _codes(op, number, like, lookups, sums, scratch, item):  # type: ignore[no-untyped-def]
    """4 codes, 5 absmax, 6 table of 256 or 0, 7 nested absmax, 8 offset, 9 D, 10 O, 11 x in order (M, D'), 12 bytes of
    its row, 13 out (M, ..), 14 its row, 15 onto, 16 bias (O) fp32, 17 B, 18 its row, 19 A x (M, ..), 20 its row,
    21 pieces, 22 levels, 23 rows of an item, 24 M, 25 whether 6 is in planes."""
    if op[6] != 0 and like.itemsize != 2:
        blocks, begin, end = op[9] // nibbles.BLOCK, item * op[23], min(op[10], item * op[23] + op[23])
        group = begin * blocks // nibbles.GROUP
        groups = (end * blocks - 1) // nibbles.GROUP - group + 1
        nibbles.lookups(like, op[6], op[7], np.float32(number[8]), group, groups, lookups.ctypes.data)
    _by_type(op, number, like, lookups, sums, scratch, item)


@inlined
def _dense(op, number, like, sums, item):  # type: ignore[no-untyped-def]
    """4 w (O, D), 9 D, 10 O, 11 x (M, ..) fp32, 12 bytes of its row, 13 out (M, ..), 14 its row, 15 onto, 16 bias, 17
    out as `like` times 18, 19 (M) of fp32 or 0: where it is 0.0 the vector is left out, 23 rows of an item, 24 M."""
    d, vectors, row = op[9], op[USED], op[12]
    bias, taken = array(op[16], (op[10],), np.float32), array(op[19], (op[24],), np.float32)
    lanes = nibbles.LANES_BF16 if like.itemsize == 2 else nibbles.LANES_FP32
    for r in range(item * op[23], min(op[10], item * op[23] + op[23])):
        w = array(op[4] + r * d * like.itemsize, (d,), like.dtype)
        add = bias[r] if op[16] != 0 else np.float32(0.0)
        m = 0
        while m < vectors:
            at, x, to = op[4] + r * d * like.itemsize, op[11] + m * row, sums.ctypes.data + m * 4
            if op[19] != 0:
                sums[m] = np.float32(0.0)
                if taken[m] != np.float32(0.0):
                    nibbles.plain_of_1(like, at, x, row, d // lanes, to)
                m += 1
            elif vectors - m >= 8:
                nibbles.plain_of_8(like, at, x, row, d // lanes, to)
                m += 8
            elif vectors - m >= 4:
                nibbles.plain_of_4(like, at, x, row, d // lanes, to)
                m += 4
            elif vectors - m >= 2:
                nibbles.plain_of_2(like, at, x, row, d // lanes, to)
                m += 2
            else:
                nibbles.plain_of_1(like, at, x, row, d // lanes, to)
                m += 1
        for m in range(vectors):
            total = sums[m]
            if op[19] == 0 or taken[m] != np.float32(0.0):
                x = array(op[11] + m * row, (d,), np.float32)
                for j in range(d // lanes * lanes, d):
                    total += load(w[j]) * x[j]
            if op[17] != 0:
                half = array(op[13] + (m * op[14] + r) * like.itemsize, (1,), like.dtype)
                half[0] = store(total * np.float32(number[18]), half)
            else:
                out = array(op[13] + (m * op[14] + r) * 4, (1,), np.float32)
                out[0] = total + add + out[0] if op[15] != 0 else total + add


@inlined
def _gate(op, like, item):  # type: ignore[no-untyped-def]
    """4 gate (M, ..), 5 up (M, ..), 6 their row, 7 I, 8 kind, 9 M, 22 plain out (M, D'), 23 ordered out, 24 D'."""
    inner, wide = op[7], op[24]
    parts = (wide + GATE_ELEMENTS - 1) // GATE_ELEMENTS
    m, first = item // parts, item % parts * GATE_ELEMENTS
    if m >= op[USED]:
        return
    last = min(inner, first + GATE_ELEMENTS)
    g = array(op[4] + (m * op[6] + first) * 4, (last - first,), np.float32)
    u = array(op[5] + (m * op[6] + first) * 4, (last - first,), np.float32)
    out = array(op[22] + m * wide * 4, (wide,), np.float32)
    to = out[first:last]
    if op[8] == SILU:
        for j in range(last - first):
            to[j] = g[j] * sigmoid(g[j]) * u[j]
    else:
        for j in range(last - first):
            v = g[j]
            z = np.float32(1.5957691216) * (v + np.float32(0.044715) * v * v * v)  # 2 sqrt(2 / pi)
            to[j] = v * sigmoid(z) * u[j]
    _in_order(out, like, op[23], m, op[9], inner, first, min(wide, first + GATE_ELEMENTS))


@inlined
def _share(items, threads, share):  # type: ignore[no-untyped-def]
    """The first item of a thread's share."""
    return share * items // threads


@inlined
def _wait(counters, lines, op, ops, me, threads, asked, yielding):  # type: ignore[no-untyped-def]
    """Until all before `op` is done. Asks meanwhile for bytes of this thread's share of the next matrix (28, items 29
    of 30 bytes each); `asked`: its address, and how many were."""
    begin, end = _share(op[29], threads, me), _share(op[29], threads, me + 1)
    if asked[0] != op[28]:
        asked[0], asked[1] = op[28], 0
    most = min(_ASKED_BYTES, (end - begin) * op[30])
    for one in range(op[2], op[3]):
        done, items, spins = counters[((one + 1) * lines - 1) * LINE :], ops[one * WIDTH + 1], 0
        while read(done) < items:
            spins += 1
            if asked[1] < most:
                for k in range(0, 256, 64):
                    nibbles.ask(op[28] + begin * op[30] + asked[1] + k)
                asked[1] += 256
            else:
                pause(yielding if spins % _SPINS == 0 else 0)


@inlined
def _do(op, number, like, lookups, s, sums, scratch, item):  # type: ignore[no-untyped-def]
    if op[0] == CODES:
        _codes(op, number, like, lookups, sums, scratch, item)
    elif op[0] == DENSE:
        _dense(op, number, like, sums, item)
    elif op[0] == NORM:
        _norm(op, number, like, item)
    elif op[0] == ROTATE or op[0] == ATTEND:
        if op[9] != 0:
            attend.rotate(op, number, like, item)
        if op[0] == ATTEND:
            attend.attend(op, number, like, s, scratch, item)
    elif op[0] == EIGHTS:
        heads.eights(op, like, sums, scratch, item)
    elif op[0] == EXACT:
        heads.exact(op, like, sums, item)
    else:
        _gate(op, like, item)


def _make(element: type) -> object:
    @kernel
    def token(address):  # type: ignore[no-untyped-def]
        """Slots: 0 operations, 1 their number, 2 the first, 3 the last, 4 counters, 5 most groups of 256 blocks in an
        item, 6 T, 7 bytes of scratch, 8 sched_yield, 9 threads, 10 how many have come.

        Counters of an operation, each in a line: taken of each share; items done.
        """
        slot = carray(address, (32,), np.int64)
        threads, lines = slot[9], slot[9] + 1
        me = take(array(slot[10], (1,), np.int64)) % threads
        ops = array(slot[0], (slot[1] * WIDTH,), np.int64)
        numbers = array(slot[0], (slot[1] * WIDTH,), np.float64)
        counters = array(slot[4], (slot[1] * lines * LINE,), np.int64)
        like = array(slot[0], (1,), element)
        lookups, s = np.empty(slot[5] * nibbles.GROUP, np.float32), np.empty(attend.AT_ONCE * slot[6], np.float32)
        sums, scratch, asked = np.empty(64, np.float32), np.empty(slot[7], np.uint8), np.zeros(2, np.int64)
        for i in range(slot[2], slot[3]):
            op, number = ops[i * WIDTH : (i + 1) * WIDTH], numbers[i * WIDTH : (i + 1) * WIDTH]
            _wait(counters, lines, op, ops, me, threads, asked, slot[8])
            turn, count = 0, 0
            while turn < threads:
                share = (me + turn) % threads
                first, end = _share(op[1], threads, share), _share(op[1], threads, share + 1)
                taken = counters[(i * lines + share) * LINE :]
                item = first + (take(taken) if turn == 0 or first + read(taken) < end else end)
                if item >= end:
                    turn += 1
                    continue
                _do(op, number, like, lookups, s, sums, scratch, item)
                count += 1
            if count > 0:
                give(counters[((i + 1) * lines - 1) * LINE :], count)

    return token


compiled = per_dtype(_make)
