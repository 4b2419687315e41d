"""`halfbyte quantize` and `halfbyte store`: build the store of a base ahead of its first use, and look over the shelf.

Cost: as the rooms in store/; verifying hashes every byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from halfbyte import base, device, inputs, shapes, store
from halfbyte.errors import BaseModelError, StoreError
from halfbyte.memory.building import Building
from halfbyte.recipe import Recipe
from halfbyte.sources.checkpoint import beside_bytes
from halfbyte.store import manifest, shelf


@dataclass(frozen=True)
class Built:
    """A store that is there now. `built` is False where it was there before; `seconds` is this call's."""

    path: Path
    manifest: manifest.Manifest
    built: bool
    seconds: float

    def to_json(self) -> dict[str, Any]:
        found = asdict(self.manifest)
        del found["files"]
        return {
            "path": str(self.path),
            "built": self.built,
            "seconds": round(self.seconds, 3),
            "bytes": self.manifest.nbytes,
            "manifest": found,
        }


def quantize(recipe: Recipe, *, out: Path | None = None, tell: store.Tell | None = None) -> Built:
    """Build the store that a run of `recipe` opens, or find it.

    Raises:
        StoreError: it cannot be built: with the reason, and what helps.
        BaseModelError: nothing is to be quantised, or the model is quantised already.
    """
    if recipe.quant.type == "none":
        raise BaseModelError("quant.type none keeps the base in 16 bits, as it is; there is nothing to quantise.")
    started, built = time.monotonic(), []
    found = inputs.find_model(recipe)
    config = base.read_config(found.path, trust_remote_code=recipe.trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise BaseModelError(
            f"{found.id} is quantised already.", fix="use it as the model of a recipe; it opens as it is"
        )
    specs = tuple(shapes.read_checkpoint(found.path)) if not found.pickle else ()
    wanted = base.want(found, config, recipe.quant, device.detect(), specs)
    telling = replace(tell or store.Tell(), built=lambda: built.append(True))
    telling.say(_preflight(wanted, specs))
    try:
        if hasattr(config, "auto_map"):
            raise store.CannotHold("it brings Python code of its own")
        path = base.ensure_store(wanted, out=out, tell=telling)
    except store.CannotHold as reason:
        raise StoreError(
            f"{found.id} cannot be held in a store: {reason}.",
            fix="nothing is needed: train, eval and chat quantise it each time they load it",
        ) from reason
    return Built(path, manifest.read(path), bool(built), time.monotonic() - started)


def _preflight(wanted: store.Wanted, specs: tuple[shapes.TensorSpec, ...]) -> str:
    """What building takes, before it begins."""
    if not specs:
        return "planned   unknown: pickled weights have no header to read"
    beside = beside_bytes(wanted.checkpoint.path)
    plan = Building(specs, wanted.quant, wanted.dtype.itemsize, wanted.config.get_text_config().vocab_size, beside)
    ram = sum(line.bytes for line in plan.lines(wanted.cores))
    return f"planned   {ram / 1e9:.2f} GB of RAM while it is built, {plan.disk_bytes / 1e9:.3f} GB on disk"


def named(names: list[str]) -> list[shelf.Shelved]:
    """The stores of the shelf that are meant: by the beginning of their key, or by their source; all for none.

    Raises:
        StoreError: a name that means none, with those that are there.
    """
    if not names:
        return [entry for entry in shelf.listing() if _is_in_place(entry)]
    chosen: dict[Path, shelf.Shelved] = {}
    for name in names:
        found = [entry for entry in shelf.find(name) if _is_in_place(entry)]
        if not found:
            there = ", ".join(entry.key for entry in shelf.listing() if _is_in_place(entry)) or "none"
            raise StoreError(f"no store is called {name}; there are: {there}.", fix="halfbyte store list")
        chosen |= {entry.path: entry for entry in found}
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
    found: dict[str, list[str]] = {}
    for i, (name, folder) in enumerate(todo):
        if progress is not None:
            progress(i, len(todo))
        try:
            found[name] = manifest.problems(folder, manifest.read(folder), full=True)
        except StoreError as error:
            found[name] = [error.message]
    return found


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
