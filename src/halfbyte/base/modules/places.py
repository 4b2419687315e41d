"""Where each part of a module goes: a card, memory, or disk; from a device map or from the memory that there is.

Parts are the largest modules that are called as one: the elements of lists of layers, and what lies beside them. Their
tensors come and go together. Source of the maps' meaning: accelerate, `infer_auto_device_map`, `dispatch_model`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from halfbyte.base.modules.settings import ModuleSettings
from halfbyte.base.modules.survey import ModuleTensor, Survey, nearest, tensors_of
from halfbyte.errors import BaseModelError
from halfbyte.system import device as machine
from halfbyte.system import files

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
DISK, CPU = "disk", "cpu"
# Of free memory; the rest is for activations.
_SHARE = 0.85
_HEADER_BYTES = 1 << 16


@dataclass(frozen=True)
class Places:
    """Where each tensor goes."""

    device_of: dict[str, str]  # of each tensor a device, or disk
    parts: tuple[str, ...]  # the modules whose tensors come and go together
    main: str  # where what is in memory or on disk is computed

    @property
    def on_card(self) -> bool:
        return self.main != CPU

    def part_of(self, name: str) -> str | None:
        """The part that a tensor belongs to; None for one beside all parts."""
        return _innermost(name, self.parts)


def parts_of(root: nn.Module, unsplit_classes: Iterable[str] = ()) -> Iterator[str]:
    """Names of the largest modules that are called as one. `unsplit_classes`: names of classes that are not taken
    apart."""

    def walk(name: str, module: nn.Module) -> Iterator[str]:
        lists = any(isinstance(m, (nn.ModuleList, nn.ModuleDict)) for m in module.modules())
        if type(module).__name__ in unsplit_classes or not (lists or isinstance(module, nn.Sequential)):
            yield name
            return
        for child, below in module.named_children():
            yield from walk(f"{name}.{child}" if name else child, below)

    yield from walk("", root)


def uses_card(device_map: str | Mapping[str, object] | None, device: machine.Device) -> bool:
    if isinstance(device_map, Mapping):
        return any(_device(value) not in (CPU, DISK) for value in device_map.values())
    return device.on_card


def resolve(
    root: nn.Module, survey: Survey, settings: ModuleSettings, device_map: str | Mapping[str, object] | None, *,
    max_memory: Mapping[object, object] | None = None, unsplit_classes: Iterable[str] = (),
) -> Places:  # fmt: skip
    """Decide for every tensor. Raises BaseModelError: a map with unknown names, tensors that it does not cover, or a
    device that is not here."""
    parts, device = tuple(parts_of(root, unsplit_classes)), machine.detect()
    names = [tensor.name for tensor in survey.tensors]
    if isinstance(device_map, Mapping):
        _check_map(root, device_map)
        nearest_entry = {name: _innermost(name, device_map, with_tensor=True) for name in names}
        if uncovered := [name for name, entry in nearest_entry.items() if entry is None]:
            raise BaseModelError(
                f"device_map says nothing about {len(uncovered)} tensors: {', '.join(uncovered[:5])}.",
                fix='add their modules, or "" for everything that is not named',
            )
        device_of = {name: _device(device_map[entry]) for name, entry in nearest_entry.items() if entry is not None}
    elif device_map is None:
        device_of = dict.fromkeys(names, device.main)
    elif device_map in AUTOMATIC:
        free = _free_bytes(device, max_memory)
        device_of = _filled(survey.tensors, parts, free, settings, even=device_map.startswith("balanced"))
    else:
        raise BaseModelError(f"device_map must be a mapping or one of {', '.join(AUTOMATIC)}, got {device_map!r}.")
    main = next((place for place in device_of.values() if place not in (CPU, DISK)), CPU)
    # What belongs to no part is needed throughout a forward.
    device_of = {n: main if place == DISK and _innermost(n, parts) is None else place for n, place in device_of.items()}
    return Places(device_of, parts, main)


def _innermost(name: str, known: Iterable[str], *, with_tensor: bool = False) -> str | None:
    """The innermost module around a tensor that is `known`, or the tensor itself `with_tensor`; None if there is none.
    The module as a whole, "", only counts where it is known."""
    names, path = set(known), name if with_tensor else name.rpartition(".")[0]
    while path and path not in names:
        path = path.rpartition(".")[0]
    return path if path in names else None


def _check_map(root: nn.Module, device_map: Mapping[str, object]) -> None:
    modules = dict(root.named_modules(remove_duplicate=False))
    known = {*modules, *tensors_of(root), *tensors_of(root, persistent=False)}
    if unknown := [name for name in device_map if name not in known]:
        near = nearest(unknown[0], known)
        raise BaseModelError(
            f"device_map names {', '.join(map(repr, unknown[:5]))}, which {type(root).__name__} does not have.",
            fix=f"did you mean {near!r}?" if near else "use whole names as in `module.named_modules()`",
        )
    count = torch.cuda.device_count()
    for name, value in device_map.items():
        place = _device(value)
        kind, _, index = place.partition(":")
        if kind not in (CPU, DISK, "cuda", "xpu", "mps", "npu", "hpu"):
            raise BaseModelError(f"device_map sends {name!r} to {value!r}; allowed are a card, cpu and disk.")
        if kind == "cuda" and int(index or 0) >= count:
            raise BaseModelError(f"device_map sends {name!r} to {place}, and this machine has {count} cards.")


def _device(value: object) -> str:
    """A device as torch writes it; `disk` as it is."""
    if isinstance(value, int):
        return f"cuda:{value}"
    text = str(value)
    return "cuda:0" if text == "cuda" else text.removesuffix(":0") if text.startswith(CPU) else text


def _free_bytes(device: machine.Device, max_memory: Mapping[object, object] | None) -> dict[str, int]:
    """Bytes for each device, cards first; disk takes the rest."""
    if max_memory is None:
        free = {f"{device.kind}:{card.index}": int(card.free_bytes * _SHARE) for card in device.cards}
        return {**free, CPU: int(device.ram_available_bytes * _SHARE)}
    from accelerate.utils.modeling import convert_file_size_to_int

    given = {_device(key): int(convert_file_size_to_int(size)) for key, size in max_memory.items()}
    return dict(sorted(given.items(), key=lambda item: (item[0] == CPU, item[0])))


def _filled(
    tensors: Sequence[ModuleTensor], parts: Sequence[str], free: dict[str, int], settings: ModuleSettings, *, even: bool
) -> dict[str, str]:
    """Parts in their order, each on the first device that still has memory for it; `even` fills cards alike."""
    groups = {tensor.name: _innermost(tensor.name, parts) or tensor.name for tensor in tensors}
    sizes = dict.fromkeys(groups.values(), 0)
    for tensor in tensors:
        sizes[groups[tensor.name]] += tensor.nbytes(settings)
    cards = [name for name in free if name != CPU]
    if even and len(cards) > 1:
        share = sum(sizes.values()) // len(cards) + max(sizes.values())
        free = {name: min(size, share) if name in cards else size for name, size in free.items()}
    devices, left = iter(free.items()), 0
    place, placed = "", dict[str, str]()
    for group, size in sizes.items():
        while place != DISK and (not place or left < size):
            place, left = next(devices, (DISK, 0))
        placed[group] = place
        left -= size
    return {name: placed[group] for name, group in groups.items()}


def check_folder(places: Places, survey: Survey, settings: ModuleSettings, folder: Path | None) -> None:
    """Refuse an offload folder that cannot take what is to go there. Raises BaseModelError: none named, not writable,
    or without space."""
    disk = [tensor for tensor in survey.tensors if places.device_of[tensor.name] == DISK]
    if not disk:
        return
    need = sum(tensor.nbytes(settings) + _HEADER_BYTES // 64 for tensor in disk) + _HEADER_BYTES
    if folder is None:
        raise BaseModelError(f"{len(disk)} tensors go to disk, and no folder is named.", fix="offload_folder='offload'")
    if why := files.why_unwritable(folder):
        raise BaseModelError(f"offload_folder {folder} cannot be written: {why}.", fix="name another offload_folder")
    free = files.free_bytes(folder)
    if free < need:
        raise BaseModelError(
            f"offload_folder {folder} has {free / 1e9:.3f} GB free, and {need / 1e9:.3f} GB go to disk.",
            fix="free some space, name another offload_folder, or send less to disk in device_map",
        )
