"""Calls that not every system has, and what stands in for them: the one door to them.

Why: Windows has no flock, no reads at an offset, no `resource`, no fsync of folders; macOS no `posix_fadvise` and no
affinity. Code that asks here runs on all of them.
Source: Python's `os`, `fcntl`, `resource` pages ("Availability"); portalocker (LockFileEx) and psutil where they lack.
Cost: none on Linux, where each is the system's own call.
"""

import os
import sys
import threading
from pathlib import Path
from typing import IO

try:
    import fcntl

    _HAS_FLOCK = True
except ImportError:  # Windows
    _HAS_FLOCK = False

BINARY: int = getattr(os, "O_BINARY", 0)  # without it Windows changes line ends
_SEEK = threading.Lock()


def lock(file: IO[str], *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file until it is closed; False if another process holds it and `wait` is False. On POSIX a child
    that inherits the descriptor keeps the lock, also when this process is killed. On Windows nobody else can read the
    file meanwhile."""
    if _HAS_FLOCK:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True
    import portalocker

    flags = portalocker.LockFlags.SHARED if shared else portalocker.LockFlags.EXCLUSIVE
    try:
        portalocker.lock(file, flags if wait else flags | portalocker.LockFlags.NON_BLOCKING)
    except portalocker.AlreadyLocked:
        return False
    return True


def handed_on(descriptor: int) -> tuple[int, ...]:
    """`pass_fds` of a child that is to keep a descriptor; nothing where children inherit none (Windows)."""
    return () if sys.platform == "win32" else (descriptor,)


def text(path: Path) -> str:
    """A small system file, or nothing where it does not exist or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def alias(link: Path, target: Path) -> None:
    """Another name for a file: a symbolic link, or a hard one where users may not make those (Windows)."""
    try:
        link.symlink_to(target)
    except OSError:
        os.link(target, link)


def read_at(descriptor: int, into: memoryview, at: int) -> int:
    """Read bytes from an offset of a file, at most as many as there is room for; 0 at its end."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [into], at)
    with _SEEK:
        os.lseek(descriptor, at, os.SEEK_SET)
        got = os.read(descriptor, len(into))
    into[: len(got)] = got
    return len(got)


def write_at(descriptor: int, data: memoryview, at: int) -> int:
    """Write bytes at an offset of a file; the system may take less than all."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, at)
    with _SEEK:
        os.lseek(descriptor, at, os.SEEK_SET)
        return os.write(descriptor, data)


def advise(descriptor: int, what: str, start: int = 0, count: int = 0) -> None:
    """Tell the system how a range of a file is read (SEQUENTIAL, RANDOM, DONTNEED), where it can be told."""
    advice = getattr(os, f"POSIX_FADV_{what}", None)
    if advice is not None:
        os.posix_fadvise(descriptor, start, count, advice)


def sync(path: Path) -> None:
    """Make a file's bytes or a folder's names durable; folders only where the system can open them."""
    try:
        # Windows flushes what is open for writing alone
        descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    except OSError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    import psutil

    asked = getattr(psutil.Process(), "cpu_affinity", None)  # Windows has one, macOS has not
    return len(asked()) if asked is not None else os.cpu_count() or 1


def peak_resident() -> int:
    """The most bytes that this process has had in memory."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        has = psutil.Process().memory_info()
        return int(getattr(has, "peak_wset", has.rss))
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
