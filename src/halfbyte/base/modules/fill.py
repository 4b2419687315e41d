"""Read, quantise and install a module's tensors one by one, into memory, onto a card or into files.

Several threads take a tensor each and read it in chunks (`base/store/encode.py`), so what is held beside the result
does not grow with it. A tensor of the module itself goes as soon as its successor is there. On disk, a part of the
module is one file, opened memory-mapped when it is whole; a file that is not finished has another name.
"""

import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from halfbyte.base.modules.places import DISK, Places
from halfbyte.base.modules.settings import ModuleSettings
from halfbyte.base.modules.survey import ModuleTensor, owner_of
from halfbyte.base.modules.weights import ModuleSource, Weights, tensor_at
from halfbyte.base.store.encode import Memory, TensorReader, slots
from halfbyte.base.store.writer import SafetensorsWriter
from halfbyte.errors import BaseModelError
from halfbyte.quant import formats
from halfbyte.system import device as machine
from halfbyte.system import files

# More would hold more chunks than they save time.
THREADS = 4


@dataclass(frozen=True)
class Filling:
    """One module on its way. `folder`: where what goes to disk is written."""

    root: nn.Module
    settings: ModuleSettings
    weights: Weights
    places: Places
    folder: Path | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def all(self, tensors: Iterable[ModuleTensor]) -> None:
        """Install every tensor; errors of any thread end it. Raises BaseModelError: a weight that is not finite; a disk
        that is full. The module is not whole then."""
        memory: list[ModuleTensor] = []
        disk: dict[str, list[ModuleTensor]] = {}
        for tensor in tensors:
            on_disk = self.places.device_of[tensor.name] == DISK
            (disk.setdefault(self.places.part_of(tensor.name) or "", []) if on_disk else memory).append(tensor)
        with self.weights.source, ThreadPoolExecutor(min(THREADS, machine.detect().cores)) as pool:
            try:
                for _ in pool.map(self._into_memory, memory):
                    pass
                for part, members in disk.items():
                    self._into_file(part, members, pool)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _reader(self) -> TensorReader:
        return TensorReader(self.weights.source, self.settings.quant)

    def _into_memory(self, tensor: ModuleTensor) -> None:
        if not tensor.quantised and isinstance(self.weights.source, ModuleSource):
            whole = tensor_at(self.root, tensor.name).detach().to(tensor.dtype)
            self._install(tensor, lambda name: whole)
            return
        plan = self.weights.plan(tensor)
        memory = Memory(slots([plan], self.settings.quant))
        memory.finish(self._reader().write(plan, memory))
        self._install(tensor, memory.tensors.__getitem__)

    def _into_file(self, part: str, tensors: Sequence[ModuleTensor], pool: ThreadPoolExecutor) -> None:
        """One part of the module, written and opened again."""
        assert self.folder is not None
        path = self.folder / (re.sub(r"[^A-Za-z0-9_.-]+", "-", part or "module") + ".safetensors")
        plans = [self.weights.plan(tensor) for tensor in tensors]
        try:
            with SafetensorsWriter(path, slots(plans, self.settings.quant)) as out:
                late = pool.map(lambda plan: self._reader().write(plan, out), plans)
                out.finish({name: data for each in late for name, data in each.items()})
        except OSError as error:
            raise BaseModelError(
                f"{path} cannot be written: {error.strerror or error}; {files.free_bytes(path) / 1e9:.2f} GB are free.",
                fix="name another offload_folder, or send less to disk in device_map",
            ) from error
        with safe_open(path, framework="pt") as file:
            for tensor in tensors:
                self._install(tensor, file.get_tensor)

    def _install(self, tensor: ModuleTensor, get: Callable[[str], Tensor]) -> None:
        """Put a tensor into the module; `get` gives what was made of it, by name."""
        quant, place = self.settings.quant, self.places.device_of[tensor.name]
        number_format = formats.of(quant)
        stored = number_format.parts(tensor.held_shape, quant) if tensor.quantised else ()
        parts = {part.suffix: get(part.name(tensor.name)) for part in stored} or {"": get(tensor.name)}
        if place != DISK:
            parts = {suffix: value.to(place) for suffix, value in parts.items()}
        with self._lock:  # a layer takes its bias along, which another thread may be about to fill
            if not tensor.quantised:
                old = tensor_at(self.root, tensor.name)
                value = parts[""]
                self._set(tensor, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)
            elif tensor.stack:
                self._set(tensor, number_format.stack(parts, tensor.shape, quant, self.settings.compute))
            else:
                self._replace(tensor, parts)

    def _set(self, tensor: ModuleTensor, value: Tensor) -> None:
        for name in tensor.names:
            setattr(self.root.get_submodule(owner_of(name)), name.rpartition(".")[2], value)

    def _replace(self, tensor: ModuleTensor, parts: dict[str, Tensor]) -> None:
        """A layer in the place of a linear one."""
        codes, storage = parts[""], self.settings.storage
        if codes.dtype == torch.uint8 != storage and not codes.nbytes % storage.itemsize:
            parts = {**parts, "": codes.view(-1).view(storage).unsqueeze(1)}
        old = self.root.get_submodule(owner_of(tensor.name))
        (rows, columns), quant = tensor.held_shape, self.settings.quant
        layer = formats.of(quant).layer(parts, (rows, columns), quant, self.settings.compute)
        layer.bias = old.bias
        layer.requires_grad_(False).train(old.training)
        for name in tensor.names:
            self.root.set_submodule(owner_of(name), layer)
