"""Classification beside the plain stack: transformers' class with PEFT on padded batches, LoRA on attention.

    plain      as its users write it, in 4 bits: `prepare_model_for_kbit_training` with its default checkpointing
    tuned      the plain stack at its best: no checkpointing
    halfbyte   exact products, a step in one micro-batch
    split      the same, in micro-batches of at most `SPLIT` tokens
    integer    quant.compute int8

Use: `python -m benchmarks.labels smollm2|modernbert [nf4] [--stacks plain halfbyte ...]`: of a base in 16 bits, where
plain is tuned, or in 4 bits for all. Each stack is a process of its own; they take turns, a round each, on the same
rows of 20 to 300 tokens: `STEPS` training steps of `ROWS` rows, then predictions, whose plain batches are sorted by
length as the pipeline takes them. The first round warms up. Weights are random, of the shapes of SmolLM2-135M and
ModernBERT-base.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

ROWS, STEPS, PREDICTED, BATCH, WHOLE, SPLIT = 16, 2, 48, 8, 4096, 1536
LABELS = ("a", "b", "c", "d")
Sides = tuple[Callable[[Any], float], Callable[[Any], Any]]


def model(kind: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, LlamaConfig, ModernBertConfig

    if kind == "smollm2":
        config = LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True, pad_token_id=0,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        return
    config = ModernBertConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
    AutoModelForMaskedLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def rows(count: int, seed: int) -> list[tuple[list[int], int]]:
    draw = random.Random(seed)
    lengths = [draw.randint(20, 300) for _ in range(count)]
    return [([draw.randrange(5, 40000) for _ in range(n)], draw.randrange(len(LABELS))) for n in lengths]


def halfbyte(folder: Path, four_bits: bool, compute: str = "exact", tokens: int = WHOLE) -> Sides:
    import torch

    from halfbyte.adapters.assembly import assemble
    from halfbyte.base import load
    from halfbyte.data import collate
    from halfbyte.data.encoding.examples import Example
    from halfbyte.layers import fuse, heads
    from halfbyte.models.sources.lookup import resolve
    from halfbyte.objectives.labels import Labels
    from halfbyte.recipe.schema import Lora, Quant, Recipe
    from halfbyte.system import device, threads
    from halfbyte.training import pace

    machine = device.detect()
    threads.configure(machine.cores)
    quant = Quant(type="nf4" if four_bits else "none", compute=compute)
    base, objective = load.open_base(resolve(str(folder)), quant, machine), Labels(LABELS)
    names = [spec.name for spec in base.specs]
    drawn = heads.attach(base.model, *heads.wanted(objective), seed=0, names=names)
    lora = Lora(r=16, lora_dropout=0.0, modules_to_save=drawn)
    recipe = Recipe(model=str(folder), data={"train": "x"}, lora=lora, quant=quant)
    assembled = assemble(base, recipe)
    print(assembled.packed.layout, assembled.engine, file=sys.stderr)
    adapted = assembled.model.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)
    pace.give_back()  # as a run does before its first step

    def batches(some: Any) -> list[Any]:
        examples = [
            Example(tuple(ids), (*(-100,) * (len(ids) - 1), ids[-1]), "", (), json.dumps(LABELS[y])) for ids, y in some
        ]
        planned = collate.Batches.of_rows(examples, tokens, len(examples))
        return [objective.collate([examples[n] for n in numbers]) for numbers in planned.micro_batches]

    def step(some: Any) -> float:
        total = 0.0
        for batch in batches(some):
            loss = objective.loss(adapted, batch) / len(some)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return total

    def predict(some: Any) -> None:
        adapted.eval()
        with torch.no_grad(), fuse.as_trained():
            for batch in batches(some):
                heads.scores(adapted, batch)

    return step, predict


def plain(folder: Path, four_bits: bool, again: bool) -> Sides:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.bfloat16,
                             llm_int8_skip_modules=["classifier", "score"])  # fmt: skip  # PEFT trains a copy of it
    lm = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(LABELS), dtype=torch.bfloat16, quantization_config=nf4 if four_bits else None
    )
    if again:
        lm = prepare_model_for_kbit_training(lm)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if "Llama" in type(lm).__name__ else ["Wqkv", "attn.Wo"]
    adapted = get_peft_model(lm, LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="SEQ_CLS")).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)

    def padded(some: Any) -> dict[str, Any]:
        longest = max(len(ids) for ids, _ in some)
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in some])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor([y for _, y in some])}

    def step(some: Any) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):  # as a Trainer with bf16
            loss = adapted(**padded(some)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def predict(some: Any) -> None:
        adapted.eval()
        some = sorted(some, key=lambda row: len(row[0]))
        with torch.no_grad():
            for at in range(0, len(some), BATCH):
                adapted(**{k: v for k, v in padded(some[at : at + BATCH]).items() if k != "labels"})

    return step, predict


def serve(stack: str, folder: Path, four_bits: bool) -> None:
    """Answer each line of the standard input, `train` or `predict`, with the seconds and the peak so far."""
    ours: dict[str, dict[str, Any]] = {"halfbyte": {}, "split": {"tokens": SPLIT}, "integer": {"compute": "int8"}}
    if stack in ours:
        step, predict = halfbyte(folder, four_bits, **ours[stack])
    else:
        step, predict = plain(folder, four_bits, four_bits and stack == "plain")
    for asked in sys.stdin:
        began = time.perf_counter()
        if asked.strip() == "predict":
            predict(rows(PREDICTED, STEPS))
        else:
            for number in range(STEPS):
                step(rows(ROWS, number))
        seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": seconds, "peak_GB": peak / 1e6}), flush=True)


def compare(stacks: list[str], folder: Path, four_bits: bool, rounds: int) -> None:
    words = [sys.executable, "-m", "benchmarks.labels", str(folder), *["nf4"] * four_bits, "--serve"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes: dict[str, Any] = {name: subprocess.Popen([*words, name], **pipes) for name in stacks}

    def round_of(task: str, number: int, name: str) -> dict[str, float]:
        process = processes[name]
        process.stdin.write(f"{task}\n")
        process.stdin.flush()
        found: dict[str, float] = json.loads(process.stdout.readline() or sys.exit(f"{name} ended"))
        print(task, number, name, found, flush=True)
        return found

    try:
        for task in ("train", "predict"):  # bitsandbytes packs a weight anew for predictions, and trains on that slowly
            seen = [{name: round_of(task, number, name) for name in stacks} for number in range(rounds + 1)][1:]
            for what in ("seconds", "peak_GB"):
                for other, own in product(("plain", "tuned"), ("halfbyte", "split", "integer")):
                    ratios = [row[other][what] / row[own][what] for row in seen if {other, own} <= set(row)]
                    if ratios:
                        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                        print(f"{task}, {what}: {other} / {own} = {spread}", flush=True)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="smollm2 or modernbert")
    parser.add_argument("format", nargs="?", choices=["nf4"])
    parser.add_argument("--stacks", nargs="+", default=["plain", "tuned", "halfbyte", "split", "integer"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, Path(args.base), args.format == "nf4")
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / args.base
        model(args.base, folder)
        compare(args.stacks, folder, args.format == "nf4", args.rounds)


if __name__ == "__main__":
    main()
