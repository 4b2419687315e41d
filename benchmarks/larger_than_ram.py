"""Train a base that is larger than memory: one whole optimiser step and one generated token, streamed from disk.

    python benchmarks/larger_than_ram.py                       # Llama-2-70B shape: 36 GB on disk, ~15 minutes
    python benchmarks/larger_than_ram.py --layers 4            # the same layers, fewer of them
    python benchmarks/larger_than_ram.py --compare             # 7B shape: streamed, mapped and resident in one run

The base is written from random layers (`random_base.py`) and deleted afterwards. Memory is the process's own resident
set, private and file pages together, sampled every 20 ms and checked against the kernel's high-water mark. The floor is
that of the matrix products at the rate of 4096 x 4096 ones, measured in the same run, before and after: forward,
recomputation and the gradient of the inputs, 6 FLOP a weight and token.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.random_base import VOCAB, Shape, write
from halfbyte import adapters, base, device, pages, stream, targets
from halfbyte.layers import fuse, loss, packing
from halfbyte.recipe import Lora, Quant
from halfbyte.sources import Checkpoint

MAX_RSS_GB, MAX_OVER_FLOOR, MAX_SLOWER, MAX_COLD_SLOWER = 4.0, 1.35, 1.05, 1.10


@dataclass
class Memory:
    """The largest resident set while it was watched, split at that moment, and the largest of each part."""

    peak: pages.Resident = field(default_factory=lambda: pages.Resident(0, 0))
    anonymous: int = 0
    file: int = 0
    high_water: int = 0

    def to_json(self) -> dict[str, float]:
        return {
            "peak_gb": max(self.peak.total, self.high_water) / 1e9,
            "sampled_gb": self.peak.total / 1e9,
            "at_peak_private_gb": self.peak.anonymous / 1e9,
            "at_peak_file_gb": self.peak.file / 1e9,
            "largest_private_gb": self.anonymous / 1e9,
            "largest_file_gb": self.file / 1e9,
        }


@contextmanager
def watched(every_s: float = 0.02) -> Iterator[Memory]:
    """Sample this process's resident set on a thread; the kernel's high-water mark begins anew."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM
    seen, done = Memory(), threading.Event()

    def sample() -> None:
        while not done.is_set():
            now = pages.resident()
            seen.peak = max(seen.peak, now, key=lambda r: r.total)
            seen.anonymous, seen.file = max(seen.anonymous, now.anonymous), max(seen.file, now.file)
            done.wait(every_s)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        seen.high_water = int(found[1]) * 1024 if found else 0


def matmul_rate(size: int = 4096) -> float:
    """FLOP/s of bf16 products of two size x size matrices, the best of five."""
    a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def cold(folder: Path) -> None:
    """Put the base's files out of the page cache."""
    for path in folder.glob("*.safetensors"):
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)


def disk_rate(folder: Path) -> float:
    """Bytes/s of reading the files through the page cache, from cold, as the stream does; up to 4 GB of them."""
    cold(folder)
    done, began = 0, time.perf_counter()
    for path in sorted(folder.glob("layer-*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while part := file.read(1 << 24):
                done += len(part)
        if done > 4e9:
            break
    return done / (time.perf_counter() - began)


def opened(folder: Path) -> Any:
    """The base with LoRA r 16 on q and v, ready for packs, recomputing."""
    checkpoint = Checkpoint(path=folder, id=folder.name, revision=None, kind="folder")
    model = base.open_base(checkpoint, Quant(compute_dtype="bf16"), device.detect(), with_tokenizer=False).model
    # B starts as random as A: with zeros there, A's gradients would be zero whatever the code does
    lora = Lora(r=16, target_modules=("q_proj", "v_proj"), lora_dropout=0.05, init_lora_weights=False)
    model = adapters.add(model, lora, targets.resolve_targets(model, lora.target_modules), seed=0)
    packing.install(model)
    fuse.install(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def batch(tokens: int) -> dict[str, Any]:
    """Two examples end to end, every token but the last of each labelled."""
    lengths = [tokens // 2, tokens - tokens // 2]
    ids = torch.randint(3, VOCAB, (tokens,), generator=torch.Generator().manual_seed(1))
    ends = {lengths[0] - 1, tokens - 1}
    keep = torch.tensor([i for i in range(tokens) if i not in ends])
    return {
        "input_ids": ids[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, lengths[0], tokens], dtype=torch.int32),
        "keep": keep,
        "targets": ids[keep + 1],
    }


def step(model: Any, optimizer: Any, tokens: int) -> tuple[float, float]:
    """One optimiser step. Returns (loss a token, seconds)."""
    torch.manual_seed(2)
    model.train()
    began = time.perf_counter()
    packed = batch(tokens)
    value = loss.pass_loss(model, packed) / packed["targets"].numel()
    value.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
    if optimizer is not None:
        optimizer.step()
    return float(value.detach()), time.perf_counter() - began


def floor_flop(shape: Shape, tokens: int, labelled: int) -> float:
    """Forward, recomputation, gradient of the inputs: 6 a weight and token; the head's logits and their gradient: 4."""
    return 6.0 * shape.layers * shape.layer_weights * tokens + 4.0 * VOCAB * shape.hidden * labelled


def train_larger(folder: Path, tokens: int, layers: int | None) -> dict[str, Any]:
    shape = Shape.of("llama-2-70b", layers)
    size = write(folder, "llama-2-70b", layers=layers, tell=say)
    disk = disk_rate(folder)
    say(f"reading from cold {disk / 1e9:.2f} GB/s")
    cold(folder)
    rate = [matmul_rate()]
    say(f"4096 x 4096 bf16 products: {rate[0] / 1e9:.0f} GFLOP/s")
    with watched() as memory:
        began = time.perf_counter()
        model = opened(folder)
        placed = stream.place(model, "streamed")
        open_s = time.perf_counter() - began
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
        say(f"opened in {open_s:.1f} s; {placed}")
        began = time.perf_counter()
        loss.head_of(model)
        say(f"the head is seen to be a plain one: two forwards of 3 tokens, {time.perf_counter() - began:.1f} s")
        value, seconds = step(model, optimizer, tokens)
        trained = [p for p in model.parameters() if p.requires_grad]
        with_gradient = sum(1 for p in trained if p.grad is not None and bool(p.grad.abs().sum() > 0))
        optimizer.zero_grad()
        say(f"step: loss {value:.3f}, {seconds:.1f} s")
        began = time.perf_counter()
        model.eval()
        with torch.no_grad():
            ids = batch(8)["input_ids"]
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0
            )
        token_s = time.perf_counter() - began
    placed.remove()
    rate.append(matmul_rate())
    floor = floor_flop(shape, tokens, tokens - 2) / (sum(rate) / len(rate))
    return {
        "shape": "llama-2-70b", "layers": shape.layers, "disk_gb": size / 1e9, "tokens": tokens, "open_s": open_s,
        "loss": value, "step_s": seconds, "floor_s": floor, "over_floor": seconds / floor,
        "matmul_gflops": [r / 1e9 for r in rate], "disk_gb_s": disk / 1e9, "adapter_tensors": len(trained),
        "with_gradient": with_gradient, "token": int(out[0, -1]), "token_s": token_s, **memory.to_json(),
    }  # fmt: skip


def compare(folder: Path, tokens: int, layers: int | None, rounds: int) -> dict[str, Any]:
    """A 7B shape in one process: mapped and streamed in turns with a warm cache, streamed from cold, resident."""
    shape = Shape.of("llama-2-7b", layers)
    size = write(folder, "llama-2-7b", layers=layers, tell=say)
    disk = disk_rate(folder)
    rate = matmul_rate()
    model = opened(folder)
    loss.head_of(model)
    seconds: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    gradients: dict[str, list[Any]] = {}

    def run(name: str, placement: stream.Placement, *, empty: bool = False) -> None:
        placed = stream.place(model, placement)
        if empty:
            cold(folder)
        with watched() as seen:
            _, took = step(model, None, tokens)
        placed.remove()
        seconds.setdefault(name, []).append(took)
        memory[name] = max(memory.get(name, 0.0), seen.file / 1e9)
        gradients[name] = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        for parameter in model.parameters():
            parameter.grad = None
        say(f"{name:<14} {took:6.2f} s   file pages {seen.file / 1e9:.2f} GB, private {seen.anonymous / 1e9:.2f} GB")

    run("warming up", "mapped")
    for _ in range(rounds):
        run("mapped", "mapped")
        run("streamed", "streamed")
    run("streamed, cold", "streamed", empty=True)
    run("resident", "resident")
    warm = [s / m for s, m in zip(seconds["streamed"], seconds["mapped"], strict=True)]
    compute = min(seconds["mapped"])
    wanted = gradients["resident"]
    same = {
        name: all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) for name, found in gradients.items()
    }
    return {
        "shape": "llama-2-7b", "layers": shape.layers, "disk_gb": size / 1e9, "tokens": tokens, "seconds": seconds,
        "file_gb": memory, "disk_gb_s": disk / 1e9, "matmul_gflops": rate / 1e9,
        "streamed_over_mapped": sorted(warm)[len(warm) // 2], "cold_over_best":
        min(seconds["streamed, cold"]) / max(compute, size / disk), "over_floor":
        compute / (floor_flop(shape, tokens, tokens - 2) / rate), "gradients_equal": same,
    }  # fmt: skip


def say(text: str) -> None:
    print(text, flush=True)


def verdict(name: str, value: float, limit: float, unit: str = "") -> bool:
    say(f"{name}: {value:.3f}{unit}, at most {limit:g}{unit}: {'yes' if value <= limit else 'NO'}")
    return value <= limit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/halfbyte-larger-than-ram"), help="for the base")
    parser.add_argument("--layers", type=int, help="fewer layers of the same shape")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="of --compare")
    parser.add_argument("--compare", action="store_true", help="7B shape: streamed, mapped, resident")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    if not pages.supported():
        sys.exit("SKIPPED: Linux with a readable /proc/self/pagemap is needed")
    if args.folder.exists():
        sys.exit(f"{args.folder} exists; name another --folder")
    try:
        if args.compare:
            result = compare(args.folder, args.tokens, args.layers, args.rounds)
        else:
            result = train_larger(args.folder, args.tokens, args.layers)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    if args.compare:
        fine = [
            verdict("streamed over mapped, warm", result["streamed_over_mapped"], MAX_SLOWER),
            verdict("cold over max(compute, disk)", result["cold_over_best"], MAX_COLD_SLOWER),
            all(result["gradients_equal"].values()),
        ]
    else:
        fine = [
            verdict("peak resident set", result["peak_gb"], MAX_RSS_GB, " GB"),
            verdict("step over the floor", result["over_floor"], MAX_OVER_FLOOR),
            result["with_gradient"] == result["adapter_tensors"],
        ]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
