"""Commands of halfbyte, one after another, by a process that stays: `python -m halfbyte.cli.worker`, for a page. A line
of JSON in, the words of a command; a line out, its exit code and what it printed."""

import json
import os
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from halfbyte.cli import main
from halfbyte.system import libraries

LIMIT_S = 120


def answer(words: list[str]) -> dict[str, object]:
    """How a command ended and what it printed."""
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            code = main._guard(lambda: main.app(words), words)
        except SystemExit as left:
            code = int(left.code or 0)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer
    with libraries.loading():
        from halfbyte.training import preview  # noqa: F401
    for line in sys.stdin:
        signal.alarm(LIMIT_S)  # ends the process, and so the command
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)
        signal.alarm(0)
