"""The command line without a process: quick, and with what it printed. Used by test_cli.py and test_bad_input.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from halfbyte.cli import main
from tests.forked import Ended

Cli = Callable[..., Ended]


def runner(here: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`run("train", "recipe.yaml")` as `halfbyte train recipe.yaml` in the current folder, which is `here` and reads
    TMP in what it printed on stderr."""

    def run(*args: str) -> Ended:
        capsys.readouterr()
        try:
            code = main._guard(lambda: main.app(list(args)), args)
        except SystemExit as left:
            code = int(left.code or 0)
        printed = capsys.readouterr()
        return Ended(code, printed.out, printed.err.replace(str(here), "TMP"))

    return run
