"""Where what Windows or macOS lacks is taken away, the main job learns what it learns on Linux, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.system.platforms import without

ROOT = Path(__file__).parents[3]


def run(system: str, folder: Path) -> dict[str, Any]:
    """In a process of its own, on this system too: memory that earlier tests have used can change the last bit."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, without.__file__, system, str(folder)],
        env=os.environ | {"PYTHONPATH": paths, "HALFBYTE_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run("linux", tmp_path_factory.mktemp("here"))


@pytest.mark.parametrize("system", ["windows", pytest.param("macos", marks=pytest.mark.slow)])
def test_the_main_job_runs_and_learns_the_same(system: str, here: dict[str, Any], tmp_path: Path) -> None:
    there = run(system, tmp_path)
    assert (
        there["losses"] == here["losses"] and there["resumed"] == here["losses"][2:] and there["said"] == here["said"]
    )
    assert 10**8 < there["peak"] < 10**10
    notes = "\n".join(there["notes"])
    assert ("the Apple GPU is not used" in notes) == (system == "macos")
    assert "this system does not tell which memory is a file's" in notes  # so the base is not called mapped
