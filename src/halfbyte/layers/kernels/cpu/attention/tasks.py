"""What the kernels of attention share: their tasks, memory of a thread, and how they are called.

A task is one example, one key head and some of the query heads that it serves. Letters as in `bf16.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu.parallel import array, each_block, run
from halfbyte.layers.kernels.cpu.scalar import FASTMATH, inlined, store, take, up

TALL = 48  # rows of queries at once: a multiple of a tile's rows, and of 2
WIDE = 192  # columns at once in backward: a multiple of a tile's rows and of its columns
PAD = 96  # of an example's length: a multiple of both
# What lies in the kernels' slots, as `Attention._run` puts it there; then what is of the forward or backward alone.
TOKENS, HEADS, KEY_HEADS, WIDTH, PARTS, EXAMPLES, LONGEST, MEMORY, BYTES, SCALE, Q, K, V, OUT = range(3, 17)


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
def store_rows(x, wide, rows, d, out):  # type: ignore[no-untyped-def]
    """x (rows, wide) in fp32 -> out (rows, d) of bf16 or fp32."""
    for r in range(rows):
        a, to = x[r * wide : r * wide + d], out[r * d : (r + 1) * d]
        for c in range(d):
            to[c] = store(a[c], to)


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
def _place(task, starts, slot):  # type: ignore[no-untyped-def]
    """Of a task: tokens before its example, the example's tokens, key head, first and last of its query heads."""
    key_heads, parts = slot[KEY_HEADS], slot[PARTS]
    example, rest = task // (key_heads * parts), task % (key_heads * parts)
    key_head, part = rest // parts, rest % parts
    groups = slot[HEADS] // key_heads
    first, last = key_head * groups + part * groups // parts, key_head * groups + (part + 1) * groups // parts
    return starts[example], starts[example + 1] - starts[example], key_head, first, last


@inlined
def _forward_task(given, slot, sizes, keys, work, turn, lay, head, task, _):  # type: ignore[no-untyped-def]
    (q, k, v, out), lse, starts = given
    (d, wide, scale), (kt, vp) = sizes, keys
    start, length, key_head, first, last = _place(task, starts, slot)
    padded, row = up(length, PAD), slot[HEADS] * d
    block = (start * slot[KEY_HEADS] + key_head * length) * d
    turn(k[block:], length, d, kt, padded)
    lay(v[block:], d, length, d, vp, wide, padded)
    for n in range(first, last):
        at = start * slot[HEADS] + n * length
        head((q[at * d :], out[start * row + n * d :], lse[at:]), keys, (length, padded, d, wide, row, scale), work)


@inlined
def forward_tasks(address, element, turn, lay, head, wide, keys, work):  # type: ignore[no-untyped-def]
    """All of a thread's tasks forward.

    Args: turn(x, rows, d, to, padded): rows of keys, transposed. lay(x, row, rows, d, to, wide, padded): rows of values
        that are `row` apart. head((q, out, lse), keys, (length, padded, d, wide, row, scale), work): a query head of an
        example; rows of out are `row` apart.
    """
    slot, number = carray(address, (32,), np.int64), carray(address, (32,), np.float64)
    n, examples = slot[TOKENS] * slot[HEADS], slot[EXAMPLES]
    lse, starts = array(slot[17], (n,), np.float32), array(slot[18], (examples + 1,), np.int64)
    sizes = (slot[WIDTH], wide, np.float32(number[SCALE]))
    given = (_given(slot, element), lse, starts)  # the functions last: numba warns of a tuple that begins with one
    each_block(slot, _forward_task, (given, slot, sizes, keys, work, turn, lay, head))


@inlined
def _backward_task(given, slot, sizes, keys, work, turn, lay, head, task, _):  # type: ignore[no-untyped-def]
    (q, k, v, o), (do, lse, starts, dq, dk, dv) = given
    (d, wide, scale), (kt, kp, vt, dka, dva) = sizes, keys
    start, length, key_head, first, last = _place(task, starts, slot)
    padded, row = up(length, PAD), slot[HEADS] * d
    block = (start * slot[KEY_HEADS] + key_head * length) * d
    turn(k[block:], length, d, kt, padded)
    turn(v[block:], length, d, vt, padded)
    lay(k[block:], d, length, d, kp, wide, padded)
    for j in range(padded * wide):
        dka[j] = np.float32(0.0)
        dva[j] = np.float32(0.0)
    for n in range(first, last):
        at, rows = start * slot[HEADS] + n * length, start * row + n * d
        here = (q[at * d :], do[rows:], o[rows:], lse[at:], dq[at * d :])
        head(here, keys, (length, padded, d, wide, row, scale), work)
    block += task % slot[PARTS] * slot[TOKENS] * slot[KEY_HEADS] * d
    store_rows(dka, wide, length, d, dk[block:])
    store_rows(dva, wide, length, d, dv[block:])


@inlined
def backward_tasks(address, element, turn, lay, head, wide, keys, work):  # type: ignore[no-untyped-def]
    """As `forward_tasks`, with head((q, do, o, lse, dq), ...), which fills dq and adds to the last two of `keys`: the
    gradients of keys and values, (padded, wide) fp32."""
    slot, number = carray(address, (32,), np.int64), carray(address, (32,), np.float64)
    n, m = slot[TOKENS] * slot[HEADS], slot[PARTS] * slot[TOKENS] * slot[KEY_HEADS] * slot[WIDTH]
    do, lse = array(slot[17], (n * slot[WIDTH],), element), array(slot[18], (n,), np.float32)
    starts, dq = array(slot[19], (slot[EXAMPLES] + 1,), np.int64), array(slot[20], (n * slot[WIDTH],), element)
    others = (do, lse, starts, dq, array(slot[21], (m,), element), array(slot[22], (m,), element))
    sizes = (slot[WIDTH], wide, np.float32(number[SCALE]))
    given = (_given(slot, element), others)
    each_block(slot, _backward_task, (given, slot, sizes, keys, work, turn, lay, head))


def tasks_of_a_head(q: Tensor, k: Tensor, starts: Tensor) -> int:
    """Into how many tasks the query heads of a key head are split, so that every thread has a few."""
    groups, wanted = q.shape[1] // k.shape[1], 4 * torch.get_num_threads()
    tasks = (len(starts) - 1) * k.shape[1]
    return next((n for n in range(1, groups) if groups % n == 0 and tasks * n >= wanted), groups)


@dataclass(frozen=True)
class Attention:
    """Two kernels as functions of tensors. `forward_bytes`, `backward_bytes`: scratch of a thread, of (D, D in whole
    tiles, the longest example in whole pads)."""

    forward_kernel: object
    backward_kernel: object
    columns: int  # of a tile
    forward_bytes: Callable[[int, int, int], int]
    backward_bytes: Callable[[int, int, int], int]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Causal attention of each example. `q`: (T, H, D), k, v: (T, K, D) of the kernels' dtype in blocks: example
        after example, each (heads, L, D). `starts`: (examples + 1,) int64: tokens before each example, and T. Returns
        the output (T, H, D) by tokens, and the log-sum-exp in blocks of (H, L), fp32."""
        out, lse = pool.empty_like(q), torch.empty(q.shape[0] * q.shape[1], dtype=torch.float32)
        self._run(self.forward_kernel, self.forward_bytes, q, k, starts, scale, v, out, lse, starts)
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, starts: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v, in blocks as they are, from `dout` (T, H, D) by tokens and what `forward`
        gave."""
        parts, dq = tasks_of_a_head(q, k, starts), pool.empty_like(q)
        dk, dv = (pool.empty((parts, *x.shape), x) for x in (k, v))
        self._run(self.backward_kernel, self.backward_bytes, q, k, starts, scale, v, out, dout, lse, starts, dq, dk, dv)
        if parts == 1:
            return dq, dk[0], dv[0]
        return dq, dk.sum(0, dtype=torch.float32).to(k.dtype), dv.sum(0, dtype=torch.float32).to(v.dtype)

    def _run(
        self, compiled: object, needed: Callable[[int, int, int], int], q: Tensor, k: Tensor, starts: Tensor,
        scale: float, *others: Tensor,
    ) -> None:  # fmt: skip
        """Call one of the two kernels; `others` are its tensors, from v on."""
        tokens, heads, d = q.shape
        key_heads, examples = k.shape[1], len(starts) - 1
        longest, parts = int(starts.diff().max()), tasks_of_a_head(q, k, starts)
        wide, padded = -(-d // self.columns) * self.columns, -(-longest // PAD) * PAD
        each = -(-needed(d, wide, padded) // 4096) * 4096 + 4096  # bytes a thread
        memory = pool.empty((each * torch.get_num_threads(),), q, torch.uint8)
        sizes = (tokens, heads, key_heads, d, parts, examples, longest, memory, each, float(scale))
        run(compiled, examples * key_heads * parts, 1, *sizes, q, k, *others)
