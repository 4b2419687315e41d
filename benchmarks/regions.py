"""Where the time of a training step goes, with one thread and with more, and what that says of more cores.

Each number of threads is a process of its own; they take turns. A process trains as `halfbyte train` does, and after a
step to warm up torch's profiler watches whole steps. Regions, by the time of the main thread alone (self times, so that
they add up to the step):

    kernels      halfbyte's own compiled kernels (`parallel.start`)
    products     the library's matrix products
    operations   torch's other operations
    optimiser    the optimiser's step and the norm of the gradients, products and operations inside
    loading      the next item of the data: collating
    Python       all that is left: between operations

Beside them stands a matrix product alone, whose ratio is what a step could have. For N cores each region is taken as
serial + parallel / N (Amdahl), from its times with one and two threads.

    python benchmarks/regions.py --data GSM8K/train.jsonl [--targets all-linear] [--compute int8] [--model FOLDER]

With more threads than cores (`--threads 2 16` on two) it tells whether threads that wait take the cores from those that
work: the ratio of a step should be near 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.stacks import Case

REGIONS = ("kernels", "products", "operations", "optimiser", "loading", "Python")
PRODUCTS = ("::mm", "::addmm", "::bmm", "::baddbmm", "linear", "::matmul", "::_int_mm", "dot_product")
CORES = (2, 4, 8, 16, 32, 64)
WHOLE, KERNEL = "halfbyte step", "halfbyte kernel"


def product_s(size: int = 1536, times: int = 8) -> float:
    """Seconds of a bf16 (else fp32) product, the median."""
    import torch

    from halfbyte.system import device

    dtype = torch.bfloat16 if device.compute_dtype(device.detect())[0] == "bf16" else torch.float32
    a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        a @ b
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


@contextmanager
def marks() -> Iterator[None]:
    """Calls of halfbyte's kernels have a name in the profile."""
    from torch.profiler import record_function

    from halfbyte.layers.kernels.cpu import parallel

    start = parallel.start

    def marked(*args: Any) -> None:
        with record_function(KERNEL):
            start(*args)

    parallel.start = marked
    try:
        yield
    finally:
        parallel.start = start


def regions(events: Any, whole_s: float) -> dict[str, float]:
    """Seconds of each region in a profile of the main thread; nothing is counted twice."""
    main = next(event.thread for event in events if event.name == KERNEL or event.name.startswith("aten::"))
    taken, stack = dict.fromkeys(REGIONS, 0.0), list[Any]()
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        if event.thread not in (main, 0) or event.time_range.end <= event.time_range.start:
            continue
        while stack and stack[-1].time_range.end <= event.time_range.start:
            stack.pop()
        above = next((region for region in map(place, stack) if region in ("optimiser", "loading")), None)
        region = above or place(event)
        inside = place(stack[-1]) if stack else None
        seconds = (event.time_range.end - event.time_range.start) / 1e6
        if region is not None:
            taken[region] += seconds
            if inside is not None and stack:
                taken[above or inside] -= seconds
        stack.append(event)
    taken["Python"] = whole_s - sum(taken.values())
    return taken


def place(event: Any) -> str | None:
    """The region of an event; None: it is none of a region, as autograd's nodes, whose own time is Python's."""
    name = event.name
    if name == KERNEL:
        return "kernels"
    if name.startswith("Optimizer."):
        return "optimiser"
    if name.startswith("enumerate(DataLoader)"):
        return "loading"
    if not name.startswith(("aten::", "mkldnn::", "onednn::")):
        return None
    return "products" if any(part in name for part in PRODUCTS) else "operations"


def work(case: Case, compute: str, steps: int) -> None:
    """Train; print the seconds of each region of a step."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from halfbyte import finetune
    from halfbyte.recipe.file import recipe_from
    from halfbyte.training.events import Listener

    watch = profile(activities=[ProfilerActivity.CPU], acc_events=True)
    began, ended, plain = [0.0], [0.0], list[float]()

    class Turns(Listener):
        """A step to warm up, as many without the profiler, as many with it; with threads as asked for, where torch
        would take no more than there are cores."""

        def begin(self, total_steps: int, done_steps: int, log_every: int) -> None:
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

        def step(self, row: dict[str, Any]) -> None:
            if 1 < row["step"] <= 1 + steps:
                plain.append(row["seconds"])
            if row["step"] == 1 + steps:
                watch.__enter__()
                began[0] = time.perf_counter()
            elif row["step"] == 1 + 2 * steps:
                ended[0] = time.perf_counter()
                watch.__exit__(None, None, None)

    with tempfile.TemporaryDirectory() as folder, marks():
        overrides = [*case.overrides(folder + "/run"), f"quant.compute={compute}"]
        finetune.train(recipe_from(case.model, case.data, overrides), listener=Turns())
        taken = regions(watch.events(), ended[0] - began[0])
    figures = {name: seconds / steps for name, seconds in taken.items()}
    print("@@" + json.dumps({**figures, "step": statistics.median(plain), "product": product_s(),
                             "threads": torch.get_num_threads()}))  # fmt: skip


def measure(args: argparse.Namespace, threads: int) -> dict[str, float]:
    words = [sys.executable, __file__, *sys.argv[1:], "--worker"]
    done = subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    for line in done.stdout.splitlines():
        if line.startswith("@@"):
            figures: dict[str, float] = json.loads(line[2:])
            return figures
    sys.exit(done.stderr[-3000:])


def table(one: dict[str, float], more: dict[str, float]) -> str:
    """Milliseconds of each region with two numbers of threads, the ratio, and, of one and two, what limits more
    cores."""
    lines = [f"{'':12}{one['threads']:>3.0f} threads{more['threads']:>4.0f} threads{'ratio':>8}"]
    for name in (*REGIONS, "step", "product"):
        a, b = one[name] * 1e3, more[name] * 1e3
        lines.append(f"{name:12}{a:11.2f}{b:12.2f}{a / b if b else 0:8.2f}")
    if (one["threads"], more["threads"]) != (1, 2):
        return "\n".join(lines)
    serial = {name: min(one[name], max(0.0, 2 * more[name] - one[name])) for name in REGIONS}
    whole = sum(one[name] for name in REGIONS)
    for cores in CORES:
        times = {name: serial[name] + (one[name] - serial[name]) / cores for name in REGIONS}
        limit = max(REGIONS, key=lambda name: times[name] - one[name] / cores)
        lines.append(f"{cores:3} cores: {whole / sum(times.values()):5.2f} times one; limited by {limit}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--targets", default="q_proj,v_proj", help="names, or all-linear")
    parser.add_argument("--compute", default="exact", choices=("exact", "int8"))
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--steps", type=int, default=4, help="that are watched")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs=2, default=(1, 2), metavar="N")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    targets: Any = args.targets if args.targets == "all-linear" else tuple(args.targets.split(","))
    case = Case(args.model, args.data, 1, 1 + 2 * args.steps, batch=args.rows, accumulation=1, targets=targets,
                options=(f"train.max_steps={1 + 2 * args.steps}",))  # fmt: skip
    if args.worker:
        work(case, args.compute, args.steps)
        return
    pairs = [(measure(args, args.threads[0]), measure(args, args.threads[1])) for _ in range(args.pairs)]
    middle = [{name: statistics.median(pair[i][name] for pair in pairs) for name in pairs[0][0]} for i in (0, 1)]
    print(json.dumps({"case": asdict(case), "pairs": pairs}))
    print(table(*middle))


if __name__ == "__main__":
    main()
