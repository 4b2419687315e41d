"""What `quantize_model` holds while it works: a module of some GB, written shard by shard, read into few bits.

    python benchmarks/any_module.py                    # 4 GB in bf16, in files of 0.5 GB
    python benchmarks/any_module.py --gb 1 --quant int8

Each in a process of its own, from the meta device, the weights out of the page cache:

    memory     everything is in memory afterwards
    disk       every layer is on disk afterwards
    loaded     the module is loaded already, in bf16 (its result is smaller than what it begins with)

"beside" is the peak of the resident set over what was resident before the call and what is afterwards: at most the
largest tensor and 300 MB are allowed. accelerate's function refuses to quantise on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

WIDTH, INNER = 4096, 16384  # a matrix of 134 MB in bf16
ALLOWED = 300e6
MODES = ("memory", "disk", "loaded")


def blocks(count: int) -> nn.Module:
    """`count` blocks of 268 MB in bf16."""
    made = (
        nn.Sequential(
            nn.Linear(WIDTH, INNER, bias=False, dtype=torch.bfloat16),
            nn.GELU(),
            nn.Linear(INNER, WIDTH, bias=False, dtype=torch.bfloat16),
        )
        for _ in range(count)
    )
    return nn.Sequential(*made)


def write(folder: Path, count: int) -> None:
    """Random weights, two blocks a file, with an index."""
    from safetensors.torch import save_file

    generator, where = torch.Generator().manual_seed(0), {}
    for first in range(0, count, 2):
        name = f"model-{first:03d}.safetensors"
        state = {}
        for block in range(first, min(count, first + 2)):
            for place, shape in ((0, (INNER, WIDTH)), (2, (WIDTH, INNER))):
                values = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
                state[f"{block}.{place}.weight"] = values
        save_file(state, folder / name)
        where |= dict.fromkeys(state, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def measure(mode: str, folder: Path, count: int, quant: str) -> dict[str, float]:
    """In this process: one call."""
    import halfbyte
    from benchmarks.measuring import cold, watched
    from halfbyte.base.modules import any_module  # noqa: F401
    from halfbyte.quant.bnb import resident_bytes
    from halfbyte.quant.kernels import nf4_cpu_kernel  # noqa: F401
    from halfbyte.system import usage

    halfbyte.quantize_model(nn.Sequential(nn.Linear(64, 64)), quant=quant, dtype="bf16")  # the last imports
    with torch.device("cpu" if mode == "loaded" else "meta"):
        module = blocks(count)
    cold(folder)
    how: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": folder / "off"} if mode == "disk" else {}
    before = usage.now()
    began = time.perf_counter()
    with watched() as seen:
        held = halfbyte.quantize_model(module, None if mode == "loaded" else folder, quant=quant, dtype="bf16", **how)
    seconds = time.perf_counter() - began
    result = 0 if mode == "disk" else resident_bytes(held)
    above = before.total + (0 if mode == "loaded" else result)
    return {
        "seconds": seconds,
        "result_gb": result / 1e9,
        "beside_gb": (max(seen.peak.total, seen.high_water) - above) / 1e9,
        "largest_gb": WIDTH * INNER * 2 / 1e9,
    }


def run(mode: str, folder: Path, count: int, quant: str) -> dict[str, float]:
    """The same in a process of its own."""
    line = [sys.executable, __file__, "--mode", mode, "--folder", str(folder), "--blocks", str(count), "--quant", quant]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--quant", default="nf4")
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--blocks", type=int)
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(measure(args.mode, args.folder, args.blocks, args.quant)))
        return
    count = max(2, round(args.gb * 1e9 / (4 * WIDTH * INNER)))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        write(Path(name), count)
        wrong = False
        for mode in MODES:
            row = run(mode, Path(name), count, args.quant)
            limit = row["largest_gb"] + ALLOWED / 1e9
            wrong |= row["beside_gb"] > limit
            beside = f"beside it {row['beside_gb']:.3f} of {limit:.3f} GB"
            print(f"{mode:8} {row['seconds']:6.1f} s  result {row['result_gb']:.3f} GB  {beside}", flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
