"""The page of `serve` in a browser, before a server that answers what it is told."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from halfbyte.serving.http.pages import TALK, TYPES
from halfbyte.web import files as web

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
PROSE = "Two apples and three pears are five pieces of fruit, as long as nobody has eaten"
JSON = '{"name": "Ada", "likes": ["pears", "apples"]}'
# What a user does: a question, the answers, a second one to the left.
DRIVE = """
const done = () => !document.querySelector(".busy") && document.querySelectorAll(".tools").length === 2;
const until = (seen, then) => seen() ? then() : setTimeout(() => until(seen, then), 20);
until(() => document.getElementById("left").options.length, () => {
  document.getElementById("ask").value = "How many?";
  document.getElementById("form").requestSubmit();
  setTimeout(() => until(done, () => document.querySelector(".left .again").click()), 100);
});
"""


class Server(BaseHTTPRequestHandler):
    """The files, the models, and answers: the adapter's is cut, the base's is JSON."""

    asked: list[dict[str, Any]]

    def log_message(self, *args: object) -> None: ...

    def send(self, text: str, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            models = [{"id": "fruit", "parent": "smol", "max_model_len": 512}, {"id": "smol", "max_model_len": 512}]
            self.send(json.dumps({"data": models}), "application/json")
        elif self.path == "/drive.js":
            self.send(DRIVE, "text/javascript")
        else:
            file = TALK[self.path.strip("/")]
            text = web.content(file).decode().replace("</head>", '<script src="/drive.js" defer></script></head>')
            self.send(text, TYPES[file.suffix])

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        text, why = (PROSE, "length") if body["model"] == "fruit" else (JSON, "stop")
        half = len(text) // 2
        choices = [({"content": text[:half]}, None), ({"content": text[half:]}, None), ({}, why)]
        chunks = [{"choices": [{"delta": delta, "finish_reason": end}]} for delta, end in choices]
        chunks.append({"choices": [], "usage": {"completion_tokens": 17}})  # it comes last
        events = [*map(json.dumps, chunks), "[DONE]"]
        self.send("".join(f"data: {event}\n\n" for event in events), "text/event-stream")


@pytest.fixture
def served() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Server,), {"asked": asked}))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", asked
    server.shutdown()


def browser(url: str, profile: Path, *options: str) -> str:
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}",
        "--virtual-time-budget=8000", *options, url,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_a_cut_answer_says_so_json_is_indented_and_again_asks_the_same(
    served: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    url, asked = served
    page = browser(url, tmp_path, "--window-size=1200,900", "--dump-dom")
    left, right = re.findall(r'<article class="answer (?:left|right)">(.*?)</article>', page, re.DOTALL)
    assert (
        f'<p class="text">{PROSE}</p>' in left
        and f'<p class="text json">{json.dumps(json.loads(JSON), indent=2)}</p>' in right
    )
    assert "Cut here" in left and "256 tokens" in left and "17 tokens" in left  # the last chunk does not take it back
    assert "Cut" not in right
    for answer in (left, right):
        assert ">Copy</button>" in answer and ">Again</button>" in answer
    assert [body["model"] for body in asked[2:]] == ["fruit"]
    assert asked[2]["messages"] == asked[[b["model"] for b in asked].index("fruit")]["messages"]
    assert '<details id="fold" open="">' in page


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_settings_are_folded_on_a_phone(served: tuple[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    page = browser(served[0], tmp_path, "--window-size=500,900", "--dump-dom")
    assert '<details id="fold">' in page


def test_settings_are_in_plain_words() -> None:
    labels = re.findall(r"<label[^>]*>([^<]+)<", TALK[""].read_text())
    words = [label.strip() for label in labels]
    assert words == ["answer by", "and beside it", "temperature", "longest answer", "instructions", "key"]
