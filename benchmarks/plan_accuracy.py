"""Planned against measured: memory and seconds of whole runs of `halfbyte train`, each in its own process.

    python benchmarks/plan_accuracy.py --folder F               # 52 runs; none again that F/results.jsonl has
    python benchmarks/plan_accuracy.py --folder F --for 150     # begins none after so many seconds; again for the rest
    python benchmarks/plan_accuracy.py --folder F --memory-only # beside other work: seconds are not judged
    python benchmarks/plan_accuracy.py --folder F --only qwen3  # those whose name has one of the words
    python benchmarks/plan_accuracy.py --folder F --seven-b G   # also the 7B shape: 3.9 GB written to G

Memory is the kernel's own high-water mark of resident memory (VmHWM), against the upper figure that the run printed:
none may be above it, and on average it may be a tenth above the peak. Seconds are from the plan to the report, against
the plan's: 9 of 10 within 15%. They are judged of runs in which no process waited for a core (`/proc/pressure/cpu`) for
more than a third of the time (a run's own threads do, now and then), and before and after which a fixed piece of work
took as long as it did after the calibration, by 7%: other guests of a host do not show as load. What cannot be judged
is run again by a later call. Stores of bases are built before, but in cold runs,
which begin with empty folders of stores and of compiled kernels. Of a run that goes on the second process is judged.
Without the twelve of hybrids all take about 16 minutes on two idle cores: four steps each, tiny random models of other
architectures, verdicts of eight rows. A run that ends by itself with "worse than the base" (exit code 1) counts.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PERIOD_S = 0.005
FEWEST = 8  # rows of a verdict (`training/comparison.py`)
UPPER_MEAN, SECONDS_OFF, SECONDS_SHARE = 1.10, 0.15, 0.9
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
HYBRIDS = ("lfm2", "qwen3_5_text", "granitemoehybrid", "falcon_h1")  # of the sizes of `architectures.py`
EVERY = "all-linear"
SMOLLM2 = "smollm2-135m"


@dataclass(frozen=True)
class Case:
    """One run. `targets` qv: those that carry queries and values; `tokens` of a micro-batch, None as planned; `ragged`:
    rows from a tenth of `length` on; `held_out`: rows; `resumed`: it goes on to twice its steps, in a new process;
    `cold`: the first run on a machine, which builds the store and compiles the kernels."""

    model: str
    length: int
    rank: int = 16
    targets: str = "qv"
    recompute: bool | str = "auto"
    placement: str = "auto"
    quant: str = "nf4"
    compute: str = "exact"
    tokens: int | None = None
    batch: int = 4
    accumulation: int = 1
    dropout: float = 0.05
    dtype: str = "auto"
    optim: str = "adamw_torch"
    packing: str = "rows"
    ragged: bool = False
    held_out: int = 0
    steps: int = 4
    resumed: bool = False
    cold: bool = False

    @property
    def rows(self) -> int:
        """Those that it trains on, and a few for its verdict."""
        return self.steps * (1 + self.resumed) * self.batch * self.accumulation + FEWEST

    @property
    def name(self) -> str:
        usual = {f.name: f.default for f in self.__dataclass_fields__.values()}
        shown = ("targets", "recompute", "placement", "quant", "compute", "dtype", "optim", "packing")
        words = [str(getattr(self, name)) for name in shown if getattr(self, name) != usual[name]]
        words = [{"True": "full", "False": "none"}.get(word, word) for word in words]
        words += [word for word in ("ragged", "resumed", "cold") if getattr(self, word)]
        words += [f"{self.held_out} held out"] * bool(self.held_out) + [f"at most {self.tokens}"] * bool(self.tokens)
        rows = f"{self.batch}x{self.accumulation}" if self.accumulation > 1 else str(self.batch)
        return f"{self.model} {self.steps} x {rows} x {self.length} r{self.rank} {' '.join(words)}".rstrip()


CASES = (
    Case(SMOLLM2, 128, batch=2),
    Case(SMOLLM2, 256),
    Case(SMOLLM2, 200, batch=2, accumulation=2, ragged=True),
    Case(SMOLLM2, 512, 16, EVERY, tokens=1024, steps=3),
    Case(SMOLLM2, 256, 8, EVERY, "selective", compute="int8"),
    Case(SMOLLM2, 512, 64, EVERY, True, batch=2),
    Case(SMOLLM2, 256, placement="resident", ragged=True),
    Case(SMOLLM2, 256, placement="streamed", recompute=True),
    Case(SMOLLM2, 192, quant="none"),
    Case(SMOLLM2, 128, 16, EVERY, dtype="fp32", dropout=0.0),
    Case(SMOLLM2, 128, quant="fp4", ragged=True, packing="stream"),
    Case(SMOLLM2, 192, held_out=12),
    Case(SMOLLM2, 160, held_out=8, ragged=True, compute="int8"),
    Case(SMOLLM2, 160, 16, EVERY, resumed=True, steps=3),
    Case(SMOLLM2, 128, quant="int8"),
    Case(SMOLLM2, 96, cold=True),
    Case("llama", 512),
    Case("llama", 512, 64, EVERY, "selective"),
    Case("llama", 1024, 16, EVERY, True, batch=2),
    Case("llama", 256, 8, placement="streamed", batch=8),
    Case("llama", 256, 128, EVERY, optim="adamw_bnb_8bit"),
    Case("llama", 384, 16, EVERY, compute="int8", ragged=True, batch=8),
    Case("llama", 256, dtype="fp32", batch=2),
    Case("llama", 300, resumed=True, held_out=8, steps=3),
    Case("llama", 256, compute="int8", cold=True),
    Case("qwen3", 512),
    Case("qwen3", 512, 16, EVERY, "selective", ragged=True),
    Case("qwen3", 256, 32, EVERY, quant="none", placement="resident"),
    Case("qwen3", 384, placement="streamed", tokens=768, held_out=8),
    Case("gemma3", 512, 16, EVERY),
    Case("gemma3", 300, ragged=True, packing="stream"),
    Case("phi3", 512, compute="int8"),
    Case("phi3", 256, 16, EVERY, True, quant="fp4", ragged=True),
    Case("gpt2", 256, 64, EVERY, batch=8),
    Case("gpt2", 256, dtype="fp32", cold=True),
    Case("bloom", 256, held_out=8),
    Case("gpt_neox", 512, 32, EVERY, dropout=0.0),
    Case("mixtral", 256),
    Case("qwen3_moe", 256, recompute=True, ragged=True),
    Case("gpt_oss", 256, held_out=4),
    *(Case(name, 450, 16, EVERY, False, ragged=True, batch=batch) for name in HYBRIDS for batch in (3, 6, 11)),
)
SEVEN_B = (
    Case("llama-2-7b-nf4", 128, 16, "qv", True, "mapped", batch=2, dropout=0.0, steps=3),
    Case("llama-2-7b-nf4", 128, 16, "qv", True, "streamed", batch=2, dropout=0.0, steps=3),
    Case("llama-2-7b-nf4", 192, 64, EVERY, "selective", "mapped", batch=1, steps=3),
)


QUIET = 0.33  # of the time, in which some process waited for a core
STEADY = 0.07  # how far the machine's pace may be from that of its calibration
# Products and passes over memory, about a second on two cores; prints the seconds.
FIXED_WORK = """
import time, torch
a, b, long = torch.ones(1024, 1024), torch.ones(1024, 1024), torch.ones(1 << 25)
for times in (5, 60):
    began = time.perf_counter()
    for _ in range(times):
        a @ b
        long.mul_(1.0)
print(time.perf_counter() - began)
"""


class Failed(Exception):
    """A run that did not end well, with the end of what it said."""


@dataclass(frozen=True)
class Watched:
    """A process that has ended: its highest resident bytes (VmHWM), the last line that it had written by then, its
    seconds, and all that it wrote."""

    peak: int
    at: str
    seconds: float
    text: str


def watch(arguments: list[str], env: dict[str, str]) -> Watched:
    """Run a process of Python to its end. Raises Failed: it did not end well."""
    peak, written, began = 0, 0, time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        child = subprocess.Popen([sys.executable, *arguments], stdout=out, stderr=subprocess.STDOUT, env=env)
        while child.poll() is None:
            try:
                found = re.search(r"^VmHWM:\s*(\d+) kB", Path(f"/proc/{child.pid}/status").read_text(), re.MULTILINE)
            except OSError:  # it ended between two looks
                break
            if found and int(found[1]) * 1024 > peak:
                peak, written = int(found[1]) * 1024, os.fstat(out.fileno()).st_size
            time.sleep(PERIOD_S)
        code = child.wait()
        out.seek(0)
        text = out.read()
    if code and "\nverdict " not in text:
        raise Failed(f"exit code {code}\n{text[-3000:]}")
    return Watched(peak, text[:written].rstrip().rpartition("\n")[2], time.monotonic() - began, text)


def waited_s() -> float:
    """Seconds in which some process of this machine waited for a core, since it was started."""
    found = re.search(r"^some .*total=(\d+)", Path("/proc/pressure/cpu").read_text(), re.MULTILINE)
    return int(found[1]) / 1e6 if found else 0.0


def write_rows(path: Path, count: int, length: int, seed: int, *, ragged: bool) -> None:
    """Rows that reach `length` tokens: words of which each is at least one, cut where it is reached. The last is short
    and keeps its end: data in which no row ends is refused. `ragged`: from a tenth of the words on."""
    draw, lines = random.Random(seed), []
    for number in range(count):
        many = draw.randrange(length // 10, length + 1) if ragged else length
        words = [f"w{draw.randrange(200)}" for _ in range(many if number < count - 1 else length // 8)]
        cut = max(1, len(words) // 16)
        lines.append(json.dumps({"prompt": " ".join(words[:cut]), "completion": " ".join(words[cut:])}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def recipe_of(case: Case, model: str, folder: Path) -> dict[str, Any]:
    from benchmarks import make_random

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_rows(folder / "train.jsonl", case.rows, case.length, 0, ragged=case.ragged)
    data = {"train": str(folder / "train.jsonl"), "eval": "none", "max_length": case.length, "overlong": "truncate"}
    if case.packing == "stream":
        lines = (json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines())
        texts = [json.dumps({"text": f"{line['prompt']} {line['completion']}"}) for line in lines]
        (folder / "train.jsonl").write_text("\n".join(texts) + "\n")
        data |= {"packing": "stream", "overlong": "error", "mask": "all"}
    if case.held_out:
        write_rows(folder / "eval.jsonl", case.held_out, case.length, 1, ragged=case.ragged)
        data["eval"] = str(folder / "eval.jsonl")
    qv = list(make_random.QV.get(case.model, ("q_proj", "v_proj")))
    return {
        "model": model,
        "quant": {
            "type": case.quant, "placement": case.placement, "compute_dtype": case.dtype, "compute": case.compute,
        },
        "lora": {
            "r": case.rank, "lora_alpha": 2 * case.rank, "lora_dropout": case.dropout,
            "target_modules": qv if case.targets == "qv" else case.targets,
        },
        "data": data,
        "train": {
            "per_device_train_batch_size": case.batch, "gradient_accumulation_steps": case.accumulation,
            "max_steps": case.steps, "learning_rate": 1e-5,
            "gradient_checkpointing": case.recompute, "max_tokens_per_micro_batch": case.tokens or "auto",
            "optim": case.optim,
        },
        "output": str(folder / "run"),
    }  # fmt: skip


class Bench:
    """Models, rows, stores and results in one folder; a cache of its own, so that every store is built here once."""

    def __init__(self, folder: Path, *, memory_only: bool = False) -> None:
        self.folder, self.memory_only = folder, memory_only
        self.results = folder / ("memory.jsonl" if memory_only else "results.jsonl")
        path = os.pathsep.join(
            filter(None, (str(Path(__file__).resolve().parents[1] / "src"), os.environ.get("PYTHONPATH")))
        )
        mine = {
            "HALFBYTE_CACHE": str(folder / "cache"),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": path,
            "PYTHONUNBUFFERED": "1",
        }
        self.env = {**os.environ, **mine}
        self.models: dict[str, str] = {}
        self.fixed_work_s = 0.0  # after the calibration

    def calibrate(self) -> None:
        """Measure the machine, where its rates are not kept yet; with `memory_only` beside other load too."""
        code = "from halfbyte.plan import calibrate as c; from halfbyte.system import device\nd = device.detect()\n"
        if self.memory_only:
            code += "for t in ('bf16', 'fp32'): c.cached(d, t) or c._save(d, t, c.measure(d, t))"
        else:
            code += "for t in ('bf16', 'fp32') * 3: print(c.ensure(d, t, say=print).source)"
        print(watch(["-c", code], self.env).text.strip(), flush=True)
        kept = self.folder / "fixed_work.json"
        if self.memory_only:
            return
        if not kept.is_file():
            kept.write_text(json.dumps(sorted(self.fixed_work() for _ in range(5))[2]))
        self.fixed_work_s = json.loads(kept.read_text())

    def fixed_work(self) -> float:
        return float(watch(["-c", FIXED_WORK], self.env).text)

    def model(self, name: str) -> str:
        if name == SMOLLM2:
            return name
        if name not in self.models:
            from benchmarks import architectures, make_random

            folder = self.folder / "models" / name
            if not folder.exists() and name in HYBRIDS:
                architectures.small(folder, name)
            elif not folder.exists():
                make_random.small(folder, name, WIDTHS[name])
            self.models[name] = str(folder)
        return self.models[name]

    def seven_b(self, folder: Path) -> None:
        """Llama-2-7B's shape in NF4, drawn layer by layer."""
        from benchmarks import make_random

        if not folder.exists():
            make_random.quantised_llama(folder, make_random.LLAMA_2_7B)
        self.models["llama-2-7b-nf4"] = str(folder.absolute())

    def measure(self, case: Case, number: int) -> dict[str, Any]:
        """One run (of one that goes on the second process): what its plan said, and what was seen."""
        import yaml

        folder = self.folder / "runs" / f"{number:02}"
        path = folder / "recipe.yaml"
        values = recipe_of(case, self.model(case.model), folder)
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        env, train = self.env, ["-m", "halfbyte", "train", str(path)]
        if case.cold:
            shutil.copytree(self.folder / "cache" / "calibration", folder / "cache" / "calibration")
            env = {**env, "NUMBA_CACHE_DIR": str(folder / "numba"), "HALFBYTE_CACHE": str(folder / "cache")}
        elif case.quant != "none" and not case.model.endswith("nf4"):
            watch(["-m", "halfbyte", "quantize", str(path)], env)
        before, waited = self.fixed_work() if self.fixed_work_s else 0.0, waited_s()
        run = watch(train, env)
        if case.resumed:
            waited, more = waited_s(), f"train.max_steps={2 * case.steps}"
            run = watch([*train, "--resume", "--set", more], env)
        plan, report = (json.loads((folder / "run" / f"{name}.json").read_text()) for name in ("plan", "report"))
        shutil.rmtree(folder)
        return {
            "case": case.name, "upper": plan["peak_bytes"], "expected": plan["expected_bytes"], "peak": run.peak,
            "at": run.at,
            "planned_s": report["planned"]["seconds"], "seconds": report["measured"]["seconds"], "wall_s": run.seconds,
            "waited": (waited_s() - waited) / run.seconds,
            "pace": (before + self.fixed_work()) / 2 / self.fixed_work_s if self.fixed_work_s else 1.0,
            "downs": [n for n in report["notices"] if n.startswith("memory")], "plan": plan, "report": report,
            "text": run.text,
        }  # fmt: skip

    def finished(self) -> dict[str, dict[str, Any]]:
        lines = self.results.read_text().splitlines() if self.results.is_file() else []
        return {row["case"]: row for row in map(json.loads, lines)}


def line_of(row: dict[str, Any]) -> str:
    gb = "".join(f"{row[name] / 1e9:8.3f}" for name in ("expected", "upper", "peak"))
    seconds = f"{row['planned_s']:8.1f}{row['seconds']:8.1f}{row['planned_s'] / row['seconds'] - 1:+8.0%}"
    downs = "  stepped down" if row["downs"] else ""
    beside = "" if row["waited"] <= QUIET else f"  beside other load ({row['waited']:.0%})"
    beside += "" if abs(row["pace"] - 1) <= STEADY else f"  fixed work took {row['pace']:.2f} times as long"
    return f"{row['case']:<74}{gb}{row['upper'] / row['peak'] - 1:+8.1%}{seconds}{beside}{downs}"


def is_steady(row: dict[str, Any]) -> bool:
    return bool(row["waited"] <= QUIET and abs(row["pace"] - 1) <= STEADY)


def summary(rows: list[dict[str, Any]], failed: list[str], *, timed: bool) -> bool:
    """Print the figures beside what is asked, and each run that is not as asked; whether all hold.

    Args:
        failed: runs that did not end well. timed: seconds are judged too.
    """
    above = [f"{row['case']}: above the upper figure" for row in rows if row["peak"] > row["upper"]]
    ratios = [row["upper"] / row["peak"] - 1 for row in rows] or [0.0]
    mean, ends = sum(ratios) / len(ratios), f"{min(ratios):+.1%} to {max(ratios):+.1%}"
    quiet = [row for row in rows if is_steady(row)] if timed else []
    far = [row for row in quiet if abs(row["planned_s"] / row["seconds"] - 1) > SECONDS_OFF]
    near = 1 - len(far) / max(1, len(quiet))
    answers = ["yes" if fine else "NO" for fine in (not above, mean <= UPPER_MEAN - 1, near >= SECONDS_SHARE)]
    print(f"\n{len(rows)} runs; above the upper figure: {len(above)} (none): {answers[0]}")
    print(f"upper figure over peak: {mean:+.1%} on average (at most {UPPER_MEAN - 1:+.0%}), {ends}: {answers[1]}")
    if timed:
        share = f"{near:.0%} of {len(quiet)} runs on a steady machine (at least {SECONDS_SHARE:.0%})"
        print(f"seconds within {SECONDS_OFF:.0%} in {share}: {answers[2]}")
    late = [f"{row['case']}: {row['planned_s']:.1f} s planned, {row['seconds']:.1f} taken" for row in far]
    for line in (*(f"{name}: did not end well" for name in failed), *above, *late):
        print(f"- {line}")
    return "NO" not in answers and not failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="runs whose name has one of these")
    parser.add_argument("--folder", type=Path, required=True, help="for models, stores and results; kept")
    parser.add_argument("--seven-b", type=Path, metavar="FOLDER", help="also the 7B shape, made there if it is not")
    parser.add_argument("--for", type=float, default=1e9, dest="seconds", help="begin no run after so many seconds")
    parser.add_argument("--memory-only", action="store_true", help="beside other work too; results in memory.jsonl")
    args = parser.parse_args()
    bench, began = Bench(args.folder.absolute(), memory_only=args.memory_only), time.monotonic()
    bench.folder.mkdir(parents=True, exist_ok=True)
    bench.calibrate()
    if args.seven_b:
        bench.seven_b(args.seven_b)
    cases = [case for case in (*CASES, *(SEVEN_B if args.seven_b else ())) if any(w in case.name for w in args.only)]
    print(f"{'':<74}{'expected':>8}{'upper':>8}{'peak':>8}{'':>8}{'planned':>8}{'took':>8}")
    rows, failed, known = list[dict[str, Any]](), list[str](), bench.finished()
    for number, case in enumerate(cases):
        row = known.get(case.name)
        again = row is None or not (args.memory_only or is_steady(row))
        if again and time.monotonic() - began < args.seconds:
            try:
                row = bench.measure(case, number)
            except Failed as error:
                print(f"{case.name}: {error}", flush=True)
                failed.append(case.name)
                continue
            with bench.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if row is not None:
            rows.append(row)
            print(line_of(row), flush=True)
    return 0 if summary(rows, failed, timed=not args.memory_only) and len(rows) == len(cases) else 1


if __name__ == "__main__":
    sys.exit(main())
