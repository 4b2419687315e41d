"""The weights of a module: in a file, in the files of an index or a folder, or in the module itself.

Names in a file are the module's; a transformers model's are renamed as transformers renames them while it loads
(`core_model_loading.py`). Everything that does not fit is told at once, from the headers, before anything is changed.
Cost: a header for each file; a tensor is later read in chunks.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor, nn

from halfbyte.base.modules.sites import Site, nearest, tensors_of
from halfbyte.base.store.reading import PickledSource, Source, SourceTensor, unsafe_pickle
from halfbyte.errors import BaseModelError, SourceError
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.models.sources.safetensors import indexed_files, weight_files
from halfbyte.quant.number_format import torch_dtypes

PICKLES = (".bin", ".pt", ".pth")
CHUNK_NUMBERS = 1 << 22
_LISTED = 5
_buffers = threading.local()


def open_source(weights: Path) -> Source:
    """The tensors of a file, an index or a folder: safetensors before pickles, which are read with weights_only=True.

    Raises:
        SourceError: nothing there, no weights in it, a file that is cut short.
        BaseModelError: pickled objects other than tensors.
    """
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
        listed = ", ".join(missing[:_LISTED])
        raise SourceError(f"{index.parent} lacks {len(missing)} of the {len(files)} files in {index.name}: {listed}.")
    return files


@dataclass(frozen=True)
class Weights:
    """Where each site's numbers are: `held` by the first of its names, in `source`; without one, in the module."""

    root: nn.Module
    source: Source | None
    held: dict[str, SourceTensor]

    def chunks(self, site: Site, unit: int) -> Iterator[tuple[int, Tensor]]:
        """(position, numbers) in order, flat, in the site's dtype; whole units at a time. A transposed matrix comes at
        once, turned to (out, in). What is yielded is overwritten by the next chunk."""
        at_once = site.numel if site.transposed else max(1, CHUNK_NUMBERS // unit) * unit
        for first in range(0, site.numel, max(1, at_once)):
            values = self._read(site, first, min(at_once, site.numel - first))
            if site.transposed and site.quantised:
                values = values.view(site.shape).T.contiguous().view(-1)
            yield first, values.to(site.dtype)

    def _read(self, site: Site, first: int, count: int) -> Tensor:
        if self.source is None:
            own = _at(self.root, site.name).detach().reshape(-1)
            return own[first : first + count].cpu()
        tensor = self.held[site.name]
        kind = torch_dtypes()[tensor.dtype]
        raw = _buffer(count * kind.itemsize)
        self.source.read(tensor, first * kind.itemsize, raw.data)
        return torch.from_numpy(raw).view(kind)


def _at(root: nn.Module, name: str) -> Tensor:
    path, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(root.get_submodule(path), attribute)
    return tensor


def _buffer(nbytes: int) -> np.ndarray:
    """Memory that this thread keeps for reading."""
    kept: np.ndarray | None = getattr(_buffers, "bytes", None)
    if kept is None or len(kept) < nbytes:
        _buffers.bytes = None
        _buffers.bytes = kept = np.empty(nbytes, np.uint8)
    return kept[:nbytes]


def match(root: nn.Module, sites: Sequence[Site], source: Source | None, origin: str) -> Weights:
    """Find every site's numbers.

    Raises:
        BaseModelError: weights that are missing, not in the module, or of another shape; tied ones that differ.
    """
    if source is None:
        if empty := [site.name for site in sites if _at(root, site.name).is_meta]:
            raise BaseModelError(
                f"{type(root).__name__} is on the meta device ({_some(empty)}) and no weights are named.",
                fix="quantize_model(module, 'model.safetensors'), an index or a folder",
            )
        return Weights(root, None, {})
    names = _module_names(root, source, sites)
    by_name: dict[str, SourceTensor] = {}
    for file_name, name in names.items():
        by_name.setdefault(name, source.tensors[file_name])
    state = {name for site in sites for name in site.names}
    left = {*tensors_of(root, persistent=False)}
    ignored = [re.compile(p) for p in getattr(root, "_keys_to_ignore_on_load_unexpected", None) or ()]
    unexpected = [
        file_name
        for file_name, name in names.items()
        # older checkpoints hold buffers that the module makes itself
        if name not in state and name not in left and not any(pattern.search(name) for pattern in ignored)
    ]
    missing, shaped, held = [], [], {}
    ties: list[tuple[Site, list[SourceTensor]]] = []
    for site in sites:
        there = [by_name[name] for name in site.names if name in by_name]
        if not there:
            missing.append(site.name)
            continue
        held[site.name] = first = there[0]
        ties += [(site, there)] if len(there) > 1 else []
        if first.shape != site.shape:
            shaped.append(f"{site.name} is {first.shape}, not {site.shape}")
        elif site.quantised and first.dtype not in ("F64", "F32", "F16", "BF16"):
            shaped.append(f"{site.name} is {first.dtype}, which is not quantised")
    _refuse(root, origin, missing, unexpected, shaped, list(names.values()))
    _check_ties(source, ties, origin)
    return Weights(root, source, held)


def _refuse(
    root: nn.Module, origin: str, missing: list[str], unexpected: list[str], shaped: list[str], names: list[str]
) -> None:
    parts = [
        f"lack {len(missing)} of its tensors: {_some(missing)}" if missing else "",
        f"hold {len(unexpected)} that it does not have: {_some(unexpected)}" if unexpected else "",
        f"hold {len(shaped)} of another kind: {_some(shaped)}" if shaped else "",
    ]
    if not any(parts):
        return
    wanted, known = (missing[0], names) if missing else (unexpected[0], [*tensors_of(root)]) if unexpected else ("", [])
    near = next((n for n in known if f".{n}".endswith(f".{wanted}")), "") or nearest(wanted, known, whole=True)
    said = ", and ".join(part for part in parts if part)
    raise BaseModelError(
        f"the weights in {origin} do not fit {type(root).__name__}: they {said}.",
        fix="check that they belong to this module and its sizes"
        + (f"; nearest to {wanted!r} is {near!r}" if near else "")
        + ("; accelerate's init_empty_weights() undoes ties of parameters: tie them again after it" if missing else ""),
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def _module_names(root: nn.Module, source: Source, sites: Sequence[Site]) -> dict[str, str]:
    """What the module calls each tensor of the source.

    Raises:
        BaseModelError: transformers merges or splits tensors of this model while it loads.
    """
    from halfbyte.base.store.conversion import renamed

    state = {name: True for site in sites for name in site.names}
    targets = renamed(root, source.tensors, state)
    if merged := [name for name, (_, converted) in targets.items() if converted]:
        raise BaseModelError(
            f"{_some(merged)}: transformers merges or splits these weights of {type(root).__name__} while it loads.",
            fix="halfbyte.load_base(folder) opens it; or load it with from_pretrained and quantise the loaded module",
        )
    return {name: target for name, (target, _) in targets.items()}


def _check_ties(source: Source, ties: Iterable[tuple[Site, list[SourceTensor]]], origin: str) -> None:
    """Refuse one parameter of the module for which there are two contents."""
    with source:
        for site, (first, *others) in ties:
            for other in others:
                if (other.file, other.start) != (first.file, first.start) and not _same(source, first, other):
                    raise BaseModelError(
                        f"{' and '.join(site.names)} are one tensor of the module, but {origin} holds two.",
                        fix="untie them in the module (its config's tie_word_embeddings), or use other weights",
                    )


def _same(source: Source, one: SourceTensor, other: SourceTensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for at in range(0, one.nbytes, CHUNK_NUMBERS):
        count = min(CHUNK_NUMBERS, one.nbytes - at)
        a, b = np.empty(count, np.uint8), np.empty(count, np.uint8)
        source.read(one, at, a.data)
        source.read(other, at, b.data)
        if not np.array_equal(a, b):
            return False
    return True


def make_loose(root: nn.Module) -> None:
    """Give the buffers that no checkpoint holds their numbers where the module is on the meta device.

    A transformers model computes them again, as it does while it loads (`_init_weights`); parameters are marked, so
    that nothing is done to them.

    Raises:
        BaseModelError: the module cannot compute them.
    """
    empty = {name: b for name, b in tensors_of(root, persistent=False).items() if b.is_meta}
    if not empty:
        return
    for parameter in root.parameters():
        parameter._is_hf_initialized = True
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in empty):
        module = root.get_submodule(owner)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta and name in module._non_persistent_buffers_set:
                setattr(module, name, _unwritten(buffer))
        model = _transformers_model(root, owner)
        if model is not None:
            with torch.no_grad():
                model._init_weights(module)
    left = [name for name, b in tensors_of(root, persistent=False).items() if name in empty and _is_unwritten(b)]
    if left:
        raise BaseModelError(
            f"{_some(left)}: buffers of {type(root).__name__} that no checkpoint holds are on the meta device, and "
            "nothing says what is in them.",
            fix="build the module under accelerate's init_empty_weights(), which leaves buffers in memory, or load it",
        )


def _unwritten(buffer: Tensor) -> Tensor:
    whole = torch.empty_like(buffer, device="cpu")
    return whole.fill_(torch.nan if buffer.is_floating_point() else torch.iinfo(buffer.dtype).min)


def _is_unwritten(buffer: Tensor) -> bool:
    marks = buffer.isnan() if buffer.is_floating_point() else buffer == torch.iinfo(buffer.dtype).min
    return bool(buffer.numel() and marks.any())


def _transformers_model(root: nn.Module, path: str) -> nn.Module | None:
    """The innermost transformers model around a module."""
    parts = path.split(".") if path else []
    for end in range(len(parts), -1, -1):
        module = root.get_submodule(".".join(parts[:end]))
        if hasattr(module, "_init_weights") and hasattr(module, "config"):
            return module
    return None
