"""The residual start of adapters: factors of a low rank of what quantising a base has lost, kept beside its store.

Why: with them base and adapter together are nearer to the 16-bit model before the first step. They do not depend on
the adapter's scaling, so that a store keeps one file for each rank; a second run does not read the source.
The file holds B (out, rank) and A (rank, in) of every quantised matrix, in fp32. They are made by a randomised
decomposition: what 4 bits lose has a long tail, and only the first directions are wanted, of matrices whose full
decomposition takes minutes.
Source: LoftQ, arXiv:2310.08659, with one round; LQ-LoRA, arXiv:2311.12023; Halko, Martinsson, Tropp 2011,
arXiv:0909.4061, algorithms 4.4 and 5.1.
Cost: the source is read once; a second for 60 M weights on a core (rank 16); 4 bytes x rank x (in + out) a matrix.
One matrix and its factors are in memory at a time.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from halfbyte.base import load, quantisation_error
from halfbyte.base.config import is_quantised_already
from halfbyte.base.store import shelf
from halfbyte.base.store.writer import SafetensorsWriter, Slot
from halfbyte.errors import AdapterError, SourceError, StoreError
from halfbyte.models.sources import safetensors
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.quant import bnb, formats, policy
from halfbyte.recipe.schema import Lora, Recipe
from halfbyte.system import device as machine
from halfbyte.types import Config, Model

FOLDER = "residual"
ANOTHER = "lora.init_lora_weights: true begins without it"
# Of a spectrum as flat as that of rounding errors the first directions stand out a little only: each power widens that.
POWERS, OVERSAMPLING = 4, 16


@dataclass(frozen=True)
class Start:
    """Where the factors of a rank are kept, in the store that they belong to; `exists` unless they are still to be made
    (in a store that is perhaps to be built first)."""

    path: Path
    rank: int
    exists: bool

    def __str__(self) -> str:
        if self.exists:
            return f"rank {self.rank} of what was lost, kept in {self.path}"
        return f"rank {self.rank} of what is lost will be made from the source and kept in {self.path}"


def rank_of(lora: Lora) -> int:
    """The largest rank of any layer: the first columns are the factors of a smaller one."""
    return max(lora.r, *lora.rank_pattern.values()) if lora.rank_pattern else lora.r


def look(checkpoint: Checkpoint, config: Config, recipe: Recipe, modules: Iterable[str]) -> Start | None:
    """Where the factors of a recipe are or will be; None where it asks for another start. Nothing is made. `modules`:
    the full names of the layers that get an adapter. Raises AdapterError: there is nothing to make them from, or a
    layer is not quantised."""
    lora, quant = recipe.lora, recipe.quant
    if lora.init_lora_weights != "residual":
        return None
    rank = rank_of(lora)
    if is_quantised_already(config, checkpoint.path):
        start = _find(checkpoint.path, rank)
        if not start.exists:
            raise AdapterError(
                f"lora.init_lora_weights residual: {checkpoint.id} is quantised already, and no factors of rank {rank} "
                f"are kept beside it ({start.path}); what was lost cannot be told from codes alone.",
                fix=f"name the 16-bit model; or, with it, `halfbyte quantize RECIPE --out DIR`. {ANOTHER}",
            )
        return start
    if whole := [name for name in modules if policy.matches(name, quant.exempt)]:
        raise _not_quantised(whole)
    dtype = load.DTYPES[machine.compute_dtype(machine.detect(), quant.compute_dtype)[0]]
    return _find(shelf.folder() / shelf.key_of(checkpoint, quant, str(dtype).removeprefix("torch.")), rank)


def ensure(base: load.Base, lora: Lora, note: Callable[[str, str], None]) -> Path | None:
    """The file of factors for an open base, found or made now, before the base is placed or gets adapters; None where
    another start is asked for. Raises AdapterError: it has no store, whether of its own or of ours. StoreError: the
    file cannot be written, or the source is not what was quantised."""
    if lora.init_lora_weights != "residual":
        return None
    if base.store is not None and base.store_spec is not None:
        return _make(base.model, base.store_spec, _find(base.store, rank_of(lora)), note)
    start = _find(base.checkpoint.path, rank_of(lora))
    if not start.exists:
        raise AdapterError(
            f"lora.init_lora_weights residual needs a store, beside which the factors are kept; {base.origin}.",
            fix=ANOTHER,
        )
    note("residual", str(start))
    return start.path


def beside(spec: shelf.StoreSpec, store: Path, lora: Lora, note: Callable[[str, str], None]) -> Path | None:
    """The file of factors beside a store that nobody has opened yet; None where another start is asked for."""
    if lora.init_lora_weights != "residual":
        return None
    start = _find(store, rank_of(lora))
    return start.path if start.exists else _make(load.open_store(spec, store), spec, start, note)


def _make(model: Model, spec: shelf.StoreSpec, start: Start, note: Callable[[str, str], None]) -> Path:
    if not start.exists:
        try:
            with shelf.building(start.path.name, where=start.path):
                if not _find(start.path.parent.parent, start.rank).exists:  # not by a process that was waited for
                    note("residual", write_factors(model, spec, start.path, start.rank))
        except shelf.CannotHold as reason:
            raise AdapterError(f"lora.init_lora_weights residual: {reason}.", fix=ANOTHER) from reason
        except (OSError, shelf.NotWritable) as error:
            why = getattr(error, "strerror", None) or "no permission, or something else lies there"
            raise StoreError(f"{start.path} cannot be written: {why}.", fix=f"free some space. {ANOTHER}") from error
    note("residual", f"rank {start.rank} is kept in {start.path}")
    return start.path


def read(path: Path, modules: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """B (O, rank) and A (rank, D) of each module that gets an adapter, mapped. Raises AdapterError: a module is not
    quantised, so that nothing was lost there."""
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


def _find(store: Path, rank: int) -> Start:
    path = store / FOLDER / f"rank-{rank}.safetensors"
    try:
        exists = bool(safetensors.read_header(path)) if path.is_file() else False
    except SourceError:  # damaged: made again
        exists = False
    return Start(path, rank, exists)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B and A with B A close to the best approximation of a rank. `matrix`: (O, D) fp32. `rank`: at most min(O, D); of
    a larger one the rest is zeros. Returns B (O, rank) and A (rank, D) fp32, each with half of every singular value,
    the largest first. The first columns of B and rows of A are those of a lower rank."""
    width = min(rank + OVERSAMPLING, *matrix.shape)
    sketch = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(matrix @ sketch).Q  # (O, width)
    for _ in range(POWERS):
        basis = torch.linalg.qr(matrix.T @ basis).Q  # (D, width)
        basis = torch.linalg.qr(matrix @ basis).Q  # (O, width)
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    count = min(rank, width)
    roots = values[:count].sqrt()
    b, a = matrix.new_zeros(matrix.shape[0], rank), matrix.new_zeros(rank, matrix.shape[1])
    b[:, :count] = (basis @ left[:, :count]) * roots
    a[:count] = roots[:, None] * right[:count]
    return b, a


def write_factors(model: Model, spec: shelf.StoreSpec, path: Path, rank: int) -> str:
    """Make the file for an open base, whole or not at all. Returns in words how much of the loss it holds. Raises
    StoreError: the source lacks a matrix that the base has, or has changed."""
    todo = {n: (m.out_features, m.in_features) for n, m in bnb.quantised_linears(model) if formats.is_quantised(m)}
    lost_sum = left_sum = 0.0
    with SafetensorsWriter(path, [slot for name, shape in todo.items() for slot in _slots(name, *shape, rank)]) as out:
        for matrix in quantisation_error.matrices(model, spec):
            difference = matrix.difference()
            b, a = low_rank(difference, rank)
            out.put(f"{matrix.name}.B", b.numpy().data)
            out.put(f"{matrix.name}.A", a.numpy().data)
            lost_sum += _squares(difference)
            left_sum += _squares(difference.addmm_(b, a, alpha=-1))
            del todo[matrix.name]
        if todo:
            raise StoreError(f"{spec.checkpoint.id} holds no source of {len(todo)} matrices, such as {min(todo)}.")
        out.finish({})
    share = 1 - left_sum / lost_sum if lost_sum else 0.0
    return f"rank {rank} holds {share:.1%} of what {spec.quant.type} has lost (of its squares)"


def _slots(name: str, rows: int, columns: int, rank: int) -> tuple[Slot, Slot]:
    return (
        Slot(f"{name}.B", "F32", (rows, rank), 4 * rows * rank),
        Slot(f"{name}.A", "F32", (rank, columns), 4 * rank * columns),
    )


def _squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
