"""Jobs beside others that use the cores: the speed that is left, beside what their share of the cores is worth.

    python benchmarks/under_load.py --data GSM8K/train.jsonl [--jobs train decode merge serve] [--states loops-1 quota]
    python benchmarks/under_load.py --data ROWS --before CHECKOUT            # another version, in turns
    python benchmarks/under_load.py --data ROWS --also GOMP_SPINCOUNT=1000   # this version in another environment

States: `idle`; `loops-N`, beside N processes of `while 1: pass`; `quota`, in a control group that may use three
quarters of the cores (root only). Each job is a process that does a round when told to, after one that is not counted,
in which its threads see what runs beside them; versions take turns in each round, and a ratio is that of two rounds
that follow each other. A fair share: a job of C threads and N loops on C cores get C / (C + N) of them; a quota gives
what it says. A round: of `train`, a step of 8 rows; of `decode`, an answer; of `serve`, four streams over HTTP; of
`merge`, the command without its start.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

JOBS = ("train", "decode", "merge", "serve")
STATES = ("idle", "loops-1", "loops-2", "quota")
MODEL, LEAST_OF_SHARE, QUOTA, PERIOD_US = "smollm2-135m", 0.85, 0.75, 100_000
CALM_S = 2.0  # after other programs, until threads wait for each other as on an idle machine
ROOT = Path(__file__).resolve().parents[1]


class Job:
    """A job of one version in its process: started, asked for rounds, ended."""

    def __init__(self, name: str, checkout: Path, environment: dict[str, str], args: argparse.Namespace) -> None:
        python = checkout / ".venv/bin/python"
        path = os.pathsep.join([str(checkout / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.log = tempfile.NamedTemporaryFile("w+", suffix=f".{name}.log")  # noqa: SIM115
        self.process = subprocess.Popen(
            [
                str(python if python.exists() else sys.executable), __file__, "--worker", name,
                "--data", str(args.data), "--run", str(args.run), "--tokens", str(args.tokens),
            ],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment, "PYTHONPATH": path},
        )  # fmt: skip
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@@"):
                facts: dict[str, Any] = json.loads(line[2:])
                return facts
        sys.exit(f"{self.process.args}: {Path(self.log.name).read_text()[-3000:]}")

    def round(self) -> float:
        """Tokens (or merges) a second."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        facts = self._answer()
        return float(facts["tokens"] / facts["seconds"])

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()  # a worker leaves at the end of its orders, its server first
        self.process.wait()
        self.log.close()


@contextmanager
def loops(number: int) -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(number)]
    try:
        time.sleep(0.3 if number else 0.0)
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()
        time.sleep(CALM_S if number else 0.0)


@contextmanager
def quota(cores: float) -> Iterator[None]:
    """What is started meanwhile may use so many cores; this process is put back afterwards."""
    old = Path("/sys/fs/cgroup/cpu")
    group = (old if old.exists() else Path("/sys/fs/cgroup")) / "halfbyte-under-load"
    group.mkdir(exist_ok=True)
    if old.exists():
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(int(cores * PERIOD_US)))
    else:
        (group / "cpu.max").write_text(f"{int(cores * PERIOD_US)} {PERIOD_US}")
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))


def share(state: str) -> float:
    """What a fair share of the cores is worth, beside all of them."""
    if state == "quota":
        return QUOTA
    threads, number = os.cpu_count() or 1, int(state.partition("-")[2] or 0)
    return threads / (threads + number)


def measure(job: str, versions: dict[str, tuple[Path, dict[str, str]]], args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each version in each state."""
    rates: dict[str, dict[str, list[float]]] = {state: {name: [] for name in versions} for state in args.states}
    free = {name: Job(job, *of, args) for name, of in versions.items()} if set(args.states) - {"quota"} else {}
    limited: dict[str, Job] = {}
    if "quota" in args.states:
        with quota(QUOTA * (os.cpu_count() or 1)):
            limited = {name: Job(job, *of, args) for name, of in versions.items()}
    for process in (*free.values(), *limited.values()):
        process.round()  # what is compiled and proven the first time
    for number in range(args.rounds):
        for state in args.states:
            processes = limited if state == "quota" else free
            with loops(int(state.partition("-")[2] or 0)):
                for name in list(versions)[:: 1 if number % 2 else -1]:
                    processes[name].round()  # until its threads have seen what runs beside them
                    rates[state][name].append(processes[name].round())
                    print(f"  {number} {state} {name} {rates[state][name][-1]:.1f}", file=sys.stderr, flush=True)
    for process in (*free.values(), *limited.values()):
        process.end()
    for state in args.states:
        for name, seen in rates[state].items():
            show(job, state, name, seen, rates)
    return rates


def show(job: str, state: str, name: str, seen: list[float], rates: dict[str, dict[str, list[float]]]) -> None:
    text = f"{job:7}{state:9}{name:28}{statistics.median(seen):9.2f} a second ({min(seen):.2f} to {max(seen):.2f})"
    if state != "idle" and "idle" in rates:
        of_idle = statistics.median(seen) / statistics.median(rates["idle"][name])
        of_share = of_idle / share(state)
        text += (
            f"  {of_idle:.2f} of idle, {of_share:.2f} of its share{'' if of_share >= LEAST_OF_SHARE else ', TOO LOW'}"
        )
    first = next(iter(rates[state]))
    if name != first:
        pairs = [a / b for a, b in zip(seen, rates[state][first], strict=True)]
        text += f"  {statistics.median(pairs):.3f} of {first} ({min(pairs):.3f} to {max(pairs):.3f})"
    print(text, flush=True)


def say(**facts: object) -> None:
    print("@@" + json.dumps(facts), flush=True)


def in_rounds(one: Callable[[], float]) -> None:
    """Say how many tokens a call of `one` gave, and how long it took, whenever told to."""
    output = sys.stdout
    say(ready=True)
    while sys.stdin.readline():
        began = time.perf_counter()
        with redirect_stdout(sys.stderr):
            tokens = one()
        print("@@" + json.dumps({"tokens": tokens, "seconds": time.perf_counter() - began}), file=output, flush=True)


def train(args: argparse.Namespace) -> None:
    from benchmarks.stacks import Case, run_halfbyte

    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as rows:
        rows.writelines(Path(args.data).read_text(encoding="utf-8").splitlines(keepends=True)[:8])
        rows.flush()
        run_halfbyte(Case(MODEL, rows.name, rounds=800, steps=1, batch=4, accumulation=2), "exact")


def decode(args: argparse.Namespace) -> None:
    import torch

    from benchmarks.decoding import generated
    from halfbyte.inference import load

    run = load.open_run(Path(args.run))
    run.model.generation_config.eos_token_id = None
    ids = torch.arange(40)[None] % 30 + 100
    with torch.no_grad():
        in_rounds(lambda: len(generated(run.model, ids, args.tokens, "halfbyte")))


def merge(args: argparse.Namespace) -> None:
    from halfbyte.export import export
    from halfbyte.export.job import ExportJob

    def one() -> float:
        with tempfile.TemporaryDirectory() as out:
            export.merge(ExportJob(Path(args.run), Path(out) / "merged", prompts=4), "16bit")
        return 1.0

    in_rounds(one)


def serve(args: argparse.Namespace) -> None:
    import asyncio

    from benchmarks.serving import client_of, filled, names, served

    async def streams(url: str) -> float:
        client = client_of(url)
        model = (await names(client))[-1]
        answers = await asyncio.gather(*(filled(client, model, n, args.tokens, lean=True) for n in range(4)))
        await client.close()
        return float(sum(tokens for tokens, _ in answers))

    with served([args.run], "--context", "1024") as (url, _):
        in_rounds(lambda: asyncio.run(streams(url)))


def new_run(folder: Path, data: Path) -> Path:
    """A run of one step, for the jobs that need an adapter."""
    run, rows = folder / "run", folder / "rows.jsonl"
    rows.write_text("".join(data.read_text(encoding="utf-8").splitlines(keepends=True)[:40]), encoding="utf-8")
    values = ["data.fields={prompt: question, completion: answer}", "data.eval=8", "train.max_steps=1"]
    values += ["train.save_strategy=no"]
    command = [sys.executable, "-m", "halfbyte", "train", MODEL, str(rows), "-o", str(run), "--quiet"]
    subprocess.run([*command, *(part for value in values for part in ("--set", value))], check=True)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="rows of a question and an answer")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    parser.add_argument("--states", nargs="+", choices=STATES, default=STATES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--run", type=Path, help="a run of its own; else one of a single step is trained")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME=VALUE[,NAME=VALUE]")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--worker", choices=JOBS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        import halfbyte  # noqa: F401  (what it sets before torch is loaded)

        {"train": train, "decode": decode, "merge": merge, "serve": serve}[args.worker](args)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no loop stays behind
    versions: dict[str, tuple[Path, dict[str, str]]] = {}
    if args.before:
        versions["before"] = (args.before.resolve(), {})
    versions["now"] = (ROOT, {})
    for given in args.also:
        versions[given] = (ROOT, dict(pair.split("=", 1) for pair in given.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        if args.run is None and set(args.jobs) != {"train"}:
            args.run = new_run(Path(folder), args.data)
        rates = {job: measure(job, versions, args) for job in args.jobs}
    if args.json:
        args.json.write_text(json.dumps(rates, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
