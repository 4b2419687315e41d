"""Training speed and memory, side by side: the plain stack, the plain stack tuned, TRL's SFTTrainer, and halfbyte.

Each stack (`stacks.py`) lives in its own process, and they take turns, a round each, so that a busy moment of the
machine meets all of them. A ratio is taken round by round; the table shows medians and the spread. Beside it stands the
ceiling, measured in the same run: bf16 (or fp32) products of 4096 x 4096 matrices. The floor of a token is
4 x (linear weights + lm_head x labelled share) FLOP: forward and the gradient of the input, nothing computed twice.

    python benchmarks/throughput.py gsm8k --data GSM8K/train.jsonl            # q/v; also gsm8k-all
    python benchmarks/throughput.py llama7b --model FOLDER --rounds 5         # a folder made by `make_random.py`
    python benchmarks/throughput.py architectures                             # ten tiny models
    python benchmarks/throughput.py vocabulary                                # memory with a 128k head
    python benchmarks/throughput.py gsm8k --isa avx2 --dtype fp32
    python benchmarks/throughput.py gsm8k --before CHECKOUT --stacks before halfbyte    # another version of halfbyte
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.stacks import STACKS, Case

# Environments in which libraries and kernels use no more than a class of processors has.
_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+bmi,+bmi2,+lzcnt,+popcnt,+f16c,+sse4.2",
}  # fmt: skip
ISA = {
    "native": {},
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "avx512_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx2_vnni": {
        **_AVX2, "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "NUMBA_CPU_FEATURES": f"{_AVX2['NUMBA_CPU_FEATURES']},+avxvnni",
    },
    "avx2": _AVX2,
}  # fmt: skip


class Worker:
    """A stack in its process: started, asked for rounds, ended."""

    def __init__(self, stack: str, case: Case, environment: dict[str, str], before: Path | None) -> None:
        self.stack = stack
        root = Path(__file__).resolve().parents[1] if before is None else before.resolve()
        python = root / ".venv/bin/python"
        self.log = tempfile.NamedTemporaryFile("w+", suffix=f".{stack}.log", delete=False)  # noqa: SIM115
        self.process = subprocess.Popen(
            [
                str(python if before and python.exists() else sys.executable), str(root / "benchmarks/stacks.py"),
                "halfbyte" if before else stack, json.dumps(asdict(case)),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(
                [str(root / "src"), str(root), os.environ.get("PYTHONPATH", "")])},
        )  # fmt: skip
        self.state = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@@"):
                found: dict[str, Any] = json.loads(line[2:])
                return found
            self.log.write(line)
        sys.exit(f"{self.stack} ended: {Path(self.log.name).read_text()[-3000:]}")

    def round(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        Path(self.log.name).unlink(missing_ok=True)


def matmul_rate(sizes: tuple[int, int, int], dtype: str, environment: dict[str, str], seconds: float = 2.0) -> float:
    """FLOP/s of (M, K) @ (K, N) in a process of its own, the best of what fits in `seconds`."""
    code = f"""
import torch, time
m, k, n = {sizes}
a = torch.randn(m, k).to(torch.{dtype}); b = torch.randn(n, k).to(torch.{dtype})
best, end = 1e9, time.perf_counter() + {seconds}
while time.perf_counter() < end:
    t = time.perf_counter(); torch.nn.functional.linear(a, b); best = min(best, time.perf_counter() - t)
print(2 * m * k * n / best)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )
    return float(out.stdout)


def flop_per_token(case: Case) -> tuple[float, dict[str, float]]:
    """The floor of one token, and what it was counted from."""
    from halfbyte.models import tensors
    from halfbyte.recipe.file import recipe_from
    from halfbyte.training.prepare import prepare

    prepared = prepare(recipe_from(case.model, case.data, case.overrides("unused")).recipe)
    specs = tensors.read_checkpoint(prepared.checkpoint.path)
    # a pre-quantised checkpoint holds two weights a byte
    linear = sum(s.numel * (2 if s.dtype == "U8" else 1) for s in specs if s.role in ("linear", "expert"))
    head = max((s.numel for s in specs if s.role in ("head", "embedding")), default=0)
    share = sum(prepared.train.labelled) / sum(prepared.train.lengths)
    return 4.0 * (linear + head * share), {"linear": linear, "lm_head": head, "labelled_share": share}


def shapes_in_use(case: Case) -> list[tuple[int, int, int]]:
    """(rows, in, out) of the products of a micro-batch: each linear shape of the model once, largest first."""
    from halfbyte.models.structure import meta_model
    from halfbyte.recipe.file import recipe_from
    from halfbyte.training.prepare import prepare

    prepared = prepare(recipe_from(case.model, case.data, case.overrides("unused")).recipe)
    step = sum(prepared.train.lengths) * case.batch * case.accumulation // len(prepared.train.lengths)
    modules = meta_model(prepared.config).modules()
    found = {tuple(m.weight.shape) for m in modules if type(m).__name__ == "Linear" and m.weight.dim() == 2}
    return [(min(int(step), 4096), i, o) for o, i in sorted(found, key=lambda s: -s[0] * s[1])]


@contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Hold `lock` (flock), so that other work on the machine that respects it waits."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compare(
    case: Case,
    stacks: list[str],
    environment: dict[str, str],
    *,
    floor: bool = True,
    lock: Path | None = None,
    before: Path | None = None,
) -> dict[str, Any]:
    """Alternate the stacks for `case.rounds - 1` rounds after one that warms up."""
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[case.dtype]
    rounds: dict[str, list[dict[str, Any]]] = {stack: [] for stack in stacks}
    ceilings: list[float] = []
    workers: list[Worker] = []
    try:
        for stack in stacks:
            with alone(lock):
                workers.append(Worker(stack, case, environment, before if stack == "before" else None))
        for number in range(case.rounds):
            with alone(lock):
                for worker in workers:
                    row = worker.round()
                    if number:
                        rounds[worker.stack].append(row)
                    print(f"  round {number} {worker.stack:<10} {row['tokens'] / row['seconds']:9.1f} tokens/s "
                          f"loss {statistics.mean(row['losses']):.4f}", file=sys.stderr, flush=True)  # fmt: skip
                if number and floor:
                    ceilings.append(matmul_rate((4096, 4096, 4096), dtype, environment))
    finally:
        for worker in workers:
            worker.end()
    result: dict[str, Any] = {"case": asdict(case), "stacks": {}}
    per_token, counted = flop_per_token(case)
    if ceilings:
        result |= {"ceiling_flops": statistics.median(ceilings), "flop_per_token": per_token, "counted": counted}
        with alone(lock):
            rates = {shape: matmul_rate(shape, dtype, environment, 0.5) for shape in shapes_in_use(case)}
        result["shape_flops"] = {" x ".join(map(str, shape)): rate for shape, rate in rates.items()}
    for worker in workers:
        rows = rounds[worker.stack]
        rates = [r["tokens"] / r["seconds"] for r in rows]
        found = {
            "tokens_per_second": statistics.median(rates),
            "spread": [min(rates), max(rates)],
            "losses": [r["losses"] for r in rows],
            "peak_rss_bytes": max(r["peak_rss_bytes"] for r in rows),
            "peak_anonymous_bytes": max(r["peak_anonymous_bytes"] for r in rows),
            "start": worker.state,
        }
        if ceilings:
            shares = [rate * per_token / c for rate, c in zip(rates, ceilings, strict=True)]
            found["share_of_floor"] = statistics.median(shares)
        result["stacks"][worker.stack] = found
    if "halfbyte" in rounds or "dropin" in rounds:
        ours = "halfbyte" if "halfbyte" in rounds else "dropin"
        for stack in stacks:
            ratios = [b["seconds"] / a["seconds"] for a, b in zip(rounds[ours], rounds[stack], strict=True)]
            result["stacks"][stack]["times_faster"] = statistics.median(ratios)
            result["stacks"][stack]["times_faster_spread"] = [min(ratios), max(ratios)]
            means = [
                abs(statistics.mean(a["losses"]) / statistics.mean(b["losses"]) - 1)
                for a, b in zip(rounds[ours], rounds[stack], strict=True)
            ]
            result["stacks"][stack]["loss_difference"] = max(means)
    return result


def table(title: str, result: dict[str, Any]) -> str:
    lines = [title]
    if "ceiling_flops" in result:
        lines.append(f"ceiling {result['ceiling_flops'] / 1e9:.0f} GFLOP/s at 4096^2; floor "
                     f"{result['flop_per_token'] / 1e9:.3f} GFLOP a token")  # fmt: skip
        rates = (f"{shape}: {rate / 1e9:.0f}" for shape, rate in result["shape_flops"].items())
        lines.append("at the shapes in use (rows x in x out), GFLOP/s: " + ", ".join(rates))
    lines.append(f"{'stack':<10} {'tokens/s':>9} {'of floor':>9} {'ours is x faster':>24} {'peak RSS':>9} "
                 f"{'anonymous':>10} {'loss diff':>10}")  # fmt: skip
    for stack, row in result["stacks"].items():
        share = f"{row['share_of_floor']:.1%}" if "share_of_floor" in row else ""
        ratio = (
            ""
            if "times_faster" not in row
            else (
                f"{row['times_faster']:.2f} ({row['times_faster_spread'][0]:.2f}-{row['times_faster_spread'][1]:.2f})"
            )
        )
        lines.append(
            f"{stack:<10} {row['tokens_per_second']:9.1f} {share:>9} {ratio:>24} {row['peak_rss_bytes'] / 1e9:6.2f} GB "
            f"{row['peak_anonymous_bytes'] / 1e9:7.2f} GB {row.get('loss_difference', 0):10.1e}"
        )
    return "\n".join(lines)


def sample(data: Path, folder: Path, rows: int) -> str:
    """The first `rows` rows of a file, in a file of their own."""
    lines = data.read_text(encoding="utf-8").splitlines()[:rows]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def words(folder: Path, rows: int, length: int, seed: int = 0) -> str:
    """Rows of `length` tokens, one-token words for the models of `make_random.py`, all but the first labelled."""
    import random

    draw = random.Random(seed)
    path = folder / "words.jsonl"
    text = [" ".join(f"w{draw.randrange(200)}" for _ in range(length - 2)) for _ in range(rows)]
    path.write_text("".join(json.dumps({"prompt": "w0 ", "completion": t}) + "\n" for t in text), encoding="utf-8")
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=["gsm8k", "gsm8k-all", "llama7b", "architectures", "vocabulary", "shapes"])
    parser.add_argument("--data", type=Path, default=Path("examples/orders/train.jsonl"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--stacks", nargs="+", choices=[*STACKS, "before"], default=None)
    parser.add_argument(
        "--before", type=Path, help="a checkout of another version (by its own .venv, if any), the stack `before`"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--checkpointing", choices=["own", "on", "off"], default="own")
    parser.add_argument("--isa", choices=ISA, default="native")
    parser.add_argument("--only", nargs="+", help="architectures to run")
    parser.add_argument("--lock", type=Path, help="a file to hold (flock) while measuring")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.stacks and "before" in args.stacks and args.before is None:
        parser.error("the stack `before` needs --before CHECKOUT")
    environment = dict(ISA[args.isa])
    again = {"own": None, "on": True, "off": False}[args.checkpointing]
    rounds = args.rounds + 1
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as out:
        folder = Path(out)
        if args.case in ("gsm8k", "gsm8k-all"):
            stacks = args.stacks or ["plain", "tuned", "trl", "trl-tuned", "halfbyte"]
            case = Case(
                args.model, sample(args.data, folder, args.rows), rounds, args.rows // 16, dropout=args.dropout,
                dtype=args.dtype, checkpointing=again,
                targets=("q_proj", "v_proj") if args.case == "gsm8k" else "all-linear",
            )  # fmt: skip
            results[args.case] = compare(case, stacks, environment, lock=args.lock, before=args.before)
        elif args.case == "llama7b":
            case = Case(
                args.model, words(folder, 1, 512), rounds, 1, 1, 1, dropout=args.dropout, dtype=args.dtype,
                mask="all", checkpointing=again,
            )  # fmt: skip
            results["llama7b"] = compare(
                case, args.stacks or ["plain", "halfbyte"], environment, lock=args.lock, before=args.before
            )
        elif args.case == "shapes":
            rate = {f"{m}x{k}x{n}": matmul_rate((m, k, n), {"bf16": "bfloat16", "fp32": "float32"}[args.dtype],
                                                environment, 1.0)
                    for m, k, n in [(4096, 4096, 4096), (2000, 576, 576), (2000, 576, 192), (2000, 576, 1536),
                                    (2000, 1536, 576), (1000, 576, 49152), (512, 4096, 4096), (512, 4096, 11008),
                                    (512, 11008, 4096)]}  # fmt: skip
            print("\n".join(f"{k:<18} {v / 1e9:7.0f} GFLOP/s" for k, v in rate.items()))
            results["shapes"] = rate
        else:
            from benchmarks import make_random

            names = args.only or (make_random.ARCHITECTURES if args.case == "architectures" else ["llama-128k"])
            for name in names:
                model = make_random.small(folder / name, name)
                long = args.case == "vocabulary"
                case = Case(
                    str(model), words(folder, 16, 512) if long else make_random.rows(folder, 32), rounds,
                    1 if long else 2, 4, 4, targets=make_random.QV[name],
                    dropout=args.dropout, dtype=args.dtype, mask="all" if long else "completion",
                    checkpointing=True if long else again,
                )  # fmt: skip
                results[name] = compare(
                    case, args.stacks or ["plain", "halfbyte"], environment, floor=False, lock=args.lock
                )
                print(table(name, results[name]), flush=True)
    if args.case not in ("shapes", "architectures", "vocabulary"):
        print(table(args.case, results[args.case]))
    if args.json:
        args.json.write_text(json.dumps({"time": time.strftime("%F %T"), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
