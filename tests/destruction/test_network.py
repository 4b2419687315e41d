"""A run of every command needs no network, and leaves no token anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_run

SECRET = "hf_abcdefghijklmnopqrstuvwxyz0123"
BLOCKED = """
import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        print("NETWORK", event, args[1:], file=sys.stderr)
        raise OSError("no network here")
sys.addaudithook(hook)
from halfbyte.cli import main
sys.exit(main._guard(lambda: main.app(sys.argv[1:]), sys.argv[1:]))
"""


@pytest.mark.slow
def test_nothing_is_asked_of_the_network_and_no_token_is_kept(tmp_path: Path) -> None:
    tiny_run.recipe(tmp_path, train__save_strategy="steps", train__save_steps=2)
    env = os.environ | {
        "HF_TOKEN": SECRET, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1",
        "HALFBYTE_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"),
    }  # fmt: skip
    said = ""
    for words in (
        ["train", "recipe.yaml"],
        ["verify", "run"],
        ["eval", "run", "--data", "train.jsonl"],
        ["generate", "run", "-p", "red cup", "--max-new-tokens", "4"],
        ["train", "run", "--resume", "--set", "train.max_steps=6"],
        ["train", f"org/{SECRET}", "train.jsonl"],  # an id of the hub: refused, as there is none
    ):
        command = [sys.executable, "-c", BLOCKED, *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        said += done.stdout + done.stderr
        if words[1].startswith("org/"):
            assert done.returncode != 0
        else:
            assert done.returncode == 0 and "NETWORK" not in done.stderr, done.stderr
    assert SECRET not in said
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size < 10_000_000]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert (tmp_path / "run" / "report.json") in written
