"""What the kernels of attention share: their tasks, memory of a thread, and how they are called.

A task is one piece, one key head and some of the query heads that it serves. A family is one example, or segments of
several in a tree: what they have in common first, then what follows it, each before its own rests. `levels` says how
many segments lie above one, and these are the last ones of the levels 0, 1, ... before it. A segment attends to them
and to itself. A piece is a family, or the root of a large one with some of what follows it, so that many threads have
something to do; the most costly pieces begin. Keys, values and their gradients of one path from the root lie in a
thread's memory end to end, as those of one example; a gradient is stored when nothing more of the piece follows its
segment, so it is the sum over all that does, in one order whoever computes it; a root's is added up over its pieces.
Segments with something below them have an even number of tokens.
Letters as in `bf16.py`; L tokens of a segment.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeAlias

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from halfbyte.layers.kernels import CAUSAL, pool
from halfbyte.layers.kernels.cpu.parallel import array, each_block, run
from halfbyte.layers.kernels.cpu.scalar import FASTMATH, hash_u32, inlined, spliced, store, take
from halfbyte.layers.kernels.dropout import NO_TERMS, ScoreTerms

TALL = 48  # rows of queries at once: a multiple of a tile's rows, and of 2
WIDE = 192  # columns at once in backward: a multiple of a tile's rows and of its columns
PAD = 96  # of a path's length: a multiple of both
MOST_ROWS = 16  # of a tile
ROOT_SHARE = 4  # a piece of a family is at least so many times as long as the root that it repeats
# What lies in the kernels' slots, as `Attention._run` puts it there; then what is of the forward or backward alone.
TOKENS, HEADS, KEY_HEADS, WIDTH, PARTS, PIECES, LONGEST, DEPTH, MEMORY, BYTES, SCALE = range(3, 14)
BACK, AHEAD, GRADIENT_TOKENS, VISITS, FIRSTS, SLOPES, TOKEN_KEYS, SEED, LOW, Q, K, V, OUT, MORE = range(14, 28)


@njit(forceinline=True, fastmath={*FASTMATH, "nnan"}, error_model="numpy")
def largest(row):  # type: ignore[no-untyped-def]
    """The maximum; a NaN may be passed over, and comes back with its exp."""
    m = row[0]
    for j in range(len(row)):
        m = row[j] if row[j] > m else m
    return m


@inlined
def scratch(address, count, element):  # type: ignore[no-untyped-def]
    """An array of `count` elements at an address, and the address behind it."""
    memory = array(address, (count,), element)
    return memory, address + memory.nbytes


@inlined
def store_rows(x, wide, rows, d, out, factor):  # type: ignore[no-untyped-def]
    """x (rows, wide) in fp32, times a factor -> out (rows, d) of bf16 or fp32."""
    for r in range(rows):
        a, to = x[r * wide : r * wide + d], out[r * d : (r + 1) * d]
        for c in range(d):
            to[c] = store(a[c] * factor, to)


@inlined
def clear_rows(x, wide, reach, before, padded):  # type: ignore[no-untyped-def]
    """Zeros for `padded` rows of x (reach, wide) from `before` on."""
    for j in range(before * wide, (before + padded) * wide):
        x[j] = np.float32(0.0)


@inlined
def keep_rows(x, wide, reach, before, rows, d, out, factor):  # type: ignore[no-untyped-def]
    """`store_rows` of rows of x (reach, wide) from `before` on."""
    store_rows(x[before * wide :], wide, rows, d, out, factor)


@inlined
def tile_end(i, total, ahead):  # type: ignore[no-untyped-def]
    """Behind the last column that is computed of rows up to i, of `total` columns."""
    return min(i + ahead, max(total, i))


@inlined
def tilt(row, distance, slope):  # type: ignore[no-untyped-def]
    """ALiBi: scores of neighbouring keys, the first of which is `distance` tokens behind the query."""
    for j in range(len(row)):
        row[j] += slope * np.float32(distance + j)


@inlined
def row_seed(terms, i):  # type: ignore[no-untyped-def]
    """Of the query in row i of its example."""
    return hash_u32(terms[1][i] ^ terms[2])


@inlined
def drop_chances(row, first, seed, low, factor):  # type: ignore[no-untyped-def]
    """Numbers in fp32 of keys `first`, ...: 0 where the mask drops them, else times a factor."""
    for j in range(len(row)):
        row[j] = row[j] * factor if hash_u32(np.uint32(first + j) ^ seed) >= low else np.float32(0.0)


@inlined
def _terms(slot, start, n):  # type: ignore[no-untyped-def]
    """Of query head n in an example: its slope over the scale, keys of its tokens, seed, below which bits are dropped,
    and what others are multiplied with."""
    number = slot.view(np.float64)
    slope, low = np.float32(0.0), np.uint32(slot[LOW])
    if slot[SLOPES] != 0:
        slope = array(slot[SLOPES], (slot[HEADS],), np.float32)[n] / np.float32(number[SCALE])
    keys = array(slot[TOKEN_KEYS], (slot[TOKENS] if low != 0 else 0,), np.uint32)[start:]
    seed = hash_u32(np.uint32(slot[SEED]) ^ np.uint32(n))
    share = np.float32(1.0) / (np.float32(1.0) - np.float32(low) * np.float32(2.0**-32))
    return slope, keys, seed, low, share


@inlined
def padded_end(before, length):  # type: ignore[no-untyped-def]
    """Tokens of a path that ends with `length` after `before`, with what whole tiles of them need."""
    return (before + length + (MOST_ROWS if before else 0) + PAD - 1) // PAD * PAD


@inlined
def memory_of_thread(slot):  # type: ignore[no-untyped-def]
    """The address of a thread's own memory; asked for once by each thread."""
    return slot[MEMORY] + take(array(slot[0], (8,), np.int64)[1:]) * slot[BYTES]


@inlined
def _given(slot, element):  # type: ignore[no-untyped-def]
    """q, k, v and the output, as `Attention._run` hands them over."""
    n, m = slot[TOKENS] * slot[HEADS] * slot[WIDTH], slot[TOKENS] * slot[KEY_HEADS] * slot[WIDTH]
    q, k = array(slot[Q], (n,), element), array(slot[K], (m,), element)
    return q, k, array(slot[V], (m,), element), array(slot[OUT], (n,), element)


@inlined
def _tree(slot):  # type: ignore[no-untyped-def]
    """The visits of all pieces (`Segments.visits`), and of each piece its first one. And room for a path: tokens before
    each level, and which visit it is."""
    pieces, depth = slot[PIECES], slot[DEPTH]
    firsts = array(slot[FIRSTS], (pieces + 1,), np.int64)
    visits = array(slot[VISITS], (firsts[pieces], 5), np.int64)
    return visits, firsts, np.zeros(depth + 1, np.int64), np.zeros(depth + 1, np.int64)


@inlined
def _place(task, tree, slot):  # type: ignore[no-untyped-def]
    """Of a task: the first visit of its piece, the one behind its last, padded tokens of its longest path, key head,
    first and last of its query heads."""
    visits, firsts, before, _ = tree
    key_heads, parts = slot[KEY_HEADS], slot[PARTS]
    piece, rest = task // (key_heads * parts), task % (key_heads * parts)
    key_head, part = rest // parts, rest % parts
    groups, reach = slot[HEADS] // key_heads, 0
    for n in range(firsts[piece], firsts[piece + 1]):
        length, level = visits[n, 1], visits[n, 2]
        before[level + 1] = before[level] + length
        reach = max(reach, padded_end(before[level], length))
    first, last = key_head * groups + part * groups // parts, key_head * groups + (part + 1) * groups // parts
    return firsts[piece], firsts[piece + 1], reach, key_head, first, last


@inlined
def _enter(n, tree):  # type: ignore[no-untyped-def]
    """Visit n as the end of the path: its first token, its tokens, tokens above it, those with what fills it up."""
    visits, _, before, path = tree
    length, level = visits[n, 1], visits[n, 2]
    before[level + 1] = before[level] + length
    path[level] = n
    return visits[n, 0], length, before[level], padded_end(before[level], length) - before[level]


@inlined
def _forward_task(given, slot, sizes, keys, work, tree, turn, lay, head, task, _):  # type: ignore[no-untyped-def]
    (q, k, v, out), lse = given
    (d, wide, step, scale), (kt, vp) = sizes, keys
    begin, end, reach, key_head, first, last = _place(task, tree, slot)
    row, visits = slot[HEADS] * d, tree[0]
    for visit in range(begin, end):
        start, length, before, padded = _enter(visit, tree)
        block = (start * slot[KEY_HEADS] + key_head * length) * d
        turn(k[block:], length, d, kt, before, padded, reach)
        lay(v[block:], d, length, d, vp[before // step * wide :], wide, padded)
        for n in range(first, last if visits[visit, 4] else first):
            at = start * slot[HEADS] + n * length
            given_head = (q[at * d :], out[start * row + n * d :], lse[at:])
            about = (length, before, reach, d, wide, row, scale)
            head(given_head, keys, about, work, _terms(slot, start, n), (slot[BACK], slot[AHEAD]))


@spliced
def forward_tasks(address, element, turn, lay, head, wide, step, keys, work):  # type: ignore[no-untyped-def]
    """All of a thread's tasks forward.

    Args: turn(x, rows, d, to, before, padded, reach): rows of keys, transposed, to columns from `before` on of `reach`.
        lay(x, row, rows, d, to, wide, padded): rows of values that are `row` apart. step: of them in one row of `to`.
        head((q, out, lse), keys, (length, before, reach, d, wide, row, scale), work, terms): a query head of a
        segment that follows `before` tokens; rows of out are `row` apart.
    """
    slot, number = carray(address, (32,), np.int64), carray(address, (32,), np.float64)
    lse = array(slot[MORE], (slot[TOKENS] * slot[HEADS],), np.float32)
    sizes = (slot[WIDTH], wide, step, np.float32(number[SCALE]))
    given = (_given(slot, element), lse)  # the functions last: numba warns of a tuple that begins with one
    each_block(slot, _forward_task, (given, slot, sizes, keys, work, _tree(slot), turn, lay, head))


@inlined
def _backward_task(given, slot, sizes, keys, work, tree, turn, lay, head, clear, keep, task, _):  # type: ignore[no-untyped-def]
    (q, k, v, o), (do, lse, dq, dk, dv) = given
    (d, wide, step, scale), (kt, kp, vt, dka, dva) = sizes, keys
    begin, end, reach, key_head, first, last = _place(task, tree, slot)
    visits, _, above, path = tree
    row, depth = slot[HEADS] * d, 0
    part = task % slot[PARTS] * slot[GRADIENT_TOKENS] * slot[KEY_HEADS] * d
    for visit in range(begin, end + 1):
        level = visits[visit, 2] if visit < end else 0
        while depth > level:  # nothing more follows these
            depth -= 1
            done, at = path[depth], above[depth]
            length = visits[done, 1]
            block = part + (visits[done, 3] * slot[KEY_HEADS] + key_head * length) * d
            keep(dka, wide, reach, at, length, d, dk[block:], np.float32(1.0))
            keep(dva, wide, reach, at, length, d, dv[block:], _terms(slot, 0, first)[4])
        if visit < end:
            depth = level + 1
            start, length, before, padded = _enter(visit, tree)
            block = (start * slot[KEY_HEADS] + key_head * length) * d
            turn(k[block:], length, d, kt, before, padded, reach)
            turn(v[block:], length, d, vt, before, padded, reach)
            lay(k[block:], d, length, d, kp[before // step * wide :], wide, padded)
            clear(dka, wide, reach, before, padded)
            clear(dva, wide, reach, before, padded)
            for n in range(first, last if visits[visit, 4] else first):
                at, rows = start * slot[HEADS] + n * length, start * row + n * d
                here = (q[at * d :], do[rows:], o[rows:], lse[at:], dq[at * d :])
                about = (length, before, reach, d, wide, row, scale)
                head(here, keys, about, work, _terms(slot, start, n), (slot[BACK], slot[AHEAD]))


@spliced
def backward_tasks(address, element, turn, lay, head, wide, step, keys, work, clear=clear_rows, keep=keep_rows):  # type: ignore[no-untyped-def]
    """As `forward_tasks`, with head((q, do, o, lse, dq), ...), which fills dq and adds to the last two of `keys`: the
    gradients of keys and values of a path in fp32, as clear(x, wide, reach, before, padded) makes them zero and
    keep(x, wide, reach, before, rows, d, out, factor) stores them: by rows, (reach, wide)."""
    slot, number = carray(address, (32,), np.int64), carray(address, (32,), np.float64)
    n, m = slot[TOKENS] * slot[HEADS], slot[PARTS] * slot[GRADIENT_TOKENS] * slot[KEY_HEADS] * slot[WIDTH]
    do, lse = array(slot[MORE], (n * slot[WIDTH],), element), array(slot[MORE + 1], (n,), np.float32)
    dq, dk = array(slot[MORE + 2], (n * slot[WIDTH],), element), array(slot[MORE + 3], (m,), element)
    others = (do, lse, dq, dk, array(slot[MORE + 4], (m,), element))
    sizes = (slot[WIDTH], wide, step, np.float32(number[SCALE]))
    given = (_given(slot, element), others)
    each_block(slot, _backward_task, (given, slot, sizes, keys, work, _tree(slot), turn, lay, head, clear, keep))


@dataclass(frozen=True, eq=False)
class Segments:
    """Segments of a pack in families, cut into pieces, as the kernels take them."""

    # (V, 5) int64, the visits of all pieces: a segment's first token, its tokens, its level, where among
    # `gradient_tokens` those of its keys go, and whether its queries are computed here (a root's are, in one piece)
    visits: Tensor
    firsts: Tensor  # (pieces + 1,) int64: the first visit of each, and V
    longest: int  # tokens of the longest path, filled up
    gradient_tokens: int  # tokens, and those of roots that are visited again
    # Of roots that are: first token, tokens, where the other visits' gradients begin, how many of them there are
    repeats: tuple[tuple[int, int, int, int], ...]

    @classmethod
    def of(cls, lengths: Sequence[int], levels: Sequence[int] = ()) -> "Segments":
        """`levels`: none where each segment is a family."""
        levels = levels or [0] * len(lengths)
        starts, repeats = [0, *accumulate(lengths)], list[tuple[int, int, int, int]]()
        pieces, cost = list[list[list[int]]](), list[int]()
        path, longest = [0], 0
        total = starts[-1]
        for start, length, level in zip(starts, lengths, levels, strict=False):
            path[level + 1 :] = [path[level] + length]
            longest = max(longest, padded_end.py_func(path[level], length))
            if level == 0:
                root, behind = (start, length), 0
                pieces.append([])
                cost.append(0)
            elif level == 1 and behind >= ROOT_SHARE * root[1]:
                known = repeats.pop() if repeats and repeats[-1][0] == root[0] else (*root, total, 0)
                repeats.append((*known[:3], known[3] + 1))
                pieces.append([[*root, 0, total, 0]])
                cost.append(0)
                total, behind = total + root[1], 0
            behind += length if level else 0
            pieces[-1].append([start, length, level, start, 1])
            cost[-1] += length * (2 * path[level] + length)
        order = sorted(range(len(pieces)), key=lambda n: -cost[n])
        firsts = torch.tensor([0, *accumulate(len(pieces[n]) for n in order)])
        return cls(torch.tensor([visit for n in order for visit in pieces[n]]), firsts, longest, total, tuple(repeats))


# How many tokens before and after itself a token sees.
Reach: TypeAlias = tuple[int, int]


def tasks_of_a_head(q: Tensor, k: Tensor, tree: Segments) -> int:
    """Into how many tasks the query heads of a key head are split, so that every thread has a few."""
    groups, wanted = q.shape[1] // k.shape[1], 4 * torch.get_num_threads()
    tasks = (len(tree.firsts) - 1) * k.shape[1]
    return next((n for n in range(1, groups) if groups % n == 0 and tasks * n >= wanted), groups)


@dataclass(frozen=True)
class Attention:
    """Two kernels as functions of tensors. `forward_bytes`, `backward_bytes`: scratch of a thread, of (D, D in whole
    tiles, the longest path in whole pads)."""

    forward_kernel: object
    backward_kernel: object
    columns: int  # of a tile
    forward_bytes: Callable[[int, int, int], int]
    backward_bytes: Callable[[int, int, int], int]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tree: Segments, scale: float, terms: ScoreTerms = NO_TERMS,
        reach: Reach = CAUSAL,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Attention of each segment to its path. `q`: (T, H, D), k, v: (T, K, D) of the kernels' dtype in blocks:
        segment after segment, each (heads, L, D). `reach`: how far tokens see. Returns the output (T, H, D) by tokens,
        and the log-sum-exp in blocks of (H, L), fp32."""
        out, lse = pool.empty_like(q), torch.empty(q.shape[0] * q.shape[1], dtype=torch.float32)
        self._run(self.forward_kernel, self.forward_bytes, q, k, tree, scale, terms, reach, v, out, lse)
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, tree: Segments, scale: float,
        terms: ScoreTerms = NO_TERMS, reach: Reach = CAUSAL,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The gradients of q, k and v, in blocks as they are, from `dout` (T, H, D) by tokens and what `forward`
        gave."""
        parts, dq = tasks_of_a_head(q, k, tree), pool.empty_like(q)
        dk, dv = (pool.empty((parts, tree.gradient_tokens, *x.shape[1:]), x) for x in (k, v))
        others = (v, out, dout, lse, dq, dk, dv)
        self._run(self.backward_kernel, self.backward_bytes, q, k, tree, scale, terms, reach, *others)
        if parts == 1:
            dk, dv = dk[0], dv[0]
        else:
            dk, dv = (x.sum(0, dtype=torch.float32).to(x.dtype) for x in (dk, dv))
        for start, length, again, times in tree.repeats:
            for x in (dk, dv):
                root = x[start : start + length]
                more = x[again : again + times * length].view(times, *root.shape)
                root.copy_(more.sum(0, dtype=torch.float32).add_(root))
        return dq, dk[: len(k)], dv[: len(v)]

    def _run(
        self, compiled: object, needed: Callable[[int, int, int], int], q: Tensor, k: Tensor, tree: Segments,
        scale: float, terms: ScoreTerms, reach: Reach, *others: Tensor,
    ) -> None:  # fmt: skip
        """Call one of the two kernels; `others` are its tensors, from v on."""
        tokens, heads, d = q.shape
        key_heads, pieces = k.shape[1], len(tree.firsts) - 1
        parts = tasks_of_a_head(q, k, tree)
        wide, depth = -(-d // self.columns) * self.columns, int(tree.visits[:, 2].max()) + 1
        each = -(-needed(d, wide, tree.longest) // 4096) * 4096 + 4096  # bytes a thread
        memory = pool.empty((each * torch.get_num_threads(),), q, torch.uint8)
        sizes = (tokens, heads, key_heads, d, parts, pieces, tree.longest, depth, memory, each, float(scale), *reach)
        where = (tree.gradient_tokens, tree.visits, tree.firsts)
        slopes = 0 if terms.slopes is None else terms.slopes.float().contiguous()
        masks = (0, 0) if terms.seed is None else (terms.seed.keys, terms.seed.seed)
        run(compiled, pieces * key_heads * parts, 1, *sizes, *where, slopes, *masks, terms.low, q, k, *others)
