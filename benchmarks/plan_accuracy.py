"""Planned against measured: memory of whole runs, each in its own process, over architectures, lengths and choices.

    python benchmarks/plan_accuracy.py                        # 42 runs, about a quarter of an hour on one thread
    python benchmarks/plan_accuracy.py --only qwen3 gpt2      # those whose name has one of the words
    python benchmarks/plan_accuracy.py --seven-b FOLDER       # also the 7B shape: 3.9 GB written to FOLDER
    python benchmarks/plan_accuracy.py --time                 # calibrate, and compare seconds a step in longer runs too

Each run plans, trains two steps and ends, or three where a step has fewer than four rows: one without the short row has
to come when the optimiser's state is there. This process reads its `/proc/PID/statm` every two milliseconds.
Private memory is compared above that of the empty process: one that has imported all a run imports, and holds nothing.
Total memory is the kernel's own high-water mark (VmHWM). A base's store is built before, in a process of its own too,
whose peak and bytes on disk are printed.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PERIOD_S = 0.002
PRIVATE_MEAN, PRIVATE_WORST, TOTAL_MEAN, TOTAL_WORST, TOTAL_UNDER = 0.10, 0.20, 0.05, 0.12, 0.05
TIME_WORST, BUILDING_WORST, DISK_WORST = 0.20, 0.10, 0.01
ROWS = 16
# Wide enough that a step's own memory is more than the noise of the process around it.
_WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16,
         "num_key_value_heads": 4}  # fmt: skip
_MIXED = {**_WIDE, "hidden_size": 768, "head_dim": 64, "num_attention_heads": 12}
WIDTHS: dict[str, dict[str, Any]] = {
    "llama": {**_WIDE, "max_position_embeddings": 4096},
    "qwen3": {**_WIDE, "head_dim": 64, "hidden_size": 768, "intermediate_size": 2048, "vocab_size": 32000},
    "gemma3": {**_WIDE, "head_dim": 64, "query_pre_attn_scalar": 64, "layer_types": ["full_attention"] * 6},
    "phi3": {**_WIDE, "hidden_size": 768, "num_attention_heads": 12},
    "gpt2": {"n_embd": 768, "n_layer": 8, "n_head": 12},
    "bloom": {"hidden_size": 768, "n_layer": 6, "n_head": 12},
    "gpt_neox": {**_WIDE, "intermediate_size": 4096},
    "mixtral": {**_MIXED, "intermediate_size": 1536},
    "qwen3_moe": {**_MIXED, "moe_intermediate_size": 384},
    "gpt_oss": {**_MIXED, "intermediate_size": 768},
}
EVERY = "all-linear"


@dataclass(frozen=True)
class Case:
    """One run. `targets` qv: those that carry queries and values; `tokens` of a micro-batch, None as planned."""

    model: str
    length: int
    rank: int
    targets: str = "qv"
    recompute: bool | str = False
    placement: str = "auto"
    quant: str = "nf4"
    tokens: int | None = None
    batch: int = 4
    dropout: float = 0.05
    dtype: str = "auto"
    optim: str = "adamw_torch"
    evaluated: bool = False
    steps: int = 2
    rows: int = ROWS
    cold: bool = False  # the first run on a machine: it builds the store and compiles the kernels

    @property
    def name(self) -> str:
        more = [
            f"{self.targets} r{self.rank}", {False: "keep", True: "full"}.get(self.recompute, str(self.recompute)),
            self.placement, self.quant, *([self.dtype] if self.dtype != "auto" else []),
            *([f"micro-batches of {self.tokens}"] if self.tokens else []), *(["8-bit"] if "8bit" in self.optim else []),
            *(["eval"] if self.evaluated else []), *(["cold"] if self.cold else []),
            *([f"{self.steps} steps"] if self.steps != 2 else []),
        ]  # fmt: skip
        return f"{self.model} {self.batch} x {self.length} {' '.join(more)}"


CASES = (
    Case("smollm2-135m", 256, 16),
    Case("smollm2-135m", 512, 16, EVERY, tokens=1024),
    Case("smollm2-135m", 512, 8, EVERY, "selective"),
    Case("smollm2-135m", 1024, 64, EVERY, True),
    Case("smollm2-135m", 256, 16, placement="resident"),
    Case("smollm2-135m", 384, 16, placement="streamed", recompute=True),
    Case("smollm2-135m", 256, 16, quant="none"),
    Case("smollm2-135m", 256, 16, EVERY, dtype="fp32", dropout=0.0),
    Case("smollm2-135m", 256, 16, EVERY, quant="fp4", tokens=512),
    Case("smollm2-135m", 300, 16, evaluated=True),
    Case("smollm2-135m", 128, 16, EVERY, batch=8, evaluated=True, rows=96, steps=12, cold=True),
    Case("llama", 512, 16),
    Case("llama", 512, 64, EVERY),
    Case("llama", 512, 64, EVERY, "selective"),
    Case("llama", 1024, 16, EVERY, True),
    Case("llama", 256, 8, placement="streamed", batch=8),
    Case("llama", 512, 8, quant="fp4", placement="resident"),
    Case("llama", 2048, 16, batch=1, steps=3),
    Case("llama", 256, 256, EVERY, optim="adamw_bnb_8bit"),
    Case("qwen3", 512, 16),
    Case("qwen3", 512, 16, EVERY, "selective"),
    Case("qwen3", 1024, 8, "qv", True, batch=3, steps=3),
    Case("qwen3", 384, 32, EVERY, quant="none", placement="resident"),
    Case("qwen3", 256, 16, placement="streamed", tokens=512),
    Case("gemma3", 512, 16),
    Case("gemma3", 512, 16, EVERY, "selective"),
    Case("gemma3", 768, 64, "qv", True),
    Case("phi3", 512, 16),
    Case("phi3", 512, 16, EVERY, True, quant="fp4"),
    Case("gpt2", 512, 16),
    Case("gpt2", 256, 64, EVERY, batch=8),
    Case("gpt2", 512, 16, EVERY, True, placement="resident"),
    Case("bloom", 256, 16),
    Case("bloom", 256, 16, EVERY, True, batch=8),
    Case("gpt_neox", 512, 16),
    Case("gpt_neox", 512, 32, EVERY, dropout=0.0),
    Case("gpt_neox", 512, 16, "qv", True, placement="streamed"),
    Case("mixtral", 256, 16),
    Case("mixtral", 512, 16, recompute=True, placement="streamed"),
    Case("qwen3_moe", 256, 16),
    Case("qwen3_moe", 512, 16, recompute=True, steps=6),
    Case("gpt_oss", 256, 16),
    Case("gpt_oss", 512, 16, recompute=True),
)
# Longer runs of as many kinds for the seconds of a step, whose first is not counted.
TIMED = tuple(
    replace(case, steps=6, rows=64)
    for case in (
        Case("smollm2-135m", 256, 16), Case("smollm2-135m", 512, 16, EVERY, tokens=1024),
        Case("smollm2-135m", 512, 16, EVERY, True), Case("llama", 512, 16), Case("llama", 512, 64, EVERY, "selective"),
        Case("llama", 1024, 16, EVERY, True), Case("qwen3", 512, 16), Case("gemma3", 512, 16, EVERY),
        Case("phi3", 512, 16), Case("gpt2", 256, 64, EVERY, batch=8), Case("gpt_neox", 512, 32, EVERY),
        Case("bloom", 256, 16),
    )
)  # fmt: skip
SEVEN_B = (
    Case("llama-2-7b-nf4", 128, 16, "qv", True, "mapped", batch=2, dropout=0.0, steps=3),
    Case("llama-2-7b-nf4", 128, 16, "qv", True, "streamed", batch=2, dropout=0.0, steps=3),
    Case("llama-2-7b-nf4", 192, 64, EVERY, "selective", "mapped", batch=1, steps=3),
)
SEVEN_B_MODELS = frozenset(case.model for case in SEVEN_B)


@dataclass
class Seen:
    """The highest bytes of a process that was watched, and how it ended."""

    private: int = 0
    file: int = 0
    total: int = 0
    rc: int = 0
    output: str = ""
    seconds: float = 0.0


@dataclass
class Result:
    case: str
    planned: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    def error(self, name: str) -> float:
        """(planned - measured) / measured."""
        return (self.planned[name] - self.measured[name]) / self.measured[name]


def watch(arguments: list[str], env: dict[str, str]) -> Seen:
    """Run a process of Python to its end, and look at its memory all the while."""
    from halfbyte.system import usage

    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=subprocess.STDOUT, env=env)
        seen = Seen()
        while child.poll() is None:
            try:
                now = usage.now(child.pid)
            except Exception:  # of psutil's many, where the process ended between two looks
                break
            seen.private, seen.file = max(seen.private, now.private), max(seen.file, now.file)
            seen.total = max(seen.total, now.total)
            time.sleep(PERIOD_S)
        seen.rc = child.wait()
        out.seek(0)
        seen.output = out.read()
    seen.seconds = time.monotonic() - began
    return seen


def high_water_bytes() -> int:
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def write_rows(path: Path, count: int, length: int, seed: int) -> None:
    """Rows that reach `length` tokens: words of which each is at least one, cut where it is reached. The last is short
    and keeps its end: data in which no row ends is refused."""
    draw = random.Random(seed)
    lines = []
    for number in range(count):
        words = [f"w{draw.randrange(200)}" for _ in range(length if number < count - 1 else length // 8)]
        lines.append(
            json.dumps({"prompt": " ".join(words[: length // 16]), "completion": " ".join(words[length // 16 :])})
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def recipe_of(case: Case, model: str, folder: Path) -> dict[str, Any]:
    from benchmarks import make_random

    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", case.rows, case.length, 0)
    data: dict[str, Any] = {
        "train": str(folder / "train.jsonl"), "eval": "none", "max_length": case.length, "overlong": "truncate",
    }  # fmt: skip
    if case.evaluated:
        write_rows(folder / "eval.jsonl", 8, case.length, 1)
        data["eval"] = str(folder / "eval.jsonl")
    qv = list(make_random.QV.get(case.model, ("q_proj", "v_proj")))
    return {
        "model": model,
        "quant": {"type": case.quant, "placement": case.placement, "compute_dtype": case.dtype},
        "lora": {
            "r": case.rank, "lora_alpha": 16, "lora_dropout": case.dropout,
            "target_modules": qv if case.targets == "qv" else case.targets,
        },
        "data": data,
        "train": {
            "per_device_train_batch_size": case.batch, "gradient_accumulation_steps": 1, "max_steps": case.steps,
            "learning_rate": 1e-4, "save_strategy": "no",
            "gradient_checkpointing": case.recompute, "max_tokens_per_micro_batch": case.tokens or "auto",
            "optim": case.optim,
            "eval_strategy": "epoch" if case.evaluated else "no",
        },
        "output": str(folder / "run"),
    }  # fmt: skip


def child(kind: str, recipe: Path) -> None:
    """In a process of its own: `empty`, `build`, `calibrate` or `train`. The last line that it prints is JSON."""
    from halfbyte import finetune
    from halfbyte.base import quantize  # what a run imports
    from halfbyte.recipe.file import load_recipe

    said: dict[str, Any] = {}
    if kind == "build":
        built = quantize.quantize(load_recipe(recipe).recipe)
        said = {"disk": sum(f.stat().st_size for f in built.path.rglob("*") if f.is_file()), "built": built.built}
    elif kind == "calibrate":
        from halfbyte.plan import calibrate
        from halfbyte.system import device

        said = {d: calibrate.ensure(device.detect(), d).to_json() for d in ("bf16", "fp32")}
    elif kind == "train":
        outcome = finetune.train(load_recipe(recipe))
        said = {"plan": json.loads(outcome.run.joinpath("plan.json").read_text()), "report": outcome.report}
    print("\n" + json.dumps({**said, "high_water": high_water_bytes()}))


class Failed(Exception):
    """A run that did not end well, with the end of what it said."""


class Bench:
    """Models, rows and stores in one folder; a cache of its own, so that every store is built here once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = os.pathsep.join(filter(None, (*sys.path[:1], os.environ.get("PYTHONPATH"))))
        mine = {"HALFBYTE_CACHE": str(folder / "cache"), "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
        self.env = {**os.environ, **mine}
        self.models: dict[str, str] = {}
        self.builds: dict[tuple[str, str, str], Result] = {}
        self.empty = self.run("empty", Path())[0].private

    def run(self, kind: str, recipe: Path, **env: str) -> tuple[Seen, dict[str, Any]]:
        seen = watch([__file__, "--child", kind, str(recipe)], {**self.env, **env})
        if seen.rc != 0:
            raise Failed(f"{kind} {recipe}: exit code {seen.rc}\n{seen.output[-3000:]}")
        said = json.loads(seen.output.splitlines()[-1])
        return seen, said

    def model(self, name: str) -> str:
        if name == "smollm2-135m":
            return name
        if name not in self.models:
            from benchmarks import make_random

            folder = self.folder / "models" / name
            if not folder.exists():
                make_random.small(folder, name, WIDTHS[name])
            self.models[name] = str(folder)
        return self.models[name]

    def seven_b(self, folder: Path) -> None:
        """Llama-2-7B's shape in NF4, drawn layer by layer."""
        from benchmarks import make_random

        if not folder.exists():
            make_random.quantised_llama(folder, make_random.LLAMA_2_7B)
        self.models["llama-2-7b-nf4"] = str(folder.absolute())

    def measure(self, case: Case, number: int) -> Result:
        import yaml

        folder = self.folder / "runs" / f"{number:02}"
        shutil.rmtree(folder, ignore_errors=True)
        values = recipe_of(case, self.model(case.model), folder)
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        built = None if case.cold else self.build(case, path)
        fresh = {"NUMBA_CACHE_DIR": str(folder / "numba"), "HALFBYTE_CACHE": str(folder / "cache")}
        seen, said = self.run("train", path, **(fresh if case.cold else {}))
        plan = said["plan"]
        if built is not None:
            built.planned = {"building": plan["building_bytes"]}
            built.planned["disk"] = sum(line["bytes"] for line in plan["disk"] if line["name"] == "base store")
        found = Result(case.name, plan=plan, lines=said["report"]["lines"])
        found.planned = {"private": plan["private_bytes"] - self.empty, "total": plan["peak_bytes"]}
        found.measured = {"private": seen.private - self.empty, "total": max(said["high_water"], seen.total)}
        steps = [c for c in said["report"]["lines"] if c["name"] == "seconds a step"]
        if steps and case in TIMED:
            found.planned["step_s"], found.measured["step_s"] = steps[0]["planned"], steps[0]["measured"]
        shutil.rmtree(folder / "run")
        return found

    def build(self, case: Case, recipe: Path) -> Result | None:
        """The store of a quantised base, before its first run; what that took, if it was built now."""
        key = (case.model, case.quant, case.dtype)
        if case.quant == "none" or key in self.builds or case.model in SEVEN_B_MODELS:
            return None
        seen, said = self.run("build", recipe)
        if not said["built"]:
            return None
        measured = {"building": max(said["high_water"], seen.total), "disk": said["disk"]}
        self.builds[key] = Result(f"store of {' '.join(key)}", measured=measured)
        return self.builds[key]


def summary(results: list[Result], name: str, *, mean: float, worst: float, under: float | None = None) -> bool:
    """Print mean and worst error beside what is allowed; whether both hold."""
    errors = [(result.error(name), result.case) for result in results if name in result.planned]
    if not errors:
        return True
    average = sum(abs(error) for error, _ in errors) / len(errors)
    largest, where = max(errors, key=lambda pair: abs(pair[0]))
    lowest = min(error for error, _ in errors)
    fine = average <= mean and abs(largest) <= worst and (under is None or lowest >= -under)
    floor = "" if under is None else f" (not below -{under:.0%})"
    print(
        f"{name:<8} of {len(errors)}: mean {average:.1%} (at most {mean:.0%}), worst {largest:+.1%} (at most "
        f"{worst:.0%}; {where}), lowest {lowest:+.1%}{floor}: {'yes' if fine else 'NO'}"
    )
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="runs whose name has one of these")
    parser.add_argument("--folder", type=Path, help="for models, stores and runs; kept")
    parser.add_argument("--seven-b", type=Path, metavar="FOLDER", help="also the 7B shape, made there if it is not")
    parser.add_argument(
        "--time", action="store_true", help="calibrate, and compare seconds a step; needs a quiet machine"
    )
    parser.add_argument("--json", type=Path, help="write plans and figures here")
    args = parser.parse_args()
    if args.child:
        child(args.child[0], Path(args.child[1]))
        return 0
    with tempfile.TemporaryDirectory(prefix="halfbyte-plan-") as temporary:
        bench = Bench((args.folder or Path(temporary)).absolute())
        if args.time:
            bench.run("calibrate", Path())
        every = CASES
        if args.seven_b:
            bench.seven_b(args.seven_b)
            every += SEVEN_B
        cases = [case for case in (*every, *(TIMED if args.time else ())) if any(w in case.name for w in args.only)]
        print(f"the empty process: {bench.empty / 1e9:.3f} GB private\n")
        print(f"{'':<72} private above empty    total peak RSS\n{'':<72} plan   seen    error   plan   seen    error")
        results, failed = [], 0
        for number, case in enumerate(cases):
            try:
                result = bench.measure(case, number)
            except Failed as error:
                failed += 1
                print(f"{case.name}: {error}", flush=True)
                continue
            results.append(result)
            cells = [
                f"{result.planned[n] / 1e9:6.3f} {result.measured[n] / 1e9:6.3f} {result.error(n):+7.1%}"
                for n in ("private", "total")
            ]
            seconds = ""
            if "step_s" in result.planned:
                seconds = f"  {result.planned['step_s']:.2f} s, seen {result.measured['step_s']:.2f} s"
            print(f"{case.name:<70} {'  '.join(cells)}{seconds}", flush=True)
        builds = [built for built in bench.builds.values() if built.planned]
        for built in builds:
            print(
                f"{built.case:<40} peak {built.planned['building'] / 1e9:.3f} GB planned, "
                f"{built.measured['building'] / 1e9:.3f} seen {built.error('building'):+.1%}; on disk "
                f"{built.planned['disk'] / 1e6:.2f} MB planned, {built.measured['disk'] / 1e6:.2f} seen "
                f"{built.error('disk'):+.2%}"
            )
        if args.json:
            args.json.write_text(json.dumps([result.__dict__ for result in (*results, *builds)], indent=1))
    print()
    timed = [result for result in results if "step_s" in result.planned]
    fine = [
        summary(results, "private", mean=PRIVATE_MEAN, worst=PRIVATE_WORST),
        summary(results, "total", mean=TOTAL_MEAN, worst=TOTAL_WORST, under=TOTAL_UNDER),
        summary(timed, "step_s", mean=TIME_WORST, worst=TIME_WORST),
        summary(builds, "building", mean=BUILDING_WORST, worst=BUILDING_WORST),
        summary(builds, "disk", mean=DISK_WORST, worst=DISK_WORST),
    ]
    return 0 if all(fine) and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
