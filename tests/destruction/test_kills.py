"""A few of `tests.destruction.kills`'s runs; the script makes as many as are asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked, small_models

ROOT = Path(__file__).parents[2]


SLOW = [
    ["--count", "10"], ["--count", "10", "--signals"], ["--count", "20", "--kinds", "rewards", "pairs"],
    ["--count", "20", "--kinds", *small_models.HYBRIDS],
]  # fmt: skip


@pytest.mark.parametrize(
    "more", [["--count", "2", "--kinds", "rewards"], *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_runs_that_are_killed_go_on(more: list[str]) -> None:
    ended = forked.Forked("tests.destruction.kills", "--seed", "1000", *more).end(seconds=7200)
    assert ended.code == 0, ended.out + ended.err[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--silent"], ["--sharded"]])
def test_runs_of_several_processes_go_on_when_one_is_gone(more: list[str]) -> None:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "tests.destruction.kills_together", "--count", "2", "--seed", "1000", *more]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 3), done.stdout + done.stderr[-2000:]  # 3: all in the same bytes, some late


@pytest.mark.slow
def test_strangers_files_are_read_or_refused() -> None:
    command = [sys.executable, "-m", "tests.destruction.fuzz", "--count", "3000", "--seed", "1000000"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_an_input_of_the_fuzz_that_once_failed_is_refused() -> None:
    """Value heads of a Qwen3.5 file that are no multiple of its keys."""
    words = ("--only", "gguf blocks", "--count", "1", "--seed", "1003489")
    ended = forked.Forked("tests.destruction.fuzz", *words).end()
    assert ended.code == 0 and "1 refused" in ended.out, ended.out + ended.err
