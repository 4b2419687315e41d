"""The store of a base, found or built: `ensure`. And whether a store is whole: `verify`.

The plain stack quantises at every load, with the 16-bit weights in memory; a store opens in the time of reading
headers, with plain `from_pretrained`, and its pages belong to the file, not to the process.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

from halfbyte.base.store import build, in_file, layout, manifest, reading, shelf
from halfbyte.errors import StoreError

DAMAGED = "a damaged store is built again"


@dataclass(frozen=True)
class Tell:
    """Whom to tell what: `progress` about ten times a second while building, `note` (a label, a text) now and then, and
    `built` once if this call has built the store."""

    progress: Callable[[build.Progress], None] | None = None
    note: Callable[[str, str], None] | None = None
    built: Callable[[], None] | None = None

    def say(self, text: str, label: str = "base") -> None:
        if self.note is not None:
            self.note(label, text)


def ensure(spec: shelf.StoreSpec, *, out: Path | None = None, tell: Tell | None = None) -> Path:
    """The folder of the store: found and checked cheaply, or built now.

    Args:
        out: build there instead of on the shelf; must not exist, or hold this very store.

    Raises:
        StoreError: it cannot be built (NotWritable: for want of space or permission).
        BaseModelError: the source is not whole, or holds weights that are not finite.
        CannotHold: this source can only be quantised while it is loaded.
    """
    tell = tell or Tell()
    key = shelf.key_of(spec.checkpoint, spec.quant, spec.dtype_name)
    target = out.absolute() if out is not None else shelf.folder() / key
    if out is None:
        shelf.hold(key)
    if (whole := _complete_store(target, key)) is not None:
        return whole
    waiting = f"another process builds the store of {spec.checkpoint.id}; waiting for it"
    with shelf.building(key, lambda: tell.say(waiting), where=out and target):
        # It may have been built while this process waited.
        if (whole := _complete_store(target, key, tell)) is not None:
            return whole
        if target.exists():
            shelf.set_aside(target)
        source = open_source(spec)
        build.build(build.BuildJob(spec, layout.lay_out(source.tensors, spec), key), source, target, tell.progress)
        if tell.built is not None:
            tell.built()
    shelf.touch(target)
    return target


# A store of at most so many bytes is hashed whenever it is opened (0.3 s); a larger one by `halfbyte store verify`.
HASHED_BYTES = 500_000_000


def verify(folder: Path, *, full: bool = True) -> manifest.Manifest:
    """Check a store against its manifest. Raises StoreError: it is none, of another format, or differs; names every
    file that does."""
    built = manifest.read(folder)
    if wrong := manifest.problems(folder, built, full=full):
        raise StoreError(
            f"{folder} is not what was built:\n" + "\n".join(f"  - {problem}" for problem in wrong),
            fix="build it again: remove the folder, then halfbyte quantize MODEL",
        )
    return built


def _complete_store(target: Path, key: str, tell: Tell | None = None) -> Path | None:
    """`target` if it is the store called `key`; None if it is not there, or damaged on the shelf, which is told."""
    if not target.exists():
        return None
    try:
        there = verify(target, full=manifest.read(target).nbytes <= HASHED_BYTES)
    except StoreError as error:
        if target.parent != shelf.folder():
            raise
        if tell is not None:
            tell.say(f"{DAMAGED}: {error.message}")
        return None
    if there.key != key:
        raise StoreError(
            f"{target} exists and is the store of {there.source.get('id')} with other contents or settings.",
            fix="name another folder, or remove this one",
        )
    shelf.touch(target)
    return target


def open_source(spec: shelf.StoreSpec) -> reading.Source:
    """The tensors of what is, or was, quantised; of a file in its own blocks their values."""
    if spec.checkpoint.blocks:
        return in_file.FileSource(spec.checkpoint, spec.config)
    files = shelf.source_files(spec.checkpoint)
    try:
        return (reading.PickledSource if spec.checkpoint.pickle else reading.Source)(files)
    except UnpicklingError as error:
        raise reading.unsafe_pickle(spec.checkpoint, error) from error
