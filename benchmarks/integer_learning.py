"""Does a run with integer products learn what an exact one does? Held-out loss at each evaluation.

The same rows and seeds by `quant.compute` exact and int8, for q/v and for all linear layers. Evaluations are exact in
both. A finished run is kept in `--out` and not repeated; a checkpoint at step 50 is kept, too (`integer_gradients.py`).

    python benchmarks/integer_learning.py --train GSM8K/train.jsonl --eval GSM8K/test.jsonl --out FOLDER
    halfbyte eval FOLDER/all-int8-0 --data QUESTIONS -m number    # what a finished run answers, by exact products
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import measuring

TARGETS = {"qv": "[q_proj, v_proj]", "all": "all-linear"}
COMPUTE = ("exact", "int8")
EVERY = 25  # steps between evaluations


def folder_of(arguments: argparse.Namespace, targets: str, compute: str, seed: int) -> Path:
    return Path(arguments.out, f"{targets}-{compute}-{seed}")


def train(arguments: argparse.Namespace, targets: str, compute: str, seed: int) -> Path:
    """The folder of a finished run, made if it is not there."""
    folder = folder_of(arguments, targets, compute, seed)
    if (folder / "report.json").is_file():
        return folder
    values = {
        "output": folder, "quant.compute": compute, "quant.compute_dtype": arguments.dtype, "train.seed": seed,
        "lora.target_modules": TARGETS[targets], "lora.r": 16, "lora.lora_alpha": 32, "data.fields.prompt": "question",
        "data.fields.completion": "answer", "data.eval": arguments.held_out, "train.learning_rate": arguments.rate,
        "train.per_device_train_batch_size": arguments.rows, "train.gradient_accumulation_steps": 1,
        "train.max_steps": arguments.steps, "train.eval_strategy": "steps", "train.eval_steps": EVERY,
        "train.load_best_model_at_end": "false", "train.save_strategy": "steps", "train.save_steps": 50,
        "train.save_total_limit": "null", "train.save_minutes": "null",
    }  # fmt: skip
    chosen = [part for name, value in values.items() for part in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "halfbyte", "train", arguments.model, str(arguments.train), *chosen]
    if folder.exists():  # cut off
        command = [sys.executable, "-m", "halfbyte", "train", "--resume", str(folder)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def losses(folder: Path) -> dict[int, float]:
    """Held-out loss by step."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


def compared(arguments: argparse.Namespace) -> Iterator[str]:
    """A line for each pair of runs, as it is finished."""
    for seed in arguments.seeds:
        for targets in arguments.targets:
            pair = {compute: losses(train(arguments, targets, compute, seed)) for compute in arguments.compute}
            if len(pair) < len(COMPUTE):
                continue
            apart = {step: pair["int8"][step] / loss - 1 for step, loss in pair["exact"].items()}
            last = max(apart)
            each = "; ".join(f"{step}: {pair['exact'][step]:.4f} {apart[step]:+.2%}" for step in sorted(apart))
            ends = f"at the end {apart[last]:+.2%}, at most {max(apart.values()):+.2%}"
            yield f"{targets}, seed {seed}: {ends} (exact, and int8 beside it: {each})"


def main() -> None:
    parser = measuring.learning_parser(__doc__, steps=200, rows=8)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--compute", nargs="+", default=list(COMPUTE), choices=COMPUTE)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--held", type=int, default=64, help="held-out rows")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = arguments.eval.read_text().splitlines(keepends=True)
    arguments.held_out = arguments.out / "held_out.jsonl"
    arguments.held_out.write_text("".join(rows[: arguments.held]))
    for line in compared(arguments):
        print(line, flush=True)


if __name__ == "__main__":
    main()
