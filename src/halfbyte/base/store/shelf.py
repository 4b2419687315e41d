"""Where stores are kept and how they are found: by source, quantiser settings and format version; list, verify, gc.

A base is quantised once for a machine, whichever command asks first, and two processes may ask at once. `bases/KEY/`
under the cache folder is a store, `KEY.partial/` one that is being built. Locks are files of their own that are never
removed, so that nobody waits on a file that somebody else has replaced; but for the one beside a folder outside, which
its holder removes, and who has waited for it looks again.
Cost: the headers of the source's files are read to look it up; a hub model is known by its revision.
"""

import atexit
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from halfbyte.base.store import manifest
from halfbyte.errors import StoreError
from halfbyte.models.sources.checkpoint import PICKLE, PICKLE_INDEX, Checkpoint
from halfbyte.models.sources.safetensors import indexed_files, weight_files
from halfbyte.recipe import number_formats
from halfbyte.recipe.schema import Quant
from halfbyte.system import files
from halfbyte.types import Config, Document, Model

if TYPE_CHECKING:
    import torch

PARTIAL, BROKEN = ".partial", ".broken"
LOCKS, USED = ".locks", "last-used"
FOLDERS, FETCHING = ("gguf", "packaged", "tapes", "tokens"), "fetch-"
# What has been written to so lately may be under way, where no lock tells.
UNDER_WAY_S = 3600.0
_KEY = re.compile(r"[\w.-]+-[0-9a-f]{16}")
# Shared locks of the stores that this process has opened.
_in_use: dict[str, IO[str]] = {}


@atexit.register
def _let_go() -> None:
    for file in _in_use.values():
        file.close()


class CannotHold(Exception):
    """A source that cannot be a store, and why. It can still be quantised while it is loaded."""


class NotWritable(StoreError):
    """No store can be written: no space, or no permission. The source can still be quantised while it is loaded."""


@dataclass(frozen=True)
class StoreSpec:
    """A base that is to be quantised. `dtype`: the compute dtype. transformers casts to it before it quantises, so it
    is part of a store's identity. `check`: is shown the empty model and what transformers would say of the load
    (`missing_keys`, `mismatched_keys`) before anything is built, and raises what is wrong."""

    checkpoint: Checkpoint
    config: Config  # of the model, as transformers reads it
    quant: Quant
    dtype: "torch.dtype"
    head_names: tuple[str, ...] = ()  # as for `NumberFormat.load_config`
    cores: int = 1  # how many threads may compute at once
    check: Callable[[Model, Document], None] | None = None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class CacheEntry:
    """One folder of the shelf. `state`: whole, building (or interrupted), old format, or broken."""

    key: str
    path: Path
    state: str
    nbytes: int
    last_used: float
    manifest: manifest.Manifest | None
    in_use: bool

    def to_json(self) -> Document:
        store = self.manifest
        return {
            "key": self.key,
            "path": str(self.path),
            "state": self.state,
            "bytes": self.nbytes,
            "last_used": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.last_used)),
            "in_use": self.in_use,
            "source": store.source if store else None,
            "quant": store.quant if store else None,
            "content_sha256": store.content_sha256 if store else None,
        }


def folder() -> Path:
    return files.cache_dir() / "bases"


def settings(quant: Quant, dtype: str) -> Document:
    """What decides the bytes of a store besides its source. Weights are cast to the compute dtype, then quantised."""
    extra = number_formats.FORMATS[quant.type].reads.difference(number_formats.BLOCK_FIELDS)
    return {
        "type": quant.type,
        "double_quant": quant.double_quant,
        "block_size": quant.block_size,
        "compute_dtype": dtype,
        "skip_modules": sorted(quant.skip_modules),
        "fp32_modules": sorted(quant.fp32_modules),
        **{name: getattr(quant, name) for name in sorted(extra)},
    }


def key_of(checkpoint: Checkpoint, quant: Quant, dtype: str) -> str:
    """The name of the store that belongs to a source and settings: readable, and unique by its hash."""
    settled = {"source": identity(checkpoint), "quant": settings(quant, dtype), "format": manifest.FORMAT_VERSION}
    digest = hashlib.sha256(json.dumps(settled, sort_keys=True).encode()).hexdigest()[:16]
    stem = re.sub(r"[^\w.-]+", "_", Path(checkpoint.id).name)[:48].strip(".") or "base"
    return f"{stem}-{quant.type}-{digest}"


def identity(checkpoint: Checkpoint) -> Document:
    """What a source is, without reading its weights: a hub revision, or path, size, time and header of each file. Below
    the cache folder paths begin there, so that it can be moved."""
    config = hashlib.sha256((checkpoint.path / "config.json").read_bytes()).hexdigest()
    if checkpoint.kind == "hub":
        return {"hub": f"{checkpoint.id}@{checkpoint.revision}", "pickle": checkpoint.pickle, "config": config}
    parts, cache = [], files.cache_dir()
    for file in source_files(checkpoint):
        stat, path = file.stat(), file.absolute()
        name = path.relative_to(cache) if path.is_relative_to(cache) else path
        parts.append([str(name), stat.st_size, stat.st_mtime_ns, manifest.header_hash(file)])
    return {"files": parts, "config": config}


def source_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that hold the source's weights."""
    if not checkpoint.pickle:
        return weight_files(checkpoint.path)
    if (checkpoint.path / PICKLE).is_file():
        return [checkpoint.path / PICKLE]
    return [checkpoint.path / shard for shard in indexed_files(checkpoint.path / PICKLE_INDEX)]


def hold(key: str) -> None:
    """Keep `gc` away from a store while this process lives. Never fails: a cache that can only be read has no gc."""
    if key in _in_use:
        return
    file = _lock_file(key, "use")
    if file is not None and _lock(file, shared=True, wait=True):
        _in_use[key] = file


def remove_held(key: str) -> None:
    """Remove a store that this process has built and needs no longer, unless another process uses it too."""
    if (file := _in_use.pop(key, None)) is not None:
        file.close()
    if (folder() / key).is_dir():
        remove(_entry(folder() / key))


def touch(path: Path) -> None:
    """Note that a store is opened now, where that can be written."""
    with suppress(OSError):
        (path / USED).touch()


@contextmanager
def building(key: str, on_wait: Callable[[], None] | None = None, *, where: Path | None = None) -> Iterator[None]:
    """Hold the right to build a store; a second process waits, after `on_wait` was called once. `where`: a folder
    outside the shelf that is built; its lock lies beside it."""
    file = _lock_file(key, "build", where)
    if file is None:
        target = where.parent if where is not None else folder()
        raise NotWritable(
            f"no store can be built in {target}: it cannot be written.",
            fix="name a folder that you can write: "
            "export HALFBYTE_CACHE=/path/with/space, or `halfbyte quantize MODEL --out DIR`",
        )
    with file:
        if not _lock(file):
            if on_wait is not None:
                on_wait()
            _lock(file, wait=True)
        if where is not None and not _is_named(file):  # its holder has finished and removed it
            with building(key, on_wait, where=where):
                yield
            return
        try:
            yield
        finally:
            if where is not None:
                Path(file.name).unlink(missing_ok=True)


def _is_named(file: IO[str]) -> bool:
    """Whether an open file is still the one that its name stands for."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
    except FileNotFoundError:
        return False


def set_aside(path: Path) -> None:
    """Take a damaged store out of the way. Who has it mapped keeps its pages; `gc` removes what is left."""
    shutil.rmtree(_hidden(path), ignore_errors=True)


def _hidden(path: Path) -> Path:
    """A folder under a name by which no store is found, so that a half deleted one is never opened."""
    if BROKEN in path.name:
        return path
    hidden = path.with_name(f"{path.name}{BROKEN}-{os.getpid()}-{time.time_ns()}")
    os.replace(path, hidden)
    return hidden


def listing() -> list[CacheEntry]:
    """Everything on the shelf, the last used first."""
    if not folder().is_dir():
        return []
    entries = [_entry(path) for path in folder().iterdir() if path.is_dir() and path.name != LOCKS]
    return sorted(entries, key=lambda entry: -entry.last_used)


def find_stores(names: list[str]) -> list[CacheEntry]:
    """The stores that are meant: by the beginning of their key, or by their source; all for none. Raises StoreError: a
    name that means none, with those that are there."""
    # whole or not, but neither an unfinished build nor what was set aside
    there = [entry for entry in listing() if entry.path.name == entry.key]
    chosen: dict[Path, CacheEntry] = {}
    for name in names:
        meant = {
            e.path: e for e in there if e.key.startswith(name) or (e.manifest and e.manifest.source.get("id") == name)
        }
        if not meant:
            keys = ", ".join(entry.key for entry in there) or "none"
            raise StoreError(f"no store is called {name}; there are: {keys}.", fix="halfbyte store list")
        chosen |= meant
    return list(chosen.values()) if names else there


def verify(names: list[str], progress: Callable[[int, int], None] | None = None) -> dict[str, list[str]]:
    """Hash every byte of stores, on the shelf or by their folder. Key or folder -> what differs, empty if nothing."""
    todo = {name: Path(name) for name in names if (Path(name) / manifest.MANIFEST).is_file()}
    keys = [name for name in names if name not in todo]
    todo |= {entry.key: entry.path for entry in (find_stores(keys) if keys or not names else [])}
    differing: dict[str, list[str]] = {}
    for i, (name, path) in enumerate(todo.items()):
        if progress is not None:
            progress(i, len(todo))
        try:
            differing[name] = manifest.problems(path, manifest.read(path), full=True)
        except StoreError as error:
            differing[name] = [error.message]
    return differing


def collect(
    *, unused_days: float | None = None, everything: bool = False, dry_run: bool = False
) -> tuple[list[CacheEntry], list[CacheEntry]]:
    """Remove interrupted builds, damaged stores and old formats, and stores unused for so long. Returns (removed, kept
    because a process uses them)."""
    oldest = 0.0 if unused_days is None else time.time() - unused_days * 86400
    chosen = [e for e in listing() if not e.in_use and (everything or e.state != "whole" or e.last_used < oldest)]
    used = [] if dry_run else [entry for entry in chosen if not remove(entry)]
    return [entry for entry in chosen if entry not in used], used


def remove(entry: CacheEntry) -> bool:
    """Delete one folder of the shelf unless a process builds or uses it. Returns whether it is gone."""
    locks = [_lock_file(entry.key, kind) for kind in ("build", "use")]
    try:
        if not all(file is not None and _lock(file) for file in locks):
            return False
        shutil.rmtree(_hidden(entry.path))
    except OSError as error:
        raise StoreError(f"{entry.path} cannot be removed: {error.strerror or error}.") from error
    finally:
        for file in locks:
            if file is not None:
                file.close()
    return True


def _entry(path: Path) -> CacheEntry:
    key = _KEY.match(path.name)
    name = key[0] if key is not None else path.name
    store, state = None, "building" if path.name == name + PARTIAL else "broken"
    if path.name == name:
        try:
            store = manifest.read(path)
            state = "broken" if manifest.problems(path, store) else "whole"
        except StoreError as error:
            state = "old format" if "of format" in error.message else "broken"
    nbytes, touched = size_and_age(path)
    return CacheEntry(name, path, state, nbytes, touched, store, _busy(name))


def size_and_age(path: Path) -> tuple[int, float]:
    """Bytes of a file or of all files in a folder, and when the last of them was written."""
    nbytes, touched = 0, 0.0
    for file in path.rglob("*") if path.is_dir() else (path,):
        with suppress(OSError):
            stat = file.stat()
            if not file.is_dir():
                nbytes, touched = nbytes + stat.st_size, max(touched, stat.st_mtime)
    return nbytes, touched


def _busy(key: str) -> bool:
    """Whether a process builds or uses a store."""
    for kind in ("build", "use"):
        with suppress(OSError), (folder() / LOCKS / f"{key}.{kind}").open("r+") as file:
            if not _lock(file):
                return True
    return False


def _lock_file(key: str, kind: str, where: Path | None = None) -> IO[str] | None:
    """An open lock file, or None where none can be made."""
    path = folder() / LOCKS / f"{key}.{kind}" if where is None else where.with_name(f".{where.name}.{kind}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")
    except OSError:
        return None


def _lock(file: IO[str], *, shared: bool = False, wait: bool = False) -> bool:
    """Lock an open file until it is closed."""
    try:
        return files.lock(file, shared=shared, wait=wait)
    except OSError as error:
        raise StoreError(f"{file.name} cannot be locked: {error.strerror or error}.") from error


def listing_beside() -> list[CacheEntry]:
    """What lies in the cache beside the stores, the last used first: converted GGUF files, packaged models, rows as
    tokens. All of it can be made or fetched again. A folder that is a link is somebody else's, and is left out."""
    folders = [files.cache_dir() / name for name in FOLDERS]
    entries = [_beside(path) for folder in folders if not folder.is_symlink() for path in _inside(folder)]
    return sorted(entries, key=lambda entry: -entry.last_used)


def collect_beside(*, unused_days: float | None, everything: bool, dry_run: bool) -> list[CacheEntry]:
    """Remove of that what was interrupted; tokens unused for so long; with `everything`, all that is not under way. Of
    conversions and packaged models it is not known when they were last used."""
    oldest = 0.0 if unused_days is None else time.time() - unused_days * 86400
    chosen = [
        entry
        for entry in listing_beside()
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


def _beside(path: Path) -> CacheEntry:
    half = path.name.endswith(PARTIAL) or path.name.startswith(FETCHING)
    nbytes, touched = size_and_age(path)
    busy = half and time.time() - touched < UNDER_WAY_S
    lock = path.with_name(path.name.removesuffix(PARTIAL) + ".lock")
    if half and lock.is_file():
        with lock.open("a") as file:
            busy = not files.lock(file, wait=False)
    state = "interrupted" if half else "whole"
    return CacheEntry(f"{path.parent.name}/{path.name}", path, state, nbytes, touched, None, busy)
