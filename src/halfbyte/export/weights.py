"""The merged model as a list of the checkpoint's own tensors, each made when it is asked for.

What: the tensors of the source under the source's names, in the order of its files, so that what is written opens like
the source. Into 16 bits: a tensor that the adapter does not change is the source's, byte for byte. From the store: a
quantised matrix is what training multiplied with.
Cost: the adapter, and one matrix and its delta in fp32; of a mapped store one matrix' pages.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from halfbyte.adapters import merging
from halfbyte.base import load, residual
from halfbyte.base.config import is_quantised_already, open_config
from halfbyte.base.store import conversion, shelf, supply
from halfbyte.base.store.reading import FLOATS, SourceTensor
from halfbyte.errors import AdapterError, BaseModelError, StoreError
from halfbyte.inference.target import Target
from halfbyte.layers import heads
from halfbyte.models import tensors
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.models.sources.lookup import find_model
from halfbyte.models.structure import meta_model
from halfbyte.quant import formats
from halfbyte.quant.number_format import torch_dtypes
from halfbyte.quant.stack import ExpertStack
from halfbyte.recipe.adapter import read_config
from halfbyte.recipe.adapter_folder import HEAD, folder_of, read_passport, recipe_around
from halfbyte.recipe.command import to_use
from halfbyte.recipe.schema import Lora
from halfbyte.system import device, pages
from halfbyte.types import Config, Model

BaseKind = Literal["16bit", "4bit"]
CHUNK_BYTES = 1 << 26
# Of a matrix merged in rows: its fp32 numbers, their rounding and the factors' part of them stay in a core's own cache.
CHUNK_NUMBERS = 1 << 18


@dataclass(frozen=True)
class Item:
    """One tensor of the merged checkpoint."""

    name: str
    source: SourceTensor  # the tensor it begins with, whose dtype and shape it has
    parameter: str  # the model's name for it
    expert: int | None = None  # which one of a stack; the tensor begins at `first_row` of the expert's matrix
    first_row: int = 0


class MergedModel:
    """A run's base with its adapter merged in. A context manager: the source's files are open inside. Raises
    AdapterError: the adapter changes what cannot be written, or does not fit. BaseModelError: the source is in few bits
    itself. StoreError: the store that it was trained on cannot be built again."""

    def __init__(self, run: Target, base: BaseKind, tell: supply.Tell | None = None) -> None:
        tell = tell or supply.Tell()
        self.run, self.base = run, base
        self.checkpoint: Checkpoint = find_model(run.recipe)
        self.config: Config = open_config(self.checkpoint.path, trust_remote_code=run.recipe.trust_remote_code)
        if is_quantised_already(self.config, self.checkpoint.path) or tensors.is_quantised(self.config.to_dict()):
            raise BaseModelError(
                f"{self.checkpoint.id} is quantised itself, so there is no 16-bit model to merge into.",
                fix="--set model=THE 16-BIT MODEL, or use the adapter with its base: halfbyte export RUN --peft",
            )
        self.dtype = load.DTYPES[device.compute_dtype(device.detect(), run.recipe.quant.compute_dtype)[0]]
        self.head = run.adapter / HEAD if run.adapter is not None and (run.adapter / HEAD).is_dir() else None
        self.shape, self.auto = self.config, None  # of the merged model: its config, and the class that opens it
        if self.head is not None and run.adapter is not None:
            self.shape, self.auto = open_config(self.head), heads.AUTO[read_config(run.adapter)["task_type"]]
        self.plain = meta_model(self.shape, self.auto)
        self.source = supply.open_source(self._wanted())
        self.changes = self._changes(run.adapter, tell)
        self.store = self._store(tell) if self._needs_store else None
        self.modules = dict(self.store.named_modules()) if self.store is not None else {}
        self.items, self.untied = self._items()
        self._maps, self._stack = pages.FileMaps.read(), ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.source)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def is_changed(self, item: Item) -> bool:
        """Whether it differs from the source's tensor."""
        return item.parameter in self.changes or (self.base == "4bit" and self._quantised(item) is not None)

    def pieces(self, item: Item) -> Iterator[tuple[int, np.ndarray]]:
        """The merged tensor in the source's dtype, rounded once, in pieces of (first byte, bytes). Each piece reuses
        the memory of the one before."""
        if not self.is_changed(item):
            yield from self._raw(item)
        elif self._in_rows(item):
            yield from self._rows(item)
        else:
            value = self.value(item).to(torch_dtypes()[item.source.dtype]).contiguous()
            yield 0, value.view(-1).view(torch.uint8).numpy()

    def _raw(self, item: Item) -> Iterator[tuple[int, np.ndarray]]:
        buffer = np.empty(min(CHUNK_BYTES, item.source.nbytes), np.uint8)
        for first in range(0, item.source.nbytes, CHUNK_BYTES):
            part = buffer[: min(CHUNK_BYTES, item.source.nbytes - first)]
            self.source.read(item.source, first, part.data)
            yield first, part

    def _in_rows(self, item: Item) -> bool:
        """Whether each row can be merged alone: a linear layer's, with LoRA that needs no norm."""
        change = self.changes.get(item.parameter)
        if len(item.source.shape) != 2 or item.source.dtype not in FLOATS or (change and not change.by_rows):
            return False
        return self.base == "16bit" or (isinstance(self._quantised(item), nn.Module) and not self._is_conv1d(item))

    def _rows(self, item: Item) -> Iterator[tuple[int, np.ndarray]]:
        """`value`, some rows at a time: the page faults of a whole fp32 matrix cost more than the arithmetic."""
        (rows, columns), change = item.source.shape, self.changes.get(item.parameter)
        step, dtype = max(1, CHUNK_NUMBERS // max(1, columns)), torch_dtypes()[item.source.dtype]
        rounded, summed = torch.empty((step, columns), dtype=dtype), torch.empty((step, columns))
        trained_on = self._dequantised(item) if self.base == "4bit" else None
        for first in range(0, rows, step):
            count = min(step, rows - first)
            part, values = rounded[:count], summed[:count]
            piece = part.view(-1).view(torch.uint8).numpy()
            at = first * columns * dtype.itemsize
            if trained_on is None:
                self.source.read(item.source, at, piece.data)
            values.copy_(part if trained_on is None else trained_on[first : first + count])
            if change is not None:
                change.apply_to_rows(values, first)
            part.copy_(values)
            yield at, piece
        if trained_on is not None:
            pages.let_go([self._module(item).weight.data], self._maps)

    def value(self, item: Item) -> Tensor:
        """The whole merged tensor in fp32, not rounded, of the source's shape."""
        change = self.changes.get(item.parameter)
        if change is not None and change.value is not None and change.rows is None:
            return change.value.float().reshape(item.source.shape)
        quantised = self._quantised(item)
        from_store = self.base == "4bit" and quantised is not None
        weight = self._trained_on(item) if from_store else self._read(item.source)
        if change is None:
            return weight
        if item.expert is not None and change.experts is not None:
            return change.apply_to_expert(weight, item.expert, item.first_row)
        if change.experts is not None:
            for expert in range(len(weight)):
                change.apply_to_expert(weight[expert], expert)
            return weight
        trained_on = (lambda: self._trained_on(item)) if change.norms and quantised and not from_store else None
        return change.apply(weight, trained_on).reshape(weight.shape)

    # --- adapter and store --------------------------------------------------------------------------------------------

    @property
    def _needs_store(self) -> bool:
        quant = self.run.recipe.quant
        return (quant.quantises and not quant.in_file) and (
            self.base == "4bit" or any(change.norms for change in self.changes.values())
        )

    def _changes(self, adapter: Path | None, tell: supply.Tell) -> dict[str, merging.WeightChange]:
        if adapter is None:
            return {}
        start = None
        if self.base == "16bit" and self.run.recipe.quant.quantises and starts_residual(adapter):
            start = self._start(adapter, tell)
        changes = merging.changes(self.shape, adapter, start, self.auto)
        known = {name for name, _ in self.plain.named_parameters(remove_duplicate=False)}
        if strange := sorted(set(changes) - known):
            raise AdapterError(f"the adapter changes {strange[0]}, which {self.checkpoint.id} does not have.")
        return changes

    def _wanted(self) -> shelf.StoreSpec:
        specs = tuple(tensors.read_checkpoint(self.checkpoint.path)) if not self.checkpoint.pickle else ()
        return load.store_spec(self.checkpoint, self.config, self.run.recipe.quant, device.detect(), specs)

    def _start(self, adapter: Path, tell: supply.Tell) -> merging.Factors:
        config, wanted = read_config(adapter), self._wanted()
        ranks = {"r": config["r"], "rank_pattern": config.get("rank_pattern") or {}}
        lora = Lora.model_validate({"init_lora_weights": "residual", **ranks})
        path = residual.beside(wanted, supply.ensure(wanted, tell=tell), lora, lambda name, text: tell.say(text, name))
        assert path is not None
        plain = merging.changes(self.shape, adapter, auto=self.auto)
        layers = {name.removesuffix(".weight"): change.layer for name, change in plain.items() if change.layer}
        rank_of = {name: int(next(iter(layer.r.values()))) for name, layer in layers.items()}
        return {n: (b[:, : rank_of[n]], a[: rank_of[n]]) for n, (b, a) in residual.read(path, [*layers]).items()}

    def _store(self, tell: supply.Tell) -> Model:
        wanted = self._wanted()
        try:
            return load.open_store(wanted, supply.ensure(wanted, tell=tell))
        except shelf.CannotHold as reason:
            raise StoreError(
                f"{self.checkpoint.id} cannot be held in a store: {reason}.", fix="--base 16bit"
            ) from reason

    # --- tensors ------------------------------------------------------------------------------------------------------

    def _items(self) -> tuple[list[Item], bool]:
        """Every tensor of the source, and of each weight that is no longer tied; whether there is such a one."""
        model = self.plain
        state = dict.fromkeys(model.state_dict(), 1)
        targets, items = conversion.renamed(model, self.source.tensors, state), list[Item]()
        stacked: dict[str, list[conversion.Member]] = {}
        for name, source in self.source.tensors.items():
            target, rule = targets[name]
            if self.head is not None and target not in state:
                continue  # of the head that it had
            if rule is not None and target in state:
                stacked.setdefault(target, []).append((source, rule))
            items.append(Item(name, source, target))
        places = {p.name: p for target, members in stacked.items() for p in self._places(target, members)}
        items = [places.get(item.name, item) for item in items]
        there, untied = {item.parameter: item for item in items}, False
        for name in sorted(self.changes.keys() - there) if self.head is not None else ():
            if (value := self.changes[name].value) is not None:  # of the head: in the first file, beside its tensors
                shape = tuple(value.shape)
                items.append(
                    Item(name, SourceTensor(name, "F32", shape, 4 * value.numel(), items[0].source.file, 0), name)
                )
        for other, first in model.all_tied_weights_keys.items():
            if first in there and other not in there and not self._stays_tied(first, other):
                items.append(Item(other, there[first].source, other))
                untied = True
        covered = {item.parameter for item in items} | (set() if untied else set(model.all_tied_weights_keys))
        if missing := sorted(set(self.changes) - covered):
            raise AdapterError(
                f"the adapter changes {missing[0]}, and no tensor of {self.checkpoint.id} is that weight."
            )
        return items, untied

    def _stays_tied(self, first: str, other: str) -> bool:
        a, b = self.changes.get(first), self.changes.get(other)
        if a is None and b is None:
            return True
        if a is None or b is None:
            return False
        same = a.value is not None and b.value is not None and torch.equal(a.value, b.value)
        return same and (a.rows is None) == (b.rows is None)

    def _places(self, target: str, members: list[conversion.Member]) -> Iterator[Item]:
        """Where each tensor of single experts is in the stack that transformers makes of them."""
        if target not in self.changes and self.base == "16bit":
            yield from (Item(source.name, source, target) for source, _ in members)
            return
        shape = tuple(self.plain.get_parameter(target).shape)
        at = 0
        for source in conversion.in_order(target, members):
            if len(source.shape) != 2:  # all experts in one tensor
                if tuple(source.shape) != shape:
                    raise AdapterError(f"{source.name} is turned while it is loaded; its experts are not merged here.")
                yield Item(source.name, source, target)
                continue
            expert, rest = divmod(at, shape[1] * shape[2])
            yield Item(source.name, source, target, expert, rest // shape[2])
            at += source.shape[0] * source.shape[1]

    def _quantised(self, item: Item) -> nn.Module | ExpertStack | None:
        """The store's module or stack of a weight in few bits; None where it is not quantised."""
        home, _, leaf = item.parameter.rpartition(".")
        module = self.modules.get(home)
        if module is None:
            return None
        if isinstance(stack := getattr(module, leaf, None), ExpertStack):
            return stack
        return module if leaf == "weight" and formats.is_quantised(module) else None

    def _trained_on(self, item: Item) -> Tensor:
        """The weight that training multiplied with, fp32, in the source's layout."""
        stack = self._quantised(item)
        if isinstance(stack, ExpertStack):
            chosen = range(len(stack)) if item.expert is None else (item.expert,)
            weight = torch.stack([stack.expert(e, self.dtype).float() for e in chosen])
            if item.expert is not None:
                weight = weight[0, item.first_row : item.first_row + item.source.shape[0]]
            return weight.contiguous()
        weight = self._dequantised(item).to(torch.float32, copy=True)
        pages.let_go([self._module(item).weight.data], self._maps)
        return weight.T.contiguous() if self._is_conv1d(item) else weight

    def _dequantised(self, item: Item) -> Tensor:
        """(out, in) in the compute dtype, on the CPU, in memory that the thread's next call reuses."""
        module = self._module(item)
        return formats.of_module(module).weight(module, self.dtype).to("cpu")

    def _module(self, item: Item) -> nn.Module:
        return self.modules[item.parameter.rpartition(".")[0]]

    def _is_conv1d(self, item: Item) -> bool:
        """Whether the source holds the matrix as (in, out)."""
        return type(self.plain.get_submodule(item.parameter.rpartition(".")[0])).__name__ == "Conv1D"

    def _read(self, source: SourceTensor) -> Tensor:
        if source.dtype not in FLOATS:
            raise AdapterError(f"{source.name} is {source.dtype}, to which nothing can be added.")
        raw = np.empty(source.nbytes, np.uint8)
        self.source.read(source, 0, raw.data)
        return torch.from_numpy(raw).view(torch_dtypes()[source.dtype]).view(source.shape).to(torch.float32)


def starts_residual(adapter: Path) -> bool:
    """Whether an adapter, or the one that it was trained on from, began with `init_lora_weights: residual`. Raises
    AdapterError: it was trained on from one that is gone, so nobody knows."""
    if (file := recipe_around(adapter)) is not None:
        lora = to_use(file).lora
        start, first = lora.init_lora_weights, lora.adapter
    else:
        recipe = (read_passport(adapter) or {}).get("recipe", {})
        start, first = recipe.get("lora.init_lora_weights"), recipe.get("lora.adapter")
    if start == "residual":
        return True
    if not first:
        return False
    if not (folder_of(first) / "adapter_config.json").is_file():
        raise AdapterError(
            f"{adapter} began with the adapter {first}, which is not there any more: whether that one began at what "
            "quantising has lost (init_lora_weights residual) cannot be told, and 16-bit weights must know.",
            fix="--base 4bit",
        )
    return starts_residual(folder_of(first))
