"""The loss curve of the plain stack, as a reference that halfbyte must meet step for step.

What: SmolLM2-135M in NF4 (double quantisation, bf16), LoRA r 16 on q_proj and v_proj, dropout 0, batch 4 x 4, 50
steps of GSM8K, through transformers + peft + bitsandbytes: `Trainer`, dynamic padding, completion-only labels. Rows and
their order are halfbyte's (same seed), so that curves can be compared point by point; token ids and labels come from
halfbyte's data rooms, everything else is theirs. Two ways of it:

    plain     everything in bf16: the model is loaded in bf16, LoRA is put on it, no autocast
    prepared  `prepare_model_for_kbit_training` and `bf16=True`: norms, embedding, head and the residual stream in fp32

    python benchmarks/reference_curve.py plain    GSM8K/train.jsonl --out benchmarks/reference_curve.json
    python benchmarks/reference_curve.py halfbyte GSM8K/train.jsonl --compare benchmarks/reference_curve.json
    python benchmarks/reference_curve.py both examples/orders/train.jsonl --steps 8      # losses and speed, in turns
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

STEPS, BATCH, ACCUMULATION, SEED, RATE = 50, 4, 4, 42, 2e-4


def overrides(data: Path, steps: int) -> list[str]:
    """The recipe of the comparison, as `--set` values."""
    with data.open() as file:
        columns = json.loads(file.readline())
    return [
        *(["data.fields={prompt: question, completion: answer}"] if "question" in columns else []),
        "data.eval=none",
        "lora.target_modules=[q_proj, v_proj]",
        "lora.r=16",
        "lora.lora_alpha=32",
        "lora.lora_dropout=0.0",
        f"train.per_device_train_batch_size={BATCH}",
        f"train.gradient_accumulation_steps={ACCUMULATION}",
        f"train.max_steps={steps}",
        f"train.learning_rate={RATE}",
        f"train.seed={SEED}",
    ]


def plain(data: Path, steps: int, *, prepare: bool = False) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

    from halfbyte.recipe.file import recipe_from
    from halfbyte.training.prepare import prepare
    from halfbyte.training.schedule import plan_steps

    prepared = prepare(recipe_from("smollm2-135m", str(data), overrides(data, steps)).recipe)
    planned = plan_steps(prepared, 10**9, 1)
    order = [row for step in planned for (row,) in step.micro_batches]
    items = [
        {"input_ids": list(prepared.train.examples[r].input_ids), "labels": list(prepared.train.examples[r].labels)}
        for r in order
    ]

    def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(r["input_ids"]) for r in rows)

        def fill(key: str, value: int) -> torch.Tensor:
            return torch.tensor([r[key] + [value] * (width - len(r[key])) for r in rows])

        mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
        return {"input_ids": fill("input_ids", 0), "labels": fill("labels", -100), "attention_mask": mask}

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    folder = prepared.checkpoint.path
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    if prepare:  # recomputation changes no number, only the time
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(SEED)
    lora = LoraConfig(
        r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, lora)
    with tempfile.TemporaryDirectory() as out:
        arguments = TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            max_steps=steps,
            learning_rate=RATE,
            lr_scheduler_type="linear",
            bf16=prepare,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=SEED,
            train_sampling_strategy="sequential",
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=items, data_collator=pad)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    tokens = sum(len(i["input_ids"]) for i in items)
    return {"stack": "transformers + peft + bitsandbytes", "losses": losses, "tokens": tokens, "seconds": seconds}


def halfbyte(data: Path, steps: int) -> dict[str, Any]:
    from halfbyte import finetune
    from halfbyte.recipe.file import recipe_from

    with tempfile.TemporaryDirectory() as out:
        values = [*overrides(data, steps), "train.lr_scheduler_type=linear", f"output={out}/run"]
        outcome = finetune.train(recipe_from("smollm2-135m", str(data), values))
        rows = [json.loads(line) for line in Path(out, "run", "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    report = outcome.report
    return {"stack": "halfbyte", "losses": losses, "tokens": report["tokens"], "seconds": report["train_seconds"]}


def both(data: Path, steps: int, rounds: int = 3) -> dict[str, Any]:
    """Plain and halfbyte in turns in fresh processes; the ratio of their tokens/s is taken round by round."""
    import subprocess
    import sys

    ratios, curves = [], {}
    for _ in range(rounds):
        rates = {}
        for stack in ("plain", "halfbyte"):
            command = [sys.executable, __file__, stack, str(data), "--steps", str(steps)]
            with tempfile.NamedTemporaryFile(suffix=".json") as out:
                subprocess.run([*command, "--out", out.name], check=True, capture_output=True)
                curves[stack] = json.loads(Path(out.name).read_text())
            rates[stack] = curves[stack]["tokens"] / curves[stack]["seconds"]
        ratios.append(rates["halfbyte"] / rates["plain"])
    return {"ratio_tokens_per_second": sorted(ratios)[len(ratios) // 2], "ratios": ratios, "losses": curves}


def compare(ours: list[float], reference: list[float]) -> dict[str, float]:
    first = max(abs(a - b) / b for a, b in zip(ours[:10], reference[:10], strict=True))
    last = abs(sum(ours[-20:]) - sum(reference[-20:])) / sum(reference[-20:])
    return {"first_10_max_relative": first, "last_20_mean_relative": last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stack", choices=["plain", "prepared", "halfbyte", "both"])
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--compare", type=Path, help="a curve written by --out")
    args = parser.parse_args()
    result = {"plain": plain, "prepared": partial(plain, prepare=True), "halfbyte": halfbyte, "both": both}[args.stack](
        args.data, args.steps
    )
    if args.compare:
        result |= compare(result["losses"], json.loads(args.compare.read_text())["losses"])
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
