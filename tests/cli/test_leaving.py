"""A command's process ends at once, and yet as Python ends: its code, what was printed, threads, exit functions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def left(code: str, body: str = "") -> subprocess.CompletedProcess[str]:
    """A process that ends by ours, seen to print and to return what it does by `sys.exit(code)`."""
    begin = f"import atexit, os, sys, tempfile, threading, time\nfrom halfbyte.cli import main\n{body}\n"
    ended = [
        subprocess.run([sys.executable, "-c", begin + end], capture_output=True, text=True, check=False)
        for end in (f"sys.exit({code})", f"main._leave({code})")
    ]
    usual, ours = ((e.returncode, e.stdout, e.stderr) for e in ended)
    assert usual == ours
    return ended[1]


@pytest.mark.parametrize(("code", "number"), [("0", 0), ("3", 3), ("None", 0), ("'why'", 1), ("True", 1), ("141", 141)])
def test_the_code_is_that_of_sys_exit(code: str, number: int) -> None:
    assert left(code).returncode == number


def test_what_is_printed_and_what_is_left_to_the_end_is_not_lost(tmp_path: Path) -> None:
    body = f"""
print("printed", end="")
atexit.register(print, "exit function")
temporary = tempfile.TemporaryDirectory()
open({str(tmp_path / "where")!r}, "a").write(temporary.name + "\\n")
threading.Thread(target=lambda: (time.sleep(0.2), print(" thread"))).start()
"""
    assert left("0", body).stdout == "printed thread\nexit function\n"
    folders = (tmp_path / "where").read_text().split()
    assert len(folders) == 2 and not any(Path(folder).exists() for folder in folders)


def test_modules_are_not_taken_apart() -> None:
    """What this is for; a tracer has Python's own end."""
    body = "class Slow:\n    def __del__(self): print('freed')\nmain.kept = Slow()"

    def end(more: str) -> str:
        code = f"import sys\nfrom halfbyte.cli import main\n{body}\n{more}\nmain._leave(0)"
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert end("") == "" and end("sys.setprofile(lambda *a: None)") == "freed\n"


def test_nobody_reads_what_is_printed() -> None:
    code = "from halfbyte.cli import main\nprint('x' * 100)\nmain._leave(0)"
    env = {**os.environ, "PYTHONUNBUFFERED": ""}  # what is printed waits for the end
    reader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    assert reader.stdout is not None and reader.stderr is not None
    reader.stdout.close()
    said = reader.stderr.read()
    assert reader.wait() == 120 and b"Traceback" not in said
