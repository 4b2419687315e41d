"""What lies in halfbyte's cache beside the stores: converted GGUF files, packaged models, rows as tokens.

All of it can be made or fetched again; it is listed, and it goes, with the stores.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from halfbyte.base.store.shelf import PARTIAL, Shelved, size_and_age
from halfbyte.errors import StoreError
from halfbyte.system import files

FOLDERS = ("gguf", "packaged", "tokens")
FETCHING = "fetch-"
# What has been written to so lately may be under way, where no lock tells.
UNDER_WAY_S = 3600.0


def listing() -> list[Shelved]:
    """Everything there, the last used first. A folder that is a link is somebody else's, and is left out."""
    folders = [files.cache_dir() / name for name in FOLDERS]
    entries = [_entry(path) for folder in folders if not folder.is_symlink() for path in _inside(folder)]
    return sorted(entries, key=lambda entry: -entry.last_used)


def collect(*, unused_days: float | None, everything: bool, dry_run: bool) -> list[Shelved]:
    """Remove what was interrupted; tokens unused for so long; with `everything`, all that is not under way. Of
    conversions and packaged models it is not known when they were last used."""
    oldest = 0.0 if unused_days is None else time.time() - unused_days * 86400
    chosen = [
        entry
        for entry in listing()
        if not entry.in_use
        and (everything or entry.state != "whole" or (entry.path.suffix == ".arrow" and entry.last_used < oldest))
    ]
    for entry in () if dry_run else chosen:
        try:
            shutil.rmtree(entry.path) if entry.path.is_dir() else entry.path.unlink()
        except OSError as error:
            raise StoreError(f"{entry.path} cannot be removed: {error.strerror or error}.") from error
    return chosen


def _inside(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from (path for path in folder.iterdir() if path.suffix not in (".lock", ".json"))


def _entry(path: Path) -> Shelved:
    half = path.name.endswith(PARTIAL) or path.name.startswith(FETCHING)
    nbytes, touched = size_and_age(path)
    busy = half and time.time() - touched < UNDER_WAY_S
    lock = path.with_name(path.name.removesuffix(PARTIAL) + ".lock")
    if half and lock.is_file():
        with lock.open("a") as file:
            busy = not files.lock(file, wait=False)
    state = "interrupted" if half else "whole"
    return Shelved(f"{path.parent.name}/{path.name}", path, state, nbytes, touched, None, busy)
