"""How this machine's processors lie: which share a core or a memory node, which are slower; and so how many threads
compute, and where several processes of one run belong.

Why: two threads of a core share its multipliers; a product that is cut into equal parts ends when the slowest core
does; memory of another node is twice as far.
Source: Linux's ABI, `sysfs-devices-system-cpu` (topology, cpu_capacity), `sysfs-devices-node` (cpulist, distance), and
`devices/cpu_atom` of Intel's hybrids. Elsewhere each processor is a core. Cost: small files for each processor, once.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from halfbyte.system.platforms import calls
from halfbyte.system.platforms.calls import text

# Beside a fast core of a hybrid at the same clock: half as many numbers are multiplied at once.
SLOW_CORE = 0.5


@dataclass(frozen=True)
class Core:
    """`cpus`: its threads that this process may run on. `speed`: beside that of the fastest core."""

    cpus: tuple[int, ...]
    node: int = 0
    speed: float = 1.0


@dataclass(frozen=True)
class Topology:
    """The cores of this process, the fastest first. `far`: how many times as far memory of another node is."""

    cores: tuple[Core, ...]
    far: float = 1.0

    @property
    def nodes(self) -> tuple[int, ...]:
        return tuple(sorted({core.node for core in self.cores}))

    @property
    def computing(self) -> tuple[Core, ...]:
        """As many of the fastest cores as compute most where all wait for the slowest."""
        counts = range(1, len(self.cores) + 1)
        best = max(counts, key=lambda count: (count * self.cores[count - 1].speed, -count), default=0)
        return self.cores[:best]

    def of_node(self, number: int) -> tuple[int, ...]:
        """The processors of one node that a process of it runs on: all threads of its computing cores."""
        return tuple(sorted(cpu for core in self.computing if core.node == number for cpu in core.cpus))

    @property
    def words(self) -> str:
        """What is not plain of it; empty where all processors are alike."""
        threads, slow = max(len(core.cpus) for core in self.cores), len(self.cores) - len(self.computing)
        parts = [f"{len(self.cores)} cores"]
        parts += [f"{threads} threads each, of which one computes"] * (threads > 1)
        parts += [f"{slow} of them slower and left out"] * (slow > 0)
        parts += [f"{len(self.nodes)} memory nodes"] * (len(self.nodes) > 1)
        return ", ".join(parts) if len(parts) > 1 else ""


def read(root: Path = Path("/"), allowed: Collection[int] | None = None) -> Topology:
    """The topology under `root`, which holds `sys`; `allowed`: processors, None for those of this process."""
    if allowed is None:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(calls.cores())
    return _read(root, frozenset(allowed))


@cache
def _read(root: Path, allowed: frozenset[int]) -> Topology:
    devices = root / "sys/devices"
    node_of = dict[int, int]()
    own, *others = [int(word) for word in text(devices / "system/node/node0/distance").split()] or [1]
    for folder in sorted((devices / "system/node").glob("node[0-9]*")):
        node_of |= dict.fromkeys(numbers(text(folder / "cpulist")), int(folder.name[4:]))
    slow = numbers(text(devices / "cpu_atom/cpus"))
    threads, speeds = dict[frozenset[int], int](), dict[int, float]()
    for cpu in sorted(allowed):
        folder = devices / f"system/cpu/cpu{cpu}"
        beside = numbers(text(folder / "topology/thread_siblings_list"))
        threads.setdefault((beside & allowed) | {cpu}, cpu)
        capacity = text(folder / "cpu_capacity")
        clock = text(folder / "cpufreq/cpuinfo_max_freq") if slow else ""
        speeds[cpu] = float(capacity or clock or 1) * (SLOW_CORE if cpu in slow and not capacity else 1.0)
    fastest = max(speeds.values(), default=1.0) or 1.0
    cores = [Core(tuple(sorted(cpus)), node_of.get(cpu, 0), speeds[cpu] / fastest) for cpus, cpu in threads.items()]
    several = others and len({core.node for core in cores}) > 1
    far = sum(others) / len(others) / own if several else 1.0
    return Topology(tuple(sorted(cores, key=lambda core: (-core.speed, core.cpus))), far)


def numbers(listed: str) -> frozenset[int]:
    """The processors of a list as Linux writes it: `0-3,8,10-11`."""
    ranges = (part.partition("-") for part in listed.strip().split(",") if part)
    return frozenset(n for low, _, high in ranges for n in range(int(low), int(high or low) + 1))


def stay_on_node(place: int, processes: int, root: Path = Path("/")) -> int | None:
    """Keep this process, the `place`-th of so many of one run, on one memory node, where each gets as many; returns its
    number. Called before there are threads. Memory that is touched from then on is the node's own."""
    topology = read(root)
    nodes = topology.nodes
    if len(nodes) < 2 or processes % len(nodes) or not hasattr(os, "sched_setaffinity"):
        return None
    node = nodes[place * len(nodes) // processes]
    os.sched_setaffinity(0, topology.of_node(node))
    return node
