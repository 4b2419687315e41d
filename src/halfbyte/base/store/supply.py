"""The store of a base, found or built: `ensure`. And whether a store is whole: `verify`.

Why: the plain stack quantises at every load, with the 16-bit weights in memory; a store opens in the time of reading
headers, and its pages belong to the file, not to the process.
What: `ensure` finds the store of a source and settings, or builds it; the folder it returns opens with plain
`AutoModelForCausalLM.from_pretrained`.
Cost: see build.py. torch is imported when something is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.base.store import manifest, shelf
from halfbyte.errors import StoreError
from halfbyte.models.sources.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch

    from halfbyte.base.store.build import Progress
    from halfbyte.recipe.schema import Quant
    from halfbyte.types import Config, Document, Model


@dataclass(frozen=True)
class Wanted:
    """A base in 4 bits: its source, config (as transformers reads it), policy and compute dtype."""

    checkpoint: Checkpoint
    config: Config
    quant: Quant
    dtype: torch.dtype
    head_names: tuple[str, ...] = ()
    cores: int = 1
    check: Callable[[Model, Document], None] | None = None
    """As for `layout.lay_out`: called before anything is built."""

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Tell:
    """Whom to tell what: `progress` about ten times a second while building, `note` (a label, a text) now and then, and
    `built` once if this call has built the store."""

    progress: Callable[[Progress], None] | None = None
    note: Callable[[str, str], None] | None = None
    built: Callable[[], None] | None = None

    def say(self, text: str, label: str = "base") -> None:
        if self.note is not None:
            self.note(label, text)


def ensure(wanted: Wanted, *, out: Path | None = None, tell: Tell | None = None) -> Path:
    """The folder of the store: found and checked cheaply, or built now.

    Args:
        out: build there instead of on the shelf; must not exist, or hold this very store.

    Raises:
        StoreError: it cannot be built (NotWritable: for want of space or permission).
        BaseModelError: the source is not whole, or holds weights that are not finite.
        CannotHold: this source can only be quantised while it is loaded.
    """
    tell = tell or Tell()
    key = shelf.key_of(wanted.checkpoint, wanted.quant, wanted.dtype_name)
    target = out.absolute() if out is not None else shelf.folder() / key
    if out is None:
        shelf.hold(key)
    if (whole := _whole(target, key)) is not None:
        return whole
    waiting = f"another process builds the store of {wanted.checkpoint.id}; waiting for it"
    with shelf.building(key, lambda: tell.say(waiting), where=out and target):
        # It may have been built while this process waited.
        if (whole := _whole(target, key)) is not None:
            return whole
        if target.exists():
            tell.say(f"a damaged store is built again: {_damage(target)}")
            shelf.set_aside(target)
        _build(wanted, key, target, tell)
        if tell.built is not None:
            tell.built()
    shelf.touch(target)
    return target


def verify(folder: Path, *, full: bool = True) -> manifest.Manifest:
    """Check a store against its manifest.

    Raises:
        StoreError: it is none, of another format, or differs; names every file that does.
    """
    built = manifest.read(folder)
    if wrong := manifest.problems(folder, built, full=full):
        raise StoreError(
            f"{folder} is not what was built:\n" + "\n".join(f"  - {problem}" for problem in wrong),
            fix="build it again: remove the folder, then halfbyte quantize MODEL",
        )
    return built


def _whole(target: Path, key: str) -> Path | None:
    """`target` if it is the store called `key`; None if it is not there, or damaged on the shelf."""
    if not target.exists():
        return None
    try:
        there = verify(target, full=False)
    except StoreError:
        if target.parent == shelf.folder():
            return None
        raise
    if there.key != key:
        raise StoreError(
            f"{target} exists and is the store of {there.source.get('id')} with other contents or settings.",
            fix="name another folder, or remove this one",
        )
    shelf.touch(target)
    return target


def _damage(target: Path) -> str:
    try:
        verify(target, full=False)
    except StoreError as error:
        return error.message
    return "it is whole now"


def _build(wanted: Wanted, key: str, target: Path, tell: Tell) -> None:
    from halfbyte.base.store import build, layout, reading

    files = shelf.source_files(wanted.checkpoint)
    source = (reading.PickledSource if wanted.checkpoint.pickle else reading.Source)(files)
    plan = layout.lay_out(
        source.tensors, wanted.config, wanted.quant, wanted.dtype, wanted.head_names, check=wanted.check
    )
    request = build.Request(
        checkpoint=wanted.checkpoint,
        layout=plan,
        key=key,
        settings=shelf.settings(wanted.quant, wanted.dtype_name),
        cores=wanted.cores,
    )
    build.build(request, source, target, tell.progress)
