"""Commands of halfbyte, one after another, by a process that stays: `python -m halfbyte.cli.worker`, for a page.

What: a line of JSON in, the words of a command; a line out, its exit code and what it printed. It ends when nothing is
asked for `REST_S`, and when a command takes longer than `LIMIT_S`.
Cost: the libraries, once.
"""

import json
import os
import select
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from halfbyte.cli import main
from halfbyte.system import libraries

REST_S, LIMIT_S = 180, 120


def answer(words: list[str]) -> dict[str, object]:
    """How a command ended and what it printed."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main._guard(lambda: main.app(words), words)
        except SystemExit as left:
            code = int(left.code or 0)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def work() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    with libraries.loading():
        from halfbyte.training import preview  # noqa: F401
    while select.select([sys.stdin], [], [], REST_S)[0] and (line := sys.stdin.readline()):
        signal.alarm(LIMIT_S)
        answers.write(json.dumps(answer(json.loads(line))) + "\n")
        answers.flush()
        signal.alarm(0)


if __name__ == "__main__":
    work()
