"""Memory pages of this process that are files: which tensors lie in one, bring pages in ahead, let them go behind.

Why: frozen weights that were opened memory-mapped need not live in RAM. A page of a file that nobody has written to can
be let go at any moment and is read again when it is next touched; a page that somebody has written to (a trained bias,
a merged weight) is private memory, and letting it go would bring the file's old bytes back in silence. So every page
is looked up before it goes.
Source: Linux `proc(5)` (`/proc/self/maps`, `smaps`, `pagemap`), `madvise(2)`: MADV_WILLNEED reads ahead into the page
cache, MADV_DONTNEED takes pages out of this process; they stay in the page cache as long as the kernel has room.
Cost: measured, per GB: looking up 2.5 ms, letting go 0.6 ms, bringing back from the page cache 5 ms. Linux only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np

PAGE = mmap.PAGESIZE
_WILLNEED, _DONTNEED = 3, 4
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
    def read(cls) -> FileMaps:
        """None at all on a system without `/proc/self/maps`."""
        try:
            with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
                lines = file.readlines()
        except OSError:
            return cls(())
        found = []
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[4] != "0" and fields[5].startswith("/"):
                start, end = fields[0].split("-")
                found.append(Span(int(start, 16), int(end, 16)))
        return cls(tuple(sorted(found)))

    def holds(self, start: int, size: int) -> bool:
        """Whether `size` bytes at `start` lie in a file, over neighbouring maps of it if need be."""
        end, at = start + size, start
        index = bisect_right(self.spans, Span(at, sys.maxsize)) - 1
        while 0 <= index < len(self.spans) and self.spans[index].start <= at < self.spans[index].end:
            at = self.spans[index].end
            if at >= end:
                return True
            index += 1
        return False


def whole_pages(areas: Iterable[tuple[int, int]], *, gap: int = PAGE) -> tuple[Span, ...]:
    """The pages that lie wholly inside `areas` of (address, bytes).

    Args:
        gap: areas nearer to each other than this are joined first; what lies between two tensors of one layer in one
            file is a few bytes of alignment.
    """
    joined: list[Span] = []
    for start, size in sorted(areas):
        if joined and start - joined[-1].end < gap:
            joined[-1] = Span(joined[-1].start, max(joined[-1].end, start + size))
        else:
            joined.append(Span(start, start + size))
    inward = (Span(-(-s.start // PAGE) * PAGE, s.end // PAGE * PAGE) for s in joined)
    return tuple(s for s in inward if s.bytes > 0)


def supported() -> bool:
    """Whether pages can be looked up and let go here: Linux, with this process's `pagemap` readable."""
    return sys.platform == "linux" and _pagemap() is not None


def bring(span: Span) -> None:
    """Start reading a span into the page cache. Returns when the reads are under way; may wait for the disk's queue."""
    _advise(span, _WILLNEED)


def let_go(span: Span) -> int:
    """Take the span's pages out of this process, except those that are private. Returns the bytes it covered."""
    done = 0
    for part in clean(span):
        _advise(part, _DONTNEED)
        done += part.bytes
    return done


def clean(span: Span) -> Iterator[Span]:
    """The parts of a span that can be read from their file again: not a page that was written to, or swapped out."""
    private = _private(span)
    if not private.any():
        yield span
        return
    edges = np.flatnonzero(np.diff(np.concatenate(([True], private, [True])).astype(np.int8)))
    for first, last in edges.reshape(-1, 2):
        yield Span(span.start + int(first) * PAGE, span.start + int(last) * PAGE)


def _private(span: Span) -> Any:
    """A bool a page: written to by this process (present but no file's page), or swapped out."""
    entries = _entries(span)
    written = ((entries & _PRESENT) != 0) & ((entries & _FILE) == 0)
    return written | ((entries & _SWAPPED) != 0)


def _entries(span: Span) -> Any:
    """`/proc/self/pagemap` for a span: one uint64 a page."""
    file = _pagemap()
    if file is None:
        raise OSError("/proc/self/pagemap cannot be read")
    size, at = span.bytes // PAGE * _ENTRY_BYTES, span.start // PAGE * _ENTRY_BYTES
    read = b""
    while len(read) < size:
        part = os.pread(file, size - len(read), at + len(read))
        if not part:
            raise OSError("/proc/self/pagemap ended early")
        read += part
    return np.frombuffer(read, dtype=np.uint64)


def _pagemap() -> int | None:
    return _opened_pagemap(os.getpid())  # a forked child has pages of its own


@cache
def _opened_pagemap(process: int) -> int | None:
    try:
        return os.open(f"/proc/{process}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _advise(span: Span, advice: int) -> None:
    if _libc().madvise(span.start, span.bytes, advice) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"madvise: {os.strerror(number)}")


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.madvise.restype = ctypes.c_int
    return libc
