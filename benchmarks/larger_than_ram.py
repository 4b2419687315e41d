"""Train a base that is larger than memory: one whole optimiser step and one generated token, streamed from disk.

    python benchmarks/larger_than_ram.py                       # Llama-2-70B shape: 36 GB on disk, ~15 minutes
    python benchmarks/larger_than_ram.py --layers 4            # the same layers, fewer of them

The base is written from random layers (`random_base.py`) and deleted afterwards. Memory is the process's own resident
set, private and file pages together, sampled every 20 ms and checked against the kernel's high-water mark. The floor is
that of the matrix products at the rate of 4096 x 4096 ones, measured in the same run, before and after, the faster of
the two: forward, recomputation and the gradient of the inputs, 6 FLOP a weight and token. Peaks of the step and of the
token are told apart.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.measuring import arguments, cold, disk_rate, matmul_rate, on_disk, say, verdict, watched
from benchmarks.random_base import VOCAB, Shape, write
from halfbyte.adapters import lora as adapters
from halfbyte.adapters import targets
from halfbyte.base import load, stream
from halfbyte.layers import fuse, loss, packing
from halfbyte.models import structure
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.recipe.schema import Lora, Quant
from halfbyte.system import device, usage

MAX_RSS_GB, MAX_OVER_FLOOR = 4.0, 1.35


def opened(folder: Path) -> Any:
    """The base with LoRA r 16 on q and v, ready for packs, recomputing."""
    checkpoint = Checkpoint(path=folder, id=folder.name, revision=None, kind="folder")
    model = load.open_base(checkpoint, Quant(compute_dtype="bf16"), device.detect()).model
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
    value = loss.micro_batch_loss(model, packed) / packed["targets"].numel()
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
        with structure.shallow(model):  # as a training does
            loss.head_of(model)
        value, seconds = step(model, optimizer, tokens)
        trained = [p for p in model.parameters() if p.requires_grad]
        with_gradient = sum(1 for p in trained if p.grad is not None and bool(p.grad.abs().sum() > 0))
        say(f"step: loss {value:.3f}, {seconds:.1f} s")
    optimizer.zero_grad()
    del optimizer
    usage.trim()  # a token is made by a process of its own, without what a step leaves behind
    with watched() as memory_of_token:
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
    floor = floor_flop(shape, tokens, tokens - 2) / max(rate)
    return {
        "shape": "llama-2-70b", "layers": shape.layers, "disk_gb": size / 1e9, "tokens": tokens, "open_s": open_s,
        "loss": value, "step_s": seconds, "floor_s": floor, "over_floor": seconds / floor,
        "matmul_gflops": [r / 1e9 for r in rate], "disk_gb_s": disk / 1e9, "adapter_tensors": len(trained),
        "with_gradient": with_gradient, "token": int(out[0, -1]), "token_s": token_s, **memory.to_json(),
        "token_memory": memory_of_token.to_json(),
    }  # fmt: skip


def main() -> int:
    parser = arguments(__doc__, "/tmp/halfbyte-larger-than-ram")
    args = parser.parse_args()
    result = on_disk(args, lambda: train_larger(args.folder, args.tokens, args.layers))
    fine = [
        verdict("peak resident set of the step", result["peak_gb"], MAX_RSS_GB, " GB"),
        verdict("peak resident set of the token", result["token_memory"]["peak_gb"], MAX_RSS_GB, " GB"),
        verdict("step over the floor", result["over_floor"], MAX_OVER_FLOOR),
        result["with_gradient"] == result["adapter_tensors"],
    ]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
