"""What this process holds in memory now and at its peak, private pages and pages of files apart.

Why: a plan is compared with what was measured, and the kernel keeps a peak only of both together (VmHWM).
Source: Linux `proc(5)`, `/proc/self/statm` (resident and shared pages), which `Peak` reads fifty times a second on a
thread of its own. Elsewhere psutil's figures, where private and file pages are not told apart.
"""

import ctypes
import os
import re
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from halfbyte.system import accelerator
from halfbyte.system.platforms import calls

PERIOD_S = 0.02
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True)
class Usage:
    """Resident bytes: `private` are the process's own, `file` are pages of mapped files."""

    private: int
    file: int

    @property
    def total(self) -> int:
        return self.private + self.file


def now(pid: int | str = "self") -> Usage:
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            _, resident, shared, *_ = (int(part) for part in file.read().split())
        return Usage((resident - shared) * _PAGE, shared * _PAGE)
    except (OSError, ValueError):
        import psutil

        return Usage(int(psutil.Process(os.getpid() if pid == "self" else int(pid)).memory_info().rss), 0)


def limit(private: int, file: int) -> Usage:
    """What a process may hold: of both kinds together where this system does not tell them apart."""
    return Usage(private, file) if now().file else Usage(private + file, 0)


def process_memory() -> dict[str, int]:
    """Resident bytes of this process now and at their peak, and the peak of the fullest card where there is one: of
    tensors, and with what torch holds beside them."""
    used = {"rss_bytes": now().total, "peak_rss_bytes": calls.peak_resident()}
    if cards := accelerator.peaks():
        used["peak_device_bytes"] = max(allocated for allocated, _ in cards)
        used["peak_device_reserved_bytes"] = max(reserved for _, reserved in cards)
    return used


def trim() -> None:
    """Give what the C library keeps of freed memory back to the system, where it can (glibc)."""
    if sys.platform.startswith("linux") and (release := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        release(0)


@dataclass(frozen=True)
class CpuTime:
    """Seconds that threads of a process ran on a core, and waited for one while others had it."""

    run_s: float
    waited_s: float

    @property
    def waited_share(self) -> float:
        return self.waited_s / max(1e-9, self.run_s + self.waited_s)

    def since(self, before: "CpuTime") -> "CpuTime":
        return CpuTime(self.run_s - before.run_s, self.waited_s - before.waited_s)


def cpu_times(root: Path = Path("/proc/self")) -> dict[str, CpuTime]:
    """Of each thread of this process that is there now, by its number, since it began (`/proc/self/task/*/schedstat`,
    in ns); empty where the kernel does not tell."""
    rows = {}
    for path in (root / "task").glob("*/schedstat"):
        try:
            run, waited, *_ = path.read_text(encoding="ascii").split()
            rows[path.parent.name] = CpuTime(int(run) / 1e9, int(waited) / 1e9)
        except (OSError, ValueError):  # it has ended
            continue
    return rows


def cpu_time(root: Path = Path("/proc/self")) -> CpuTime | None:
    """Of all of them; None where the kernel does not tell. Tells load beside this process, whatever others there are
    in the machine."""
    rows = cpu_times(root).values()
    return CpuTime(sum(row.run_s for row in rows), sum(row.waited_s for row in rows)) if rows else None


def pressure(path: Path = Path("/proc/pressure/cpu")) -> float | None:
    """The share of the last ten seconds in which some task in the machine waited for a core; None if it is not told."""
    match = re.search(r"^some avg10=([\d.]+)", calls.text(path))
    return float(match[1]) / 100 if match else None


class Peak:
    """`with Peak() as peak: ...` samples until the block ends; `peak.private` and `peak.total` are the highest seen."""

    def __init__(self, period_s: float = PERIOD_S) -> None:
        self.period_s = period_s
        self.private = self.file = self.total = 0
        self._recent = Usage(0, 0)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="halfbyte-memory", daemon=True)

    def look(self) -> Usage:
        used = now()
        self.private, self.file = max(self.private, used.private), max(self.file, used.file)
        self.total = max(self.total, used.total)
        self._recent = Usage(max(self._recent.private, used.private), max(self._recent.file, used.file))
        return used

    def take(self) -> Usage:
        """The highest of each since this was last called."""
        self.look()
        recent, self._recent = self._recent, Usage(0, 0)
        return recent

    def __enter__(self) -> Self:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()
        self.look()

    def _sample(self) -> None:
        while not self._end.wait(self.period_s):
            self.look()
