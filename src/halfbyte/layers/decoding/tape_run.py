"""A tape's operations with their counters, run on all threads. Without torch, so that `image.py` can do without it.

Cost: one call on torch's threads.
"""

import ctypes
from functools import cache

import numpy as np

from halfbyte.layers.kernels.cpu import parallel
from halfbyte.layers.kernels.cpu.decoding import interpreter
from halfbyte.layers.kernels.cpu.decoding import slots as s


class TapeRun:
    """Operations (n, WIDTH) in a row, for a kernel of `interpreter.py` and so many threads.

    Args:
        groups, scratch_bytes: what the largest operation needs. max_tokens: of a text.
    """

    def __init__(
        self, operations: np.ndarray, kernel: object, threads: int, *, groups: int, max_tokens: int, scratch_bytes: int
    ) -> None:
        self.operations, self.kernel = operations, kernel
        self.threads, self.count = threads, len(operations) // s.WIDTH
        self.used = 1  # of the vectors, the first ones
        self._counters = np.zeros((threads + 1) * self.count * interpreter.LINE, np.int64)
        self._arrived = np.zeros(interpreter.LINE, np.int64)
        self._slots = np.zeros(s.WIDTH, np.int64)
        for slot, number in {
            s.TAPE_OPERATIONS: operations.ctypes.data, s.TAPE_COUNT: self.count,
            s.TAPE_COUNTERS: self._counters.ctypes.data, s.TAPE_GROUPS: groups, s.TAPE_MAX_TOKENS: max_tokens,
            s.TAPE_YIELD: _yield_address(), s.TAPE_THREADS: threads, s.TAPE_SCRATCH_BYTES: scratch_bytes,
            s.TAPE_ARRIVED: self._arrived.ctypes.data,
        }.items():  # fmt: skip
            self._slots[slot] = number

    def run(self, first: int = 0, last: int | None = None) -> None:
        """Run operations first .. last; a token begins with the first one."""
        if first == 0:
            self._counters.fill(0)
        self._arrived.fill(0)
        self._slots[s.TAPE_FIRST], self._slots[s.TAPE_LAST] = first, self.count if last is None else last
        self.operations[s.USED :: s.WIDTH] = self.used
        parallel.start(self.kernel, self._slots, self.threads)


@cache
def _yield_address() -> int:
    """Of `sched_yield`, which lets other threads have the core; 0 where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):
        return 0
