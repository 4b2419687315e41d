"""Large matrix products in fp32, on the tiles that attention has: C = A B, or C += A B.

Why: torch multiplies in fp32 by MKL, which takes its AVX2 code on AMD's processors and reaches 82% of what two FMAs a
cycle would, and with AVX-512 40%. Here it is 95% (docs/log). On Intel's processors MKL is as it should be.
What: a part of B is laid out in panels as wide as a tile, which all threads then multiply with blocks of rows of A.
Source: Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (ACM TOMS 2008). A is not packed: a
tile reads a few of its rows along, and they are in the cache when the next panel comes.
Cost: 2 M N K FLOP; `PANEL_NUMBERS` of memory. A number of C is one sum in one order, whatever the threads.

Letters: A (M, K), B (K, N), C (M, N).
"""

import threading
from functools import cache

import numpy as np
import torch
from llvmlite import binding
from numba import carray
from torch import Tensor

from halfbyte.layers.kernels.cpu import tiles
from halfbyte.layers.kernels.cpu.parallel import array, each_block, kernel, run
from halfbyte.layers.kernels.cpu.scalar import fetch, inlined, take, up
from halfbyte.layers.kernels.cpu.tiles import COLUMNS32 as COLUMNS
from halfbyte.layers.kernels.cpu.tiles import ROWS32 as ROWS
from halfbyte.layers.kernels.cpu.tiles import tile32

# Of K at once, so that a panel stays in the first-level cache; rows and columns of C that a thread takes at once, so
# that a block of A stays in the second-level one.
STEPS, TALL, WIDE = (288, 96, 768) if COLUMNS == 16 else (192, 144, 768)
PANEL_NUMBERS, LONGEST = 1_280_000, 2304  # numbers of B that are laid out at once, and the most rows of it
LEAST_ROWS = 192  # for fewer rows of A, laying out B costs more than is gained
WORK = TALL * STEPS + ROWS * COLUMNS  # numbers that a thread has for itself
LINE = 16  # numbers in a line of the cache
_ZERO = np.float32(0.0)


@cache
def faster() -> bool:
    """Whether these products are for this processor."""
    return tiles.available32() and binding.get_host_cpu_name().startswith("znver")


def takes(out: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether `product_` is faster than torch for these, and may be used: rows one after the other, B either way."""
    (depth, width), dtypes = b.shape, {a.dtype, b.dtype, out.dtype}
    if a.shape[0] < LEAST_ROWS or width < COLUMNS or depth < 8 or dtypes != {torch.float32}:
        return False
    return a.stride(1) == 1 and out.stride(1) == 1 and 1 in b.stride() and faster()


@cache
def fault() -> str | None:
    """What these products get wrong on this machine, seen once on a small one beside torch's in fp64."""
    draw = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(s, generator=draw) for s in ((LEAST_ROWS + 5, 403), (403, 71), (LEAST_ROWS + 5, 71)))
    right = c.double() + a.double() @ b.double()
    sizes = c.abs().double() + a.abs().double() @ b.abs().double()
    off = (product_(c, a, b, add=True).double() - right).abs()
    return None if bool((off <= 404 * 2.0**-24 * sizes).all()) else "A product in fp32 is wrong"


@inlined
def _panels(b, row, step, n, k, out, first, last):  # type: ignore[no-untyped-def]
    """B (k, n) -> its columns in panels (k, COLUMNS), zeros beyond; a number is `row` from the next below, `step` from
    the next beside."""
    for panel in range(first, last):
        j, to = panel * COLUMNS, out[panel * COLUMNS * k :]
        whole = j + COLUMNS <= n
        for s in range(k):
            c = to[s * COLUMNS : (s + 1) * COLUMNS]
            if whole and step == 1:
                a = b[s * row + j : s * row + j + COLUMNS]
                for i in range(COLUMNS):
                    c[i] = a[i]
            elif whole:
                a = b[s * row + j * step :]
                for i in range(COLUMNS):
                    c[i] = a[i * step]
            else:
                for i in range(COLUMNS):
                    c[i] = b[s * row + (j + i) * step] if j + i < n else _ZERO


@inlined
def _edge(x, panel, c, c_row, size, more, tile):  # type: ignore[no-untyped-def]
    """A tile that ends outside of C, by way of memory of its own."""
    rows, columns, steps = size
    tile32(tile, COLUMNS, x, STEPS, 1, panel, COLUMNS, steps, 0)
    for r in range(rows):
        for t in range(columns):
            before = c[r * c_row + t] if more else _ZERO
            c[r * c_row + t] = before + tile[r * COLUMNS + t]


@inlined
def _blocks(a, a_row, panels, c, c_row, sizes, add, work, first, last):  # type: ignore[no-untyped-def]
    m, n, k, tall, wide, groups, threads = sizes
    x, tile = work[: TALL * STEPS], work[TALL * STEPS :]
    for task in range(first, last):
        i0, j0 = task // groups * tall, task % groups * wide
        i1, j1 = min(m, i0 + tall), min(n, j0 + wide)
        share = tall * COLUMNS // (j1 - j0) + 1
        for s in range(0, k, STEPS):
            steps, more = min(STEPS, k - s), add if s == 0 else 1
            for i in range(i0, i1):
                to, row = x[(i - i0) * STEPS : (i - i0) * STEPS + steps], a[i * a_row + s : i * a_row + s + steps]
                for t in range(steps):
                    to[t] = row[t]
            # what is copied next comes into the cache meanwhile
            soon, at = (i0, s + STEPS) if s + STEPS < k else ((task + threads) // groups * tall, 0)
            for j in range(j0, j1, COLUMNS):
                panel = panels[j * k + s * COLUMNS :]
                for i in range(soon, min(m, soon + share)):
                    for t in range(at, min(k, at + STEPS), LINE):
                        fetch(a[i * a_row + t :])
                soon += share
                for i in range(i0, i1, ROWS):
                    rows, to = x[(i - i0) * STEPS :], c[i * c_row + j :]
                    if i + ROWS <= m and j + COLUMNS <= n:
                        for r in range(ROWS):
                            for t in range(0, COLUMNS, LINE):
                                fetch(to[r * c_row + t :])
                        tile32(to, c_row, rows, STEPS, 1, panel, COLUMNS, steps, more)
                    else:
                        _edge(rows, panel, to, c_row, (min(ROWS, m - i), min(COLUMNS, n - j), steps), more, tile)


@kernel
def _pack(p):  # type: ignore[no-untyped-def]
    s = carray(p, (32,), np.int64)
    n, k = s[5], s[6]
    row, step = s[7], s[8]
    b = array(s[3], ((k - 1) * row + (n - 1) * step + 1,), np.float32)
    each_block(s, _panels, (b, row, step, n, k, array(s[4], (s[1] * COLUMNS * k,), np.float32)))


@kernel
def _multiply(p):  # type: ignore[no-untyped-def]
    s = carray(p, (32,), np.int64)
    m, n = s[6], s[7]
    k = s[8]
    a_row, c_row = s[9], s[10]
    a, c = array(s[3], ((m - 1) * a_row + k,), np.float32), array(s[5], ((m - 1) * c_row + n,), np.float32)
    panels = array(s[4], (-(-n // COLUMNS) * COLUMNS * k,), np.float32)
    thread = take(array(s[0], (8,), np.int64)[1:])
    work = array(s[16] + 4 * WORK * thread, (WORK,), np.float32)
    each_block(s, _blocks, (a, a_row, panels, c, c_row, (m, n, k, s[11], s[12], s[13], s[14]), s[15], work))


def product_(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """out = a b, or out += a b, for what `takes` says: (M, K) @ (K, N) -> (M, N)."""
    (k, n), longest = b.shape, _even(b.shape[0], LONGEST, 1)
    widest = _even(n, max(COLUMNS, PANEL_NUMBERS // longest), COLUMNS)
    memory = _memory_for(longest * up(widest, COLUMNS))
    for j in range(0, n, widest):
        for s in range(0, k, longest):
            part = b[s : s + longest, j : j + widest]
            _part(out[:, j : j + widest], a[:, s : s + longest], part, memory, add or s > 0)
    return out


class _ThreadMemory(threading.local):
    """What a thread that asks for a product lays B out in, and each thread that makes it its rows of A. No block of
    the pool, which would be taken from larger tensors for a moment."""

    panels = torch.empty(0)


_thread = _ThreadMemory()


def _memory_for(numbers: int) -> tuple[Tensor, Tensor]:
    """Memory for so many numbers of B, and for the work of each thread."""
    work = torch.get_num_threads() * WORK
    if max(numbers, PANEL_NUMBERS) + work > _thread.panels.numel():
        _thread.panels = torch.empty(max(numbers, PANEL_NUMBERS) + work)
    return _thread.panels[work:], _thread.panels[:work]


def _part(out: Tensor, a: Tensor, b: Tensor, memory: tuple[Tensor, Tensor], add: bool) -> None:
    panels, work = memory
    m, k = a.shape
    n, threads = b.shape[1], torch.get_num_threads()
    tall, wide = _blocks_of(m, n, threads)
    count, groups = -(-n // COLUMNS), -(-n // wide)
    run(_pack, count, max(1, min(4, count // threads)), b, panels, n, k, *b.stride())
    sizes = m, n, k, a.stride(0), out.stride(0), tall, wide, groups, threads
    run(_multiply, -(-m // tall) * groups, 1, a, panels, out, *sizes, int(add), work)


def _blocks_of(m: int, n: int, threads: int) -> tuple[int, int]:
    """(rows, columns) of C that a thread takes at once: where tasks are few, as many for each thread."""
    tall, wide = min(TALL, up(m, ROWS)), WIDE
    if -(-m // tall) * -(-n // wide) < 8 * threads:
        blocks = threads * -(-m // (tall * threads))
        tall = min(tall, max(4 * ROWS, up(-(-m // blocks), ROWS)))
        if -(-m // tall) < threads:
            wide = min(wide, up(-(-n // threads), COLUMNS))
    return tall, wide


def _even(size: int, longest: int, step: int) -> int:
    """The length of equal parts of `size`, each at most about `longest`, in whole steps."""
    return -(-size // -(-size // longest) // step) * step
