"""What more cores of this machine bring: measured for products, passes over memory and waiting; then for a step.

What: `halfbyte doctor` measures with 1, 2, 4, ... threads, and keeps it beside the rates. Between these numbers a rate
lies on a line; beyond, it goes on by the share that does not scale (Amdahl), fitted to the last one. A barrier takes as
many times as long as there are more threads. Of a plan's time Python's part stays, passes over memory go as memory
does, and all else as products.
Source: G. Amdahl, AFIPS 1967. Cost: a second for each number of threads. No torch but to measure.
"""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np

from halfbyte.plan.calibrate import MEMORY_BYTES, Tries, path_of, threads
from halfbyte.plan.job import Job
from halfbyte.plan.result import Plan
from halfbyte.plan.timing import mean_micro_batches
from halfbyte.runs.folder import read_json
from halfbyte.system import files, openmp
from halfbyte.system import topology as topologies
from halfbyte.system.device import Device
from halfbyte.system.topology import Topology

SUFFIX, ASKED = ".scaling.json", (1, 2, 4, 8, 16, 32, 64)
SERIAL = frozenset({"overhead", "own dropout", "writing"})
MEMORY = frozenset({"operands", "elementwise", "rounding", "optimiser"})
# Parallel regions of a layer, forward and backward: counted on SmolLM2 with adapters on all linear layers.
REGIONS_OF_A_LAYER = 60
BARRIERS = 2_000
SIZE = 1536  # of a product


@dataclass(frozen=True)
class Measured:
    """With so many threads: operations and bytes a second, and seconds of a region that does nothing."""

    threads: int
    products: float
    memory: float
    barrier_s: float


@dataclass(frozen=True)
class Scaling:
    """`rows`: by number of threads, ascending, from 1 on."""

    rows: tuple[Measured, ...]

    def rate(self, name: str, count: float) -> float:
        """`products` or `memory` with so many threads."""
        counts, rates = [row.threads for row in self.rows], [float(getattr(row, name)) for row in self.rows]
        if count <= counts[-1]:
            return float(np.interp(count, counts, rates))
        serial = max(0.0, (counts[-1] * rates[0] / rates[-1] - 1) / max(1, counts[-1] - 1))
        return rates[0] / (serial + (1 - serial) / count)

    def barrier_s(self, count: float) -> float:
        counts, seconds = [row.threads for row in self.rows], [row.barrier_s for row in self.rows]
        return float(np.interp(count, counts, seconds)) * max(1.0, count / counts[-1])


@dataclass(frozen=True)
class OnCores:
    """A step on so many cores, beside one on one core; what keeps it from as many times as fast."""

    cores: int
    step_s: float
    speed_up: float
    limit: str


@dataclass(frozen=True)
class CoresForecast:
    """`nodes`: memory nodes, seconds of a step of one process over all, and of one on each; None of a single one.
    `measured`: with how many threads at most; beyond, the figures are by formula."""

    steps: tuple[OnCores, ...]
    nodes: tuple[int, float, float] | None
    measured: int


def step_on(parts: dict[str, float], scaling: Scaling, now: int, count: int, regions: float) -> dict[str, float]:
    """Seconds of each part of a step that takes `parts` with `now` threads, with `count`; waiting is one more."""
    memory, products = (scaling.rate(kind, now) / scaling.rate(kind, count) for kind in ("memory", "products"))
    ratios = {**dict.fromkeys(SERIAL, 1.0), **dict.fromkeys(MEMORY, memory)}
    waiting = regions * max(0.0, scaling.barrier_s(count) - scaling.barrier_s(now))
    return {**{name: part * ratios.get(name, products) for name, part in parts.items()}, "waiting": waiting}


def expect(parts: dict[str, float], scaling: Scaling, now: int, regions: float, most: int) -> tuple[OnCores, ...]:
    """A step on 1, 2, 4, ... cores up to `most`, at least 64."""
    alone = step_on(parts, scaling, now, 1, regions)
    whole, every = sum(alone.values()), list[OnCores]()
    for count in sorted({*(n for n in ASKED if n <= max(most, ASKED[-1])), most}):
        seconds = step_on(parts, scaling, now, count, regions)
        lost = {name: value - alone.get(name, 0.0) / count for name, value in seconds.items()}
        limit = max(lost, key=lambda name: lost[name]) if count > 1 else ""
        every.append(OnCores(count, sum(seconds.values()), whole / sum(seconds.values()), limit))
    return tuple(every)


def over_nodes(
    parts: dict[str, float], scaling: Scaling, now: int, regions: float, topology: Topology, *, micro_batches: int,
    trainable: int,
) -> tuple[int, float, float] | None:  # fmt: skip
    """As `CoresForecast.nodes`. Of a process over all nodes all but one in so many accesses are far. One on each makes
    its share of the micro-batches, or smaller ones."""
    count, cores = len(topology.nodes), len(topology.computing)
    if count < 2:
        return None
    far = (1 + (count - 1) * topology.far) / count
    one = step_on(parts, scaling, now, cores, regions)
    together = sum(value * (far if name in MEMORY else 1.0) for name, value in one.items())
    share = math.ceil(micro_batches / count) / max(1, micro_batches)
    own = step_on(parts, scaling, now, max(1, cores // count), regions * share)
    shares = {**dict.fromkeys(SERIAL, share), "waiting": 1.0}
    each = sum(value * shares.get(name, 1 / count) for name, value in own.items())
    reduced = 8 * (count - 1) / count * trainable  # bytes of gradients that each sends and receives
    return count, together, each + reduced / scaling.rate("memory", max(1, cores // count))


def of_plan(plan: Plan, job: Job, device: Device, topology: Topology | None = None) -> CoresForecast | None:
    """What a plan's step would be on other numbers of cores; None where `doctor` has not measured how this machine
    scales, and on a card."""
    scaling = None if device.on_card else cached(device, plan.compute_dtype)
    if scaling is None:
        return None
    topology, now = topology or topologies.read(), threads(device)
    micro_batches = mean_micro_batches(job, plan.max_tokens_per_micro_batch)
    known = plan.time.parts, scaling, now, float(REGIONS_OF_A_LAYER * job.facts.layers * micro_batches)
    nodes = over_nodes(*known, topology, micro_batches=micro_batches, trainable=plan.trainable)
    return CoresForecast(expect(*known, len(topology.computing)), nodes, scaling.rows[-1].threads)


def measure(device: Device, dtype: str) -> Scaling:
    """Measure with 1, 2, 4, ... of torch's threads, the best of some tries each."""
    import torch

    from halfbyte.layers.kernels.cpu.matmul import into

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    a, b, out = (torch.ones(SIZE, SIZE, dtype=kind) for _ in range(3))
    long = torch.ones(MEMORY_BYTES // kind.itemsize, dtype=kind)
    before, most, rows = torch.get_num_threads(), threads(device), list[Measured]()
    try:
        for count in (*(n for n in ASKED if n < most), most):
            torch.set_num_threads(count)
            tries = Tries("cpu")
            with torch.no_grad():
                products = 2 * SIZE**3 / tries.best(lambda: into(out, a, b))
                memory = 2 * long.nbytes / tries.best(lambda: long.mul_(1))
            barrier_s = tries.best(partial(openmp.empty_regions, count, BARRIERS)) / BARRIERS
            rows.append(Measured(count, products, memory, barrier_s))
    finally:
        torch.set_num_threads(before)
    return Scaling(tuple(rows))


def keep(device: Device, dtype: str, scaling: Scaling) -> None:
    path = path_of(device, dtype).with_suffix(SUFFIX)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, files.as_json(files.seal(asdict(scaling))))


def cached(device: Device, dtype: str) -> Scaling | None:
    """What was measured on this machine under the same conditions."""
    value = read_json(path_of(device, dtype).with_suffix(SUFFIX))
    whole = files.SEAL in value and files.is_sealed(value)
    return Scaling(tuple(Measured(**row) for row in value["rows"])) if whole else None
