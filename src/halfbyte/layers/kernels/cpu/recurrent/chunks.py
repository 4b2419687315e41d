"""The memory of a thread in which the kernels of this room take a chunk of tokens (`sizes.py`), and its float mode."""

import numpy as np

from halfbyte.layers.kernels.cpu import tiles
from halfbyte.layers.kernels.cpu.parallel import array, each_block
from halfbyte.layers.kernels.cpu.scalar import flush_subnormals, inlined, set_float_mode, take

AMX = tiles.amx()
TILE = tiles.ROWS32, tiles.COLUMNS32


@inlined
def each_task(slots, part, args, amx):  # type: ignore[no-untyped-def]
    """`each_block` for parts whose states and decays sink below 2^-126: those are 0. amx: what `AMX` is, for numba."""
    mode = flush_subnormals()
    if AMX:
        tiles.amx_begin(np.zeros(64, np.uint8))
    each_block(slots, part, args)
    if AMX:
        tiles.amx_end()
    set_float_mode(mode)


@inlined
def thread_memory(slot, memory, size):  # type: ignore[no-untyped-def]
    """The address of a thread's own memory, of `size` bytes each from `memory` on; asked for once by each thread."""
    return memory + take(array(slot[0], (8,), np.int64)[1:]) * size


@inlined
def numbers(at, count):  # type: ignore[no-untyped-def]
    """So many fp32 numbers at an address, and the address behind them."""
    return array(at, (count,), np.float32), at + 4 * count


@inlined
def matrices(at, count, size, element):  # type: ignore[no-untyped-def]
    """So many matrices of `size` numbers each, one after the other, and the address behind them."""
    found = array(at, (count, size), element)
    return found, at + found.itemsize * count * size
