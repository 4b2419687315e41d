"""Settings of halfbyte's own process: how many threads, and how the C library keeps freed memory.

Why: under a CPU quota (a container) torch starts a thread for every processor of the host, and they take turns on the
few that are allowed. glibc hands every large block back to the system when it is freed and asks for it again in the
next layer, until its moving threshold has grown past the block; a fixed threshold does not depend on what came before.
Source: `torch.set_num_threads`; glibc's `mallopt(3)`, where a threshold that is set stops moving.
Cost: none. Huge pages are left as the system has them: asking for them gained nothing measurable (docs/log.md).
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
MALLOC_VARIABLES = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
# Blocks from this size on get pages of their own, given back when they are freed; smaller ones stay and are used again.
MMAP_THRESHOLD = 1 << 30
TRIM_THRESHOLD = 256 << 20  # free bytes at the heap's top from which they are given back
TOP_PAD = 64 << 20  # bytes that the heap grows by
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class Settings:
    """What this process computes with, in words for the report. `threads` are torch's, for one operation."""

    threads: int
    threads_why: str
    allocator: str
    huge_pages: str

    @property
    def line(self) -> str:
        return f"{self.threads} threads ({self.threads_why}); {self.allocator}; huge pages: {self.huge_pages}"

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def settle(cores: int, env: Mapping[str, str] = os.environ) -> Settings:
    """Set threads and allocator for this process, where the user's environment does not say otherwise.

    Args:
        cores: that this process may use, affinity and CPU quota counted (`device.Device.cores`).
        env: variables that OpenMP and glibc read.
    """
    threads, why = _threads(cores, env)
    return Settings(threads, why, _allocator(env), _huge_pages())


def _threads(cores: int, env: Mapping[str, str]) -> tuple[int, str]:
    import torch

    found = torch.get_num_threads()
    if asked := [name for name in THREAD_VARIABLES if env.get(name)]:
        return found, asked[0]
    if found <= cores:
        return found, "torch's own choice"
    torch.set_num_threads(cores)
    return cores, f"{cores} of {found}: more are not allowed to run at once"


def _allocator(env: Mapping[str, str]) -> str:
    name, version = platform.libc_ver()
    if name != "glibc":
        return "the system's"
    if asked := [name for name in MALLOC_VARIABLES if env.get(name)]:
        return f"glibc {version}, {asked[0]}"
    mallopt = ctypes.CDLL(None).mallopt
    values = ((_M_MMAP_THRESHOLD, MMAP_THRESHOLD), (_M_TRIM_THRESHOLD, TRIM_THRESHOLD), (_M_TOP_PAD, TOP_PAD))
    if not all(mallopt(option, value) for option, value in values):
        return f"glibc {version}, which refused a threshold"
    return f"glibc {version}: blocks below {MMAP_THRESHOLD >> 20} MiB stay and are used again"


def _huge_pages() -> str:
    """The choice in brackets of `always [madvise] never`; no block of ours is advised."""
    try:
        text = _HUGE_PAGES.read_text(encoding="ascii")
    except OSError:
        return "unknown"
    return text.partition("[")[2].partition("]")[0] or "unknown"
