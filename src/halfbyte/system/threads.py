"""Settings of this process: its threads; the allocator and huge pages, which are only reported.

Under a CPU quota (a container) torch starts a thread for every processor of the host, and they take turns on the few
that are allowed. Fixed thresholds of glibc's allocator, small or large, and huge pages (torch's `THP_MEM_ALLOC_ENABLE`,
glibc's `glibc.malloc.hugetlb`) were measured and gained nothing (docs/log), so they stay as the system and the user
have them; the report says how that is.
"""

import math
import os
import platform
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte.system import device, openmp, topology
from halfbyte.system.platforms import calls

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
MALLOC_VARIABLES = (
    "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD",
)  # fmt: skip
PRODUCTS_KEPT = 256  # a micro-batch of a Llama under all-linear has about fifty
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class ProcessSettings:
    """What this process computes with, in words for the report. `threads` are torch's, for one operation."""

    threads: int
    threads_why: str
    waiting: str
    allocator: str
    huge_pages: str

    @property
    def line(self) -> str:
        threads = f"{self.threads} threads ({self.threads_why}), waiting: {self.waiting}"
        return f"{threads}; allocator {self.allocator}; huge pages: {self.huge_pages}"

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def keep_few_products(env: MutableMapping[str, str] = os.environ) -> None:
    """Let oneDNN keep the code of at most `PRODUCTS_KEPT` matrix products, where the environment does not say a number.

    It compiles each shape of a product (2 ms) and keeps the last 1,024, half a megabyte each, in the heap, where they
    also hold the blocks around them apart: a run whose micro-batches have ever new lengths grew by 0.5 GB. PyTorch
    keeps what belongs to its last 1,024 products once more, another half megabyte each, and gains no time by it (64 and
    63 microseconds a product). Both are read at the first product of the process, so call it before. Source: oneDNN's
    "Primitive Cache", ideep's `lru_cache.hpp`.
    """
    env.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(PRODUCTS_KEPT))
    env.setdefault("LRU_CACHE_CAPACITY", "1")


def configure(
    cores: int, env: Mapping[str, str] = os.environ, *, sharing: int | None = None, place: int = 0
) -> ProcessSettings:
    """Set the threads of this process to at most `cores`, where the environment does not say otherwise. `sharing`: so
    many processes of one run share this machine, and `cores` are this one's, the `place`-th; where the machine has
    memory nodes for them, it stays on one."""
    keep_few_products()
    share = device.core_share() / (sharing or 1)
    node = topology.stay_on_node(place, sharing) if sharing is not None else None
    threads, why = _threads(cores, env, sharing)
    why += "" if node is None else f"; memory node {node}"
    waiting = openmp.watch(threads, share, env)
    # the choice in brackets of `always [madvise] never`; no block of ours is advised
    huge_pages = calls.text(_HUGE_PAGES).partition("[")[2].partition("]")[0] or "unknown"
    return ProcessSettings(threads, why, waiting, _allocator(env), huge_pages)


def asked_threads(env: Mapping[str, str] = os.environ) -> tuple[int, str] | None:
    """The threads that the user's environment asks for, at most as many as may run at once, and the variable that does;
    None if none does."""
    for name in THREAD_VARIABLES:
        first = env.get(name, "").partition(",")[0]
        if first.isdigit() and int(first) > 0:
            return min(int(first), max(1, math.ceil(device.core_share()))), name
    return None


def _threads(cores: int, env: Mapping[str, str], sharing: int | None = None) -> tuple[int, str]:
    import torch

    current, asked = torch.get_num_threads(), asked_threads(env)
    if sharing is not None and asked is None:
        torch.set_num_threads(cores)
        return cores, f"{sharing} processes share this machine's cores"
    if asked is not None:
        torch.set_num_threads(asked[0])  # OpenMP itself has as many as the variable says, which torch does not show
        return asked
    if current <= cores:
        return current, "torch's own choice"
    torch.set_num_threads(cores)
    lies = topology.read()
    limit = lies.words if cores == len(lies.computing) else ""
    return cores, f"{cores} of {current}: {limit or 'more are not allowed to run at once'}"


def _allocator(env: Mapping[str, str]) -> str:
    """The C library's, with the variables that change it."""
    library = " ".join(part for part in platform.libc_ver() if part) or "the system's"
    return ", ".join([library, *(name for name in MALLOC_VARIABLES if env.get(name))])
