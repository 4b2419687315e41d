"""Files and folders that are whole or absent, also after a crash or a power cut; locks, hashes, the cache folder.

A process can be killed between any two steps, and a name can reach the disk before the bytes that it names. So what is
new is written beside its place, synced, renamed, and then its folder is synced too: some milliseconds on a disk.
"""

import contextlib
import difflib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from halfbyte.system.platforms import calls
from halfbyte.system.platforms.calls import lock as lock
from halfbyte.system.platforms.calls import sync as sync

SEAL = "seal"
LARGE_BYTES = 10_000_000  # of a file that is known by its size and time


def cache_dir() -> Path:
    """Where halfbyte keeps what it converts, builds or fetches: $HALFBYTE_CACHE, else ~/.cache/halfbyte."""
    named = os.environ.get("HALFBYTE_CACHE")
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "halfbyte"


def beside(path: Path) -> Path:
    """The temporary name of this process for what will be called `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in the block that names no file, as of a full disk, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write(path: Path, content: bytes) -> None:
    """Write or replace a small file in one step. After an OSError or a kill the file is as it was before."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """The same of files that belong together: none gets its name before the disk has room for all."""
    temporary = {path: beside(path) for path in contents}
    try:
        for path, content in contents.items():
            with naming(path):
                temporary[path].write_bytes(content)
        for path in contents:
            with naming(path):
                put(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def as_json(value: Mapping[str, object]) -> bytes:
    """A JSON object on several lines; numbers that JSON has no name for (NaN, infinity) become null."""
    return (json.dumps(finite(value), indent=2) + "\n").encode()


def seal(value: Mapping[str, object]) -> dict[str, object]:
    """The object with a hash of its content, for a file whose every digit matters."""
    return {**value, SEAL: _seal_of(value)}


def is_sealed(value: Mapping[str, object]) -> bool:
    """Whether the object is as `seal` left it; True of one that was never sealed."""
    return SEAL not in value or value[SEAL] == _seal_of(value)


def _seal_of(value: Mapping[str, object]) -> str:
    unsealed = {name: part for name, part in value.items() if name != SEAL}
    return hashlib.sha256(json.dumps(unsealed, sort_keys=True).encode()).hexdigest()


def finite(value: object) -> object:
    """A copy in which every NaN and infinity is None, tuples are lists and paths are text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to write into; when the block ends it is called `path`, and an older `path` is gone. After an
    error nothing is left of it, and the older one is untouched. Its files are as readable as the folder: safetensors
    makes some that only their owner reads."""
    temporary = beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        readable = temporary.stat().st_mode & 0o444
        for file in temporary.rglob("*"):
            if not file.is_symlink():  # what it leads to may be another's
                file.chmod(file.stat().st_mode | readable)
        put(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_dead(folder: Path, name: str = "*") -> None:
    """Remove the temporary files (named by `beside`) of processes that no longer run."""
    import psutil

    for path in folder.glob(f".{name}.*"):
        if path.suffix[1:].isdigit() and not psutil.pid_exists(int(path.suffix[1:])):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def put(new: Path, path: Path) -> None:
    """Give a finished file or folder its name, durably, in place of an older one. A folder cannot be replaced in one
    step. An error puts the older one back; a process killed between the two renames leaves it under the name
    `aside(path)`. Raises IsADirectoryError where a file would replace a folder."""
    if path.is_dir() and not new.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for written in (*new.rglob("*"), new):
        sync(written)
    old = aside(path)
    if path.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        if old.exists():
            os.replace(old, path)
        raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def aside(folder: Path) -> Path:
    """Where the older folder is for the moment in which a new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def forget(path: Path) -> None:
    """Ask the system to drop a synced file's pages from memory, so that the next reader reads the disk."""
    with path.open("rb") as file:
        calls.advise(file.fileno(), "DONTNEED")


def sha256(path: Path) -> str:
    """The hash of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state(path: Path) -> dict[str, str]:
    """Each file of a folder, or one file: a hash of its bytes; of a large one that is no adapter its size and time."""
    known = {}
    for file in sorted(file for file in (path.iterdir() if path.is_dir() else (path,)) if file.is_file()):
        stat = file.stat()
        large = stat.st_size > LARGE_BYTES and not file.name.startswith("adapter")
        known[file.name] = f"{stat.st_size} {stat.st_mtime_ns}" if large else sha256(file)
    return known


def near_name(path: Path, names: Iterable[str]) -> str | None:
    """Of the names beside a path that is not there, the one that may have been meant. Endings do not count: they would
    make `a.jsonl` and `b.jsonl` alike."""
    stems = {name: Path(name).stem for name in names}
    near = difflib.get_close_matches(path.stem, list(stems.values()), n=1)
    return next((name for name, stem in stems.items() if stem in near), None)


def free_bytes(path: Path) -> int:
    """Free bytes for this user on the file system of `path`, or of its nearest parent that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def why_unwritable(folder: Path) -> str:
    """Why nothing can be written into a folder that is there or could be made; empty if something can."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return f"{there}: {error.strerror or error}"


def is_full(error: BaseException) -> bool:
    """Whether a write failed for want of space or quota; safetensors tells it in the words of its own error."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in codes
    return type(error).__name__ == "SafetensorError" and any(f"(os error {code})" in str(error) for code in codes)


def no_space(path: Path, size: int) -> str:
    """What to say when `is_full`."""
    folder = next((p for p in path.parents if p.exists()), Path("."))
    return f"no space left: writing {path} needs {size} bytes, and {folder} has {free_bytes(folder)} bytes free."


def no_room(path: Path) -> str:
    """What to say when `is_full`, and it is not known for how much."""
    return f"the disk of {path} is full ({free_bytes(path) / 1e6:.1f} MB free)"
