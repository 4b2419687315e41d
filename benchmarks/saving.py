"""What checkpoints cost a run, with and without them in turn, in one run.

    python benchmarks/saving.py                        # smollm2-135m on the example's rows, about a minute

Blocks of ten steps are saved after every second step, or not at all, in turn; the same rows come in both kinds of
blocks. The difference of their seconds, divided by the saves, is what one checkpoint costs (the proofs that are asked
again before it, the wait until weights are read, and what its thread takes from the steps beside it).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from halfbyte import finetune
from halfbyte.recipe.file import recipe_from
from halfbyte.runs.folder import RunFolder
from halfbyte.training.schedule import Cadence

ROOT = Path(__file__).resolve().parents[1]
BLOCK, EVERY, USUAL_STEPS = 10, 2, 100  # USUAL_STEPS: the default of train.save_steps


def in_turn(self: Cadence, step: int, seconds: float) -> bool:
    return (step // BLOCK) % 2 == 1 and step % EVERY == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=80)
    given = parser.parse_args()
    Cadence.is_due = in_turn  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        # as many rows as two blocks take, so that both kinds of blocks have the same ones
        rows = (ROOT / "examples/orders/train.jsonl").read_text().splitlines(True)[: 2 * BLOCK]
        (Path(folder) / "rows.jsonl").write_text("".join(rows))
        sets = [
            f"output={folder}/run", f"train.max_steps={given.steps}", "train.per_device_train_batch_size=4",
            "train.gradient_accumulation_steps=1", "train.save_steps=1000", "lora.lora_dropout=0", "data.eval=none",
        ]  # fmt: skip
        finetune.train(recipe_from(given.model, f"{folder}/rows.jsonl", sets))
        made = [row for row in RunFolder(Path(folder) / "run").read_metrics() if "loss" in row]
        kept = sum(p.stat().st_size for p in (Path(folder) / "run/checkpoints").rglob("*") if p.is_file())
    # a save after step n is paid for in step n + 1 and those beside it
    with_saves = [row["seconds"] for row in made if ((row["step"] - 1) // BLOCK) % 2 == 1 and row["step"] > BLOCK]
    without = [row["seconds"] for row in made if ((row["step"] - 1) // BLOCK) % 2 == 0 and row["step"] > BLOCK]
    cost = (mean(with_saves) - mean(without)) * EVERY
    least = (median(with_saves) - median(without)) * EVERY
    print(
        f"a step {mean(without):.3f} s (median {median(without):.3f}); a checkpoint costs {cost:.3f} s (by medians "
        f"{least:.3f}): {cost / (USUAL_STEPS * mean(without)):.2%} of a run that saves every {USUAL_STEPS} steps; "
        f"{len(with_saves)} steps with, {len(without)} without; {kept / 1e6:.0f} MB of checkpoints at the end"
    )


if __name__ == "__main__":
    main()
