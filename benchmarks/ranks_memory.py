"""Memory of several processes of one run on this machine: do they hold one copy of the base, and what the plan said.

    python benchmarks/ranks_memory.py --processes 4
    python benchmarks/ranks_memory.py --processes 4 --placement sharded

Starts torchrun with halfbyte, a few steps of the orders example, and reads `/proc/PID/smaps` of all workers while they
train. `store_pss`: the proportional share of the pages of the base's file, summed over the processes: of N that share
one copy it is the file once. `private`: the largest private memory of one of them, beside the plan's.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
_AREA = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)$")


def shares(pid: int, inside: str) -> dict[str, int]:
    """Bytes of a process: resident, proportional and private of files whose path has `inside`; private of all."""
    found, here = dict.fromkeys(("store_rss", "store_pss", "store_private", "private"), 0), False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if (area := _AREA.match(line)) is not None:
            here = inside in area[1]
            continue
        name, _, value = line.partition(":")
        if name in ("Private_Clean", "Private_Dirty", "Rss", "Pss"):
            size = 1024 * int(value.split()[0])
            if here:
                found["store_private" if "Private" in name else f"store_{name.lower()}"] += size
            if name == "Private_Dirty":
                found["private"] += size
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--placement", default="mapped")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        sets = {
            "model": args.model, "quant.placement": args.placement, "output": run, "train.max_steps": args.steps,
            "data.train": ROOT / "examples/orders/train.jsonl", "quant.compute_dtype": "fp32", "data.eval": "null",
            "train.per_device_train_batch_size": 2 * args.processes, "train.save_strategy": "no",
        }  # fmt: skip
        (Path(folder) / "recipe.yaml").write_text((ROOT / "examples/orders/recipe.yaml").read_text())
        words = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        line = [*launch, str(args.processes), "-m", "halfbyte", "train", f"{folder}/recipe.yaml", *words]
        with (Path(folder) / "out").open("w") as out:
            started = psutil.Process(subprocess.Popen(line, stdout=out, stderr=out).pid)
            result = watched(started, run, args.processes)
        if not (run / "report.json").exists():
            sys.exit((Path(folder) / "out").read_text()[-4000:])
        plan = json.loads((run / "plan.json").read_text())
    lines = {each["name"]: each["bytes"] for each in plan["lines"] if each["where"] == "private"}
    result |= {
        "planned_private": sum(lines.values()),
        "planned_base": {x["name"]: x["bytes"] for x in plan["lines"]}["base"],
    }
    print(json.dumps(result, indent=2))


def watched(started: psutil.Process, run: Path, count: int) -> dict[str, object]:
    """The largest figures of all processes together, while there are steps."""
    best: dict[str, object] = {}
    most = [0] * count
    while started.is_running() and started.status() != psutil.STATUS_ZOMBIE:
        try:
            workers = [
                p for p in started.children(recursive=True) if "halfbyte" in p.cmdline() and "train" in p.cmdline()
            ]
            each = [shares(p.pid, "/bases/") for p in workers[:count]]
        except (psutil.Error, OSError):
            each = []
        metrics = run / "metrics.jsonl"
        if len(each) == count and metrics.is_file() and metrics.stat().st_size:
            most = [max(a, b["private"]) for a, b in zip(most, each, strict=True)]
            sums = {name: sum(one[name] for one in each) for name in ("store_rss", "store_pss", "store_private")}
            if sums["store_pss"] >= int(str(best.get("store_pss", 0))):
                best = dict(sums)
        time.sleep(0.3)
    return {**best, "private_of_each": most}


if __name__ == "__main__":
    main()
