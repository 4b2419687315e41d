"""A person's way through the studio, timed in headless Chromium; and what the page costs a training.

    python benchmarks/studio_path.py plan       # from the drop of 10,000 rows to the plan, and to the rows in colour
    python benchmarks/studio_path.py curves     # from a row of the metrics to the chart
    python benchmarks/studio_path.py cost       # steps with the page open beside steps with it closed, in turns

plan: before each drop are three seconds, in which a person looks for the file. curves: a run that has a
step a second; then two, without anybody who asks, for the CPU seconds of server and browser.
cost: one training, ten steps with the page and ten without, so that the machine's own changes are in both; the ratio of
the medians, with its bootstrap's 95% interval, and the CPU seconds of server and browser. Needs playwright and a
browser; nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.report import made  # noqa: E402
from tests.studio.driven import MINUTE, Server, browser, page_of, rows  # noqa: E402

CHROMIUM = next((p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), "")
TURN, FIRST = 10, 5  # steps with the page, and without; steps before the first turn


@contextmanager
def studio() -> Iterator[tuple[Server, Any]]:
    with tempfile.TemporaryDirectory() as folder, browser(CHROMIUM) as opened:
        server = Server(Path(folder))
        try:
            page = page_of(opened, server)
            page.wait_for_selector("#state.ready")
            yield server, page
        finally:
            server.end()


def plan(base: str, times: int) -> None:
    with studio() as (server, page):
        page.fill("#base", base)
        for number in range(times):
            file = rows(server.folder / f"many{number}.csv", 10_000)
            page.goto("about:blank")
            page.goto(f"{server.url}#key={server.key}")
            page.wait_for_selector("#state.ready")
            page.wait_for_timeout(3_000)
            began = time.monotonic()
            page.set_input_files("#file", file)
            page.wait_for_selector("#plan dd[data-of=memory]", timeout=2 * MINUTE)
            shown = time.monotonic() - began
            page.wait_for_selector("#examples .piece.on", timeout=2 * MINUTE)
            print(
                f"plan {shown:.2f} s after the drop of 10,000 rows, rows {time.monotonic() - began:.2f} s", flush=True
            )


def cpu_seconds(server: int) -> tuple[float, float]:
    """Of the studio's server, and of the browser's processes, that still run."""
    used = [0.0, 0.0]
    for process in psutil.Process().children(recursive=True):
        try:
            if process.pid == server or "chrom" in process.name():
                used[process.pid != server] += sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return used[0], used[1]


def curves(_: str, times: int) -> None:
    with studio() as (server, page):
        run = made.run(server.folder / "runs" / "steps", made.metrics(50), steps=5000)
        page.goto(f"{server.url}#run/steps")
        page.wait_for_selector("#charts svg", timeout=MINUTE)
        waits, last = list[float](), 51 + 10 * times
        for step in range(51, last):
            wrote = time.monotonic()
            run.append_metrics({**made.metrics(1)[0], "step": step, "loss": step / 1000})
            page.wait_for_selector(f"#charts svg[aria-label^='Loss: each step {step / 1000:g}']", timeout=MINUTE)
            waits.append(time.monotonic() - wrote)
            time.sleep(max(0.0, 1.0 - waits[-1]))
        before, began = cpu_seconds(server.process.pid), time.monotonic()  # nobody asks the page now
        for step in range(last, last + 20 * times):
            run.append_metrics({**made.metrics(1)[0], "step": step, "loss": step / 1000})
            time.sleep(0.5)
        used, wall = cpu_seconds(server.process.pid), time.monotonic() - began
    parts = zip(("server", "browser"), used, before, strict=True)
    shares = ", ".join(f"{name} {(a - b) / wall:.1%}" for name, a, b in parts)
    print(f"a step is seen after {statistics.mean(waits):.2f} s, at most {max(waits):.2f}; {shares} of a core at 2/s")


def cost(base: str, turns: int) -> None:
    with studio() as (server, page):
        steps = FIRST + 2 * turns * TURN
        rows(server.folder / "data" / "rows.csv", 4 * steps)
        command = [sys.executable, "-m", "halfbyte", "train", base, "data/rows.csv", "-q", "--output", "runs/a"]
        sets = (f"train.max_steps={steps}", "train.per_device_train_batch_size=4", "data.eval=none",
                "data.fields={prompt: question, completion: answer}")  # fmt: skip
        words = [word for text in sets for word in ("--set", text)]
        training = subprocess.Popen([*command, *words], cwd=server.folder)
        metrics = server.folder / "runs" / "a" / "metrics.jsonl"
        seconds: dict[bool, list[float]] = {True: [], False: []}
        used, wall, is_open, until = [0.0, 0.0], 0.0, False, FIRST
        began: tuple[tuple[float, float], float] = ((0.0, 0.0), 0.0)
        while training.poll() is None:
            done = [json.loads(line) for line in metrics.open()] if metrics.is_file() else []
            done = [row for row in done if "seconds" in row and "loss" in row]
            if len(done) < until:
                time.sleep(0.02)
                continue
            now = cpu_seconds(server.process.pid), time.monotonic()
            if until > FIRST:  # the first step of a turn was partly in the one before
                seconds[is_open] += [row["seconds"] for row in done[until - TURN + 1 : until]]
                if is_open:
                    used = [a + b - c for a, b, c in zip(used, now[0], began[0], strict=True)]
                    wall += now[1] - began[1]
            is_open, until = not is_open, until + TURN
            page.goto(f"{server.url}#run/a" if is_open else "about:blank")
            began = cpu_seconds(server.process.pid), time.monotonic()
    ratio = statistics.median(seconds[True]) / statistics.median(seconds[False])
    draw = random.Random(0)
    ratios = sorted(
        statistics.median(draw.choices(seconds[True], k=len(seconds[True])))
        / statistics.median(draw.choices(seconds[False], k=len(seconds[False])))
        for _ in range(2000)
    )
    print(f"a step with the page takes {ratio:.4f} [{ratios[50]:.4f}, {ratios[1949]:.4f}] of one without "
          f"({len(seconds[True])} and {len(seconds[False])} steps of {statistics.median(seconds[False]):.2f} s); "
          f"server {used[0] / wall:.1%} of a core, browser {used[1] / wall:.1%}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "curves", "cost"))
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--times", type=int, default=3, help="drops; tens of steps; turns with the page")
    given = parser.parse_args()
    {"plan": plan, "curves": curves, "cost": cost}[given.what](given.base, given.times)


if __name__ == "__main__":
    main()
