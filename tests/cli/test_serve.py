"""`halfbyte serve` and `plan --nodes`: every option reaches what reads it, and changes something there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient
from typer.testing import CliRunner

from halfbyte.cli.main import app
from halfbyte.serving.engine import Ask, Engine
from halfbyte.serving.folders import AdapterFolders
from halfbyte.serving.http import app as app_module
from halfbyte.serving.http import pages
from halfbyte.serving.settings import KEY, Settings
from halfbyte.studio.jobs import Worker
from halfbyte.writing.sampling import SamplingParams
from tests import tiny_run
from tests.serving import served


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_run.checkpoint(tmp_path / "tiny")
    return tmp_path / "tiny"


def started(base: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[Engine, Settings, str, AdapterFolders]:
    """What the command hands to the server, and what it prints; nothing is served."""
    seen: list[Any] = []

    def serve(engine: Engine, settings: Settings, sock: Any, ready: Any, folders: AdapterFolders) -> None:
        seen[:] = engine, settings, folders
        ready()
        sock.close()

    monkeypatch.setattr(app_module, "serve", serve)
    done = CliRunner().invoke(app, ["serve", str(base), "--port", "0", *words, "--set", "quant.type=none"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return seen[0], seen[1], done.output, seen[2]


def test_without_options(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, settings, said, folders = started(base, monkeypatch)
    assert not folders.allowed
    assert settings == Settings(port=0)
    assert (engine.max_waiting, engine.pack, engine.models.places) == (128, False, 16)
    assert "serving tiny at http://127.0.0.1:" in said and "Ctrl-C ends it" in said


def test_every_option_arrives(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("k" * 24 + "\n")
    options = {
        "--host": "127.0.0.1", "--context": "64", "--at-once": "2", "--queue": "5", "--time-limit": "7",
        "--grace": "3", "--api-key-file": str(tmp_path / "key"), "--allow-host": "My.Host",
        "--allow-adapters": str(tmp_path),
    }  # fmt: skip
    words = [word for pair in options.items() for word in pair]
    engine, settings, said, folders = started(base, monkeypatch, *words, "--pack", "--quiet")
    assert (engine.max_waiting, engine.pack) == (5, True)
    assert (engine.models.max_length, engine.models.places) == (64, 2)
    assert settings == Settings("127.0.0.1", 0, frozenset({"my.host"}), "k" * 24, 7.0, 3.0)
    assert "Ctrl-C" not in said and folders == AdapterFolders((tmp_path.resolve(),), ("quant.type=none",))


def test_a_studio_is_served_behind_its_key_and_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nobody gave a key: the folder's own."""
    servers: list[uvicorn.Server] = []
    monkeypatch.setattr(pages, "run", lambda server, sock, ready: (servers.append(server), ready(), sock.close()))
    monkeypatch.setattr(Worker, "run", lambda *words: {})  # no process
    monkeypatch.setenv(KEY, "to be restored")  # the command sets it
    monkeypatch.delenv(KEY)
    words = ["--port", "0", "--upload", "0.001", "--allow-host", "My.Host"]
    done = CliRunner().invoke(app, ["studio", str(tmp_path), *words])
    assert done.exit_code == 0, done.output + repr(done.exception)
    key = (tmp_path / ".studio" / "key").read_text()
    assert f"/#key={key}" in done.output and os.environ[KEY] == key  # which `serve` of a run takes from there
    served_app: Any = servers[0].config.app
    client, mine = TestClient(served_app, base_url="http://127.0.0.1:8765"), {"Authorization": f"Bearer {key}"}
    assert client.get("/api/recipes/a.yaml").status_code == 401
    assert client.get("/api/recipes/a.yaml", headers=mine).status_code == 404
    assert client.get("/api/recipes/a.yaml", headers={**mine, "Host": "my.host"}).status_code == 404
    assert client.get("/api/recipes/a.yaml", headers={**mine, "Host": "evil.example"}).status_code == 421
    assert client.put("/api/data/a.csv", content=b"x" * 1_000_001, headers=mine).status_code == 413
    assert client.put("/api/data/a.csv", content=b"a,b\n", headers=mine).json() == {"name": "a.csv"}


def test_the_time_at_the_end_is_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [app_module.build(Engine(served.two()), Settings(grace_s=seconds)) for seconds in (3.0, 60.0)]
    assert all(isinstance(each, uvicorn.Server) for each in made)
    assert [each.config.timeout_graceful_shutdown for each in made] == [3, 60]


@pytest.mark.parametrize(("pack", "wanted"), [(False, 1), (True, 3)])
def test_prompts_that_wait_are_read_together_if_asked(pack: bool, wanted: int) -> None:
    engine = Engine(served.two(), pack=pack)
    model = engine.models.by_name["first"]
    engine.queue.extend(Ask(model, served.prompt(text), SamplingParams(4)) for text in served.QUESTIONS[:3])
    assert len(engine._next()) == wanted


def planned(*words: str) -> Any:
    done = CliRunner().invoke(app, ["plan", "llama-2-7b", "--device", "cpu:64GB", *words, "--json"])
    return json.loads(done.output)


def test_a_plan_of_several_machines() -> None:
    assert "nodes" not in planned()
    fast, slow, more = planned("--nodes", "4"), planned("--nodes", "4", "--link", "10Mb/s"), planned("--nodes", "8")
    assert fast["nodes"]["asked"]["nodes"] == 4 and more["nodes"]["asked"]["nodes"] == 8
    assert slow["nodes"]["asked"]["reduce_s"] > 50 * fast["nodes"]["asked"]["reduce_s"]
    done = CliRunner().invoke(app, ["plan", "llama-2-7b", "--device", "cpu:64GB", "--nodes", "4"])
    assert "speed-up" in done.output and "nodes" in done.output


def test_what_is_no_link_is_told_in_one_line() -> None:
    done = CliRunner().invoke(app, ["plan", "llama-2-7b", "--nodes", "4", "--link", "fast"])
    assert done.exit_code != 0 and "1Gb/s" in str(done.exception)
    done = CliRunner().invoke(app, ["plan", "llama-2-7b", "--link", "10Mb/s"])
    assert "is not read without --nodes" in str(done.exception)
