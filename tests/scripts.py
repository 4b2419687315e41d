"""Small programs in Python that a test starts by their name."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

# A first line of `#!` takes no path with a space, so a shell starts the interpreter, as pip's own scripts do. What the
# shell reads is one string to Python.
START = """#!/bin/sh
'''exec' {python} "$0" "$@"
' '''
"""


def write(path: Path, text: str) -> None:
    """Write `text` as a program that this interpreter runs."""
    path.write_text(START.format(python=shlex.quote(sys.executable)) + text, encoding="utf-8")
    path.chmod(0o755)
