"""What holding a base costs: the plain stack's load, the store's first open and its reopening, in one run.

    python benchmarks/base_store.py FOLDER                 # Llama-2-7B in bf16: 13.5 GB, its store: 3.9 GB
    python benchmarks/base_store.py FOLDER --layers 2      # fewer of the same layers

Each in a process of its own, timed from the call, with every import done, to the open model:

    plain      AutoModelForCausalLM.from_pretrained with a BitsAndBytesConfig, on bitsandbytes' own CPU kernels
    first      halfbyte opens it for the first time: builds the store, then opens it. Compiling the quantiser is in it
    reopen     halfbyte opens it again, three times; the slowest counts
    standard   AutoModelForCausalLM.from_pretrained on the store's folder, as any script would

The weights are random and are deleted afterwards. Before each process its files are put out of the page cache
(posix_fadvise); what it then read from the disk is in the table. Memory is that of the opening, sampled every 20 ms.
Logits of one prompt are compared, once as the 4-bit layers unpack their weights (training mode, no dropout here) and
once in evaluation mode, where bitsandbytes may take another kernel and halfbyte does not: there halfbyte
may be as far from plain as plain is from itself in training mode.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.make_random import LLAMA_2_7B, sharded_llama
from benchmarks.measuring import cold, read_from_disk, say, verdict, watched

MIN_FIRST, MAX_PRIVATE_GB, MIN_REOPEN, MAX_REOPEN_S = 8.0, 1.5, 100.0, 2.0
REOPENINGS = 3
PROMPT = "w1 w17 w5 w120 w3 w42 w9 w77 w150 w8"
PLAIN_KERNEL = {"HALFBYTE_BNB_KERNEL": "0"}


def open_plain(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=bits, device_map={"": "cpu"})


def open_halfbyte(folder: Path) -> Any:
    from halfbyte.base import load
    from halfbyte.models.sources.lookup import resolve
    from halfbyte.recipe.schema import Quant
    from halfbyte.system import device

    return load.open_base(resolve(str(folder)), Quant(compute_dtype="bf16"), device.detect()).model


def open_standard(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cpu"})


OPEN: dict[str, Callable[[Path], Any]] = {
    "plain": open_plain, "first": open_halfbyte, "reopen": open_halfbyte, "standard": open_standard,
}  # fmt: skip


def work(name: str, folder: Path, logits: Path | None) -> None:
    """In a process of its own: open, and print the figures as JSON."""
    import bitsandbytes  # noqa: F401
    import torch
    from transformers import AutoTokenizer
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.utils import logging

    from halfbyte.base import load  # noqa: F401

    logging.disable_progress_bar()
    before = read_from_disk()
    with watched() as memory:
        began = time.perf_counter()
        model = OPEN[name](folder)
        seconds = time.perf_counter() - began
    read_gb = (read_from_disk() - before) / 1e9
    if logits is not None:
        ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
        with torch.no_grad():
            found = [model.train(mode)(input_ids=ids).logits for mode in (True, False)]
        torch.save(torch.stack(found), logits)
    print(json.dumps({"seconds": seconds, "read_gb": read_gb, **memory.to_json()}))


def run(name: str, folder: Path, cache: Path, logits: Path | None = None) -> dict[str, Any]:
    """One process, from cold. Its environment keeps every cache of halfbyte and numba inside `cache`."""
    cold(folder)
    environment = {**os.environ, "HALFBYTE_CACHE": str(cache), "NUMBA_CACHE_DIR": str(cache / "numba")}
    environment |= {"HF_HUB_OFFLINE": "1", **(PLAIN_KERNEL if name in ("plain", "standard") else {})}
    command = [sys.executable, __file__, "--worker", name, str(folder)]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, *(["--logits", str(logits)] if logits else [])], env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"{name} failed with exit code {done.returncode}; what it said is above")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    row["process_s"] = time.perf_counter() - began
    say(line(name, row))
    return row


def line(name: str, row: dict[str, Any]) -> str:
    return (f"{name:<10} {row['seconds']:9.2f} {row['process_s']:10.1f} {row['read_gb']:8.2f} "
            f"{row['largest_private_gb']:12.2f} {row['peak_gb']:9.2f}")  # fmt: skip


HEAD = f"{'':<10} {'open, s':>9} {'process, s':>10} {'read, GB':>8} {'private, GB':>12} {'RSS, GB':>9}"


def apart(a: Any, b: Any) -> float:
    """The largest difference of two tensors of logits, as a share of the largest logit; 0 where they are bit-equal."""
    return float((a.float() - b.float()).abs().max() / a.float().abs().max())


def compared(found: dict[str, Any]) -> dict[str, float]:
    """How far apart logits are. `found`: name -> (unpacked, evaluated)."""
    plain, reopened, standard = (found[name] for name in ("plain", "reopen", "standard"))
    return {
        "standard, unpacked": apart(plain[0], standard[0]),
        "standard, evaluated": apart(plain[1], standard[1]),
        "reopen, unpacked": apart(plain[0], reopened[0]),
        "reopen, evaluated": apart(plain[1], reopened[1]),
        "plain, evaluated beside unpacked": apart(plain[1], plain[0]),
    }


def measure(folder: Path, layers: int | None, rounds: int) -> dict[str, Any]:
    import torch

    values = {**LLAMA_2_7B, **({} if layers is None else {"num_hidden_layers": layers})}
    source, cache = folder / "llama-2-7b", folder / "cache"
    began = time.perf_counter()
    size = sharded_llama(source, values)
    say(f"wrote {size / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s\n\n{HEAD}")
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in OPEN}
    for _ in range(rounds):
        rows["plain"].append(run("plain", source, folder / "unused", folder / "plain.pt"))
        shutil.rmtree(cache, ignore_errors=True)
        rows["first"].append(run("first", source, cache))
    [store] = (cache / "bases").glob("*/halfbyte*.json")
    for _ in range(REOPENINGS):
        cold(store.parent)
        rows["reopen"].append(run("reopen", source, cache, folder / "reopen.pt"))
    rows["standard"].append(run("standard", store.parent, folder / "unused", folder / "standard.pt"))
    logits = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("plain", "reopen", "standard")}
    plain = statistics.median(row["seconds"] for row in rows["plain"])
    return {
        "layers": values["num_hidden_layers"], "source_gb": size / 1e9, "rows": rows,
        "store_gb": sum(f.stat().st_size for f in store.parent.iterdir()) / 1e9,
        "first_times_faster": [p["seconds"] / f["seconds"] for p, f in zip(rows["plain"], rows["first"], strict=True)],
        "first_private_gb": max(row["largest_private_gb"] for row in rows["first"]),
        "reopen_s": max(row["seconds"] for row in rows["reopen"]),
        "reopen_times_faster": plain / max(row["seconds"] for row in rows["reopen"]),
        "logits_apart": compared(logits),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the model and its store; must not exist")
    parser.add_argument("--layers", type=int, help="fewer of the same layers")
    parser.add_argument("--rounds", type=int, default=1, help="of plain and first, in turns")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--worker", choices=list(OPEN), help=argparse.SUPPRESS)
    parser.add_argument("--logits", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.folder, args.logits)
        return 0
    if args.folder.exists():
        sys.exit(f"{args.folder} exists; name another folder")
    need = 13.5e9 + 4.0e9 + 1e9 if args.layers is None else args.layers * 0.53e9 + 2e9
    free = shutil.disk_usage(args.folder.absolute().parent).free
    if free < need:
        sys.exit(f"SKIPPED: {need / 1e9:.1f} GB are needed in {args.folder}, {free / 1e9:.1f} GB are free")
    try:
        result = measure(args.folder, args.layers, args.rounds)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    logits = result["logits_apart"]
    say("\nlogits apart, as a share of the largest: " + ", ".join(f"{k} {v:.2g}" for k, v in logits.items()))
    fine = [
        verdict("first open, times faster than plain", statistics.median(result["first_times_faster"]), MIN_FIRST,
                at_least=True),
        verdict("first open, private memory", result["first_private_gb"], MAX_PRIVATE_GB, " GB"),
        verdict("reopening, times faster than plain", result["reopen_times_faster"], MIN_REOPEN, at_least=True),
        verdict("reopening", result["reopen_s"], MAX_REOPEN_S, " s"),
        verdict("logits of standard", max(logits["standard, unpacked"], logits["standard, evaluated"]), 0),
        verdict("logits of reopen, unpacked", logits["reopen, unpacked"], 0),
        verdict("logits of reopen, evaluated", logits["reopen, evaluated"], logits["plain, evaluated beside unpacked"]),
    ]  # fmt: skip
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
