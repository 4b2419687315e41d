"""How many tokens the kernels of this room take at once, and the memory of a thread in which they do it."""

import numpy as np

from halfbyte.layers.kernels.cpu import tiles
from halfbyte.layers.kernels.cpu.parallel import array, each_block
from halfbyte.layers.kernels.cpu.scalar import flush_subnormals, inlined, set_float_mode, take
from halfbyte.layers.kernels.cpu.tiles import COLUMNS32 as COLUMNS
from halfbyte.layers.kernels.cpu.tiles import ROWS32 as ROWS

AMX = tiles.amx()
CHUNK = 96  # tokens: whole tiles of rows, of columns, and of sums of pairs
SPARE = 15  # rows behind a state's last: the most that a tile has there
_PAGE, _LINE = 4096, 64


def up_to(n: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-n // step) * step


def memory_bytes(numbers: int) -> int:
    """Of a thread, for so many fp32 numbers: a line more than whole pages, so threads compete for no lines."""
    return up_to(4 * (numbers + ROWS * COLUMNS), _PAGE) + _LINE


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
