"""Two million rows: read, templated, masked and tokenised by halfbyte, and by `datasets` as its users do, in one run.

    python benchmarks/rows.py                          # 2,000,000 rows, 1.5 GB of JSONL: 20 minutes and 12 GB of disk
    python benchmarks/rows.py --rows 50000             # a try

The rows are prompts and completions of about the length of GSM8K's, of words in their order from Python's own help
pages. halfbyte's first start is everything of `train` up to the planned steps: rows read and checked, rendered, masked,
tokenised, kept, judged by the gates, the memory planned, the first step made. Its second start is the same again, in
a new process. The other side is `load_dataset("json")` and `.map(num_proc=cores)` over rows one by one, with
`apply_chat_template` for the prompt and for the whole, which gives ids and a completion mask; it checks nothing.

On both sides the clock starts once everything is imported (4 s of halfbyte's start, whatever the rows).

Memory is the sum of the proportional set sizes (PSS) of a side's process and all its children, sampled: a page that
n processes share counts 1/n in each, so once in the sum. The baseline is the same sum once all is imported and the
tokenizer is read, before a row is.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from halfbyte.base.config import open_config, open_tokenizer
from halfbyte.models.sources.lookup import find_model, resolve
from halfbyte.recipe.file import recipe_from
from halfbyte.system import device
from halfbyte.training import prepare

MOST_ABOVE_GB, MOST_SECOND_S = 1.0, 3.0
PROMPT_WORDS, COMPLETION_WORDS = (20, 75), (25, 110)
SAMPLED_EVERY_S = 0.25


def write_rows(path: Path, count: int, seed: int = 0) -> None:
    """`count` rows; the same ones for the same seed."""
    from pydoc_data.topics import topics

    words = re.findall(r"[A-Za-z']+[.,:]?", " ".join(topics.values()))
    draw = random.Random(seed)

    def text(least: int, most: int) -> str:
        size, at = draw.randint(least, most), draw.randrange(len(words) - most)
        taken = words[at : at + size]
        for place in range(4, size, 9):
            taken[place] = str(draw.randrange(2000))
        return " ".join(taken)

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"prompt": text(*PROMPT_WORDS), "completion": text(*COMPLETION_WORDS)}) + "\n")


def pss_bytes(process: psutil.Process) -> int:
    """Of a process and all its children."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            rollup = Path(f"/proc/{one.pid}/smaps_rollup").read_text()
        except OSError:  # it has ended meanwhile
            continue
        found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
        total += int(found[1]) * 1024 if found else 0
    return total


def halfbyte_side(model: str, rows: Path) -> dict[str, Any]:
    """One start, in this process."""
    from halfbyte.models.structure import meta_model
    from halfbyte.training import fit, schedule

    recipe, machine = recipe_from(model, str(rows), ["data.eval=none"]).recipe, device.detect()
    found = find_model(recipe)
    open_tokenizer(found, trust_remote_code=False)
    meta_model(open_config(found.path, trust_remote_code=False), trust_remote_code=False)  # imports all
    baseline, began = pss_bytes(psutil.Process()), time.perf_counter()
    prepared = prepare.prepare(recipe)
    encoded = time.perf_counter()
    plan = fit.with_plan(prepared, machine).plan
    planned = schedule.plan_steps(prepared, plan.max_tokens_per_micro_batch, None)
    first = planned[0]
    ended = time.perf_counter()
    return {
        "seconds": ended - began, "rows_seconds": encoded - began, "baseline_bytes": baseline,
        "tokens": prepared.train.stats.tokens, "labelled": prepared.train.stats.labelled_tokens,
        "steps": len(planned), "micro_batches_of_the_first": len(first.micro_batches),
    }  # fmt: skip


def datasets_side(model: str, rows: Path, cache: Path) -> dict[str, Any]:
    """The same job as users of `datasets` write it."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        prompt = [{"role": "user", "content": row["prompt"]}]
        whole = [*prompt, {"role": "assistant", "content": row["completion"]}]
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        ids = tokenizer.apply_chat_template(whole, return_dict=False)
        return {"input_ids": ids, "completion_mask": [0] * len(before) + [1] * (len(ids) - len(before))}

    baseline, began = pss_bytes(psutil.Process()), time.perf_counter()
    loaded = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(cache))
    done = loaded.map(tokenise, num_proc=device.cores(), remove_columns=loaded.column_names)
    ended = time.perf_counter()
    first = done[:1000]
    return {
        "seconds": ended - began, "baseline_bytes": baseline, "rows": len(done),
        "tokens_of_1000": sum(map(len, first["input_ids"])),
        "labelled_of_1000": sum(map(sum, first["completion_mask"])),
    }  # fmt: skip


def watch(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run one side in a process of its own; its figures, and the most memory that was seen."""
    command = [sys.executable, __file__, *arguments]
    env = {**os.environ, "HALFBYTE_CACHE": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as child:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            try:
                peak = max(peak, pss_bytes(process))
            except psutil.NoSuchProcess:
                break
            time.sleep(SAMPLED_EVERY_S)
        said = child.stdout.read() if child.stdout else ""
    if child.returncode:
        sys.exit(f"{arguments[1]} ended with {child.returncode}")
    found: dict[str, Any] = json.loads(said.splitlines()[-1])
    return {**found, "peak_bytes": peak, "above_gb": (peak - found["baseline_bytes"]) / 1e9}


def compare(model: str, count: int, folder: Path, order: list[str]) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    began = time.perf_counter()
    write_rows(rows, count)
    print(f"{count:,} rows, {rows.stat().st_size / 1e9:.2f} GB, written in {time.perf_counter() - began:.0f} s")
    time.sleep(2.5)  # a file that has just changed is hashed again
    found: dict[str, Any] = {"rows": count, "bytes": rows.stat().st_size, "cores": device.cores()}
    for side in order:
        for start in ("first", "second") if side == "halfbyte" else ("map",):
            name = f"{side} {start}"
            found[name] = one = watch(["--side", side, "--model", model, "--folder", str(folder)], folder)
            peak, above = one["peak_bytes"] / 1e9, one["above_gb"]
            rate = "" if start == "second" else f", {count / one['seconds']:,.0f} rows/s"
            print(f"{name:<16} {one['seconds']:8.2f} s{rate}; peak {peak:.2f} GB, {above:.2f} GB above the baseline")
    if "datasets map" in found and "halfbyte first" in found:
        ratio = found["datasets map"]["seconds"] / found["halfbyte first"]["seconds"]
        found["times_faster"] = ratio
        print(f"halfbyte is {ratio:.2f} times as fast (wanted: 1 at least)")
    if "halfbyte first" in found:
        above, second = found["halfbyte first"]["above_gb"], found["halfbyte second"]["seconds"]
        print(f"memory {above:.2f} GB above the baseline (wanted: {MOST_ABOVE_GB} at most)")
        print(f"second start {second:.2f} s (wanted: under {MOST_SECOND_S})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--folder", type=Path, help="where files go, instead of a folder that is deleted afterwards")
    parser.add_argument("--sides", nargs="+", default=["halfbyte", "datasets"], choices=["halfbyte", "datasets"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--side", choices=["halfbyte", "datasets"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        rows = given.folder / "rows.jsonl"
        one = (
            halfbyte_side(given.model, rows)
            if given.side == "halfbyte"
            else datasets_side(given.model, rows, given.folder / "datasets")
        )
        print(json.dumps(one))
        return
    model = str(resolve(given.model).path)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="rows"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = compare(model, given.rows, folder, given.sides)
    finally:
        if given.folder is None:
            shutil.rmtree(folder)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
