"""The weights of a module: in a file, in the files of an index or a folder, or in the module itself.

Names in a file are the module's; a transformers model's are renamed as transformers renames them while it loads
(`base/store/conversion.py`). Everything that does not fit is told at once, from the headers, before
anything is changed.
Cost: a header for each file; a tensor is later read in chunks.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from halfbyte.base.modules.survey import ModuleTensor, nearest, owner_of, tensors_of
from halfbyte.base.store import reading
from halfbyte.base.store.conversion import renamed
from halfbyte.base.store.reading import FLOATS, PickledSource, Source, SourceTensor, TensorPlan, unsafe_pickle
from halfbyte.errors import BaseModelError, SourceError
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.models.sources.safetensors import indexed_files, weight_files
from halfbyte.quant.number_format import torch_dtypes

PICKLES = (".bin", ".pt", ".pth")
COMPARED_BYTES = 1 << 22
_LISTED = 5


def open_source(weights: Path) -> Source:
    """The tensors of a file, an index or a folder: safetensors before pickles, which are read with weights_only=True.
    Raises SourceError: nothing there, no weights in it, a file that is cut short. BaseModelError: pickled objects other
    than tensors."""
    files = _files(weights)
    if files[0].suffix not in PICKLES:
        return Source(files)
    try:
        return PickledSource(files)
    except UnpicklingError as error:
        raise unsafe_pickle(Checkpoint(weights, str(weights), None, "folder", pickle=True), error) from error


def _files(weights: Path) -> list[Path]:
    if weights.is_dir():
        safe = any(weights.glob("*.safetensors"))
        indices = sorted(weights.glob("*.safetensors.index.json" if safe else "*.index.json"))
        if len(indices) == 1:
            return _indexed(indices[0])
        pickles = [] if safe else sorted(p for p in weights.iterdir() if p.suffix in PICKLES)
        return pickles or weight_files(weights)
    if not weights.is_file():
        raise SourceError(f"there are no weights at {weights}.", fix="name a file, an index or a folder with weights")
    if weights.suffix == ".json":
        return _indexed(weights)
    if weights.suffix not in (".safetensors", *PICKLES):
        allowed = ", ".join((".safetensors", *PICKLES))
        raise SourceError(f"{weights} is neither a file of weights ({allowed}) nor an index (.json).")
    return [weights]


def _indexed(index: Path) -> list[Path]:
    files = [index.parent / name for name in indexed_files(index)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise SourceError(
            f"{index.parent} lacks {len(missing)} of the {len(files)} files in {index.name}: {_some(missing)}."
        )
    return files


class ModuleSource(Source):
    """The numbers that a module has itself, read when they are asked for: what takes their place may be there first."""

    def __init__(self, root: nn.Module, tensors: Iterable[ModuleTensor]) -> None:
        super().__init__(())
        self.root, names = root, {dtype: name for name, dtype in torch_dtypes().items()}
        for name in (tensor.name for tensor in tensors):
            value = tensor_at(root, name)
            dtype = names.get(value.dtype, str(value.dtype))
            self.tensors[name] = SourceTensor(name, dtype, tuple(value.shape), value.nbytes, Path(), 0)

    def read(self, tensor: SourceTensor, offset: int, into: memoryview) -> None:
        reading.read_tensor(tensor_at(self.root, tensor.name), offset, into)


def tensor_at(root: nn.Module, name: str) -> Tensor:
    return getattr(root.get_submodule(owner_of(name)), name.rpartition(".")[2])


@dataclass(frozen=True)
class Weights:
    """Where each tensor's numbers are: in `source`, by the first of the tensor's names."""

    source: Source
    sources: Mapping[str, SourceTensor]

    def plan(self, tensor: ModuleTensor) -> TensorPlan:
        """What is read, and what is made of it."""
        encoding: Literal["quantised", "copy"] = "quantised" if tensor.quantised else "copy"
        source = (self.sources[tensor.name],)
        return TensorPlan(tensor.name, source, tensor.held_shape, encoding, tensor.dtype, tensor.transposed)


def match(root: nn.Module, tensors: Sequence[ModuleTensor], source: Source | None, origin: str) -> Weights:
    """Find every tensor's numbers. Raises BaseModelError: weights that are missing, not in the module, or of another
    shape; tied ones that differ."""
    if source is None:
        if empty := [tensor.name for tensor in tensors if tensor_at(root, tensor.name).is_meta]:
            raise BaseModelError(
                f"{type(root).__name__} is on the meta device ({_some(empty)}) and no weights are named.",
                fix="quantize_model(module, 'model.safetensors'), an index or a folder",
            )
        itself = ModuleSource(root, tensors)
        return Weights(itself, itself.tensors)
    names = _module_names(root, source, tensors)
    by_name: dict[str, SourceTensor] = {}
    for file_name, name in names.items():
        by_name.setdefault(name, source.tensors[file_name])
    there = {tensor.name: [by_name[name] for name in tensor.names if name in by_name] for tensor in tensors}
    firsts = {name: contents[0] for name, contents in there.items() if contents}
    other = [
        f"{tensor.name} is {first.shape}, not {tensor.shape}"
        if first.shape != tensor.shape
        else f"{tensor.name} is {first.dtype}, which is not quantised"
        for tensor in tensors
        if (first := firsts.get(tensor.name)) is not None
        and (first.shape != tensor.shape or (tensor.quantised and first.dtype not in FLOATS))
    ]
    missing = [tensor.name for tensor in tensors if tensor.name not in firsts]
    _refuse(root, origin, missing, _unexpected(root, names, tensors), other, list(names.values()))
    _check_ties(source, [(t, there[t.name]) for t in tensors if len(there[t.name]) > 1], origin)
    return Weights(source, firsts)


def _module_names(root: nn.Module, source: Source, tensors: Sequence[ModuleTensor]) -> dict[str, str]:
    """What the module calls each tensor of the source. Raises BaseModelError: transformers merges or splits tensors of
    this model while it loads."""
    state = {name: True for tensor in tensors for name in tensor.names}
    targets = renamed(root, source.tensors, state)
    if merged := [name for name, (_, converted) in targets.items() if converted]:
        raise BaseModelError(
            f"{_some(merged)}: transformers merges or splits these weights of {type(root).__name__} while it loads.",
            fix="halfbyte.load_base(folder) opens it; or load it with from_pretrained and quantise the loaded module",
        )
    return {name: target for name, (target, _) in targets.items()}


def _unexpected(root: nn.Module, names: Mapping[str, str], tensors: Iterable[ModuleTensor]) -> list[str]:
    """Tensors of the source that the module does not have; older checkpoints hold buffers that it makes itself."""
    known = {name for tensor in tensors for name in tensor.names} | {*tensors_of(root, persistent=False)}
    ignored = [re.compile(p) for p in getattr(root, "_keys_to_ignore_on_load_unexpected", None) or ()]
    return [file for file, name in names.items() if name not in known and not any(p.search(name) for p in ignored)]


def _refuse(
    root: nn.Module, origin: str, missing: list[str], unexpected: list[str], other: list[str], names: list[str]
) -> None:
    problems = [
        f"lack {len(missing)} of its tensors: {_some(missing)}" if missing else "",
        f"hold {len(unexpected)} that it does not have: {_some(unexpected)}" if unexpected else "",
        f"hold {len(other)} of another kind: {_some(other)}" if other else "",
    ]
    if not any(problems):
        return
    wanted, known = (missing[0], names) if missing else (unexpected[0], [*tensors_of(root)]) if unexpected else ("", [])
    near = next((n for n in known if f".{n}".endswith(f".{wanted}")), "") or nearest(wanted, known, whole_names=True)
    raise BaseModelError(
        f"the weights in {origin} do not fit {type(root).__name__}: they {', and '.join(filter(None, problems))}.",
        fix="check that they belong to this module and its sizes"
        + (f"; nearest to {wanted!r} is {near!r}" if near else "")
        + ("; accelerate's init_empty_weights() undoes ties of parameters: tie them again after it" if missing else ""),
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def _check_ties(source: Source, ties: Iterable[tuple[ModuleTensor, list[SourceTensor]]], origin: str) -> None:
    """Refuse one parameter of the module for which there are two contents."""
    with source:
        for tensor, (first, *others) in ties:
            for other in others:
                if (other.file, other.start) != (first.file, first.start) and not _same(source, first, other):
                    raise BaseModelError(
                        f"{' and '.join(tensor.names)} are one tensor of the module, but {origin} holds two.",
                        fix="untie them in the module (its config's tie_word_embeddings), or use other weights",
                    )


def _same(source: Source, one: SourceTensor, other: SourceTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for at in range(0, one.nbytes, COMPARED_BYTES):
        a, b = np.empty((2, min(COMPARED_BYTES, one.nbytes - at)), np.uint8)
        source.read(one, at, a.data)
        source.read(other, at, b.data)
        if not np.array_equal(a, b):
            return False
    return True


def make_buffers(root: nn.Module) -> None:
    """Give the buffers that no checkpoint holds their numbers where the module is on the meta device. A transformers
    model computes them again, as it does while it loads (`_init_weights`); parameters are marked, so that nothing is
    done to them. Raises BaseModelError: the module cannot compute them."""
    empty = {name: b for name, b in tensors_of(root, persistent=False).items() if b.is_meta}
    if not empty:
        return
    for parameter in root.parameters():
        parameter._is_hf_initialized = True
    for owner in dict.fromkeys(map(owner_of, empty)):
        module = root.get_submodule(owner)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta and name in module._non_persistent_buffers_set:
                setattr(module, name, torch.full_like(buffer, _unwritten(buffer), device="cpu"))
        model = _transformers_model(root, owner)
        if model is not None:
            with torch.no_grad():
                model._init_weights(module)
    buffers = ((name, b) for name, b in tensors_of(root, persistent=False).items() if name in empty)
    left = [n for n, b in buffers if bool((b.isnan() if b.is_floating_point() else b == _unwritten(b)).any())]
    if left:
        raise BaseModelError(
            f"{_some(left)}: buffers of {type(root).__name__} that no checkpoint holds are on the meta device, and "
            "nothing says what is in them.",
            fix="build the module under accelerate's init_empty_weights(), which leaves buffers in memory, or load it",
        )


def _unwritten(buffer: Tensor) -> float:
    """What stands for a number that nobody has written."""
    return torch.nan if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min


def _transformers_model(root: nn.Module, path: str) -> nn.Module | None:
    """The innermost transformers model around a module."""
    parts = path.split(".") if path else []
    for end in range(len(parts), -1, -1):
        module = root.get_submodule(".".join(parts[:end]))
        if hasattr(module, "_init_weights") and hasattr(module, "config"):
            return module
    return None
