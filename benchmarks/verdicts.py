"""Are verdicts right? Short runs at random, each judged again on rows that its verdict has not seen.

    python benchmarks/verdicts.py --data GSM8K --out FOLDER              # 200 runs of a small model, in one process
    python benchmarks/verdicts.py --data GSM8K --out FOLDER --model smollm2-135m --runs 20

Four sets: short GSM8K rows, sums, labels of one word, conversations of one to three turns. Each run draws a set, its
rows, 3 to 20 steps of one to four rows, a rate from 1e-5 to 3e-2, and whether rows are held out. The small model is
trained here, for a minute, by plain torch on other rows of the four sets. The judge is `halfbyte eval --base` on 64
further rows: "better" and "worse" are where its interval of the difference is on one side of 0. What is done is kept in
`--out` and not repeated; `--for` seconds end it early.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tests import tiny_run
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte import finetune
from halfbyte.errors import TrainError
from halfbyte.inference.evaluate import evaluate
from halfbyte.inference.load import open_run
from halfbyte.recipe.file import recipe_from
from halfbyte.scoring.sheet import EvalOptions

Row = dict[str, Any]
JUDGED_ROWS = 64
THINGS = ("cup", "door", "soup", "train", "book", "song", "road", "shop", "lamp", "chair")
GOOD, BAD = ("fine", "bright", "quick", "lovely", "warm"), ("broken", "dull", "late", "awful", "cold")


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def asked(question: str, answer: str) -> Row:
    return {"messages": [turn("user", question), turn("assistant", answer)]}


def sums(draw: random.Random, data: Path) -> Iterator[Row]:
    while True:
        a, b = draw.randrange(1000), draw.randrange(1000)
        yield asked(f"{a} + {b} =", str(a + b))


def labels(draw: random.Random, data: Path) -> Iterator[Row]:
    while True:
        good, thing = draw.random() < 0.5, draw.choice(THINGS)
        word = draw.choice(GOOD if good else BAD)
        yield asked(f"The {thing} was {word}.", "good" if good else "bad")


def conversations(draw: random.Random, data: Path) -> Iterator[Row]:
    while True:
        turns = []
        for _ in range(draw.randint(1, 3)):
            thing, count = draw.choice(THINGS), draw.randint(1, 9)
            turns += [turn("user", f"I see {count} {thing}s"), turn("assistant", " ".join([thing] * count))]
        yield {"messages": turns}


def gsm8k(draw: random.Random, data: Path) -> Iterator[Row]:
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    short = [row for row in rows if len(row["question"]) + len(row["answer"]) < 300]
    while True:
        draw.shuffle(short)
        yield from (asked(row["question"], row["answer"]) for row in short)


SETS = {"sums": sums, "labels": labels, "conversations": conversations, "gsm8k": gsm8k}


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def small_model(folder: Path, data: Path, steps: int = 250) -> Path:
    """A model of three layers that knows the four sets a little."""
    if (folder / "config.json").is_file():
        return folder
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny_run.VOCAB, hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model, tokenizer = LlamaForCausalLM(config).train(), tiny_run.tokenizer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    streams = [make(random.Random(f"base/{name}"), data) for name, make in SETS.items()]
    for _ in range(steps):
        rows = [next(stream)["messages"] for stream in streams for _ in range(3)]
        ids = [tokenizer.apply_chat_template(row, tokenize=True, return_dict=False)[:160] for row in rows]
        width = max(map(len, ids))
        batch = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        places = torch.arange(width)[None] < torch.tensor([[len(row)] for row in ids])
        loss = model(input_ids=batch, attention_mask=places.long(), labels=batch.masked_fill(~places, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"the small model's loss: {float(loss):.3f}", file=sys.stderr)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(number: int, arguments: argparse.Namespace, model: str) -> dict[str, Any]:
    """One run and its judgement, as a line of the results."""
    draw = random.Random(number)
    name, count = draw.choice(list(SETS)), draw.randint(40, 200)
    held_out = draw.choice([0, 8, 16, 32])
    rate = 10 ** draw.uniform(-5, math.log10(3e-2))
    steps, batch = draw.randint(3, 20), draw.randint(1, 4)
    folder = Path(arguments.out, f"run{number}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = list(islice(SETS[name](random.Random(f"rows/{number}"), Path(arguments.data)), count + JUDGED_ROWS))
    train = write(folder / "train.jsonl", rows[:count])
    judged = write(folder / "judged.jsonl", rows[count:])
    values = {
        "output": folder / "run", "data.eval": held_out or "none", "train.learning_rate": f"{rate:.3e}",
        "train.max_steps": steps, "train.per_device_train_batch_size": batch, "lora.r": draw.choice([4, 16]),
        "train.save_strategy": "no", "data.mask": "assistant", "train.lr_scheduler_type": "constant",
    }  # fmt: skip
    about = {"run": number, "set": name, "rows": count, "held_out": held_out, "rate": rate, "steps": steps}
    try:
        report = finetune.train(recipe_from(model, str(train), [f"{k}={v}" for k, v in values.items()])).report
    except TrainError as error:
        return {**about, "verdict": "diverged", "ended": error.message}
    opened = open_run(folder / "run")
    difference = evaluate(opened, EvalOptions.of(opened.recipe.eval, ["loss"], with_base=True), data=judged).scores[0]
    shutil.rmtree(folder)
    assert difference.difference is not None and difference.difference.interval is not None
    low, high = difference.difference.interval
    truth = "better" if high < 0 else "worse" if low > 0 else "no difference"
    verdict = report["verdict"]
    losses = [report["loss"]["first"], report["loss"]["last"]]
    return {
        **about, "verdict": verdict["name"], "interval": verdict["interval"], "on": verdict["rows"], "truth": truth,
        "judged": [low, high], "losses": losses,
    }  # fmt: skip


def show(results: list[dict[str, Any]]) -> None:
    pairs = Counter((row["verdict"], row.get("truth", "ended")) for row in results)
    for (verdict, truth), count in sorted(pairs.items()):
        print(f"{verdict:>15} | judged {truth:<15} {count:4d}")
    bad = ("worse", "diverged")
    wrong = [row for row in results if row["verdict"] in bad and row.get("truth") == "better"]
    missed = [row for row in results if row["verdict"] not in bad and row.get("truth") == "worse"]
    opposite = [row for row in missed if row["verdict"] == "better"]
    rose = [row for row in results if row.get("truth") == "better" and row["losses"][1] > row["losses"][0]]
    worse = sum(row.get("truth") == "worse" for row in results)
    print(f"{len(results)} runs: {len(wrong)} called worse that are better")
    print(f"of {worse} that are worse {len(missed)} are not called so, {len(opposite)} of them better")
    print(f"{len(rose)} better ones ended with a step whose loss was above the first one's")
    for row in wrong + missed:
        print(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the folder of GSM8K's train.jsonl")
    parser.add_argument("--out", required=True)
    parser.add_argument("--model", help="instead of the small model that is trained here")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--for", type=float, default=math.inf, dest="seconds")
    arguments = parser.parse_args()
    out, until = Path(arguments.out), time.monotonic() + arguments.seconds
    out.mkdir(parents=True, exist_ok=True)
    model = arguments.model or str(small_model(out / "model", Path(arguments.data)))
    path = out / "results.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    results = [json.loads(line) for line in lines]
    for number in range(len(results), arguments.runs):
        if time.monotonic() > until:
            break
        results.append(run(number, arguments, model))
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(results[-1]) + "\n")
    show(results)


if __name__ == "__main__":
    main()
