"""A studio's page driven in headless Chromium: a server of a process of its own, that can be killed; a page that keeps
what is wrong on it; pictures, and what axe-core finds. STUDIO_SHOTS=DIR keeps the pictures:
light, dark, 390 wide; STUDIO_PATIENCE=N waits N times as long."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MINUTE = 60_000 * int(os.environ.get("STUDIO_PATIENCE", "1"))  # of a busy machine more
SHOTS = os.environ.get("STUDIO_SHOTS")
MOVE = """(input, value) => {
  input.value = value;
  for (const name of ["input", "change"]) input.dispatchEvent(new Event(name, { bubbles: true }));
}"""


class Server:
    """A studio in a folder, at one port; killed and started anew. `program`: `halfbyte studio`, or what stands for it;
    it gets the folder and the port, and its first line ends in the key."""

    def __init__(self, folder: Path, program: Sequence[str] = ("-m", "halfbyte", "studio")) -> None:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.port = sock.getsockname()[1]
        self.folder, self.url, self.program = folder, f"http://127.0.0.1:{self.port}/", program
        self.start()

    def start(self) -> None:
        command = [sys.executable, *self.program, str(self.folder), "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.key = self.process.stdout.readline().rstrip().partition("#key=")[2]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """The server and what it started."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(20)
        for lock in (self.folder / ".studio" / "jobs").glob("*/lock"):  # what a test that failed has left
            if (lock.parent / "code").exists():
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(lock.read_text()), signal.SIGKILL)


@contextlib.contextmanager
def browser(chromium: str) -> Iterator[Any]:
    from playwright import sync_api

    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


def page_of(opened: Any, server: Server) -> Any:
    """A tab of its own storage, at the studio; `problems`: what its console says, what it asks of others."""
    page = opened.new_page(viewport={"width": 1200, "height": 900})
    page.problems = []

    def asked(request: Any) -> None:
        page.problems += [] if request.url.startswith(server.url) else [request.url]

    page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("request", asked)
    page.goto(f"{server.url}#key={server.key}")
    return page


def of_a_kill(problems: Sequence[str]) -> list[str]:
    """Problems but for those that a server that is not there, or refuses, brings with it."""
    return [p for p in problems if "Failed to load resource" not in p and "ERR_" not in p]


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
    """A CSV of questions and answers."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer"])
        writer.writerows((f"red cup {n % 90 + 10} old box", f"box {n % 7}, twice") for n in range(count))
    return path
