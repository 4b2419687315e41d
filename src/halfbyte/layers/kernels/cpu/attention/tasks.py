"""What the kernels of attention share: their tasks, memory of a thread, and how they are called."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from numba import njit
from torch import Tensor

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu.parallel import array, run
from halfbyte.layers.kernels.cpu.scalar import FASTMATH, inlined

TALL = 48  # rows of queries at once: a multiple of a tile's rows, and of 2
WIDE = 192  # columns at once in backward: a multiple of a tile's rows and of its columns
PAD = 96  # of an example's length: a multiple of both


@njit(forceinline=True, fastmath={*FASTMATH, "nnan"}, error_model="numpy")
def largest(row):  # type: ignore[no-untyped-def]
    """The maximum; a NaN may be passed over, and comes back with its exp."""
    m = row[0]
    for j in range(len(row)):
        m = row[j] if row[j] > m else m
    return m


@inlined
def scratch(at, count, element):  # type: ignore[no-untyped-def]
    """An array of `count` elements at an address, and the address behind it."""
    made = array(at, (count,), element)
    return made, at + made.nbytes


@inlined
def part_of(task, starts, key_heads, parts):  # type: ignore[no-untyped-def]
    """(tokens before its example, the example's tokens, key head, part of its query heads) of a task."""
    example, rest = task // (key_heads * parts), task % (key_heads * parts)
    return starts[example], starts[example + 1] - starts[example], rest // parts, rest % parts


def tasks_of_a_head(q: Tensor, k: Tensor, starts: Tensor) -> int:
    """Into how many tasks the query heads of a key head are split, so that every thread has a few."""
    groups, wanted = q.shape[1] // k.shape[1], 4 * torch.get_num_threads()
    tasks = (len(starts) - 1) * k.shape[1]
    return next((n for n in range(1, groups) if groups % n == 0 and tasks * n >= wanted), groups)


@dataclass(frozen=True)
class Attention:
    """Two kernels as functions of tensors.

    Args:
        columns: of a tile. forward_bytes, backward_bytes: scratch of a thread, of (D, D in whole tiles, the longest
            example in whole pads).
    """

    forward_kernel: object
    backward_kernel: object
    columns: int
    forward_bytes: Callable[[int, int, int], int]
    backward_bytes: Callable[[int, int, int], int]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Causal attention of each example.

        Args:
            q: (T, H, D), k, v: (T, K, D) of the kernels' dtype in blocks: example after example, each (heads, L, D).
            starts: (examples + 1,) int64: tokens before each example, and T.

        Returns:
            The output (T, H, D) by tokens, and the log-sum-exp in blocks of (H, L), fp32.
        """
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
        self,
        compiled: object,
        needed: Callable[[int, int, int], int],
        q: Tensor,
        k: Tensor,
        starts: Tensor,
        scale: float,
        *others: Tensor,
    ) -> None:
        """Call one of the two kernels; `others` are its tensors, from v on."""
        tokens, heads, d = q.shape
        key_heads, examples, longest = k.shape[1], len(starts) - 1, int(starts.diff().max())
        parts = tasks_of_a_head(q, k, starts)
        wide, most = -(-d // self.columns) * self.columns, -(-longest // PAD) * PAD
        each = -(-needed(d, wide, most) // 4096) * 4096 + 4096  # bytes a thread
        memory = pool.empty((each * torch.get_num_threads(),), q, torch.uint8)
        sizes = (tokens, heads, key_heads, d, parts, examples, longest, memory, each, float(scale))
        run(compiled, examples * key_heads * parts, 1, *sizes, q, k, *others)
