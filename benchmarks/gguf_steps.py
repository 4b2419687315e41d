"""Whole training steps on a GGUF file's blocks beside NF4's, exact and in 8-bit integers, in one process and in turns.

    python benchmarks/gguf_steps.py smollm2-135m=nf4 smollm2-135m=gguf Q4_0.gguf=gguf

Each is MODEL=FORMAT; the first is what the others are divided by, in each round. A step is forward, backward, clipping
and AdamW at a rate of 0, of two texts end to end, with LoRA of rank 16 on all linears. Two rounds are not counted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import larger_than_ram
from benchmarks.measuring import say
from halfbyte.adapters.assembly import assemble
from halfbyte.base import load
from halfbyte.layers import fuse, loss
from halfbyte.layers.kernels.cpu.integer.products import Products, set_products
from halfbyte.models import structure
from halfbyte.models.sources.lookup import find_model
from halfbyte.recipe.file import recipe_from
from halfbyte.system import device, threads

ROWS = Path(__file__).resolve().parents[1] / "examples" / "orders" / "train.jsonl"
SETTINGS = ("lora.target_modules=all-linear", "lora.r=16", "lora.lora_alpha=32", "lora.lora_dropout=0.05")


def opened(name: str) -> tuple[Any, torch.optim.Optimizer]:
    source, _, kind = name.rpartition("=")
    recipe = recipe_from(source, str(ROWS), [f"quant.type={kind}", *SETTINGS]).recipe
    model = assemble(load.open_base(find_model(recipe), recipe.quant, device.detect()), recipe).model
    with structure.shallow(model):
        loss.head_of(model)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="+", metavar="MODEL=FORMAT")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    threads.configure(device.detect().cores)
    bases = {name: opened(name) for name in args.bases}
    for products, way in ((None, "exact"), (Products(), "int8")):
        for model, _ in bases.values():
            set_products(fuse.frozen_layers(model), products)
        seconds: dict[str, list[float]] = {name: [] for name in bases}
        for turn in range(args.rounds + 2):
            for name in args.bases[:: 1 if turn % 2 else -1]:
                model, optimizer = bases[name]
                larger_than_ram.VOCAB = int(model.config.vocab_size)
                seconds[name].append(larger_than_ram.step(model, optimizer, args.tokens)[1])
                optimizer.zero_grad()
        first = seconds[args.bases[0]][2:]
        for name, each in seconds.items():
            low, middle, high = quantiles([a / b for a, b in zip(each[2:], first, strict=True)])
            own = f"{way}, {args.tokens} tokens, {name}: {1e3 * median(each[2:]):.0f} ms"
            say(f"{own}; over the first {middle:.3f} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
