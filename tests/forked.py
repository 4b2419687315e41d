"""`python -m MODULE` in a process of its own, forked from one that has imported everything once
(`distributed.together`): for what takes a process, such as signals, a terminal or what a child of ours is asked,
without the seconds in which it would import."""

from __future__ import annotations

import io
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed import together


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def _child(words: tuple[str, ...], env: dict[str, str], stdin: str, stdout: str, stderr: str) -> None:
    os.setsid()  # so that a terminal that is opened is this process's own
    os.environ.clear()
    os.environ.update(env)
    for number, (path, flags) in enumerate(((stdin, os.O_RDWR), (stdout, os.O_WRONLY), (stderr, os.O_WRONLY))):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv = list(words)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


class Forked:
    """`python -m *words` in the current folder, on a terminal or with what it prints in files."""

    def __init__(self, *words: str, terminal: str | None = None, **env: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        files = [Path(self._folder.name, name) for name in ("out", "err")]
        for file in files:
            file.touch()
        streams = [terminal] * 3 if terminal else [os.devnull, *map(str, files)]
        given = (words, {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}, *streams)
        self._process: Any = together.server().Process(target=_child, args=given)
        self._process.start()

    @property
    def running(self) -> bool:
        return self._process.exitcode is None

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def end(self, seconds: float = 240) -> Ended:
        """Wait for its end, which -9 is the code of where it was killed."""
        self._process.join(seconds)
        code = self._process.exitcode
        out, err = (Path(self._folder.name, name).read_text() for name in ("out", "err"))
        if code is None:
            self._process.kill()
            raise AssertionError(f"not back after {seconds} s: {out}\n{err}")
        return Ended(code, out, err)


def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of `[python, "-P", "-m", *words]`."""
    assert command[:3] == [sys.executable, "-P", "-m"]
    ended = Forked(*command[3:]).end()
    return subprocess.CompletedProcess(command, ended.code, ended.out, ended.err)


class Popen:
    """`subprocess.Popen` of the same, over before it is asked."""

    def __init__(self, command: list[str], *, env: dict[str, str], stderr: Any, **_: Any) -> None:
        ended = Forked(*command[3:], **env).end()
        self.stdout, self._code = io.StringIO(ended.out), ended.code
        stderr.write(ended.err)

    def wait(self) -> int:
        return self._code

    def kill(self) -> None: ...

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, *_: object) -> None: ...
