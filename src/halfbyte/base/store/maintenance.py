"""`halfbyte store`: look the shelf over, verify what is on it, and remove what is not needed.

Cost: verifying hashes every byte.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from halfbyte.base.store import manifest, shelf
from halfbyte.errors import StoreError


def named(names: list[str]) -> list[shelf.Shelved]:
    """The stores of the shelf that are meant: by the beginning of their key, or by their source; all for none.

    Raises:
        StoreError: a name that means none, with those that are there.
    """
    if not names:
        return [entry for entry in shelf.listing() if _is_in_place(entry)]
    chosen: dict[Path, shelf.Shelved] = {}
    for name in names:
        meant = [entry for entry in shelf.find(name) if _is_in_place(entry)]
        if not meant:
            there = ", ".join(entry.key for entry in shelf.listing() if _is_in_place(entry)) or "none"
            raise StoreError(f"no store is called {name}; there are: {there}.", fix="halfbyte store list")
        chosen |= {entry.path: entry for entry in meant}
    return list(chosen.values())


def _is_in_place(entry: shelf.Shelved) -> bool:
    """Whether a command finds it as a store, whole or not: neither an unfinished build nor what was set aside."""
    return entry.path.name == entry.key


def verify(names: list[str], progress: Callable[[int, int], None] | None = None) -> dict[str, list[str]]:
    """Hash every byte of stores, on the shelf or by their folder. Key or folder -> what differs, empty if nothing."""
    folders = [Path(name) for name in names if (Path(name) / manifest.MANIFEST).is_file()]
    keys = [name for name in names if Path(name) not in folders]
    entries = named(keys) if keys or not names else []
    todo = [(str(folder), folder) for folder in folders] + [(entry.key, entry.path) for entry in entries]
    differing: dict[str, list[str]] = {}
    for i, (name, folder) in enumerate(todo):
        if progress is not None:
            progress(i, len(todo))
        try:
            differing[name] = manifest.problems(folder, manifest.read(folder), full=True)
        except StoreError as error:
            differing[name] = [error.message]
    return differing


def collect(
    *, unused_days: float | None = None, everything: bool = False, dry_run: bool = False
) -> tuple[list[shelf.Shelved], list[shelf.Shelved]]:
    """Remove interrupted builds, damaged stores and old formats, and stores unused for so long. Returns (removed, kept
    because a process uses them)."""
    chosen = shelf.collectable(unused_days=unused_days, everything=everything)
    if dry_run:
        return chosen, []
    gone = [shelf.remove(entry) for entry in chosen]
    return (
        [entry for entry, removed in zip(chosen, gone, strict=True) if removed],
        [entry for entry, removed in zip(chosen, gone, strict=True) if not removed],
    )
