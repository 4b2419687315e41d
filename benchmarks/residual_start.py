"""Does an adapter learn more from a residual start? Held-out loss, the same rows and seeds, by number format.

Every linear layer gets an adapter of rank 16. Each run has its loss before the first step and after the last, in one
process; a finished run is kept in `--out` and not repeated.

    python benchmarks/residual_start.py --train GSM8K/train.jsonl --eval GSM8K/test.jsonl --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measuring
from halfbyte import finetune
from halfbyte.recipe.file import recipe_from

STARTS = {"default": "true", "residual": "residual"}


def one(arguments: argparse.Namespace, kind: str, start: str, seed: int, rate: float) -> dict[str, Any]:
    """A run's report, with its held-out loss before the first step as `before`."""
    folder = arguments.out / f"{kind}-{start}-{rate:g}-{seed}"
    if not (folder / "report.json").is_file():
        values = {
            "output": folder, "quant.type": kind, "lora.init_lora_weights": STARTS[start], "train.seed": seed,
            "lora.target_modules": "all-linear", "lora.lora_dropout": 0, "data.fields.prompt": "question",
            "data.fields.completion": "answer", "data.eval": arguments.eval, "train.learning_rate": rate,
            "train.per_device_train_batch_size": arguments.rows, "train.gradient_accumulation_steps": 1,
            "train.max_steps": arguments.steps, "train.eval_strategy": "steps", "train.eval_steps": arguments.steps,
            "train.eval_on_start": "true", "train.load_best_model_at_end": "false", "train.save_strategy": "no",
            "train.save_minutes": "null",
        }  # fmt: skip
        overrides = [f"{name}={value}" for name, value in values.items()]
        finetune.train(recipe_from(arguments.model, str(arguments.train), overrides))
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {**report, "before": next(row["eval_loss"] for row in rows if row["step"] == 0)}


def lines(arguments: argparse.Namespace) -> Iterator[str]:
    """One line for each pair of runs as it is finished, then the means."""
    gains: dict[tuple[str, float], list[float]] = {}
    for seed in range(1, arguments.seeds + 1):
        for rate in arguments.rates:
            for kind in arguments.formats:
                pair = {start: one(arguments, kind, start, seed, rate) for start in STARTS}
                gains.setdefault((kind, rate), []).append(pair["residual"]["eval_loss"] - pair["default"]["eval_loss"])
                shown = "; ".join(f"{s} {r['before']:.4f} -> {r['eval_loss']:.4f}" for s, r in pair.items())
                yield f"{kind} at {rate:g}, seed {seed}: {shown}; residual - default {gains[kind, rate][-1]:+.4f}"
    for (kind, rate), each in gains.items():
        spread = f"({min(each):+.4f} to {max(each):+.4f})"
        yield f"{kind} at {rate:g}: residual - default {statistics.mean(each):+.4f} {spread}"


def main() -> None:
    parser = measuring.learning_parser(__doc__, steps=100, rows=4)
    parser.add_argument("--formats", nargs="+", default=["nf4", "fp4"])
    parser.add_argument("--rates", nargs="+", type=float, default=[2e-4])
    parser.add_argument("--seeds", type=int, default=3)
    for line in lines(parser.parse_args()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
