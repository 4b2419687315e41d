"""`--within` beside a full grid: does it end on time, with a loss near that of the best of ten fixed arms, also killed?

For each model and data set: one run in the given time; the same killed twice at random moments and resumed; and, of the
length that the first one came to, every rate of `RATES` (times the one that it chose) on each of two sets of layers,
without probes. Each is a fresh process; `halfbyte eval` scores all of them on the same held-out rows, untimed.

    python benchmarks/within.py --within 20m --out FOLDER --models smollm2-135m MODEL --rows A.jsonl:A-held.jsonl ...

A line of `FOLDER/results.jsonl` is one run; what is there is not repeated, so the grid can be made in pieces. Passes:
the end within 5% of the time, probes in at most 15% of it, the loss at most 0.5% above the best arm's, killed the same.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from halfbyte.system.words import seconds_of

RATES = (0.25, 0.5, 1.0, 2.0, 4.0)
TARGETS = {"all": "all-linear", "q/v": "[q_proj, v_proj]"}


@dataclass(frozen=True)
class Case:
    """A model on a data set, in a time."""

    model: str
    rows: str
    held_out: str
    within: str
    folder: Path
    options: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{Path(self.model).name}, {Path(self.rows).stem}"

    def command(self, run: Path, *more: str) -> list[str]:
        values = (f"data.eval={self.held_out}", f"output={run}", *self.options)
        chosen = [part for value in values for part in ("--set", value)]
        return [sys.executable, "-m", "halfbyte", "train", self.model, self.rows, *chosen, "--quiet", *more]


def call(command: list[str], kill_after: float | None = None) -> tuple[float, bool]:
    """Seconds of a command, and whether it ended by itself."""
    began = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        child.wait(kill_after)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.wait()
        return time.monotonic() - began, False
    if child.returncode != 0:
        raise SystemExit(f"exit code {child.returncode}: {' '.join(command)}")
    return time.monotonic() - began, True


def score(case: Case, run: Path) -> float:
    """The adapter's loss on all held-out rows."""
    command = [sys.executable, "-m", "halfbyte", "eval", str(run), "--data", case.held_out, "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    (loss,) = (metric for metric in json.loads(done.stdout)["metrics"] if metric["name"] == "loss")
    return float(loss["adapter"]["value"])


def in_time(case: Case, run: Path, kills: Sequence[float]) -> dict[str, Any]:
    """A run in the given time, killed after so many seconds each."""
    total = 0.0
    for number, after in enumerate([*kills, None]):
        again = [sys.executable, "-m", "halfbyte", "train", str(run), "--resume", "--quiet"]
        command = again if number > 0 and run.exists() else case.command(run, "--within", case.within)
        seconds, ended = call(command, after)
        total += seconds
        if ended:
            break
    row = json.loads((run / "report.json").read_text())
    within, probes = row["within"], sum(probe["seconds"] for probe in row["within"]["probes"])
    words = {"words": within["verdicts"], "more": within["more"]}
    return {"seconds": total, "probes": probes, "steps": row["steps"], "winner": within["winner"], **words}


def fixed(case: Case, run: Path, rate: float, targets: str, steps: int) -> dict[str, Any]:
    """An arm of the grid."""
    values = (f"train.learning_rate={rate}", f"train.max_steps={steps}", f"lora.target_modules={TARGETS[targets]}")
    seconds, _ = call(case.command(run, *(part for value in values for part in ("--set", value))))
    return {"seconds": seconds, "rate": rate}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| case | ended | probes | loss | best of the grid | above it | killed twice |", f"|{'---|' * 7}"]
    for name in dict.fromkeys(row["case"] for row in rows):
        of = {row["arm"]: row for row in rows if row["case"] == name}
        if "first" not in of:
            continue
        first, within_s = of["first"], seconds_of(of["first"]["within"]) or 1.0
        grid = [row["loss"] for arm, row in of.items() if arm not in ("first", "killed")]
        best = min(grid, default=float("nan"))
        ended, probes = first["seconds"] / within_s - 1, first["probes"] / within_s
        lines.append(
            f"| {name} | {ended:+.1%} | {probes:.1%} | {first['loss']:.4f} | {best:.4f} of {len(grid)} | "
            f"{first['loss'] / best - 1:+.2%} | {of.get('killed', {}).get('loss', '')} |"
        )
    return "\n".join(lines)


def run_case(case: Case, rows: list[dict[str, Any]], results: Path, asked: str) -> None:
    """Every arm that is not there yet and has `asked` in its name."""
    draw, limit = random.Random(case.name), seconds_of(case.within) or 1.0
    kills = sorted(draw.uniform(0.05, 0.5) * limit for _ in range(2))
    done = {row["arm"]: row for row in rows if row["case"] == case.name}
    grid = [(targets, times) for targets in TARGETS for times in RATES]
    for arm, part in [("first", None), ("killed", None), *((f"{n}, x {t:g}", (n, t)) for n, t in grid)]:
        if arm in done or asked not in arm:
            continue
        run = case.folder / arm.replace(", x ", "-").replace("/", "")
        if part is None:
            row = in_time(case, run, kills if arm == "killed" else [])
        else:
            first = done["first"]
            row = fixed(case, run, part[1] * first["winner"]["train.learning_rate"], part[0], first["steps"])
        done[arm] = {"case": case.name, "arm": arm, "within": case.within, "loss": score(case, run), **row}
        rows.append(done[arm])
        with results.open("a") as stream:
            stream.write(json.dumps(done[arm]) + "\n")
        print(json.dumps(done[arm]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--within", default="20m")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"])
    parser.add_argument("--rows", nargs="+", required=True, metavar="TRAIN:HELD", help="files of rows")
    parser.add_argument("--set", nargs="*", default=[], dest="options")
    parser.add_argument("--arms", default="", help="only arms whose name has this")
    given = parser.parse_args()
    results = given.out / "results.jsonl"
    given.out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    for model in given.models:
        for pair in given.rows:
            train, _, held_out = pair.partition(":")
            folder = given.out / f"{Path(model).name}-{Path(train).stem}"
            run_case(
                Case(model, train, held_out, given.within, folder, tuple(given.options)), rows, results, given.arms
            )
    print(table(rows))


if __name__ == "__main__":
    main()
