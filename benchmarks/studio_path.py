"""A person's way through the studio, timed in headless Chromium; and what the page costs a training.

    python benchmarks/studio_path.py plan       # from the drop of 10,000 rows to the plan, and to the rows in colour
    python benchmarks/studio_path.py curves     # from a row of the metrics to the chart
    python benchmarks/studio_path.py cost       # steps with the page open beside steps with it closed, in turns
    python benchmarks/studio_path.py pictures ~/work/orders     # those of docs/images, in a folder that is made for it

plan: before each drop are three seconds, in which a person looks for the file. curves: a run that has a
step a second; then two, without anybody who asks, for the CPU seconds of server and browser.
cost: one training, twenty steps with the page and twenty without. CPU seconds of server and browser with it, less those
without, over the training's own in the same turns, with the bootstrap's 95% interval over turns; it holds beside others
too. And the ratio of the medians of a step's wall time, which does not. pictures: examples/orders on the base, with
real commands. Needs playwright and a browser.
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
TURN, FIRST, SETTLED_S = 20, 5, 3  # steps with the page, and without; steps before the first turn; a page that opens


@contextmanager
def studio(place: str = "") -> Iterator[tuple[Server, Any]]:
    with tempfile.TemporaryDirectory() as folder, browser(CHROMIUM) as opened:
        server = Server(Path(place or folder))
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


def cpu_seconds(server: int, training: int = 0) -> tuple[float, ...]:
    """Of the studio's server, of the browser's processes that still run, and of a training."""
    used = {"server": 0.0, "browser": 0.0, "training": 0.0}
    for process in psutil.Process().children(recursive=True):
        try:
            kind = {server: "server", training: "training"}.get(process.pid, "browser")
            if kind != "browser" or "chrom" in process.name() or "headless" in process.name():
                used[kind] += sum(process.cpu_times()[:2])
        except psutil.NoSuchProcess:
            continue
    return tuple(used.values())


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
    parts = zip(("server", "browser"), used, before, strict=False)
    shares = ", ".join(f"{name} {(a - b) / wall:.1%}" for name, a, b in parts)
    print(f"a step is seen after {statistics.mean(waits):.2f} s, at most {max(waits):.2f}; {shares} of a core at 2/s")


def cost(base: str, turns: int) -> None:
    with studio() as (server, page):
        steps = FIRST + 2 * turns * TURN
        rows(server.folder / "data" / "rows.csv", 4 * steps)
        sets = (f"train.max_steps={steps}", "train.per_device_train_batch_size=4", "data.eval=none",
                "data.fields={prompt: question, completion: answer}")  # fmt: skip
        words = [f"--model={base}", "--data=data/rows.csv", *(word for text in sets for word in ("--set", text))]
        command = [sys.executable, "-m", "halfbyte", "init", "recipes/a.yaml", *words]
        subprocess.run(command, cwd=server.folder, check=True, capture_output=True)
        job = page.evaluate("call('POST', 'jobs', {words: ['train', 'recipes/a.yaml', '--output', 'runs/a']})")
        training = psutil.Process(int((server.folder / ".studio" / "jobs" / job["id"] / "lock").read_text()))
        metrics = server.folder / "runs" / "a" / "metrics.jsonl"
        seconds: dict[bool, list[float]] = {True: [], False: []}
        turns_of: dict[bool, list[tuple[float, ...]]] = {True: [], False: []}  # CPU seconds of each, and wall seconds
        is_open, until, began = False, FIRST, (0.0,) * 4
        while training.is_running():
            done = [json.loads(line) for line in metrics.open()] if metrics.is_file() else []
            done = [row for row in done if "seconds" in row and "loss" in row]
            if len(done) < until:
                time.sleep(0.1)
                continue
            now = (*cpu_seconds(server.process.pid, training.pid), time.monotonic())
            if until > FIRST:  # the first step of a turn was partly in the one before
                seconds[is_open] += [row["seconds"] for row in done[until - TURN + 1 : until]]
                turns_of[is_open].append(tuple(a - b for a, b in zip(now, began, strict=True)))
            is_open, until = not is_open, until + TURN
            page.goto(f"{server.url}#run/a" if is_open else "about:blank")
            page.wait_for_timeout(1000 * SETTLED_S)
            began = (*cpu_seconds(server.process.pid, training.pid), time.monotonic())

    def share(some: list[tuple[float, ...]]) -> float:
        """CPU of server and browser beside the training's, less what they take without a page."""
        with_page, without = ([sum(c) for c in zip(*t, strict=True)] for t in (some, turns_of[False]))
        return sum(with_page[:2]) / with_page[2] - sum(without[:2]) / without[2]

    draw, of = random.Random(0), turns_of[True]
    shares = sorted(share(draw.choices(of, k=len(of))) for _ in range(2000))
    server_s, browser_s, training_s, wall = (sum(c) for c in zip(*of, strict=True))
    ratio = statistics.median(seconds[True]) / statistics.median(seconds[False])
    between = f"{share(of):.2%} [{shares[50]:.2%}, {shares[1949]:.2%}]"
    print(f"the page takes {between} of the training's CPU seconds over {len(of)} turns: server {server_s:.2f},",
          f"browser {browser_s:.2f}, training {training_s:.1f} s in {wall:.0f} s; a step of",
          f"{statistics.median(seconds[False]):.2f} s takes {ratio:.3f} of its wall time")  # fmt: skip


def pictures(base: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    with studio(str(folder)) as (_, page):

        def shot(name: str, width: int = 1200, scheme: str = "light") -> None:
            page.emulate_media(color_scheme=scheme)
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(500)
            page.screenshot(path=ROOT / "docs" / "images" / f"studio-{name}.png", full_page=True)
            page.set_viewport_size({"width": 1200, "height": 900})

        page.fill("#base", base)
        page.select_option("#kind", "json")
        page.set_input_files("#file", ROOT / "examples" / "orders" / "train.jsonl")
        page.wait_for_selector("#plan dd[data-of=memory]", timeout=MINUTE)
        page.wait_for_selector("#examples .piece.on", timeout=MINUTE)
        page.locator(":focus").evaluate("(element) => element.blur()")
        shot("light")
        shot("phone", width=390)
        page.click("#start")
        page.wait_for_selector("#run-name .finished", timeout=20 * MINUTE)
        page.wait_for_selector("#job:not(:has(.note:has-text('running')))", timeout=MINUTE)
        shot("dark", scheme="dark")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "curves", "cost", "pictures"))
    parser.add_argument("folder", nargs="?", type=Path, help="of pictures: what the page says that it is in")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--times", type=int, default=3, help="drops; tens of steps; turns with the page")
    given = parser.parse_args()
    if given.what == "pictures":
        return pictures(given.base, given.folder) if given.folder else parser.error("pictures need a folder")
    return {"plan": plan, "curves": curves, "cost": cost}[given.what](given.base, given.times)


if __name__ == "__main__":
    main()
