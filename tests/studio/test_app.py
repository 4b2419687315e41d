"""A studio without a browser: who may ask, what may be named, what becomes of uploads, recipes and commands."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import http.server
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from starlette.testclient import TestClient

from halfbyte.runs.folder import RunFolder
from halfbyte.serving.http.guard import Guard
from halfbyte.serving.http.refusal import Refusal
from halfbyte.serving.settings import Settings
from halfbyte.studio import events as events_of
from halfbyte.studio import jobs as jobs_of
from halfbyte.studio import workspace
from halfbyte.studio.app import PAGE, Studio, application
from halfbyte.studio.events import MetricsTail
from halfbyte.studio.jobs import Jobs, Worker
from halfbyte.studio.workspace import SETTABLE, Workspace
from tests.report import made
from tests.studio.driven import Server

KEY = "k" * 24
TRAIN = {"words": ["train", "recipes/rows.yaml", "--output", "runs/rows"]}
RECIPE = {"model": "smollm2-135m", "data": {"train": "data/rows.csv"}, "lora": {"r": 16}, "output": "runs/rows"}
# A command that says its words, and waits for a signal where it is told to.
SCRIPT = """
import os, signal, sys, time
print("words", *sys.argv[1:], flush=True)
if sys.argv[1] == "serve":
    print(os.environ.get("SERVED", ""), flush=True)
if sys.argv[1] == "train" or (sys.argv[1] == "serve" and "SERVED" in os.environ):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    time.sleep(60)
if sys.argv[1] == "verify":
    print("error: no adapter")
    sys.exit(1)
"""


class Told(Worker):
    """Commands that are written down; a recipe is begun as `init` would."""

    asked: list[tuple[str, ...]]

    def run(self, *words: str) -> Any:
        self.asked.append(words)
        if words[0] == "init":
            (self.folder / words[1]).write_text(yaml.safe_dump(RECIPE))
            return {"recipe": words[1], "plan": None, "remarks": []}
        return {"refused": False}


@pytest.fixture
def studio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(jobs_of, "_PYTHON", (jobs_of.sys.executable, str(script)))
    space = Workspace(tmp_path / "studio", upload_bytes=10_000)
    space.begin()
    commands = Told(space.folder)
    commands.asked = []
    studio = Studio(space, Jobs(space), commands)
    yield studio
    for job in studio.jobs.listing():
        if job["state"] == "running":
            studio.jobs.stop(job["id"])


@pytest.fixture
def client(studio: Studio) -> TestClient:
    app = Guard(application(studio), Settings(key=KEY, uploads="/api/data/"))
    return TestClient(app, base_url="http://127.0.0.1:8765", headers={"Authorization": f"Bearer {KEY}"})


def recipe(studio: Studio, name: str = "rows.yaml") -> Path:
    path = studio.workspace.folder / "recipes" / name
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def init(model: object, rows: str = "rows.csv") -> dict[str, list[str]]:
    return {"words": ["init", "recipes/rows.yaml", f"--model={model}", f"--data=data/{rows}", "--json"]}


def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------- who may ask
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example:8765"}, 421),  # DNS rebinding
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:9999"}, 403),  # another server of this machine
        ({"Origin": "null"}, 403),
        ({"Authorization": ""}, 401),
        ({"Authorization": "Bearer " + "x" * 24}, 401),
        ({"Content-Type": "text/plain"}, 415),
    ],
)
def test_a_stranger_starts_nothing(client: TestClient, studio: Studio, headers: dict[str, str], status: int) -> None:
    recipe(studio)
    given = {"Content-Type": "application/json", **headers}
    answer = client.post("/api/jobs", content=json.dumps(TRAIN), headers=given)
    assert answer.status_code == status
    assert studio.jobs.listing() == []
    for method, path in (("PUT", "/api/data/a.csv"), ("DELETE", "/api/recipes/rows.yaml"), ("GET", "/api/events")):
        if status != 415:
            assert client.request(method, path, headers=headers).status_code == status


def test_pages_need_no_key_and_load_nothing_from_elsewhere(client: TestClient) -> None:
    for name in PAGE:
        answer = client.get(f"/{name}", headers={"Authorization": ""})
        assert answer.status_code == 200
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert (policy["default-src"], policy["script-src"], policy["connect-src"]) == ("'none'", "'self'", "'self'")
        assert answer.headers["x-frame-options"] == "DENY"
        assert "https://" not in answer.text and "<script>" not in answer.text
    assert client.get("/ask/x-1/", headers={"Authorization": ""}).status_code == 200
    assert client.get("/ask/x-1/v1/models", headers={"Authorization": ""}).status_code == 401


BAD_NAMES = [
    "..%2F..%2Fetc%2Fpasswd", "%2Fetc%2Fpasswd", "..", ".hidden.csv", "-x.csv", "a%00.csv", "a%0A.csv",
    "a" * 200 + ".csv",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_name_leads_out_of_its_folder(client: TestClient, studio: Studio, name: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert client.put(f"/api/data/{name}", content=b"a,b\n1,2\n").status_code in (400, 404, 405)
    assert client.request("DELETE", f"/api/recipes/{name}", json={"confirm": name}).status_code in (400, 404, 405)
    assert client.get(f"/api/recipes/{name}").status_code in (400, 404, 405)
    assert client.post("/api/jobs", json={"words": ["eval", f"runs/{name}"]}).status_code == 400
    assert client.get(f"/api/page?run={name}").status_code in (400, 404)
    assert client.post(f"/api/jobs/{name}/stop").status_code in (400, 404, 405)
    assert sorted(tmp_path.rglob("*")) == before


def test_links_are_not_followed(client: TestClient, studio: Studio, tmp_path: Path) -> None:
    folder, secret = studio.workspace.folder, tmp_path / "secret"
    made.finished(secret / "run", made.metrics(3))
    (secret / "rows.csv").write_text("a,b\n")
    (folder / "runs" / "run").symlink_to(secret / "run")
    (folder / "data" / "rows.csv").symlink_to(secret / "rows.csv")
    (folder / "recipes" / "r.yaml").symlink_to(secret / "run" / "recipe.yaml")
    assert studio.state()["runs"] == studio.state()["data"] == studio.state()["recipes"] == []
    assert client.request("DELETE", "/api/runs/run", json={"confirm": "run"}).json()["error"]["code"] == "link"
    assert client.get("/api/recipes/r.yaml").json()["error"]["code"] == "link"
    assert client.post("/api/commands", json=init("smollm2-135m")).json()["error"]["code"] == "link"
    assert (secret / "run" / "recipe.yaml").exists() and (secret / "rows.csv").exists()


@pytest.mark.parametrize(
    "model", ["/etc", "../..", "~", "--output=x", "", None, 3, "smollm2-135m/../../..", "http://x.y/z"]
)
def test_a_base_is_packaged_of_the_hub_or_below_the_folders(client: TestClient, studio: Studio, model: object) -> None:
    (studio.workspace.folder / "data" / "rows.csv").write_text("a,b\n1,2\n")
    assert client.post("/api/commands", json=init(model)).json()["error"]["code"] == "base"
    assert studio.worker.asked == []  # type: ignore[attr-defined]


def test_a_link_under_a_name_of_the_hub_is_no_base(client: TestClient, studio: Studio, tmp_path: Path) -> None:
    folder = studio.workspace.folder
    (folder / "data" / "rows.csv").write_text("a,b\n1,2\n")
    (folder / "org").mkdir()
    (tmp_path / "secret").mkdir()
    (folder / "org" / "name").symlink_to(tmp_path / "secret")
    assert client.post("/api/commands", json=init("org/name")).json()["error"]["code"] == "base"
    assert studio.worker.asked == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["../../../secret", "../../runs/a", "20261130-120000-0000", "", "."])
def test_no_log_is_read_but_of_commands_that_were_started(
    client: TestClient, studio: Studio, tmp_path: Path, name: str
) -> None:
    for folder in (tmp_path / "secret", studio.workspace.folder / "runs" / "a", studio.workspace.jobs):
        folder.mkdir(exist_ok=True)
        for part, text in (("lock", "1"), ("log", "secret"), ("job.json", '{"words": ["train"]}')):
            (folder / part).write_text(text)
    for way in (studio.jobs.read, studio.jobs.goes_on, studio.jobs.stop):
        with pytest.raises(Refusal, match="no such command"):
            way(name)
    answer = client.get("/api/events", params={"job": name})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "missing"


def test_bases_that_may_be_named(studio: Studio, tmp_path: Path) -> None:
    (studio.workspace.folder / "mine").mkdir()
    (studio.workspace.folder / "mine" / "config.json").write_text("{}")
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "x.gguf").write_text("")
    space = Workspace(studio.workspace.folder, (tmp_path / "others",))
    for name in ("smollm2-135m", "org/name", "org/name@main", "mine", str(tmp_path / "others" / "x.gguf")):
        assert space.base(name) == name
    assert {"smollm2-135m", "mine", str(tmp_path / "others" / "x.gguf")} <= set(space.listing()["bases"])
    with pytest.raises(Refusal):
        studio.workspace.base(str(tmp_path / "others" / "x.gguf"))


# ------------------------------------------------------------------------------------------------- files
def test_an_upload_is_whole_and_overwrites_nothing(client: TestClient, studio: Studio) -> None:
    names = [client.put("/api/data/my rows.csv", content=text).json()["name"] for text in (b"a,b\n1,2\n", b"a,b\n")]
    assert names == ["my rows.csv", "my rows-2.csv"]
    folder = studio.workspace.folder / "data"
    assert [(folder / name).read_bytes() for name in names] == [b"a,b\n1,2\n", b"a,b\n"]
    assert studio.state()["data"] == ["my rows-2.csv", "my rows.csv"]


def test_an_upload_beside_a_link_to_nothing_has_another_name(client: TestClient, studio: Studio) -> None:
    folder = studio.workspace.folder / "data"
    (folder / "rows.csv").write_text("a,b\n")
    (folder / "rows-2.csv").symlink_to(folder / "gone.csv")
    assert client.put("/api/data/rows.csv", content=b"a,b\n1,2\n").json() == {"name": "rows-3.csv"}
    answer = client.put("/api/data/rows-2.csv", content=b"a,b\n1,2\n")
    assert answer.status_code == 400 and "is a link" in answer.json()["error"]["message"]
    assert not (folder / "gone.csv").exists()


@pytest.mark.parametrize("declared", [True, False])
def test_an_upload_is_bounded_and_leaves_nothing(client: TestClient, studio: Studio, declared: bool) -> None:
    sent = []

    def parts() -> Iterator[bytes]:
        for _ in range(100):
            sent.append(1)
            yield b"x" * 1_000

    headers = {"Content-Length": "2000000000"} if declared else {}
    assert client.put("/api/data/big.csv", content=parts(), headers=headers).status_code == 413
    assert bool(sent) != declared  # what is said to be too large is not read at all
    assert list((studio.workspace.folder / "data").iterdir()) == []


def test_an_upload_leaves_half_of_the_free_disk(
    client: TestClient, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace.files, "free_bytes", lambda folder: 2_000)
    assert client.put("/api/data/a.csv", content=b"x" * 1_001).status_code == 413
    assert client.put("/api/data/a.csv", content=b"x" * 1_000).status_code == 200


@pytest.mark.parametrize("name", ["a.exe", "a", "a.yaml", "a.py", "a.csv.sh"])
def test_only_files_of_rows_are_taken(client: TestClient, name: str) -> None:
    assert client.put(f"/api/data/{name}", content=b"x").json()["error"]["code"] == "suffix"


def test_an_empty_file_is_refused(client: TestClient) -> None:
    assert "empty" in client.put("/api/data/a.csv", content=b"").json()["error"]["message"]


def test_nothing_is_deleted_without_its_name_said_again(client: TestClient, studio: Studio) -> None:
    path = recipe(studio)
    for confirm in ({}, {"confirm": "other"}, {"confirm": True}):
        assert client.request("DELETE", "/api/recipes/rows.yaml", json=confirm).json()["error"]["code"] == "confirm"
    assert path.exists()
    assert client.request("DELETE", "/api/recipes/rows.yaml", json={"confirm": "rows.yaml"}).status_code == 200
    assert not path.exists()
    run = made.run(studio.workspace.folder / "runs" / "a", made.metrics(2))
    with run.lock():
        answer = client.request("DELETE", "/api/runs/a", json={"confirm": "a"})
        assert answer.status_code == 409 and run.path.exists()
    assert client.request("DELETE", "/api/runs/a", json={"confirm": "a"}).status_code == 200 and not run.path.exists()


def test_columns_are_those_of_a_dropped_file(client: TestClient, studio: Studio, tmp_path: Path) -> None:
    client.put("/api/data/rows.csv", content=b"frage,antwort\n1,2\n")
    assert client.get("/api/data/rows.csv").json() == {"columns": ["frage", "antwort"]}
    client.put("/api/data/torn.json", content=b"[" * 9_000)
    assert client.get("/api/data/torn.json").status_code in (200, 422)
    (tmp_path / "secret.csv").write_text("a,b\n")
    (studio.workspace.folder / "data" / "link.csv").symlink_to(tmp_path / "secret.csv")
    assert client.get("/api/data/link.csv").json()["error"]["code"] == "link"
    assert client.get("/api/data/none.csv").status_code == 404
    assert client.get("/api/data/..%2Fsecret.csv").status_code in (400, 404)


# ------------------------------------------------------------------------------------------------- recipes
def test_a_preset_and_how_rows_are_read_are_said_to_init(client: TestClient, studio: Studio) -> None:
    client.put("/api/data/rows.csv", content=b"frage,antwort\n1,2\n")
    said = ["--for=style", '--set=data.fields.prompt="frage"', "--set=data.format=text"]
    words = [*init("smollm2-135m")["words"], *said]
    assert client.post("/api/commands", json={"words": words}).status_code == 200
    assert studio.worker.asked == [tuple(words)]  # type: ignore[attr-defined]
    before = studio.state()["changed"]["rows.yaml"]
    client.patch("/api/recipes/rows.yaml", json={"lora.r": 4})
    assert studio.state()["changed"]["rows.yaml"] == client.get("/api/recipes/rows.yaml").json()["changed"] > before


def test_short_commands_are_answered_by_the_worker(client: TestClient, studio: Studio) -> None:
    client.put("/api/data/rows.csv", content=b"question,answer\n1,2\n")
    assert client.post("/api/commands", json=init("smollm2-135m")).json()["recipe"] == "recipes/rows.yaml"
    check = ["data", "check", "recipes/rows.yaml", "--json", "--row", "3"]
    assert client.post("/api/commands", json={"words": check}).json() == {"refused": False}
    assert studio.worker.asked == [tuple(init("smollm2-135m")["words"]), tuple(check)]  # type: ignore[attr-defined]


BAD_WORDS: list[object] = [
    [], "train", [["train"]], ["--help"], ["push", "runs/a", "me/x"], ["store", "gc", "--all"],
    ["train", "recipes/rows.yaml", "--set", "trust_remote_code=true"], ["serve", "runs/a", "--host", "0.0.0.0"],
    ["train", "recipes/../x.yaml"], ["train", "smollm2-135m", "data/rows.csv"], ["export", "runs/a", "--out=/tmp/x"],
    ["merge", "runs/a", "--out", "runs/../x"], ["init", "/tmp/x.yaml"], ["train", "/etc/passwd"],
    ["init", "recipes/x.yaml", "--data=/etc/passwd"], ["init", "recipes/x.yaml", "--set=model=/etc"],
    ["init", "recipes/x.yaml", "--set=data.chat_template=/etc/passwd"], ["init", "recipes/x.yaml", "--for=../x"],
    ["train", "recipes/rows.yaml", "--set=data.format=text"], ["store", "gc"], ["store", "list", "--unused-days=0"],
    ["init", "recipes/x.yaml", "--data=hub:a/b/../../etc/passwd"], ["init", "recipes/x.yaml", "--for=json/../x"],
]  # fmt: skip


@pytest.mark.parametrize("words", BAD_WORDS, ids=str)
def test_words_that_a_page_may_not_say(client: TestClient, studio: Studio, words: object) -> None:
    recipe(studio)
    made.finished(studio.workspace.folder / "runs" / "a", made.metrics(3))
    for path in ("/api/jobs", "/api/commands"):
        assert client.post(path, json={"words": words}).status_code == 400
    assert studio.jobs.listing() == [] and studio.worker.asked == []  # type: ignore[attr-defined]


def test_a_field_that_is_moved_is_in_the_recipe(client: TestClient, studio: Studio) -> None:
    path = recipe(studio)
    (studio.workspace.folder / "data" / "test.csv").write_text("a,b\n")
    values = {"lora.r": 8, "lora.lora_alpha": 16, "train.within": "30m", "data.eval": "test.csv"}
    changed = client.patch("/api/recipes/rows.yaml", json=values).json()
    assert changed["values"]["lora"] == {"r": 8, "lora_alpha": 16}
    assert "within: 30m" in changed["text"] and "eval: data/test.csv" in changed["text"]
    client.patch("/api/recipes/rows.yaml", json={"train.within": None, "data.eval": "5%", "data.rows": 64})
    written = yaml.safe_load(path.read_text())
    assert written["train"] == {} and written["data"]["train"] == [{"path": "data/rows.csv", "limit": 64}]
    client.patch("/api/recipes/rows.yaml", json={"data.rows": None})
    assert yaml.safe_load(path.read_text())["data"]["train"] == "data/rows.csv"


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "model: [", "data: 3", "model: x\ndata: {train: data/rows.csv}\nlora: 3\n"]
)
def test_a_recipe_that_somebody_broke_is_told_in_words(client: TestClient, studio: Studio, text: str) -> None:
    path = recipe(studio)
    path.write_text(text)
    for answer in (client.get("/api/recipes/rows.yaml"), client.patch("/api/recipes/rows.yaml", json={"data.rows": 3})):
        assert answer.status_code == 422 and answer.json()["error"]["code"] == "RecipeError"
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"trust_remote_code": True}, "not set here"),
        ({"model": "/etc"}, "not set here"),
        ({"output": "/tmp/x"}, "not set here"),
        ({"data.train": "/etc/passwd"}, "not set here"),
        ({"data.chat_template": "/etc/passwd"}, "not set here"),
        ({"data.eval": "/etc/passwd"}, "no name"),
        ({"data.eval": "1/../../../etc/passwd"}, "no name"),
        ({"data.eval": "hub:a/b/../../etc/passwd"}, "no name"),
        ({"lora.r": 0}, "lora.r"),
        ({"lora.r": "many"}, "lora.r"),
        ({"train.within": "soon"}, "train.within"),
        ({"lora.r": {"a": 1}}, "lora.r"),
    ],
)
def test_what_may_not_be_set_changes_nothing(client: TestClient, studio: Studio, values: Any, word: str) -> None:
    path = recipe(studio)
    answer = client.patch("/api/recipes/rows.yaml", json=values)
    assert answer.status_code in (400, 422) and word in answer.json()["error"]["message"]
    assert yaml.safe_load(path.read_text()) == RECIPE
    assert list(path.parent.iterdir()) == [path]


def test_a_section_whose_lines_are_commented_out_can_be_set(client: TestClient, studio: Studio) -> None:
    path = recipe(studio)
    path.write_text(path.read_text() + "train:\n  # seed: 3\n")
    assert client.patch("/api/recipes/rows.yaml", json={"train.seed": 4}).status_code == 200
    assert yaml.safe_load(path.read_text())["train"] == {"seed": 4}


def test_no_field_that_can_be_set_names_a_file_or_lets_code_run() -> None:
    files = {"model", "output", "data.train", "data.chat_template", "lora.adapter"}
    assert not SETTABLE & {"trust_remote_code", "allow_pickle", "train.report_to", *files}


# ------------------------------------------------------------------------------------------------- commands
def test_a_command_goes_on_without_the_server_and_is_found_and_stopped(client: TestClient, studio: Studio) -> None:
    recipe(studio)
    job = client.post("/api/jobs", json=TRAIN).json()
    assert job["command"] == "halfbyte train recipes/rows.yaml --output runs/rows" and job["state"] == "running"
    later = Jobs(studio.workspace)  # of a server that was started anew
    assert later.read(job["id"])["state"] == "running"
    until(lambda: "words train" in later.read(job["id"])["log"])
    assert client.post("/api/jobs", json=TRAIN).json()["id"] == job["id"]  # clicked twice
    assert client.post(f"/api/jobs/{job['id']}/stop").status_code == 200
    until(lambda: later.read(job["id"])["code"] == 3)
    assert later.read(job["id"])["state"] == "failed"
    assert client.post(f"/api/jobs/{job['id']}/stop").status_code == 409


@pytest.mark.parametrize(
    ("code", "state"), [("0", "done"), ("3", "failed"), ("-9", "failed"), ("143", "stopped"), ("130", "stopped"),
                        ("-15", "stopped"), ("-2", "stopped"), (None, "ended")],
)  # fmt: skip
def test_a_command_that_was_asked_to_end_has_not_failed(studio: Studio, code: str | None, state: str) -> None:
    folder = studio.workspace.jobs / "20260101-120000-abcd"
    folder.mkdir()
    (folder / "job.json").write_text('{"words": ["train", "recipes/rows.yaml"], "began": 1}')
    for name, text in (("log", "step 1/9\n"), ("lock", "1"), *([("code", code)] if code else [])):
        (folder / name).write_text(text)
    assert studio.jobs.read(folder.name)["state"] == state


def test_commands_take_no_module_from_the_folder(tmp_path: Path) -> None:
    """As `python -m` does of its working directory: a file of rows may not become code."""
    for name in ("halfbyte", "typer", "json", "yaml"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(77)")
    for words in ([*jobs_of._PYTHON, "--version"], jobs_of._WORKER):
        done = subprocess.run(words, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr


class Asked(http.server.BaseHTTPRequestHandler):
    """A run's server: it says what it was asked."""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps([self.command, self.path, self.headers["Authorization"], body]).encode())

    do_POST = do_GET


def test_of_a_served_run_its_models_and_answers_alone_are_passed_on(
    client: TestClient, studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.finished(studio.workspace.folder / "runs" / "a", made.metrics(3))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Asked) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            monkeypatch.setenv("SERVED", f"at http://127.0.0.1:{server.server_port}/v1")
            job = client.post("/api/jobs", json={"words": ["serve", "runs/a", "--port", "0"]}).json()["id"]
            until(lambda: studio.jobs.read(job)["port"] == server.server_port)
            address, key = f"/ask/{job}/v1", f"Bearer {KEY}"
            assert client.get(f"{address}/models").json() == ["GET", "/v1/models", key, ""]
            said = client.post(f"{address}/chat/completions", json={"a": 1}).json()
            assert said == ["POST", "/v1/chat/completions", key, '{"a":1}']
            for path in ("load_lora_adapter", "completions", "models/../load_lora_adapter", "%2e%2e/metrics", ""):
                for method in ("GET", "POST"):
                    assert client.request(method, f"{address}/{path}", json={}).status_code == 404, path
            assert client.post(f"{address}/models", json={}).status_code == 404
            assert client.get(f"{address}/models", headers={"Authorization": ""}).status_code == 401
        finally:
            server.shutdown()
    other = client.post("/api/jobs", json=TRAIN | {"words": ["verify", "runs/a"]}).json()["id"]
    assert client.get(f"/ask/{other}/v1/models").status_code == 404  # it does not serve


def test_what_is_done_with_a_run_is_a_command(client: TestClient, studio: Studio) -> None:
    made.finished(studio.workspace.folder / "runs" / "a", made.metrics(3))
    asked = [
        "eval runs/a --base",
        "merge runs/a",
        "verify runs/a",
        "export runs/a --gguf Q8_0 --ollama",
        "serve runs/a --port 0",
    ]
    jobs = [client.post("/api/jobs", json={"words": words.split()}).json() for words in asked]
    assert [job["command"] for job in jobs] == [f"halfbyte {words}" for words in asked]
    until(lambda: all(studio.jobs.read(job["id"])["code"] is not None for job in jobs))
    states = {job["words"][0]: studio.jobs.read(job["id"])["state"] for job in jobs}
    assert states["verify"] == "failed" and states["merge"] == "done"
    assert client.post("/api/jobs", json={"words": ["eval", "runs/none"]}).status_code == 404


def test_reports_and_comparisons_are_the_pages_of_their_commands(client: TestClient, studio: Studio) -> None:
    runs = studio.workspace.folder / "runs"
    for name in ("a", "b"):
        made.run(runs / name, made.metrics(3))
    (runs / "a" / "report.html").write_text("of a")
    (runs / "compare.html").write_text("of both")
    assert (client.get("/api/page?run=a").text, client.get("/api/page").text) == ("of a", "of both")
    assert client.get("/api/page?run=b").status_code == 507
    (runs / "b" / "report.html").symlink_to(runs / "compare.html")
    assert client.get("/api/page?run=b").json()["error"]["code"] == "link"


def test_the_state_has_each_run_and_sees_its_changes(studio: Studio) -> None:
    run = made.run(studio.workspace.folder / "runs" / "a", made.metrics(3), steps=10)
    (first,) = studio.state()["runs"]
    assert (first["run"], first["step"], first["steps"]) == ("a", 3, 10)
    json.dumps(studio.state())
    run.append_metrics({"step": 4, "loss": 1.0})
    assert studio.state()["runs"][0]["step"] == 4


def test_metrics_are_followed_row_by_row_and_anew_where_they_were_replaced(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    follower = MetricsTail(run.metrics)
    assert follower.news() == {}
    run.append_metrics({"step": 1, "loss": 2.0, "tokens": 5})
    assert follower.news() == {"curves": {}, "rows": [{"step": 1, "loss": 2.0}]}
    assert follower.news() == {}
    with run.metrics.open("a") as file:
        file.write('{"step": 2, "lo')  # torn
    assert follower.news() == {"rows": []}
    run.append_metrics({"step": 2, "eval_loss": 1.0})
    assert follower.news() == {"rows": [{"step": 2, "eval_loss": 1.0}]}
    run.truncate_metrics(1)
    assert follower.news() == {"curves": {}, "rows": [{"step": 1, "loss": 2.0}]}


def test_the_end_of_what_is_followed_is_told_at_the_next_look(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run, and of a command, whose exit code is written somewhat later."""
    monkeypatch.setattr(events_of, "STATE_LOOKS", 1_000_000)  # at no other time
    monkeypatch.setattr(events_of, "LOOK_S", 0.01)
    run = made.run(studio.workspace.folder / "runs" / "a", made.metrics(3))
    job = studio.jobs.start(["train", "recipes/rows.yaml"])["id"]

    async def follow() -> None:
        told = events_of.events(studio.state, run.path, lambda: studio.jobs.read(job), lambda: studio.jobs.goes_on(job))
        seen = dict[str, Any]()

        async def until_told(*states: str) -> None:
            async for event in told:
                seen.update(json.loads(event["data"]))
                if (seen["state"]["runs"][0]["state"], seen["job"]["state"]) == states:
                    return

        async with asyncio.timeout(60):
            with run.lock():
                await until_told("running", "running")
            await until_told("crashed", "running")
            until(lambda: "words train" in studio.jobs.read(job)["log"])
            studio.jobs.stop(job)
            await until_told("crashed", "failed")
        assert seen["job"]["code"] == 3

    asyncio.run(follow())


def test_the_key_is_its_owners_and_stays(studio: Studio) -> None:
    key = studio.workspace.begin()
    assert len(key) >= 24 and studio.workspace.begin() == key
    assert (studio.workspace.folder / ".studio" / "key").stat().st_mode & 0o077 == 0


@pytest.mark.slow  # writes two gigabytes
@pytest.mark.parametrize("declared", [True, False])
def test_two_gigabytes_and_more_are_refused_in_little_memory(tmp_path: Path, declared: bool) -> None:
    server = Server(tmp_path)
    process, peak, size = psutil.Process(server.process.pid), 0, 2_100_000_000
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    length = {"Content-Length": str(size)} if declared else {}

    def parts() -> Iterator[bytes]:
        nonlocal peak
        for _ in range(size // 1_000_000):
            peak = max(peak, process.memory_info().rss)
            yield bytes(1_000_000)

    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it does not read on
            headers = {"Authorization": f"Bearer {server.key}", **length}
            connection.request("PUT", "/api/data/big.csv", parts(), headers, encode_chunked=not declared)
        if not declared:
            assert connection.getresponse().status == 413
        until(lambda: not list((tmp_path / "data").iterdir()))
        assert peak < 400_000_000
    finally:
        server.end()
