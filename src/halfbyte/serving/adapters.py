"""Adapters put on a base that is served, and taken away again, between answers.

Why: a server lasts longer than the choice of its adapters.
What: only folders below those that were allowed when the server began are read, with links followed first: whatever is
asked for, a folder outside of them is told apart from none at all by nothing. The adapter has to belong to the base, as
at the start. A new writer, proven for each model, takes the place of the one before; if it cannot be, nothing changes.
Cost: a second or two, in which nothing is written.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from halfbyte.adapters.assembly import put_beside, take_away
from halfbyte.errors import AdapterError
from halfbyte.inference import load, target
from halfbyte.inference.target import Target
from halfbyte.models.sources.lookup import find_model
from halfbyte.serving.models import Models, served, writer_for
from halfbyte.serving.names import check_same
from halfbyte.writing.text import TextWriter

_NAME = re.compile(r"[\w.:@+-]{1,64}")


@dataclass(frozen=True)
class AdapterFolders:
    """Args: allowed: folders, with links followed, below which adapters may lie. overrides: of their recipes."""

    allowed: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()

    @classmethod
    def of(cls, folders: Sequence[Path], overrides: Sequence[str] = ()) -> "AdapterFolders":
        """Raises AdapterError: one of them is no folder."""
        if missing := [folder for folder in folders if not folder.is_dir()]:
            raise AdapterError(f"--allow-adapters {missing[0]} is no folder.", fix="name one that has adapters in it")
        return cls(tuple(folder.resolve() for folder in folders), tuple(overrides))

    def find(self, name: str) -> Target | None:
        """The run or adapter of a path, relative to an allowed folder or absolute; None: there is none below them, or
        it reads what is not. Raises HalfbyteError: it is no run."""
        for root in self.allowed:
            with suppress(OSError, ValueError, RuntimeError):  # 5,000 characters, a zero among them, links in a ring
                path = (root / name).resolve()
                if path.is_relative_to(root) and path.is_dir() and self._stays_inside(path):
                    found = target.find(path, self.overrides)
                    template = found.recipe.data.chat_template or ""
                    is_file = template and "{" not in template and Path(template).exists()
                    return None if found.adapter is None or is_file else found
        return None

    def _stays_inside(self, path: Path) -> bool:
        """Whether nothing of it is a link to elsewhere."""
        return all(
            any(file.resolve().is_relative_to(root) for root in self.allowed)
            for folder in (path, path / "adapter")
            for file in folder.glob("*")
        )


def put(models: Models, name: str, one: Target) -> tuple[Models, TextWriter, str]:
    """One more adapter, and who writes from then on. Raises AdapterError: it belongs to another base, does not fit, or
    would change its neighbours. Nothing has changed."""
    opened, first = models.opened, models.first
    assert one.adapter is not None and opened.base is not None
    if not _NAME.fullmatch(name):
        raise AdapterError(f"{name[:64]!r} is no name: letters, digits and .:@+-_ of at most 64 are.")
    check_same(first, one)
    if one.recipe.lora.bias != "none" or opened.own_biases:
        raise AdapterError("an adapter that has trained the base's biases (lora.bias) has to be served alone.")
    tokenizer = load.tokenizer_of(one, find_model(first.recipe))
    load.check_belongs(one, opened.base, tokenizer)
    numbers = [int(n.removeprefix("adapter")) for n in opened.model.peft_config if n.startswith("adapter")]
    internal = f"adapter{max(numbers, default=0) + 1}"
    with torch.enable_grad():  # for its proof
        put_beside(opened.model, opened.recipe, one.adapter, internal, packed=opened.job.packed)
    try:
        by_name = {**models.by_name, name: served(opened.model, name, internal, tokenizer)}
        return _with(replace(models, by_name=by_name))
    except Exception:
        take_away(opened.model, internal)
        raise


def take(models: Models, name: str) -> tuple[Models, TextWriter, str]:
    """Without an adapter, and who writes from then on."""
    gone = models.by_name[name].adapter
    assert gone is not None
    by_name = {other: one for other, one in models.by_name.items() if other != name}
    changed = _with(replace(models, by_name=by_name))
    take_away(models.opened.model, gone)
    return changed


def _with(models: Models) -> tuple[Models, TextWriter, str]:
    return models, *writer_for(models)
