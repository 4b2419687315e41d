"""The hash of a file's bytes, looked up where the file has not changed since it was hashed.

Why: what is cached must follow from the content of files, and hashing gigabytes at every start takes seconds.
What: beside the hash of a large file stand its size, inode and times of modification and of change, to the nanosecond;
any of them changed, it is hashed again. A file that changed in the last seconds is not noted: it could change once more
within the same tick of the clock.
Cost: SHA-256, about 1 GB/s, once; then a `stat`.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.errors import DataError
from halfbyte.system import files
from halfbyte.system.files import cache_dir

if TYPE_CHECKING:
    from halfbyte.types import Document

LARGE_BYTES = 64_000_000  # smaller files are hashed in no time
SETTLED_S = 2.0
MOST_FILES = 1000


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits.

    Raises:
        DataError: it cannot be read.
    """
    try:
        before = path.stat()
        if before.st_size < LARGE_BYTES:
            return files.sha256(path)
        name, stamp = str(path.resolve()), _stamp(before)
        known = _known()
        if known.get(name, {}).get("stamp") == stamp:
            return str(known[name]["digest"])
        fresh = files.sha256(path)
        settled = time.time() - max(before.st_mtime, before.st_ctime) >= SETTLED_S
        if settled and _stamp(path.stat()) == stamp:
            _note(name, {"stamp": stamp, "digest": fresh})
        return fresh
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _stamp(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _notes() -> Path:
    return cache_dir() / "tokens" / "digests.json"


def _known() -> Document:
    try:
        known = json.loads(_notes().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(known, dict) and all(
        isinstance(v, dict) and {"stamp", "digest"} <= set(v) for v in known.values()
    )
    return known if whole else {}


def _note(name: str, value: Document) -> None:
    """Keep a hash, the latest last. A disk that cannot be written keeps nothing."""
    known = {k: v for k, v in _known().items() if k != name} | {name: value}
    with contextlib.suppress(OSError):
        _notes().parent.mkdir(parents=True, exist_ok=True)
        files.write(_notes(), files.as_json(dict(list(known.items())[-MOST_FILES:])))
