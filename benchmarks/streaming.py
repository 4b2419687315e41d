"""One training step of a Llama-2-7B shape with its base streamed, mapped and resident, in one process and in turns.

    python benchmarks/streaming.py                 # 3.9 GB on disk; three rounds of three steps: 8 minutes on two cores
    python benchmarks/streaming.py --layers 8      # fewer of the same layers

A round is a mapped step, a streamed one with the files in the page cache, and a streamed one after they were put out of
it (posix_fadvise; what the step then read from the disk is counted). Ratios are taken within a round. The step is
whole, clipping and AdamW included, at a learning rate of 0, so that every one must find the same gradients. The rate of
the disk is that of reading the same files one after the other, from cold, before the first step.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.larger_than_ram import floor_flop, opened, step
from benchmarks.measuring import arguments, cold, disk_rate, matmul_rate, on_disk, read_from_disk, say, verdict, watched
from benchmarks.random_base import Shape, write
from halfbyte.base import stream
from halfbyte.layers import loss
from halfbyte.plan.result import Placement

MAX_SLOWER, MAX_COLD_SLOWER = 1.05, 1.10
MODEL = "llama-2-7b"


def compare(folder: Path, tokens: int, layers: int | None, rounds: int) -> dict[str, Any]:
    shape = Shape.of(MODEL, layers)
    size = write(folder, MODEL, layers=layers, tell=say)
    disk = disk_rate(folder)
    say(f"reading from cold {disk / 1e9:.2f} GB/s")
    rate = matmul_rate()
    model = opened(folder)
    loss.head_of(model)
    seconds: dict[str, list[float]] = {}
    read_gb: dict[str, list[float]] = {}
    file_gb: dict[str, float] = {}
    gradients: dict[str, list[list[Any]]] = {}

    def run(name: str, placement: Placement, *, empty: bool = False) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=0.0)
        placed = stream.place(model, placement)
        if empty:
            cold(folder)
        before = read_from_disk()
        with watched() as seen:
            _, took = step(model, optimizer, tokens)
        read = (read_from_disk() - before) / 1e9
        placed.remove()
        seconds.setdefault(name, []).append(took)
        read_gb.setdefault(name, []).append(read)
        file_gb[name] = max(file_gb.get(name, 0.0), seen.file / 1e9)
        gradients.setdefault(name, []).append([p.grad.clone() for p in trained])
        optimizer.zero_grad()
        say(f"{name:<14} {took:6.2f} s   read {read:.2f} GB, "
            f"file pages {seen.file / 1e9:.2f} GB, private {seen.anonymous / 1e9:.2f} GB")  # fmt: skip

    run("warming up", "mapped")
    for _ in range(rounds):
        run("mapped", "mapped")
        run("streamed", "streamed")
        run("streamed, cold", "streamed", empty=True)
    run("resident", "resident")
    mapped = seconds["mapped"]
    floor = floor_flop(shape, tokens, tokens - 2) / rate
    wanted = gradients["resident"][0]
    same = {
        name: all(torch.equal(a, b) for found in runs for a, b in zip(found, wanted, strict=True))
        for name, runs in gradients.items()
    }
    return {
        "shape": MODEL, "layers": shape.layers, "disk_gb": size / 1e9, "tokens": tokens, "rounds": rounds,
        "seconds": seconds, "read_gb": read_gb, "file_gb": file_gb, "disk_gb_s": disk / 1e9,
        "matmul_gflops": rate / 1e9, "adapter_tensors": len(wanted), "over_floor": statistics.median(mapped) / floor,
        "warm_over_mapped": [s / m for s, m in zip(seconds["streamed"], mapped, strict=True)],
        "cold_over_best": [
            s / max(m, size / disk) for s, m in zip(seconds["streamed, cold"], mapped, strict=True)
        ],
        "gradients_equal": same,
    }  # fmt: skip


def main() -> int:
    parser = arguments(__doc__, "/tmp/halfbyte-streaming")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    result = on_disk(args, lambda: compare(args.folder, args.tokens, args.layers, args.rounds))
    equal = all(result["gradients_equal"].values())
    say(f"gradients as resident, to the bit: {'yes' if equal else 'NO'}")
    fine = [
        verdict("streamed over mapped, warm", statistics.median(result["warm_over_mapped"]), MAX_SLOWER),
        verdict("cold over max(compute, disk)", statistics.median(result["cold_over_best"]), MAX_COLD_SLOWER),
        equal,
    ]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
