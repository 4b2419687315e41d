"""Gradients of a step by integer products beside those by bf16, both against fp32, at points of a run.

For the fresh adapter, and for a run's checkpoint: the rows of one step, all adapters, no dropout. A line for each way:
relative error of the tensors (mean, worst), worst cosine, of all together, and of the loss; then by kind of layer.

    python benchmarks/integer_gradients.py RUN --data GSM8K/train.jsonl --at 0 50    # a run of integer_learning.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from halfbyte.adapters import lora
from halfbyte.adapters.assembly import assemble
from halfbyte.base import load
from halfbyte.data import collate
from halfbyte.layers import fuse
from halfbyte.layers.kernels.cpu.integer.products import Products, set_products
from halfbyte.proofs import setting
from halfbyte.proofs.integers import kind_of
from halfbyte.recipe.file import recipe_from
from halfbyte.system import device
from halfbyte.training.prepare import prepare

WAYS: dict[str, Products | None] = {
    "exact": None, "input gradient in int8": Products(forward=False), "both in int8": Products(),
}  # fmt: skip
Gradients = dict[str, torch.Tensor]


def computed(run: Path, data: str, at: int, dtype: str, rows: list[int]) -> Iterator[tuple[str, float, Gradients]]:
    """Name, loss and gradients of each way, of these rows, in one compute dtype."""
    asked: dict[str, Any] = yaml.safe_load((run / "recipe.yaml").read_text())
    targets = str(asked["lora"]["target_modules"]).replace("'", "")
    loaded = recipe_from(
        asked["model"], data,
        [f"lora.target_modules={targets}", f"lora.r={asked['lora']['r']}", f"quant.compute_dtype={dtype}",
         "data.fields={prompt: question, completion: answer}", f"train.seed={asked['train']['seed']}"],
    )  # fmt: skip
    recipe = loaded.recipe
    prepared = prepare(recipe)
    made = assemble(load.open_base(prepared.checkpoint, recipe.quant, device.detect()), recipe)
    if at:
        lora.put_weights(made.model, run / "checkpoints" / f"step-{at:06}")
    batch = collate.Batches(prepared.train.examples, ()).of(rows)
    for name, products in WAYS.items():
        set_products(fuse.frozen_layers(made.model), products)
        with setting.as_given(made.model):
            loss, gradients = setting.loss_and_gradients(made.model, [batch])
        yield f"{dtype}, {name}", loss, {n: g.double() for n, g in gradients.items()}


def line(name: str, wanted: tuple[float, Gradients], loss: float, found: Gradients) -> str:
    errors, cosines, kinds = [], [], dict[str, list[float]]()
    off = size = 0.0
    for tensor, w in wanted[1].items():
        g, norm = found[tensor], float(w.norm())
        if norm == 0:  # A's, where B is zero
            continue
        away = float((g - w).norm())
        errors.append(away / norm)
        cosines.append(float((g * w).sum() / (g.norm() * w.norm())))
        kinds.setdefault(kind_of(tensor), []).append(away / norm)
        off, size = off + away**2, size + norm**2
    by_kind = ", ".join(f"{kind} {sum(e) / len(e):.1%}" for kind, e in kinds.items())
    return (
        f"{name}: mean {sum(errors) / len(errors):.1%}, worst {max(errors):.1%}, worst cosine {min(cosines):.3f}, "
        f"together {(off / size) ** 0.5:.1%}, loss {loss / wanted[0] - 1:+.2%}; {by_kind}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--at", nargs="+", type=int, default=[0, 50])
    parser.add_argument("--rows", type=int, default=4)
    arguments = parser.parse_args()
    for at in arguments.at:
        print(f"step {max(1, at)} of {arguments.run.name}")
        wanted: tuple[float, Gradients] | None = None
        rows = list(range(at * arguments.rows, (at + 1) * arguments.rows))
        for dtype in ("fp32", "bf16"):
            for name, loss, found in computed(arguments.run, arguments.data, at, dtype, rows):
                if wanted is None:
                    wanted = loss, found
                else:
                    print(line(name, wanted, loss, found), flush=True)


if __name__ == "__main__":
    main()
