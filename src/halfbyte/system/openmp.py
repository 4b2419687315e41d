"""The OpenMP library that torch computes with, and how its threads wait for each other beside other programs.

Why: a thread that has done its part of an operation spins until the others have, since to sleep and to be woken costs
7% of a training. Where another program uses a core, it spins for a thread that does not run, and takes the time in
which that one could: beside one busy process two threads had a third of their speed.
What: GNU OpenMP spins for microseconds only where it has more threads than there are processors. So while threads of
this process wait for a core, or may not use as many as they are, an empty team is in the process beside them. Imported
before torch, it asks for no spin at all then (`prepare`): 3% more beside one busy process, 10% beside two. Where the
environment says how to wait (`GOMP_SPINCOUNT`, `OMP_WAIT_POLICY`), that holds.
Source: libgomp, `config/linux/wait.h` (`do_spin`), `env.c` (300,000 spins, else 100) and `team.c` (`gomp_free_thread`:
a team ends with the thread that began it). Linux `proc(5)` for waits. LLVM's and Intel's OpenMP have no such rule.
Cost: a look at this process's threads four times a second, 0.1 ms.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping, MutableMapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from halfbyte.system import usage
from halfbyte.system.platforms import calls

WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
# What `prepare` asks for: the spins that are usual on an idle machine, and none where threads have to share.
PREPARED = {"GOMP_SPINCOUNT": "300000", "OMP_WAIT_POLICY": "PASSIVE"}
LOOK_S = 0.25
CALM_S = 1.0  # without a wait for a core, until threads may spin again
# Of the time, by the thread that waits most: 0.03 of it on an idle machine, 0.2 and more beside a busy process.
LEAST_WAIT = 0.1


def prepare(env: MutableMapping[str, str] = os.environ) -> None:
    """Tell GNU OpenMP, which reads it when torch is loaded, how to wait. No other OpenMP library is told, nor where the
    environment does say something; `watch` takes it back, for processes that are not ours."""
    torch = None if "torch" in sys.modules else find_spec("torch")
    theirs = Path(torch.origin or "").parent / "lib" if torch else None
    if theirs and any(theirs.glob("libgomp*")) and not any(env.get(name) for name in WAIT_VARIABLES):
        env.update(PREPARED)


@cache
def region() -> Any | None:
    """`GOMP_parallel` of the OpenMP library that torch has loaded; None where it has none of that name."""
    for path in libraries():
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


def libraries(maps: Path = Path("/proc/self/maps")) -> list[str]:
    """Where the OpenMP library in this process lies: as Linux lists it, else the one that torch's wheel brings, which
    torch will load."""
    lines = calls.text(maps).splitlines()
    mapped = {line.split(maxsplit=5)[5] for line in lines if "omp" in line}  # a path may hold spaces
    if not (paths := _named(mapped)) and (torch := find_spec("torch")) is not None:
        paths = _named(str(path) for path in (Path(torch.origin or "").parent / "lib").glob("lib*omp*"))
    return [path for path in sorted(paths) if f"{os.sep}torch" in path] or sorted(paths)


def _named(paths: Iterable[str]) -> set[str]:
    return {path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))}


class EmptyTeam:
    """Threads that do nothing, more than there are processors."""

    def __init__(self) -> None:
        self._leave: threading.Event | None = None

    @property
    def there(self) -> bool:
        return self._leave is not None

    def begin(self) -> None:
        if self._leave is None:
            self._leave = threading.Event()
            threading.Thread(target=_stay, args=(self._leave,), name="halfbyte-team", daemon=True).start()

    def end(self) -> None:
        if self._leave is not None:
            self._leave.set()
            self._leave = None


def empty_regions(count: int, times: int = 1) -> None:
    """Parallel regions of so many threads that do nothing."""
    if (run := region()) is not None:
        for _ in range(times):
            run(_nothing(), None, count, 0)


@cache
def _nothing() -> ctypes.c_void_p:
    return ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # free(NULL)


def _stay(leave: threading.Event) -> None:
    empty_regions(calls.cores() + 1)
    leave.wait()


class CoreWatch:
    """Sees, look by look, whether threads of this process wait for a core; `team` is there while they do, or always."""

    def __init__(self, team: EmptyTeam, *, always: bool) -> None:
        self.team, self.always = team, always
        self._before: Mapping[str, usage.CpuTime] = {}
        self._calm_at = 0.0

    def look(self, now: Mapping[str, usage.CpuTime], at: float) -> None:
        """`now`: times of each thread; `at`: seconds of a clock."""
        waits = [row.since(self._before[name]).waited_s for name, row in now.items() if name in self._before]
        self._before = now
        if self.always or max(waits, default=0.0) > LEAST_WAIT * LOOK_S:
            self._calm_at = at + CALM_S
            self.team.begin()
        elif at >= self._calm_at:
            self.team.end()

    def run(self) -> None:
        while True:
            self.look(usage.cpu_times(), time.monotonic())
            time.sleep(LOOK_S)


_watching: threading.Thread | None = None


def watch(threads: int, cores: float, env: Mapping[str, str] = os.environ) -> str:
    """Watch from now on how `threads`, torch's for one operation, get the `cores` that this process may use; returns
    how they wait for each other, in words. Once for a process is enough, and one that was forked is another one."""
    global _watching
    if all(env.get(name) == value for name, value in PREPARED.items()):
        for name in PREPARED:
            os.environ.pop(name, None)
    elif asked := next((f"{name}={env[name]}" for name in WAIT_VARIABLES if env.get(name)), None):
        return asked
    if threads == 1:
        return "nothing to wait for"
    if region() is None or not any("libgomp" in Path(path).name for path in libraries()) or not usage.cpu_times():
        return "the library's own way"
    if _watching is None or not _watching.is_alive():
        watching = CoreWatch(EmptyTeam(), always=threads > cores)
        _watching = threading.Thread(target=watching.run, name="halfbyte-openmp", daemon=True)
        _watching.start()
    return "short, then asleep" if threads > cores else "spinning; asleep while other programs use the cores"
