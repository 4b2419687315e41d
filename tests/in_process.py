"""The command line without a process: quick, and with what it printed. Used by test_cli.py and test_bad_input.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from unittest import mock

import pytest

from halfbyte.cli import main
from halfbyte.training.deadline import Clock
from tests.forked import Ended

Cli = Callable[..., Ended]


def runner(here: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`run("train", "recipe.yaml")` as `halfbyte train recipe.yaml` in the current folder, which is `here` and reads
    TMP in what it printed on stderr. A command's time begins with it, not with the process of all tests."""

    def run(*args: str) -> Ended:
        capsys.readouterr()
        try:
            with mock.patch.object(Clock, "of_process", Clock):
                code = main._guard(lambda: main.app(list(args)), args)
        except SystemExit as left:
            code = int(left.code or 0)
        printed = capsys.readouterr()
        return Ended(code, printed.out, printed.err.replace(str(here), "TMP"))

    return run


def imported(names: Collection[str], *words: str, cwd: Path | None = None) -> tuple[int, list[str], str]:
    """The code of a command in a process of its own, which of these modules it has imported, and what it printed."""
    code = (
        f"import sys\nfrom halfbyte.cli import main\nsys.argv = {['halfbyte', *words]}\n"
        f"main._leave = lambda code: print(int(code or 0), *sorted({set(names)} & set(sys.modules)))\nmain.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    number, *found = done.stdout.splitlines()[-1].split()
    return int(number), found, done.stdout
