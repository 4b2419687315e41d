"""A run's folder as a run leaves it, made without one: for tests of what reads it. No torch."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from halfbyte.runs.folder import RunFolder, write_json

RECIPE = "model: tiny-model\ndata: {train: rows.jsonl}\ntrain: {learning_rate: 0.001}\nlora: {r: 8}\noutput: run\n"


def metrics(steps: int, *, evals: int = 0, **changes: Any) -> list[dict[str, Any]]:
    """Rows of a run whose loss falls; `changes` are functions of the step, by the name of a column."""
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        row = {
            "step": step, "epoch": step / steps, "loss": 3.0 / math.sqrt(step) + 0.1 * math.sin(step * 7.0),
            "learning_rate": 1e-3 * (1 - step / steps), "grad_norm": 1.0 + 0.3 * math.sin(step), "tokens": 700,
            "labelled_tokens": 300, "micro_batches": 1, "seconds": 1.5, "tokens_per_second": 466.0,
            "rss_bytes": 1_200_000_000 + 1000 * step, "peak_rss_bytes": 1_300_000_000,
        }  # fmt: skip
        rows.append(row | {name: change(step) for name, change in changes.items()})
        if evals and step % (steps // evals) == 0:
            rows.append({"step": step, "eval_loss": 2.5 / math.sqrt(step), "eval_perplexity": 3.0})
    return rows


def run(folder: Path, rows: list[dict[str, Any]], *, steps: int | None = None, **files: Any) -> RunFolder:
    """A run folder with these metrics; `files` are further JSON files by their names without the suffix."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE)
    made = RunFolder(folder)
    made.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(
        made.plan, {"steps": steps or sum("loss" in row for row in rows), "peak_bytes": 1.5e9, "needed_bytes": 1.3e9}
    )
    for name, value in files.items():
        write_json(folder / f"{name}.json", value)
    return made


WEIGHTS = b"weights"


def verdict(name: str = "better", text: str = "better than the base: loss 1 beside 2", sha256: str = "") -> Any:
    """A verdict in a report, of the adapter of `finished` unless another hash is given."""
    digest = sha256 or hashlib.sha256(WEIGHTS).hexdigest()
    useless = name in ("worse", "diverged")
    return {"verdict": {"name": name, "text": text, "useless": useless, "adapter_sha256": digest}}


def finished(folder: Path, rows: list[dict[str, Any]], **report: Any) -> RunFolder:
    """The same of a run that has ended, with an adapter's config and a report."""
    made = run(folder, rows, report={"notices": [], "eval_loss": None, **report})
    made.adapter.mkdir()
    if "verdict" in report:
        (made.adapter / "adapter_model.safetensors").write_bytes(WEIGHTS)
    write_json(made.adapter / "adapter_config.json", {"r": 8, "lora_alpha": 16})
    return made
