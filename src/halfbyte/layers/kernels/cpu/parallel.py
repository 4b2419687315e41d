"""Run a compiled kernel on torch's own threads.

Why: a second pool of threads (numba's) fights with torch's for the cores, since OpenMP's threads spin for a while after
each region. `GOMP_parallel` of the libgomp that torch has loaded runs a function on the pool that its matmuls use.
What: a kernel is a numba `cfunc` of one pointer to 32 int64 slots: a counter's address, how many rows there are and how
many a thread takes at once; then addresses, sizes, and floats (as float64 bits). Each thread takes blocks of rows from
the counter until none is left.
Source: GOMP_parallel is libgomp's stable entry point (libgomp.map, GOMP_4.0); LLVM's libomp, which torch's wheel for
macOS brings, exports it too. Intel's library on Windows does not: there Python's threads call the kernel.
Cost: 5 microseconds a call; 50 by Python's threads.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numba import carray, cfunc, types

from halfbyte.layers.kernels.cpu.scalar import inlined, pointer, spliced, take
from halfbyte.system import openmp

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SLOTS = 32
MOST_THREADS = 64  # of Python's, where they have to be used
# Elements that a thread takes at once: a few hundred kB of activations, so that both threads end together.
BLOCK_ELEMENTS = 32 * 1024

Kernel: TypeAlias = Any  # a compiled `cfunc`
_memory = threading.local()
kernel: Any = cfunc(types.void(types.voidptr), cache=True, error_model="numpy")


@inlined
def array(address, shape, element):  # type: ignore[no-untyped-def]
    return carray(pointer(address), shape, element)


@spliced
def each_block(slots, part, args):  # type: ignore[no-untyped-def]
    """part(*args, first, last) for every block of rows that this thread gets."""
    counter = array(slots[0], (1,), np.int64)
    rows, block = slots[1], slots[2]
    while True:
        first = take(counter) * block
        if first >= rows:
            break
        part(*(args + (first, min(rows, first + block))))  # noqa: RUF005, numba takes one tuple


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads of Python's, beside the calling one. A kernel holds no interpreter lock."""
    return ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="halfbyte-kernel")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of its threads


def run(compiled: Kernel, rows: int, block: int, *values: "Tensor | int | float") -> None:
    """Call a kernel with `values` in slots 3, 4, ...; returns when every block is done. Tensors must be contiguous on
    the CPU and stay alive until then, which this frame sees to."""
    slots, floats, counter, places = _slots()
    counter.fill(0)
    slots.fill(0)
    slots[:3] = places[1], rows, block
    for i, value in enumerate(values, 3):
        if isinstance(value, float):
            floats[i] = value
        else:
            slots[i] = value.data_ptr() if hasattr(value, "data_ptr") else value
    start(compiled, places[0])


def _slots() -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]]:
    """This thread's slots, the same as floats, its counter, and where slots and counter are."""
    known: tuple[np.ndarray, np.ndarray, np.ndarray, tuple[int, int]] | None = getattr(_memory, "slots", None)
    if known is None:
        slots, counter = np.zeros(SLOTS, np.int64), np.zeros(8, np.int64)  # a cache line of its own
        places = slots.ctypes.data, counter.ctypes.data
        _memory.slots = known = slots, slots.view(np.float64), counter, places
    return known


def start(compiled: Kernel, slots: np.ndarray | int, threads: int | None = None) -> None:
    """Call a kernel on every thread with these slots, or those at an address; returns when all are back. threads: None:
    as many as torch's."""
    slots = slots if isinstance(slots, int) else slots.ctypes.data
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    if threads == 1:
        compiled.ctypes(slots)
    elif (region := openmp.region()) is not None:
        region(compiled.address, slots, threads, 0)
    else:
        others = [_pool().submit(compiled.ctypes, slots) for _ in range(min(threads, MOST_THREADS) - 1)]
        compiled.ctypes(slots)
        for other in others:
            other.result()


def works(threads: int | None = None) -> bool:
    """Whether a kernel can be compiled, kept and called here."""

    @kernel
    def count(p):  # type: ignore[no-untyped-def]
        s = carray(p, (32,), np.int64)
        counter, rows = array(s[0], (1,), np.int64), array(s[3], (s[1],), np.int64)
        while True:
            row = take(counter)
            if row >= s[1]:
                break
            rows[row] += 1

    numbers, slots = np.zeros(3, np.int64), np.zeros(SLOTS, np.int64)
    slots[:4] = numbers.ctypes.data, 2, 1, numbers.ctypes.data + 8
    start(count, slots, threads)
    return numbers.tolist()[1:] == [1, 1]


def block_rows(width: int) -> int:
    """How many rows of `width` elements a thread takes at once."""
    return max(1, BLOCK_ELEMENTS // max(1, width))


def per_dtype(make: Callable[[type], object]) -> "Callable[[torch.dtype], object]":
    """A kernel for bf16 and fp32 from one source, the function of a pointer that `make(element type)` returns, compiled
    when first used. What that closes over must be the element type alone: numba looks its cache up by the values of a
    closure, and a compiled function among them would be another one in each process."""

    @cache
    def get(dtype: "torch.dtype") -> object:
        return kernel(make(np.uint16 if dtype.itemsize == 2 else np.float32))

    get.per_dtype = True  # type: ignore[attr-defined]  # `ahead.py` looks for it
    return get
