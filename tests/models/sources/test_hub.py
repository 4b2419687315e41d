"""The hub, spoken to by a real huggingface_hub in a process of its own (it reads its environment at import)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from tests.hub_server import HubServer, commit_of

ASK = """
import json, sys
from halfbyte.errors import SourceError
from halfbyte.models.sources.lookup import resolve
try:
    found = resolve(sys.argv[1], allow_pickle=sys.argv[2] == "True")
    answer = {"path": str(found.path), "id": found.id, "revision": found.revision, "kind": found.kind,
              "pickle": found.pickle, "files": sorted(p.name for p in found.path.iterdir())}
except SourceError as error:
    answer = {"error": str(error)}
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(json.dumps(answer))
"""
CONFIG = json.dumps({"model_type": "llama"}).encode()
WEIGHTS = save({"w": np.arange(60_000, dtype=np.float32)})
FILES = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"hello",
    "model.safetensors": WEIGHTS,
    "README.md": b"not needed",
    "consolidated.safetensors": b"the same weights again",
    "pytorch_model.bin": b"a pickle",
    "onnx/model.safetensors": b"another format",
}
NAME = "someone/tiny"
# huggingface_hub keeps a cut transfer in pieces of 10 MiB; a file must be longer for one to be kept.
PIECE_BYTES = 10 * 1024 * 1024
LONG = save({"w": np.arange(5_000_000, dtype=np.float32)})


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


class Answer(dict[str, object]):
    """What was found; where something else was said instead, a test that looks for it shows that."""

    def __missing__(self, key: str) -> object:
        raise AssertionError(f"no {key!r} in {dict(self)}")


def ask(hub: HubServer | str, home: Path, model: str, *, allow_pickle: bool = False, **env: str) -> Answer:
    done = process(hub, home, model, allow_pickle=allow_pickle, **env)
    assert done.returncode == 0, done.stderr
    return Answer(json.loads(done.stdout.splitlines()[-1]))


def process(
    hub: HubServer | str, home: Path, model: str, *, allow_pickle: bool = False, before: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    url = hub if isinstance(hub, str) else hub.url
    return subprocess.run(
        [sys.executable, "-c", f"from halfbyte.models.sources import hub\n{before}\n{ASK}", model, str(allow_pickle)],
        env={**clean, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **env},
        capture_output=True,
        text=True,
        cwd=home,
        timeout=120,
    )


def test_a_model_comes_with_its_commit_and_only_the_files_it_needs_then_works_offline(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.add(NAME, FILES)
    found = ask(hub, tmp_path, NAME)
    assert (found["id"], found["revision"], found["kind"], found["pickle"]) == (
        NAME,
        commit_of(NAME, "main"),
        "hub",
        False,
    )
    assert found["files"] == ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert Path(str(found["path"])).is_relative_to(tmp_path / "hub")
    assert Path(str(found["path"]), "model.safetensors").read_bytes() == WEIGHTS

    before = len(hub.seen)
    assert ask(hub, tmp_path, NAME, HF_HUB_OFFLINE="1") == found
    assert len(hub.seen) == before
    # A server that is down is as good as offline, for what is cached.
    assert ask("http://127.0.0.1:9", tmp_path, NAME) == found


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: HubServer, tmp_path: Path) -> None:
    commit = commit_of(NAME, "v2")
    hub.add(NAME, FILES, revisions={"v2": commit})
    assert ask(hub, tmp_path, f"{NAME}@v2")["revision"] == commit
    assert ask(hub, tmp_path, f"{NAME}@{commit}", HF_HUB_OFFLINE="1")["revision"] == commit
    error = str(ask(hub, tmp_path, f"{NAME}@v3")["error"])
    assert error.startswith(f"{NAME} has no revision 'v3'; allowed: a branch, a tag or a commit of it\n  fix: ")


def test_hf_hub_cache_is_honoured(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, FILES)
    found = ask(hub, tmp_path, NAME, HF_HUB_CACHE=str(tmp_path / "elsewhere"))
    assert Path(str(found["path"])).is_relative_to(tmp_path / "elsewhere")


def test_who_may_see_it(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, FILES, token="hf_right")
    error = str(ask(hub, tmp_path, NAME)["error"])
    assert f"does not show {NAME} to you (HTTP 401)" in error and "hf auth login" in error
    assert "HTTP 401" in str(ask(hub, tmp_path, NAME, HF_TOKEN="hf_wrong")["error"])
    assert ask(hub, tmp_path, NAME, HF_TOKEN="hf_right")["revision"] == commit_of(NAME, "main")

    hub.add("someone/gated", FILES, gated=True)
    error = str(ask(hub, tmp_path, "someone/gated")["error"])
    assert error.startswith("someone/gated is gated") and f"accept its terms at {hub.url}/someone/gated" in error


def test_not_found_names_the_hub_and_a_folder_that_is_nearly_called_so(hub: HubServer, tmp_path: Path) -> None:
    error = str(ask(hub, tmp_path, "models/tinny")["error"])
    assert error == f"{hub.url} has no model models/tinny\n  fix: check the name at {hub.url}/models"
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    assert "There is no local models/tinny either; near it: models/tiny" in str(
        ask(hub, tmp_path, "models/tinny")["error"]
    )


def test_offline_and_not_cached_and_no_network(hub: HubServer, tmp_path: Path) -> None:
    error = str(ask(hub, tmp_path, NAME, HF_HUB_OFFLINE="1")["error"])
    assert f"{NAME} (revision main) is not in the cache" in error and "HF_HUB_OFFLINE is set" in error
    assert not hub.seen
    error = str(ask("http://127.0.0.1:9", tmp_path, NAME)["error"])
    assert error.startswith("http://127.0.0.1:9 cannot be reached") and "smollm2-135m" in error


def test_a_hub_out_of_reach_is_one_line_and_what_is_cached_is_used(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, FILES)
    cached = ask(hub, tmp_path, NAME)
    done = process("http://127.0.0.1:9", tmp_path, NAME)
    assert json.loads(done.stdout)["path"] == cached["path"]
    assert done.stderr == "http://127.0.0.1:9 cannot be reached; only what is cached is used\n"


def test_a_hub_that_never_answers_is_not_waited_for(tmp_path: Path) -> None:
    """It takes connections, and says nothing: then the one request is the only one."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = process(url, tmp_path, NAME, before="hub.ANSWERS_S = 1.0")
        silent.settimeout(0)
        connections = list(accepted(silent))
    assert "cannot be reached, and" in json.loads(done.stdout)["error"]
    assert len(connections) == 1 and len(done.stderr.splitlines()) == 1


def test_an_answer_may_be_later_than_a_connection(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, FILES)
    hub.before_the_first = lambda: time.sleep(1.5)
    found = json.loads(process(hub, tmp_path, NAME, before="hub.CONNECTS_S = 1.2").stdout)
    assert "files" in found, found


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system cannot stop a process")
def test_no_time_goes_by_while_the_machine_stands_still(hub: HubServer, tmp_path: Path) -> None:
    """Stopped for longer than it would wait; the hub, on the same machine, goes on a little after it."""

    def stand_still() -> None:
        pid = int((tmp_path / "pid").read_text())
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.3)

    hub.add(NAME, FILES)
    hub.before_the_first = stand_still
    before = "import os; hub.ANSWERS_S = 1.5; open('pid', 'w').write(str(os.getpid()))"
    found = json.loads(process(hub, tmp_path, NAME, before=before).stdout)
    assert "files" in found, found


def accepted(server: socket.socket) -> Iterator[socket.socket]:
    while True:
        try:
            yield server.accept()[0]
        except BlockingIOError:
            return


def test_a_cut_in_the_middle_is_resumed_from_where_it_was(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {**FILES, "model.safetensors": LONG})
    hub.cut_after["model.safetensors"] = PIECE_BYTES + 1_000_000
    found = ask(hub, tmp_path, NAME)
    assert Path(str(found["path"]), "model.safetensors").read_bytes() == LONG
    assert [seen.range for seen in hub.requests_for("model.safetensors")] == [None, f"bytes={PIECE_BYTES}-"]


def test_a_download_that_fails_leaves_no_half_file_and_the_next_run_goes_on(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, {**FILES, "model.safetensors": LONG})
    hub.cut_after["model.safetensors"] = PIECE_BYTES + 1_000_000
    hub.refuse_ranges = True
    error = str(ask(hub, tmp_path, NAME)["error"])
    assert "HTTP 503" in error and "run the same command again; files that are already whole are kept" in error
    assert not list(tmp_path.rglob("model.safetensors"))
    offline = str(ask(hub, tmp_path, NAME, HF_HUB_OFFLINE="1")["error"])
    assert "is only partly in the cache" in offline

    hub.refuse_ranges = False
    fetched = len(hub.requests_for("config.json"))
    found = ask(hub, tmp_path, NAME)
    assert Path(str(found["path"]), "model.safetensors").read_bytes() == LONG
    assert fetched == 1 and len(hub.requests_for("config.json")) == 1


def test_pickle_is_fetched_only_when_allowed_and_only_without_safetensors(hub: HubServer, tmp_path: Path) -> None:
    hub.add(NAME, FILES)
    assert ask(hub, tmp_path, NAME, allow_pickle=True)["pickle"] is False
    old = {k: v for k, v in FILES.items() if not k.endswith(".safetensors")}
    hub.add("someone/old", old)
    assert "someone/old has only pickled weights" in str(ask(hub, tmp_path, "someone/old")["error"])
    assert not hub.requests_for("pytorch_model.bin")
    found = ask(hub, tmp_path, "someone/old", allow_pickle=True)
    assert found["pickle"] is True and "pytorch_model.bin" in found["files"]  # type: ignore[operator]


def test_shards_are_those_the_index_names(hub: HubServer, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"w": "model-00001-of-00002.safetensors", "v": "odd.safetensors"}}).encode()
    shards = {"model-00001-of-00002.safetensors": WEIGHTS, "odd.safetensors": WEIGHTS}
    hub.add(NAME, {"config.json": CONFIG, "model.safetensors.index.json": index, **shards, "unused.safetensors": b""})
    files = ask(hub, tmp_path, NAME)["files"]
    assert files == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "odd.safetensors",
    ]

    hub.add(
        "someone/lacking", {"config.json": CONFIG, "model.safetensors.index.json": index, "odd.safetensors": WEIGHTS}
    )
    error = str(ask(hub, tmp_path, "someone/lacking")["error"])
    assert "someone/lacking is not a whole checkpoint" in error
    assert "model-00001-of-00002.safetensors is missing" in error


def test_what_is_no_model(hub: HubServer, tmp_path: Path) -> None:
    adapter = {"adapter_config.json": json.dumps({"base_model_name_or_path": NAME}).encode()}
    hub.add("someone/adapter", {**adapter, "adapter_model.safetensors": WEIGHTS})
    error = str(ask(hub, tmp_path, "someone/adapter")["error"])
    assert error.startswith("someone/adapter is a PEFT adapter") and f"give the base as the model: {NAME}" in error
    hub.add("someone/ggufs", {"m.Q4.gguf": b"GGUF"})
    assert "someone/ggufs has only GGUF files: m.Q4.gguf" in str(ask(hub, tmp_path, "someone/ggufs")["error"])
