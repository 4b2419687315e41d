"""The manifest of a store: what it was made from, how, and each file's size and hash. It is written last.

A folder without a manifest is no store, so a half store can never look whole.
Cost: checking sizes and headers of a 7B store takes milliseconds; hashing it whole, seconds.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from halfbyte.errors import StoreError
from halfbyte.system import files
from halfbyte.system.platforms import calls
from halfbyte.types import Document

MANIFEST = "halfbyte-store.json"
# Raised when what a store holds changes, so that older ones are neither found nor opened.
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Entry:
    """One file: its bytes, its whole hash, and that of its safetensors header (the whole file's for other files)."""

    name: str
    nbytes: int
    sha256: str
    header_sha256: str


@dataclass(frozen=True)
class Manifest:
    """`source` says id, kind, revision and folder; `content_sha256` is over every tensor that was read, by name."""

    key: str
    source: Document
    content_sha256: str
    quant: Document
    parameters: int
    seconds: float
    created: str
    files: tuple[Entry, ...]
    format: int = FORMAT_VERSION

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.files)


def write(folder: Path, manifest: Manifest) -> None:
    """Put the manifest in its place, whole or not at all, and durably."""
    files.write(folder / MANIFEST, json.dumps(asdict(manifest), indent=1).encode() + b"\n")


def check_place(out: Path | None) -> None:
    """Raise a StoreError for a place of a new store that has something else already."""
    if out is not None and (out.exists() or out.is_symlink()):
        try:
            read(out)
        except StoreError as error:
            raise StoreError(error.message, fix="name another folder: --out DIR") from None


def read(folder: Path) -> Manifest:
    """The manifest of a folder. Raises StoreError: none is there, it is not one, or it is of another format version."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{folder} is not a store: it has no {MANIFEST}, which is written last.") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}.") from error
    version = values.get("format") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{folder} is a store of format {version}, and this halfbyte reads format {FORMAT_VERSION}.",
            fix="build it again: halfbyte quantize MODEL",
        )
    try:
        return Manifest(files=tuple(Entry(**entry) for entry in values.pop("files")), **values)
    except (TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"{path} is not a manifest of a store: {error}.") from error


def problems(folder: Path, manifest: Manifest, *, full: bool = False) -> list[str]:
    """What differs from the manifest; empty for a whole store. `full`: hash every byte, not only sizes and headers."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        every = pool.map(lambda entry: problem(folder / entry.name, entry, full=full), manifest.files)
        return [each for each in every if each]


def entry_of(path: Path) -> Entry:
    """Size and hashes of a file as it lies on the disk."""
    whole = files.sha256(path)
    return Entry(path.name, path.stat().st_size, whole, header_hash(path) or whole)


def header_hash(path: Path) -> str | None:
    """sha256 of a safetensors file's length and header; None for other files."""
    if path.suffix != ".safetensors":
        return None
    with path.open("rb") as file:
        calls.advise(file.fileno(), "RANDOM")  # the header, and not what the disk reads ahead
        start = file.read(8)
        return hashlib.sha256(start + file.read(int.from_bytes(start, "little") % (1 << 30))).hexdigest()


def tree_hash(parts: Iterable[tuple[str, str]]) -> str:
    """One hash for many named ones, whatever their order."""
    lines = "".join(f"{name}\0{value}\n" for name, value in sorted(parts))
    return hashlib.sha256(lines.encode()).hexdigest()


def problem(path: Path, entry: Entry, *, full: bool) -> str | None:
    """What differs from the manifest in one file, or None."""
    try:
        size = path.stat().st_size
        if size != entry.nbytes:
            return f"{entry.name} has {size:,} bytes, not {entry.nbytes:,}"
        if entry.name.endswith(".safetensors") and header_hash(path) != entry.header_sha256:
            return f"the header of {entry.name} has changed"
        if (full or entry.name == "config.json") and files.sha256(path) != entry.sha256:
            how = "changed" if entry.name == "config.json" else "another sha256 than when it was built"
            return f"{entry.name} has {how}"
    except FileNotFoundError:
        return f"{entry.name} is missing"
    except OSError as error:
        return f"{entry.name} cannot be read: {error.strerror or error}"
    return None
