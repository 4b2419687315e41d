"""Memory pages of this process that are files: which tensors lie in one, bring pages in ahead, let them go behind.

Frozen weights that were opened memory-mapped need not live in RAM. A page of a file that nobody has written to can
be let go at any moment and is read again when it is next touched. A page that was written to (a trained bias, a merged
weight) is private memory: letting it go would silently bring the file's old bytes back. So each is looked up first.
Source: Linux `proc(5)` (`/proc/self/maps`, `smaps`, `pagemap`), `madvise(2)`: MADV_WILLNEED reads ahead into the page
cache, MADV_DONTNEED takes pages out of this process; they stay in the page cache as long as the kernel has room;
MADV_HUGEPAGE has private memory in pages of 2 MB.
Cost: measured, per GB: looking up 2.5 ms, letting go 0.6 ms, bringing back from the page cache 5 ms. Linux only.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from halfbyte.system.platforms import calls

if TYPE_CHECKING:
    from torch import Tensor, dtype

PAGE = mmap.PAGESIZE
_PAGEMAP = "/proc/self/pagemap"
_NORMAL, _RANDOM, _WILLNEED, _DONTNEED = 0, 1, 3, 4
_LINE = 64  # bytes, of a cache line
_ENTRY_BYTES = 8  # of /proc/self/pagemap, one a page
_PRESENT, _SWAPPED, _FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)


class Span(NamedTuple):
    """Addresses from `start` up to and without `end`."""

    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class FileMaps:
    """The file-backed parts of this process's memory, as they were when they were read."""

    spans: tuple[Span, ...]

    @classmethod
    def read(cls) -> Self:
        """None at all on a system without `/proc/self/maps`."""
        return cls(tuple(sorted(span for span, *_ in file_maps())))

    def holds(self, start: int, size: int) -> bool:
        """Whether `size` bytes at `start` lie in a file, over neighbouring maps of it if need be."""
        end, position = start + size, start
        index = bisect_right(self.spans, Span(position, sys.maxsize)) - 1
        while 0 <= index < len(self.spans) and self.spans[index].start <= position < self.spans[index].end:
            position = self.spans[index].end
            if position >= end:
                return True
            index += 1
        return False


def file_maps() -> Iterator[tuple[Span, str, int, str]]:
    """Each part of this process's memory that is a file: where, what it may be used for (`r-xp`), where in the file it
    begins, the file's path."""
    for span, fields in _maps():
        if len(fields) == 6 and fields[4] != "0" and fields[5].startswith("/"):
            yield span, fields[1], int(fields[2], 16), fields[5]


def heap() -> tuple[Span, ...]:
    """Where this process has memory of its own that it writes to."""
    return tuple(span for span, fields in _maps() if fields[4] == "0" and fields[1].startswith("rw"))


def _maps() -> Iterator[tuple[Span, list[str]]]:
    """Each part of this process's memory, with its line of `/proc/self/maps`; none where there is no such file."""
    for fields in (line.split(maxsplit=5) for line in calls.text(Path("/proc/self/maps")).splitlines()):
        start, end = fields[0].split("-")
        yield Span(int(start, 16), int(end, 16)), fields


def whole_pages(areas: Iterable[tuple[int, int]]) -> tuple[Span, ...]:
    """The pages that lie wholly inside `areas` of (address, bytes). Areas nearer to each other than a page are joined
    first; what lies between two tensors of one layer in one file is a few bytes of alignment."""
    joined: list[Span] = []
    for start, size in sorted(areas):
        if joined and start - joined[-1].end < PAGE:
            joined[-1] = Span(joined[-1].start, max(joined[-1].end, start + size))
        else:
            joined.append(Span(start, start + size))
    inward = (Span(-(-s.start // PAGE) * PAGE, s.end // PAGE * PAGE) for s in joined)
    return tuple(s for s in inward if s.bytes > 0)


class Arena:
    """Private memory for tensors that stay, in large pages where the system has them: reading a weight once a token
    then does not wait at each 4 kB. Released with the last tensor in it."""

    def __init__(self, nbytes: int) -> None:
        """nbytes: of all tensors, without their padding to `_LINE`; nothing is taken before it is written to."""
        self._memory: mmap.mmap | None = None
        self._used = 0
        if nbytes > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without them
                self._memory = None

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor in this arena; elsewhere in memory where it does not fit or is not contiguous."""
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor) if tensor.is_contiguous() else tensor.clone()

    def empty(self, shape: Sequence[int], dtype: dtype) -> Tensor:
        """A tensor in this arena, without values; elsewhere in memory where it does not fit."""
        import torch

        place = self._place(shape, dtype)
        return torch.empty(shape, dtype=dtype) if place is None else place

    def zeros(self, shape: Sequence[int], dtype: dtype) -> Tensor:
        """The same of zeros. In the arena they take memory only as they are written to."""
        import torch

        place = self._place(shape, dtype)  # new pages are zero
        return torch.zeros(shape, dtype=dtype) if place is None else place

    def _place(self, shape: Sequence[int], dtype: dtype) -> Tensor | None:
        import torch

        size = math.prod(shape) * dtype.itemsize
        if self._memory is None or not 0 < size <= len(self._memory) - self._used:
            return None
        place = torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=self._used)
        self._used = min(len(self._memory), self._used + -(-size // _LINE) * _LINE)
        return place.view(dtype).view(shape)


def supported() -> bool:
    """Whether pages can be looked up and let go here: Linux, with this process's `pagemap` readable."""
    return sys.platform == "linux" and os.access(_PAGEMAP, os.R_OK)


def prefetch(span: Span) -> None:
    """Start reading a span into the page cache. Returns when the reads are under way; may wait for the disk's queue."""
    _advise(span, _WILLNEED)


def read_ahead(span: Span, *, on: bool) -> None:
    """Whether the kernel reads on behind a page of the span that is touched, as it does by itself."""
    _advise(span, _NORMAL if on else _RANDOM)


def release(span: Span) -> int:
    """Take the span's pages out of this process, except those that are private. Returns the bytes it covered."""
    parts = list(unmodified(span))
    for part in parts:
        _advise(part, _DONTNEED)
    return sum(part.bytes for part in parts)


def let_go(tensors: Iterable[Tensor], maps: FileMaps) -> None:
    """Release what lies in a file of these tensors, where pages can be looked up."""
    areas = [(t.data_ptr(), t.nbytes) for t in tensors if t.device.type == "cpu" and t.numel()]
    for span in whole_pages(area for area in areas if maps.holds(*area)) if supported() else ():
        release(span)


def release_code() -> None:
    """Take the code of libraries out of this process: what starting needed and is not run again does not come back, the
    rest with its next call. Only of maps that no thread can write to; nothing where pages cannot be looked up."""
    for span, allowed, _, path in file_maps() if supported() else ():
        if "w" not in allowed and ".so" in path.rpartition("/")[2]:
            release(span)


def in_file(start: int, size: int, maps: Sequence[tuple[Span, str, int, str]]) -> tuple[str, int] | None:
    """The file, and where in it, of memory that is as it was read; None of private memory. maps: as `file_maps`."""
    for span, _, offset, path in maps if supported() else ():
        if span.start <= start and start + size <= span.end:
            whole = Span(start // PAGE * PAGE, -(-(start + size) // PAGE) * PAGE)
            return (path, offset + start - span.start) if list(unmodified(whole)) == [whole] else None
    return None


def unmodified(span: Span) -> Iterator[Span]:
    """The parts of a span that can be read from their file again: not a page that was written to, or swapped out."""
    entries = _entries(span)
    written = ((entries & _PRESENT) != 0) & ((entries & _FILE) == 0)  # present, but no file's page
    private = written | ((entries & _SWAPPED) != 0)
    if len(private) and not private.any():  # as most are; a start asks of a thousand
        yield Span(span.start, span.start + len(private) * PAGE)
        return
    edges = np.flatnonzero(np.diff(np.concatenate(([True], private, [True])).astype(np.int8)))
    for first, last in edges.reshape(-1, 2):
        yield Span(span.start + int(first) * PAGE, span.start + int(last) * PAGE)


def _entries(span: Span) -> NDArray[np.uint64]:
    """`/proc/self/pagemap` for a span: one uint64 a page."""
    count = span.bytes // PAGE
    with open(_PAGEMAP, "rb", buffering=0) as file:
        entries = os.pread(file.fileno(), count * _ENTRY_BYTES, span.start // PAGE * _ENTRY_BYTES)
    if len(entries) < count * _ENTRY_BYTES:
        raise OSError(f"{_PAGEMAP} ended early")
    return np.frombuffer(entries, np.uint64)


def _advise(span: Span, advice: int) -> None:
    if _libc().madvise(ctypes.c_void_p(span.start), ctypes.c_size_t(span.bytes), advice) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"madvise: {os.strerror(number)}")


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
