"""A long run of short steps, with evaluations and saves: memory and descriptors stay flat, and the report is right.

python -m tests.destruction.soak --steps 2000
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from halfbyte import finetune
from halfbyte.runs.folder import RunFolder
from halfbyte.training.events import Listener
from tests import tiny_run

SETTLED, MOST_BYTES_PER_100 = 300, 1_000_000  # steps that memory takes to settle


class Counts(Listener):
    """Open file descriptors, every 100 steps."""

    def __init__(self) -> None:
        self.open: list[int] = []
        self.saves = 0

    def step(self, row: dict[str, Any]) -> None:
        if row["step"] % 100 == 0:
            self.open.append(len(os.listdir("/proc/self/fd")))

    def saved(self, path: Path, reason: str) -> None:
        self.saves += 1


def soak(folder: Path, steps: int) -> tuple[dict[str, Any], list[str]]:
    """(figures, what is wrong)."""
    tiny_run.rows(folder / "train.jsonl", 64)
    tiny_run.rows(folder / "held.jsonl", 8, seed=5)
    loaded = tiny_run.recipe(
        folder, data__eval=folder / "held.jsonl", train__max_steps=steps, train__learning_rate=1e-3,
        train__save_strategy="steps", train__save_steps=20, train__save_total_limit=2, train__eval_strategy="steps",
        train__eval_steps=50, train__load_best_model_at_end=True, lora__lora_dropout=0.1,
    )  # fmt: skip
    counts, began = Counts(), time.monotonic()
    report = finetune.train(loaded, listener=counts).report
    rows = RunFolder(folder / "run").read_metrics()
    made = [row for row in rows if "loss" in row]
    late = [row for row in made if row["step"] > SETTLED]
    slope = float(np.polyfit([row["step"] for row in late], [row["rss_bytes"] for row in late], 1)[0]) * 100
    losses = np.array([row["loss"] for row in made])
    jumps = [row["step"] for row in made if row.get("spike")]
    figures = {
        "steps": len(made), "seconds": time.monotonic() - began, "bytes_per_100_steps": slope,
        "rss_mb": [round(made[i]["rss_bytes"] / 1e6, 1) for i in (49, SETTLED, len(made) // 2, -1)],
        "open_files": counts.open[:2] + counts.open[-1:], "saves": counts.saves, "spikes": jumps,
        "evaluations": sum("eval_loss" in row for row in rows),
        "loss": [float(losses[:20].mean()), float(losses[-20:].mean())],
    }  # fmt: skip
    wrong = []
    if slope > MOST_BYTES_PER_100:
        wrong.append("memory grows")
    if len(set(counts.open[1:])) > 2 or counts.open[-1] > counts.open[0] + 1:
        wrong.append(f"file descriptors: {counts.open}")
    if (
        report["steps"] != steps
        or report["tokens"] != sum(row["tokens"] for row in made)
        or report["verdict"]["useless"]
    ):
        wrong.append("the report is wrong")
    if [row["step"] for row in made] != list(range(1, steps + 1)) or losses[-20:].mean() >= losses[:20].mean():
        wrong.append("the loss curve has a gap, or did not fall")
    return figures, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures, wrong = soak(Path(folder), given.steps)
    print(json.dumps(figures), *wrong, sep="\n")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
