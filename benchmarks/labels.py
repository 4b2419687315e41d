"""Classification beside the plain stack: transformers' class with PEFT on padded batches, LoRA.

Use: `python -m benchmarks.labels smollm2|modernbert [nf4]`: of a base in 16 bits, or in 4 bits on both sides. Each
side runs in a process of its own, on the same rows of 20 to 300 tokens: training steps of `ROWS` rows, and predictions,
whose plain batches are sorted by length as the pipeline takes them; the best of `ROUNDS` each, after one to warm up.
Weights are random, of the shapes of SmolLM2-135M and ModernBERT-base.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS, PREDICTED, BATCH, ROUNDS = 16, 48, 8, 4
LABELS = ("a", "b", "c", "d")
FOUR_BITS = "nf4" in sys.argv


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


def ours(folder: Path) -> tuple[Callable[[Any], float], Callable[[Any], Any]]:
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

    machine = device.detect()
    threads.configure(machine.cores)
    quant = Quant(type="nf4" if FOUR_BITS else "none")
    base, objective = load.open_base(resolve(str(folder)), quant, machine), Labels(LABELS)
    names = [spec.name for spec in base.specs]
    drawn = heads.attach(base.model, *heads.wanted(objective), seed=0, names=names)
    recipe = Recipe(model=str(folder), data={"train": "x"}, lora=Lora(r=16, lora_dropout=0.0, modules_to_save=drawn))
    assembled = assemble(base, recipe)
    print(assembled.packed.layout, assembled.engine, file=sys.stderr)
    adapted = assembled.model.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-4)

    def batches(some: Any) -> list[Any]:
        examples = [
            Example(tuple(ids), (*(-100,) * (len(ids) - 1), ids[-1]), "", (), json.dumps(LABELS[y])) for ids, y in some
        ]
        planned = collate.Batches.of_rows(examples, 4096, len(examples))  # a run's step is one micro-batch, too
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


def plain(folder: Path) -> tuple[Callable[[Any], float], Callable[[Any], Any]]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                             bnb_4bit_compute_dtype=torch.bfloat16,
                             llm_int8_skip_modules=["classifier", "score"])  # fmt: skip  # PEFT trains a copy of it
    lm = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(LABELS), dtype=torch.bfloat16, quantization_config=nf4 if FOUR_BITS else None
    )
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


def side(name: str, folder: Path) -> None:
    step, predict = {"ours": ours, "plain": plain}[name](folder)

    def best(call: Callable[[Any], Any], some: list[Any]) -> float:
        seconds = []
        for _ in range(ROUNDS + 1):
            began = time.perf_counter()
            call(some)
            seconds.append(time.perf_counter() - began)
        return min(seconds[1:])

    trained, predicted = best(step, rows(ROWS, 1)), best(predict, rows(PREDICTED, 2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"step_s": trained, "predict_s": predicted, "peak_GB": peak}))


def main() -> None:
    if sys.argv[1] in ("ours", "plain"):
        side(sys.argv[1], Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / sys.argv[1]
        model(sys.argv[1], folder)
        seen = {}
        for name in ("ours", "plain"):
            command = [sys.executable, "-m", "benchmarks.labels", name, str(folder), *sys.argv[2:]]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            seen[name] = json.loads(run.stdout.splitlines()[-1])
            print(name, seen[name], flush=True)
        for what in ("step_s", "predict_s", "peak_GB"):
            print(f"{what}: plain / ours = {seen['plain'][what] / seen['ours'][what]:.2f}")


if __name__ == "__main__":
    main()
