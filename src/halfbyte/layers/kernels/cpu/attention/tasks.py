"""What the kernels of attention share: their tasks, and memory of a thread."""

import torch
from numba import njit
from torch import Tensor

from halfbyte.layers.kernels.cpu.parallel import array
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
def up(n, step):  # type: ignore[no-untyped-def]
    return (n + step - 1) // step * step


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
