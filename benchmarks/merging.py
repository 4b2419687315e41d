"""What merging costs beside copying the source's files: time, peak memory, and what plain transformers says of it.

    python benchmarks/merging.py make FOLDER               # Llama-2-7B in bf16, LoRA on all linears, its store: 17.4 GB
    python benchmarks/merging.py time FOLDER               # copy, merge into either base, 13.5 GB more at a time
    python benchmarks/merging.py logits FOLDER --base 4bit # a merged model by plain transformers, beside plain PEFT

Times are of whole processes, `cp` and `sync` for the copy, `halfbyte merge --no-proof` for a merge, each from files
that are not in the page cache to bytes that are on the disk, in turns. The peak is that of the resident set, pages of
files included. Layers hold the same random numbers, which no time depends on. `--source` names another `src/`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.make_random import LLAMA_2_7B, sharded_llama
from benchmarks.measuring import cold, say, verdict

BASES, RANK, MOST_GB, MOST_TIMES = ("16bit", "4bit"), 16, 2.0, 3.0
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT = "w1 w17 w5 w120 w3 w42 w9 w77 w150 w8"


def make(folder: Path, layers: int | None) -> None:
    values = {**LLAMA_2_7B, **({} if layers is None else {"num_hidden_layers": layers})}
    size = sharded_llama(folder / "model", values, alike=True)
    adapter(folder, values)
    halfbyte(folder, "quantize", str(folder / "model"), "--quiet")
    say(f"wrote {size / 1e9:.2f} GB and its store")


def adapter(folder: Path, values: dict[str, int]) -> None:
    """LoRA on all linears, by numbers that move logits."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**values))
    generator, tensors = torch.Generator().manual_seed(1), dict[str, torch.Tensor]()
    for name, module in model.named_modules():
        if name.endswith(LINEARS):
            for part, shape in (("A", (RANK, module.in_features)), ("B", (module.out_features, RANK))):
                own = torch.empty(shape).normal_(0, 0.02, generator=generator)
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = own
    (folder / "adapter").mkdir()
    save_file(tensors, folder / "adapter/adapter_model.safetensors", metadata={"format": "pt"})
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(folder / "model")
    config.save_pretrained(folder / "adapter")


def halfbyte(folder: Path, *arguments: str, source: Path | None = None) -> tuple[float, float]:
    """Seconds and peak resident GB of one command."""
    environment = {**os.environ, "HALFBYTE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    if source is not None:
        environment["PYTHONPATH"] = str(source)
    return timed([sys.executable, "-m", "halfbyte", *arguments], environment)


def timed(command: list[str], environment: dict[str, str] | None = None) -> tuple[float, float]:
    began = time.perf_counter()
    child = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        sys.exit(f"{' '.join(command[:6])} failed with exit code {child.returncode}; what it said is above")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


def measure(folder: Path, rounds: int, source: Path | None) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for _ in range(rounds):
        for name in ("copy", *BASES):
            out = folder / "out"
            cold(folder / "model")
            for store in (folder / "cache/bases").iterdir():
                cold(store)
            if name == "copy":
                script = 'mkdir "$2" && cp --reflink=never "$1"/* "$2" && sync "$2"/* "$2"'
                spent, peak = timed(["bash", "-c", script, "copy", str(folder / "model"), str(out)])
            else:
                command = ["merge", str(folder / "adapter"), "--base", name, "--no-proof", "--out", str(out), "-q"]
                spent, peak = halfbyte(folder, *command, source=source)
            shutil.rmtree(out)
            rows.append({"what": name, "seconds": spent, "peak_gb": peak})
            say(f"{name:<6} {spent:7.1f} s {peak:6.2f} GB")
    for name in BASES:
        of = {each: [r for r in rows if r["what"] == each] for each in ("copy", name)}
        times = [a["seconds"] / b["seconds"] for a, b in zip(of[name], of["copy"], strict=True)]
        verdict(f"{name}, times a copy", max(times), MOST_TIMES)
        verdict(f"{name}, peak", max(row["peak_gb"] for row in of[name]), MOST_GB, " GB")
    return {"rows": rows}


def logits(folder: Path, base: str) -> dict[str, float]:
    """How far the merged model is from base and adapter in plain PEFT; both in bf16, one after the other."""
    out = folder / f"merged-{base}"
    if not out.exists():
        halfbyte(folder, "merge", str(folder / "adapter"), "--base", base, "--no-proof", "--out", str(out), "-q")
    [store] = (found.parent for found in (folder / "cache/bases").glob("*/config.json"))
    places = {"merged": out, "peft": folder / "model" if base == "16bit" else store, "alone": folder / "model"}
    for name, path in places.items():
        worker = [sys.executable, __file__, "logits", str(path), "--worker", str(folder / f"{name}.npy")]
        timed([*worker, *(["--adapter", str(folder / "adapter")] if name == "peft" else [])])
    import numpy as np

    found = {name: np.load(folder / f"{name}.npy").astype(np.float64) for name in places}
    spread = np.linalg.norm(found["peft"] - found["peft"].mean(1, keepdims=True))
    made = {name: float(np.linalg.norm(found[name] - found["peft"]) / spread) for name in ("merged", "alone")}
    layers = json.loads((out / "config.json").read_text())["num_hidden_layers"]
    # two programs in bf16 and weights rounded to it: r = 2^-8 / sqrt(3) each, through 5 products of each layer
    verdict(f"{base}, rms difference over the spread", made["merged"], 2 * 2**-8 * (5 * layers) ** 0.5)
    say(f"the base alone is {made['alone']:.3f} away; {out.name} opened by plain transformers")
    return made


def ask(folder: Path, adapter: Path | None, out: Path) -> None:
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        np.save(out, model(input_ids=ids).logits[0].float().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "time", "logits"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="fewer of the same layers")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--base", choices=BASES, default="4bit")
    parser.add_argument("--source", type=Path, help="another src/ to be timed")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        ask(args.folder, args.adapter, args.worker)
        return
    if args.what == "make":
        make(args.folder, args.layers)
        return
    made = measure(args.folder, args.rounds, args.source) if args.what == "time" else logits(args.folder, args.base)
    if args.json:
        args.json.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
