"""calls.py: each stand-in does what the system's own call does, seen with that call taken away."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from halfbyte.models.sources.checkpoint import locked
from halfbyte.runs.folder import RunFolder
from halfbyte.system import files
from halfbyte.system.platforms import calls

HOLD = """
import sys
from halfbyte.system.platforms import calls
calls._HAS_FLOCK = sys.argv[3] == "flock"
file = open(sys.argv[1], "a+")
calls.lock(file, shared=sys.argv[2] == "shared")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("own", [True, False])
def test_bytes_at_an_offset(own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not own:
        monkeypatch.delattr(os, "preadv")
        monkeypatch.delattr(os, "pwrite")
    path, content = tmp_path / "file", bytes(range(10, 14)) + b"\r\n\x1a"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | calls.BINARY)
    try:
        assert calls.write_at(descriptor, memoryview(content), 5) == len(content)
        assert calls.write_at(descriptor, memoryview(b"ab"), 0) == 2
        assert path.read_bytes() == b"ab\0\0\0" + content
        into = memoryview(bytearray(20))
        assert calls.read_at(descriptor, into, 6) == len(content) - 1
        assert bytes(into[: len(content) - 1]) == content[1:]
        assert calls.read_at(descriptor, into, 100) == 0
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_lock_is_held_until_its_process_ends(
    own: bool, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By flock, and by portalocker where there is none."""
    monkeypatch.setattr(calls, "_HAS_FLOCK", own)
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path), "shared" if shared else "alone", "flock" if own else "none"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with path.open("a+") as file, path.open("a+") as another:
        assert not calls.lock(file, wait=False)
        assert calls.lock(another, shared=True, wait=False) == shared
    holder.communicate("")
    with path.open("a+") as file:
        assert calls.lock(file, wait=False)


def test_a_run_whose_lock_cannot_be_read_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows lets nobody read a locked file."""
    run = RunFolder.create(tmp_path / "run", "model: m\n")
    (run.path / "lock").write_text("77")
    monkeypatch.setattr(files, "lock", lambda *_, **__: False)
    assert run.writer() == "77"

    class Unreadable:
        def __enter__(self) -> Unreadable:
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self) -> str:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", lambda *_, **__: Unreadable())
    assert run.writer() == "unknown"


def test_a_name_is_given_where_no_symbolic_link_may_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("content")
    calls.alias(tmp_path / "one", tmp_path / "file")
    assert (tmp_path / "one").is_symlink()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(1, "A required privilege is not held by the client")

    monkeypatch.setattr(os, "symlink", refuse)
    calls.alias(tmp_path / "two", tmp_path / "file")
    assert not (tmp_path / "two").is_symlink() and (tmp_path / "two").read_text() == "content"


def test_children_inherit_a_lock_only_where_they_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path / "lock") as descriptor:
        assert calls.handed_on(descriptor) == (descriptor,)
        monkeypatch.setattr(sys, "platform", "win32")
        assert calls.handed_on(descriptor) == ()


def test_cores_are_those_that_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the system, by psutil (Windows), else all (macOS)."""
    allowed = len(os.sched_getaffinity(0))
    assert calls.cores() == allowed
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: [0, 2, 5])
    assert calls.cores() == 3
    monkeypatch.delattr(psutil.Process, "cpu_affinity")
    assert calls.cores() == os.cpu_count()


def test_the_peak_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls.peak_resident() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    monkeypatch.setitem(sys.modules, "resource", None)
    held = psutil.Process().memory_info().rss
    assert 0.5 * held < calls.peak_resident() < 2 * held  # Linux's psutil tells no peak


def test_advice_is_given_where_it_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[tuple[int, ...]]()
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: told.append(args))
    calls.advise(5, "RANDOM", 10, 20)
    assert told == [(5, 10, 20, os.POSIX_FADV_RANDOM)]
    monkeypatch.delattr(os, "POSIX_FADV_RANDOM")
    calls.advise(5, "RANDOM")
    assert len(told) == 1
