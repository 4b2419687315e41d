"""Gigabytes of rows that are streamed (`data.streaming`): memory, time before the first step, a kill and a resume.

    python benchmarks/streamed_rows.py                   # 2.1 GB of JSON lines, deleted afterwards: minutes
    python benchmarks/streamed_rows.py --gb 0.1 pass     # a try of one part

pass: every window of a pass is tokenised, in a process of its own; the resident set after each, and that every text was
there once (a text ends with one end token). first: a training of a few steps on the packaged base, by its command: the
time up to its first step, and the peak of its report beside the plan's. kill: a tiny model trained over several windows
in one go, and again killed twice and resumed: the same adapter, byte for byte, and the same losses.
Texts are slices of Python's own help pages. As of a crawl, each row has its page beside its text, nine times as long,
which is not trained on; `--pages 0` leaves them out, and a pass takes ten times as long.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
from tests import tiny_run

from halfbyte.base.config import open_tokenizer
from halfbyte.data.streaming import Flow
from halfbyte.models.sources.lookup import find_model
from halfbyte.recipe.file import recipe_from

MODEL, SEED = "smollm2-135m", 0
STREAMED = ("data.streaming=true", "data.eval=none", "train.max_steps={}")
KILLED_AT = (0.35, 0.7)  # of the steps
STEPS, ROWS_A_STEP, SAVED_EVERY = 120, 64, 20


def write(path: Path, least_bytes: int, pages: int) -> int:
    """Texts of 400 to 8,000 characters, each with a page of `pages` times its length; how many."""
    from pydoc_data.topics import topics

    draw, whole, written, count = random.Random(SEED), " ".join(topics.values()), 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < least_bytes:
            at = draw.randrange(len(whole) - 8000)
            text = f"{count} {whole[at : at + draw.randint(400, 8000)]}"
            written += file.write(json.dumps({"text": text, "html": f"<p>{text}" * pages}) + "\n")
            count += 1
    return count


def one_pass(rows: Path, texts: int) -> str:
    sets = [text.format(1) for text in STREAMED] + ["data.packing=stream", "data.max_length=2048"]
    recipe = recipe_from(MODEL, str(rows), sets).recipe
    tokenizer, this = open_tokenizer(find_model(recipe), trust_remote_code=False), psutil.Process()
    before, began = this.memory_info().rss, time.monotonic()
    flow = Flow(recipe.data.train, tokenizer, recipe.data, recipe.train.seed)
    flow.first()
    first, resident, tokens, ends = time.monotonic() - began, list[int](), 0, 0
    while flow.index[-1][0] == 0:
        examples, _ = flow._window(len(flow.index) - 1)
        resident.append(this.memory_info().rss)
        for example in examples.examples:
            ids = np.asarray(example.input_ids)
            tokens, ends = tokens + len(ids), ends + int((ids == tokenizer.eos_token_id).sum())
        flow.rows(end := flow.index[-1][3], end + 1)
    seconds = time.monotonic() - began
    assert ends == texts, f"{ends:,} end tokens of {texts:,} texts"
    mb = [(size - before) / 1e6 for size in resident]
    tenth = len(mb) // 10 or 1
    return (
        f"pass: {rows.stat().st_size / 1e9:.2f} GB, {texts:,} texts, each once, {tokens / 1e6:,.0f} M tokens in "
        f"{len(mb)} windows, {seconds:.0f} s ({tokens / seconds:,.0f} tokens a second); first window after {first:.1f} "
        f"s; resident above the start {mb[0]:.0f} MB after the first, {np.median(mb[:tenth]):.0f} and "
        f"{np.median(mb[-tenth:]):.0f} in the first and last tenth, {max(mb):.0f} at most"
    )


def command(folder: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "halfbyte", "train", *words, "-q"]


def steps_of(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [row for line in lines if "loss" in (row := json.loads(line))]


def first_step(rows: Path, folder: Path) -> str:
    sets = [text.format(6) for text in STREAMED] + ["data.packing=stream", "data.max_length=512"]
    sets += ["train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=1", f"output={folder / 'first'}"]
    began = time.monotonic()
    running = subprocess.Popen(command(folder, MODEL, str(rows), *(w for text in sets for w in ("--set", text))))
    while running.poll() is None and not steps_of(folder / "first"):
        time.sleep(0.1)
    waited = time.monotonic() - began
    if running.wait():
        sys.exit("the training has failed")
    report = json.loads((folder / "first" / "report.json").read_text())
    step = steps_of(folder / "first")[0]["seconds"]
    peak, plan = (each["peak_rss_bytes"] / 1e9 for each in (report, report["planned"]))
    return (
        f"first: a step of {step:.1f} s was there after {waited:.1f} s; peak {peak:.2f} GB, planned {plan:.2f} at most"
    )


def killed(rows: Path, folder: Path) -> str:
    tiny_run.recipe(
        folder, data__train=rows, data__streaming=True, data__packing="stream", data__max_length=256,
        train__max_steps=STEPS, train__per_device_train_batch_size=ROWS_A_STEP, train__gradient_accumulation_steps=1,
        train__save_strategy="steps", train__save_steps=SAVED_EVERY,
    )  # fmt: skip
    recipe = str(folder / "recipe.yaml")
    subprocess.run(command(folder, recipe, "--output", str(folder / "whole")), check=True)
    run, kills = folder / "part", list[int]()
    for share in (*KILLED_AT, 2.0):
        words = (str(run), "--resume") if kills else (recipe, "--output", str(run))
        running = subprocess.Popen(command(folder, *words))
        while running.poll() is None and len(steps_of(run)) < share * STEPS:
            time.sleep(0.05)
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
            kills.append(len(steps_of(run)))
        running.wait()
    same = [(p / "adapter" / "adapter_model.safetensors").read_bytes() for p in (folder / "whole", run)]
    losses = [[row["loss"] for row in steps_of(p)] for p in (folder / "whole", run)]
    windows = json.loads((run / "stream.json").read_text())["windows"]
    assert same[0] == same[1] and losses[0] == losses[1] and len(losses[0]) == STEPS
    return f"kill: {STEPS} steps over {len(windows)} windows, killed after steps {kills}: the same bytes and losses"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["pass", "first", "kill"], help="pass, first, kill; all if none")
    parser.add_argument("--gb", type=float, default=2.1)
    parser.add_argument("--pages", type=int, default=9, help="how many times its text a row's page is long")
    parser.add_argument("--folder", help="for the rows; the system's temporary one if none")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        folder, rows = Path(place), Path(place) / "web.jsonl"
        texts = write(rows, int(given.gb * 1e9), given.pages)
        parts = {
            "pass": lambda: one_pass(rows, texts),
            "first": lambda: first_step(rows, folder),
            "kill": lambda: killed(rows, folder),
        }
        for part in given.parts:
            print(parts[part](), flush=True)


if __name__ == "__main__":
    main()
