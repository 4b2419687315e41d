"""The studio in headless Chromium: from a dropped file to an adapter, a compared answer and an exported file, without a
terminal; a reload and a killed server meanwhile; what axe-core finds. Needs playwright (PyPI) and a browser; axe-core
comes from npm. STUDIO_SHOTS=DIR keeps pictures: light, dark, 390 wide."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import tiny_run
from tests.report import made
from tests.serving.http.test_page import CHROMIUM

playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")]
MINUTE = 60_000
SHOTS = os.environ.get("STUDIO_SHOTS")
MOVE = """(input, value) => {
  input.value = value;
  for (const name of ["input", "change"]) input.dispatchEvent(new Event(name, { bubbles: true }));
}"""


class Server:
    """`halfbyte studio` in a folder, at one port; killed and started anew."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}/"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "halfbyte", "studio", str(self.folder), "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.key = self.process.stdout.readline().rstrip().partition("#key=")[2]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("studio")
    tiny_run.checkpoint(folder / "tiny")
    server = Server(folder)
    yield server
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(20)
    for lock in (folder / ".studio" / "jobs").glob("*/lock"):  # what a test that failed has left
        if (lock.parent / "code").exists():
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(lock.read_text()), signal.SIGKILL)


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """axe-core's script; empty where npm has none."""
    folder = tmp_path_factory.mktemp("axe")
    if shutil.which("npm") is None:
        return ""
    packed = subprocess.run(["npm", "pack", "axe-core@4"], cwd=folder, capture_output=True, check=False)
    if packed.returncode:
        return ""
    shutil.unpack_archive(next(folder.glob("*.tgz")), folder)
    return (folder / "package" / "axe.min.js").read_text()


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.problems = []

        def asked(request: Any) -> None:
            page.problems += [] if request.url.startswith(server.url) else [request.url]

        page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("request", asked)
        page.goto(f"{server.url}#key={server.key}")
        yield page
        browser.close()


def look(page: Any, axe: str, name: str) -> None:
    """Pictures, and that axe-core finds nothing serious in any of them; nothing is wider than the window."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (1200, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(150)
            if SHOTS:
                page.screenshot(path=f"{SHOTS}/{name}-{scheme}-{width}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (name, width)
            if axe:
                page.evaluate(axe)
                found = page.evaluate("axe.run().then((r) => r.violations)")
                serious = [v for v in found if v["impact"] in ("serious", "critical")]
                nodes = [(v["id"], v["nodes"][0]["html"], v["nodes"][0].get("failureSummary")) for v in serious]
                assert not serious, (name, scheme, width, nodes)
    page.emulate_media(color_scheme="light")
    page.set_viewport_size({"width": 1200, "height": 900})


def rows(path: Path, count: int) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer"])
        writer.writerows((f"red cup {n} old box", f"box {n % 7}") for n in range(count))
    return path


def test_from_a_dropped_file_to_an_answer_and_an_export(server: Server, page: Any, axe: str, tmp_path: Path) -> None:
    page.fill("#base", "tiny")
    page.set_input_files("#file", rows(tmp_path / "asked.csv", 240))
    page.wait_for_selector("#plan dd[data-of=memory]", timeout=MINUTE)
    page.wait_for_selector("#examples .piece.on", timeout=MINUTE)
    assert page.url.endswith("#new/asked.yaml")
    assert "box" in "".join(page.locator("#examples .piece.on").all_text_contents())
    look(page, axe, "new")

    before = page.inner_text("#plan dd[data-of=memory]"), page.inner_text("#plan dd[data-of=steps]")
    for field, value in (("lora.r", 3), ("train.per_device_train_batch_size", 1)):
        page.locator(f"input[name='{field}']").evaluate(MOVE, value)
        page.wait_for_selector("#pending", state="visible")
        page.wait_for_selector("#pending", state="hidden", timeout=MINUTE)
    assert page.inner_text("#plan dd[data-of=steps]") != before[1]
    text = (server.folder / "recipes" / "asked.yaml").read_text()
    assert re.search(r"^  r: 8$", text, re.M) and re.search(r"^  lora_alpha: 16$", text, re.M)
    page.reload()
    page.wait_for_selector("#examples .piece.on", timeout=MINUTE)
    assert page.inner_text("#out-lora\\.r") == "8"

    page.click("#start")
    page.wait_for_selector("#charts svg", timeout=4 * MINUTE)
    server.kill()  # while it trains
    page.wait_for_selector("#state.bad")
    server.start()
    page.wait_for_selector("#state.ready", timeout=MINUTE)
    page.wait_for_selector("#run-name .finished, #run-name .worse, #run-name .diverged", timeout=3 * MINUTE)
    look(page, axe, "run")
    assert (server.folder / "runs" / "asked" / "adapter" / "adapter_model.safetensors").is_file()

    page.click("text=Export adapter")
    page.wait_for_selector("#result:has-text('export done')", timeout=2 * MINUTE)
    assert list((server.folder / "runs" / "asked").glob("*/export.json"))
    page.click("#actions >> text=Report")
    page.wait_for_selector("#report svg.chart", timeout=MINUTE)
    look(page, axe, "report")
    page.go_back()
    page.click("#actions >> text=Ask")
    page.click("text=Ask base and adapter", timeout=2 * MINUTE)
    page.wait_for_selector("#state.ready", timeout=MINUTE)
    page.fill("#most", "8")
    page.fill("#ask", "red cup 3 old box")
    page.click("#send")
    page.locator(".answer .tools").nth(1).wait_for(timeout=MINUTE)
    look(page, axe, "ask")
    page.click("#back")
    page.click("nav >> text=Commands")
    page.locator("#jobs >> text=Stop").first.click()
    page.wait_for_selector("#jobs:not(:has(.running))", timeout=MINUTE)
    look(page, axe, "commands")
    assert page.problems == [p for p in page.problems if "Failed to load resource" in p or "ERR_" in p]  # of the kill


BAD_FILES = {
    "empty.csv": b"",
    "head.csv": b"a,b\n",
    "nul.csv": b"a,b\n\0\0,\0\n",
    "latin.csv": "prompt,completion\né,ü\n".encode("latin-1"),
    "html.csv": b"<html><script>alert(1)</script></html>",
    "short.csv": b"prompt,completion\n1\n",
    "quote.csv": b'prompt,completion\n"a,b\n',
    "list.json": b"[1,2,3]",
    "deep.json": b"[" * 100_000,
    "torn.jsonl": b'{"prompt": "a", "comp',
    "number.jsonl": b"1\n2\n",
    "null.jsonl": b'{"prompt": null, "completion": null}\n' * 3,
    "nest.jsonl": b'{"messages": "hi"}\n',
    "role.jsonl": b'{"messages": [{"role": "x"}]}\n',
    "fake.parquet": b"PAR1 not really",
    "zip.parquet": b"PK\x03\x04" + b"\0" * 100,
    "bom.jsonl": b"\xef\xbb\xbf{}\n",
    "bomb.jsonl.gz": b"\x1f\x8b" + b"\0" * 50,
    "blank.txt": b"   \n\n",
    "program.exe": b"MZ",
}


def test_bad_files_are_told_in_words(server: Server, page: Any, tmp_path: Path) -> None:
    page.wait_for_selector("#state.ready")
    page.fill("#base", "tiny")
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_bytes(content)
        page.evaluate("tell('')")
        page.set_input_files("#file", tmp_path / name)
        page.wait_for_selector("#problem:not([hidden])", timeout=MINUTE)
        said = page.inner_text("#problem")
        assert said and "Traceback" not in said and "halfbyte init was ended" not in said, (name, said)
    assert not [problem for problem in page.problems if "Failed to load resource" not in problem]


def test_runs_are_compared_and_deleted_when_that_is_confirmed(server: Server, page: Any, axe: str) -> None:
    for name in ("left", "right"):
        made.run(server.folder / "runs" / name, made.metrics(30, evals=3))
    page.click("nav >> text=Runs")
    for name in ("left", "right"):
        page.check(f"#run-rows input[value={name}]", timeout=MINUTE)
    look(page, axe, "runs")
    page.click("#compare")
    page.wait_for_selector("#report svg.chart", timeout=MINUTE)
    assert page.inner_text("#report pre").startswith("halfbyte compare runs/")
    look(page, axe, "compare")
    page.goto(f"{server.url}#run/left")
    for answer, left in (("Keep it", True), ("Delete it for good", False)):
        page.click("#actions >> text=Delete")
        page.click(f"#sure >> text={answer}")
        page.wait_for_timeout(500)
        assert (server.folder / "runs" / "left").exists() is left
    assert not page.problems


def test_how_soon_a_plan_is_shown(server: Server, page: Any, tmp_path: Path, record_property: Any) -> None:
    """A figure, not a bound: `pytest -s` prints the seconds from the drop of 10,000 rows to the plan. Before the drop
    are three seconds, in which a person looks for the file."""
    page.wait_for_selector("#state.ready")
    page.wait_for_timeout(3_000)
    page.fill("#base", os.environ.get("STUDIO_BASE", "tiny"))
    file = rows(tmp_path / "many.csv", 10_000)
    began = time.monotonic()
    page.set_input_files("#file", file)
    page.wait_for_selector("#plan dd[data-of=memory]", timeout=2 * MINUTE)
    seconds = time.monotonic() - began
    record_property("seconds", seconds)
    print(f"\nplan shown {seconds:.2f} s after the drop of 10,000 rows", end=" ")
    page.wait_for_selector("#examples .piece.on", timeout=2 * MINUTE)
    print(f"rows {time.monotonic() - began:.2f} s")


def test_how_soon_a_step_is_seen_and_what_that_costs(server: Server, page: Any) -> None:
    """Figures, not bounds: from a row of the metrics to the chart; the server's share of a core meanwhile."""
    run = made.run(server.folder / "runs" / "steps", made.metrics(2000), steps=5000)
    page.goto(f"{server.url}#run/steps")
    page.wait_for_selector("#charts svg", timeout=MINUTE)
    process, waits = psutil.Process(server.process.pid), list[float]()
    before, began = sum(process.cpu_times()[:2]), time.monotonic()
    for step in range(2001, 2021):
        row = {**made.metrics(1)[0], "step": step, "loss": step / 1000}
        wrote = time.monotonic()
        run.append_metrics(row)
        page.wait_for_selector(f"#charts svg[aria-label^='Loss: each step {step / 1000:g}']", timeout=MINUTE)
        waits.append(time.monotonic() - wrote)
        time.sleep(0.8)
    share = (sum(process.cpu_times()[:2]) - before) / (time.monotonic() - began)
    mean = sum(waits) / len(waits)
    print(f"\na step is seen after {mean:.2f} s, at most {max(waits):.2f}; the server takes {share:.1%} of a core")
