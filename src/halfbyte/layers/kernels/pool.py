"""Memory of a micro-batch's tensors, used again by the next ones: blocks of pages of our own, lent to torch.

Why: PyTorch asks glibc for aligned memory, and `memalign` cannot put a tensor where one of the same size was. So the
tensors of each layer split larger holes, and a run's heap grew for a hundred steps: SmolLM2, 800 tokens a step, from
1.3 to 2.4 GB (docs/log, "Blocks of our own").
What: a block is lent for as long as a tensor on it lives, and then goes to the next tensor that it holds. A smaller
tensor takes a larger block. One with a row for each token of a micro-batch gets a block for the run's longest
(`expect`); pages that no tensor reached take no memory. What is free beyond a share of the most that was lent goes.
Source: `torch.frombuffer`, which keeps the buffer's exporter alive, and no more, until the storage is freed.
Cost: about five microseconds a tensor, so small ones stay torch's own.
"""

import contextlib
import math
import mmap
import sys
import threading
import weakref
from bisect import bisect_left, insort_left
from collections import deque
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

LEAST_BYTES = 65_536  # a smaller tensor is torch's own
LARGER = 2.0  # a block may be so many times as large as its tensor
# Free blocks that are kept: with them no more is held than so many times the most that was lent at once.
KEPT_SHARE = 1.1
LINE_BYTES = 64
# Blocks from this size on ask for pages of 2 MB: 3 to 4% of a step in fp32, and no more memory (docs/log).
HUGE_FROM = 4 << 20
_FLAGS = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}


class Block(mmap.mmap):
    """Pages of our own, and where in the first one a tensor begins: if all began with a page, those that a kernel
    passes over at once would compete for the same lines of the cache."""

    begin: int


class _Loan(weakref.ref[memoryview]):
    """A view that a tensor holds; called back when it lets go."""

    __slots__ = ("block",)
    block: Block


class Pool:
    """Blocks of memory, each lent to one tensor at a time. For use from any thread."""

    def __init__(self) -> None:
        self.total_bytes = 0  # of all blocks
        self.lent_bytes = self.max_lent_bytes = 0  # of those that are lent, now and at most
        self._block_count = 0
        self.releases = 0  # times that all free blocks were let go
        self._expected: tuple[frozenset[int], int] = frozenset(), 0
        self._free: list[Block] = []  # by size; of one size the last one returned is first, as it may be in the cache
        self._lock = threading.Lock()
        self._returned: deque[Block] = deque()
        self._loans: dict[int, _Loan] = {}  # by id, as a reference hashes what it refers to

    def expect(self, rows: Collection[int], most: int) -> None:
        """From now on a tensor of so many rows, (rows, ..) or (B, T, ..) with rows = B T, has a block for the most."""
        self._expected = frozenset(rows), most

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU, contiguous, its numbers not set."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size < LEAST_BYTES:
            return torch.empty(shape, dtype=dtype)
        for rows in {shape[0], math.prod(shape[:2])} & self._expected[0]:
            size = max(size, count // rows * self._expected[1] * dtype.itemsize)
        with self._lock:
            block = self._take(size)
        view = memoryview(block)
        loan = _Loan(view, self._back)
        loan.block = block
        self._loans[id(loan)] = loan
        # no view: what an autograd function returns may then be added to in place
        return torch.frombuffer(view, dtype=dtype, count=count, offset=block.begin).resize_(shape)

    def give_back(self) -> None:
        """Let go of every block that is free."""
        with self._lock:
            self._collect()
            self.releases += 1
            self.total_bytes -= sum(map(len, self._free))
            self._free.clear()
            self.max_lent_bytes = self.lent_bytes

    def _take(self, size: int) -> Block:
        self._collect()
        size += mmap.PAGESIZE
        place = bisect_left(self._free, size, key=len)
        if place < len(self._free) and len(self._free[place]) <= LARGER * size:
            block = self._free.pop(place)
        else:
            block = self._new_block(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        self.lent_bytes += len(block)
        self.max_lent_bytes = max(self.max_lent_bytes, self.lent_bytes)
        return block

    def _new_block(self, size: int) -> Block:
        """A new block; where that is more than is kept, free ones go, the smallest first."""
        while self._free and self.total_bytes + size > KEPT_SHARE * max(self.max_lent_bytes, self.lent_bytes + size):
            self.total_bytes -= len(self._free.pop(0))
        block = Block(-1, size, **_FLAGS)
        if size >= HUGE_FROM and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                block.madvise(mmap.MADV_HUGEPAGE)
        self._block_count += 1
        block.begin = LINE_BYTES * (self._block_count * 17 % (mmap.PAGESIZE // LINE_BYTES))
        self.total_bytes += size
        return block

    def _back(self, loan: _Loan) -> None:
        """May be called in the middle of anything, so it takes no lock."""
        del self._loans[id(loan)]
        self._returned.append(loan.block)

    def _collect(self) -> None:
        while self._returned:
            block = self._returned.popleft()
            self.lent_bytes -= len(block)
            insort_left(self._free, block, key=len)


POOL = Pool()


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on the device of `like`, and of its dtype where none is said; its numbers are not set."""
    dtype = dtype or like.dtype
    if like.device.type == "cpu":
        return POOL.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=like.device)


def empty_like(x: Tensor) -> Tensor:
    """As `torch.empty_like` of a contiguous tensor."""
    return empty(x.shape, x)
