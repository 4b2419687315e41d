"""files.py: at every moment of a kill or a failure a file or a folder is as it was before, or whole and new."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from halfbyte.system import files


def refuse(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill(folder: Path, content: str) -> Path:
    """A folder with a file, and with one in a folder of its own."""
    (folder / "deep").mkdir(parents=True)
    for name in ("a", "deep/b"):
        (folder / name).write_text(content)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["write_bytes", "fsync", "replace"])
def test_a_file_is_as_it_was_when_a_step_fails(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    files.write(path, b"before")
    with monkeypatch.context() as patch:
        patch.setattr(Path if step == "write_bytes" else os, step, refuse)
        with pytest.raises(OSError, match="No space"):
            files.write(path, b"after, and longer")
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["x.json"]
    files.write(path, b"after")
    assert path.read_bytes() == b"after" and os.listdir(tmp_path) == ["x.json"]


def test_files_that_belong_together_are_as_they_were_when_one_finds_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, scores = tmp_path / "answers", tmp_path / "scores"
    files.write_together({answers: b"1", scores: b"1"})
    real = Path.write_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda path, data: refuse() if b"no room" in data else real(path, data))
        with pytest.raises(OSError, match="No space") as error:
            files.write_together({answers: b"2", scores: b"no room"})
    assert error.value.filename == str(scores)
    assert (answers.read_bytes(), scores.read_bytes()) == (b"1", b"1")
    assert sorted(os.listdir(tmp_path)) == ["answers", "scores"]


KILLED = """
import os, signal, sys
from pathlib import Path
from halfbyte.system import files
calls, step, after = [], sys.argv[2], int(sys.argv[3])
real = getattr(os, step)
def killed(*args):
    calls.append(args)
    if len(calls) == after:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
path = Path(sys.argv[1])
setattr(os, step, killed)
if path.is_dir():
    with files.new_folder(path) as folder:
        (folder / "deep").mkdir()
        (folder / "a").write_text("new")
        (folder / "deep" / "b").write_text("new")
else:
    files.write(path, b"new")
"""


def killed_at(path: Path, step: str, after: int) -> None:
    """Replace `path` in a process that kills itself before its call number `after` of `os.step`."""
    code = subprocess.run([sys.executable, "-c", KILLED, str(path), step, str(after)]).returncode
    assert code == -signal.SIGKILL


@pytest.mark.parametrize(("step", "after", "left"), [("fsync", 1, "old"), ("replace", 1, "old"), ("fsync", 2, "new")])
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(step: str, after: int, left: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    killed_at(path, step, after)
    assert path.read_text() == left


def test_bytes_are_on_the_disk_before_their_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = files.sync, os.replace
    monkeypatch.setattr(files, "sync", lambda path: (done.append(f"sync {path.name}"), sync(path)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(f"name {Path(b).name}"), replace(a, b)))
    files.write(tmp_path / "x", b"1")
    assert done == [f"sync .x.{os.getpid()}", "name x", f"sync {tmp_path.name}"]
    done.clear()
    files.put(fill(tmp_path / "new", "1"), tmp_path / "folder")
    assert sorted(done[:-2]) == ["sync a", "sync b", "sync deep", "sync new"]
    assert done[-2:] == ["name folder", f"sync {tmp_path.name}"]


def test_numbers_that_json_has_no_name_for_become_null() -> None:
    value = {"a": float("nan"), "b": [float("-inf"), (1, Path("x"))], 3: {"c": 1.5}}
    assert files.as_json(value).endswith(b"}\n")
    assert json.loads(files.as_json(value)) == {"a": None, "b": [None, [1, "x"]], "3": {"c": 1.5}}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device without space")
def test_a_full_disk_is_known_and_said_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "not there" / "report.json"
    with pytest.raises(OSError, match="No space") as full:
        Path("/dev/full").write_bytes(b"12345678")
    assert files.is_full(full.value) and files.is_full(OSError(errno.EDQUOT, ""))
    assert not files.is_full(PermissionError(errno.EACCES, ""))
    free = shutil.disk_usage(tmp_path).free
    said = files.no_space(path, 8)
    assert said.startswith(f"no space left: writing {path} needs 8 bytes, and {tmp_path} has ")
    assert abs(int(said.split()[-3]) - free) < 1e9  # others write meanwhile
    assert abs(files.free_bytes(path) - free) < 1e9


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    path = fill(tmp_path / "x", "old")
    (path / "only before").touch()
    with files.new_folder(path) as folder:
        fill(folder, "new")
        assert content(path)["a"] == "old"
    assert content(path) == {"a": "new", "deep/b": "new"}
    assert os.listdir(tmp_path) == ["x"]


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "beside", lambda path: Path("/dev/full"))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(OSError, match="No space") as error:
        files.write(tmp_path / "x", b"y" * 100_000)
    assert error.value.filename == str(tmp_path / "x") and files.is_full(error.value)


def test_files_of_a_folder_are_as_readable_as_it_is(tmp_path: Path) -> None:
    (elsewhere := tmp_path / "key").touch(0o600)
    with files.new_folder(tmp_path / "x") as folder:
        for name in ("a", "b"):
            (folder / name).touch(0o600)
        (folder / "c").symlink_to(elsewhere)
        folder.chmod(0o750)
    assert {(tmp_path / "x" / name).stat().st_mode & 0o777 for name in ("a", "b")} == {0o640}
    assert elsewhere.stat().st_mode & 0o777 == 0o600


def test_a_file_takes_the_place_of_no_folder(tmp_path: Path) -> None:
    folder = fill(tmp_path / "x", "old")
    with pytest.raises(IsADirectoryError):
        files.write(folder, b"page")
    assert content(folder) == {"a": "old", "deep/b": "old"} and os.listdir(tmp_path) == ["x"]


def second_rename(patch: pytest.MonkeyPatch) -> None:
    replace, calls = os.replace, []

    def once(a: Path, b: Path) -> None:
        calls.append(a)
        refuse() if len(calls) == 2 else replace(a, b)

    patch.setattr(os, "replace", once)


def full(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "fsync", refuse)


def no_rename(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "replace", refuse)


@pytest.mark.parametrize(
    ("failing", "there"), [(full, True), (full, False), (no_rename, True), (no_rename, False), (second_rename, True)]
)
def test_a_folder_is_as_it_was_when_a_step_fails(
    failing: Callable[[pytest.MonkeyPatch], None], there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fill(tmp_path / "x", "old") if there else tmp_path / "x"
    with monkeypatch.context() as patch:
        failing(patch)
        with pytest.raises(OSError, match="No space"), files.new_folder(path) as folder:
            fill(folder, "new")
    assert content(tmp_path) == ({"x/a": "old", "x/deep/b": "old"} if there else {})
    assert os.listdir(tmp_path) == (["x"] if there else [])


@pytest.mark.parametrize(("step", "after"), [("fsync", 1), ("replace", 1), ("replace", 2), ("fsync", 5)])
def test_a_killed_writer_leaves_a_whole_folder(step: str, after: int, tmp_path: Path) -> None:
    """Under its name, or, between the two renames, under the name for which readers look then."""
    path = fill(tmp_path / "x", "old")
    killed_at(path, step, after)
    between = (step, after) == ("replace", 2)
    assert path.exists() is not between
    left = "new" if (step, after) == ("fsync", 5) else "old"  # 4 syncs of what is new, then that of its name
    assert content(files.aside(path) if between else path) == {"a": left, "deep/b": left}
    with files.new_folder(path) as folder:  # the next writer is not hindered by what was left
        fill(folder, "next")
    assert content(path) == {"a": "next", "deep/b": "next"} and not files.aside(path).exists()


# --- locks, hashes, the cache folder -------------------------------------------------------------------------------

HOLD = """
import sys
from halfbyte.system import files
with open(sys.argv[1], "a") as file:
    files.lock(file, shared=sys.argv[2] == "shared")
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("shared", [False, True])
def test_a_lock_is_held_by_one_process_until_it_ends(shared: bool, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path), "shared" if shared else "alone"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert tried(path, shared=False) is False
        assert tried(path, shared=True) is shared
        other.kill()
    assert tried(path, shared=False) is True


def tried(path: Path, *, shared: bool) -> bool:
    file: IO[str]
    with path.open("a") as file:
        return files.lock(file, shared=shared, wait=False)


@pytest.mark.parametrize("size", [0, 1, 1_000_003])
def test_the_hash_is_of_every_byte(size: int, tmp_path: Path) -> None:
    data = os.urandom(size)
    (tmp_path / "x").write_bytes(data)
    assert files.sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_the_cache_folder_is_the_named_one_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for named, expected in (("~/mine", tmp_path / "mine"), ("rel", Path.cwd() / "rel")):
        monkeypatch.setenv("HALFBYTE_CACHE", named)
        assert files.cache_dir() == expected
    monkeypatch.delenv("HALFBYTE_CACHE")
    assert files.cache_dir() == tmp_path / ".cache" / "halfbyte"


def test_what_dead_writers_left_is_cleared_and_nothing_else(tmp_path: Path) -> None:
    dead, names = 2**22 + 1, ("report.json", "best")  # above the largest pid
    for name in names:
        (tmp_path / f".{name}.{dead}").mkdir()
        (tmp_path / f".{name}.{dead}" / "weights").write_text("half")
        (tmp_path / f".{name}.{os.getpid()}").write_text("mine")
    (tmp_path / ".best.old").mkdir()
    (tmp_path / f"step.{dead}").write_text("a name of someone's own")
    files.clear_dead(tmp_path, "best")
    assert (tmp_path / f".report.json.{dead}").exists() and not (tmp_path / f".best.{dead}").exists()
    files.clear_dead(tmp_path)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {f".report.json.{os.getpid()}", f".best.{os.getpid()}", ".best.old", f"step.{dead}"}
