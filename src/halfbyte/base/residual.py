"""The residual start of adapters: factors of a low rank of what quantising a base has lost, kept beside its store.

Why: with them base and adapter together are nearer to the 16-bit model before the first step. They do not depend on
the adapter's scaling, so that a store keeps one file for each rank; a second run does not read the source.
Source: LoftQ, arXiv:2310.08659, with one round; LQ-LoRA, arXiv:2311.12023.
Cost: the source is read once; a second for 60 M weights on a core (rank 16); 4 bytes x rank x (in + out) a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.base import load
from halfbyte.base.config import is_quantised_already
from halfbyte.base.store import shelf
from halfbyte.errors import AdapterError, SourceError, StoreError
from halfbyte.models.sources import safetensors
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.quant import policy
from halfbyte.recipe.schema import Lora, Recipe
from halfbyte.system import device as machine
from halfbyte.types import Config, Model

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "residual"
ANOTHER = "lora.init_lora_weights: true begins without it"


@dataclass(frozen=True)
class Start:
    """Where the factors of a rank are kept, in the store that they belong to; `there` unless they are still to be made
    (in a store that is perhaps to be built first)."""

    path: Path
    rank: int
    there: bool

    def __str__(self) -> str:
        if self.there:
            return f"rank {self.rank} of what was lost, kept in {self.path}"
        return f"rank {self.rank} of what is lost will be made from the source and kept in {self.path}"


def rank_of(lora: Lora) -> int:
    """The largest rank of any layer: the first columns are the factors of a smaller one."""
    return max(lora.r, *lora.rank_pattern.values()) if lora.rank_pattern else lora.r


def look(checkpoint: Checkpoint, config: Config, recipe: Recipe, modules: Iterable[str]) -> Start | None:
    """Where the factors of a recipe are or will be; None where it asks for another start. Nothing is made.

    Args:
        modules: the full names of the layers that get an adapter.

    Raises:
        AdapterError: there is nothing to make them from, or a layer is not quantised.
    """
    lora, quant = recipe.lora, recipe.quant
    if lora.init_lora_weights != "residual":
        return None
    rank = rank_of(lora)
    if is_quantised_already(config, checkpoint.path):
        start = _at(checkpoint.path, rank)
        if not start.there:
            raise AdapterError(
                f"lora.init_lora_weights residual: {checkpoint.id} is quantised already, and no factors of rank {rank} "
                f"are kept beside it ({start.path}); what was lost cannot be told from codes alone.",
                fix=f"name the 16-bit model; or, with it, `halfbyte quantize RECIPE --out DIR`. {ANOTHER}",
            )
        return start
    if whole := [name for name in modules if policy.matches(name, quant.exempt)]:
        raise _not_quantised(whole)
    dtype = load.DTYPES[machine.compute_dtype(machine.detect(), quant.compute_dtype)[0]]
    key = shelf.key_of(checkpoint, quant, str(dtype).removeprefix("torch."))
    return _at(shelf.folder() / key, rank)


def ensure(base: load.Base, lora: Lora, note: Callable[[str, str], None]) -> Path | None:
    """The file of factors for an open base, found or made now, before the base is placed or gets adapters; None where
    another start is asked for.

    Raises:
        AdapterError: it has no store, whether of its own or of ours.
        StoreError: the file cannot be written, or the source is not what was quantised.
    """
    if lora.init_lora_weights != "residual":
        return None
    if base.store is not None and base.wanted is not None:
        return _made(base.model, base.wanted, _at(base.store, rank_of(lora)), note)
    start = _at(base.checkpoint.path, rank_of(lora))
    if not start.there:
        raise AdapterError(
            f"lora.init_lora_weights residual needs a store, beside which the factors are kept; {base.origin}.",
            fix=ANOTHER,
        )
    note("residual", str(start))
    return start.path


def beside(wanted: shelf.Wanted, store: Path, lora: Lora, note: Callable[[str, str], None]) -> Path | None:
    """The file of factors beside a store that nobody has opened yet; None where another start is asked for."""
    if lora.init_lora_weights != "residual":
        return None
    start = _at(store, rank_of(lora))
    return start.path if start.there else _made(load.open_store(wanted, store), wanted, start, note)


def _made(model: Model, wanted: shelf.Wanted, start: Start, note: Callable[[str, str], None]) -> Path:
    from halfbyte.base import factors

    if not start.there:
        try:
            with shelf.building(start.path.name, where=start.path):
                if not _at(start.path.parent.parent, start.rank).there:  # not by a process that was waited for
                    note("residual", factors.write(model, wanted, start.path, start.rank))
        except shelf.CannotHold as reason:
            raise AdapterError(f"lora.init_lora_weights residual: {reason}.", fix=ANOTHER) from reason
        except (OSError, shelf.NotWritable) as error:
            why = getattr(error, "strerror", None) or "no permission, or something else lies there"
            raise StoreError(f"{start.path} cannot be written: {why}.", fix=f"free some space. {ANOTHER}") from error
    note("residual", f"rank {start.rank} is kept in {start.path}")
    return start.path


def read(path: Path, modules: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """B (O, rank) and A (rank, D) of each module that gets an adapter, mapped.

    Raises:
        AdapterError: a module is not quantised, so that nothing was lost there.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        there = set(file.keys())
        if missing := [name for name in modules if f"{name}.A" not in there]:
            raise _not_quantised(missing)
        return {name: (file.get_tensor(f"{name}.B"), file.get_tensor(f"{name}.A")) for name in modules}


def _not_quantised(names: list[str]) -> AdapterError:
    listed = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    return AdapterError(
        f"lora.init_lora_weights residual: {len(names)} layers that get an adapter are not quantised, so nothing was "
        f"lost there: {listed}.",
        fix=f"leave them out with lora.exclude_modules. {ANOTHER}",
    )


def _at(store: Path, rank: int) -> Start:
    path = store / FOLDER / f"rank-{rank}.safetensors"
    try:
        there = bool(safetensors.read_header(path)) if path.is_file() else False
    except SourceError:  # damaged: made again
        there = False
    return Start(path, rank, there)
