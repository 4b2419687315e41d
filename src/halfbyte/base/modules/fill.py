"""Read, quantise and install a module's tensors one by one, into memory, onto a card or into files.

Several threads take a tensor each and read it in chunks, so what is held beside the result does not grow with it.
A tensor of the module itself goes as soon as its successor is there. On disk, a part of the module is one file, opened
memory-mapped when it is whole; a file that is not finished has another name.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from halfbyte.base.modules.places import DISK, Places
from halfbyte.base.modules.settings import Settings
from halfbyte.base.modules.sites import Site
from halfbyte.base.modules.weights import Weights
from halfbyte.base.store.writer import SafetensorsWriter, Slot
from halfbyte.errors import BaseModelError
from halfbyte.quant import formats
from halfbyte.quant.number_format import NumberFormat, torch_dtypes
from halfbyte.system import device as machine
from halfbyte.system import files

# More would hold more chunks than they save time.
THREADS = 4


@dataclass(frozen=True)
class Filling:
    """One module on its way. `folder`: where what goes to disk is written."""

    root: nn.Module
    settings: Settings
    weights: Weights
    places: Places
    folder: Path | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def all(self, sites: Iterable[Site]) -> None:
        """Install every site; errors of any thread end it.

        Raises:
            BaseModelError: a weight that is not finite; a disk that is full. The module is not whole then.
        """
        memory: list[Site] = []
        disk: dict[str, list[Site]] = {}
        for site in sites:
            if self.places.of[site.name] == DISK:
                disk.setdefault(self._part(site), []).append(site)
            else:
                memory.append(site)
        source = self.weights.source
        with source or nullcontext(), ThreadPoolExecutor(min(THREADS, machine.detect().cores)) as pool:
            try:
                for _ in pool.map(self._into_memory, memory):
                    pass
                for part, members in disk.items():
                    self._into_file(part, members, pool)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _part(self, site: Site) -> str:
        known, path = set(self.places.parts), site.name.rpartition(".")[0]
        while path and path not in known:
            path = path.rpartition(".")[0]
        return path

    def _into_memory(self, site: Site) -> None:
        if site.quantised:
            first, *_ = self._held().parts(site.held_shape, self.settings.quant)
            codes = torch.empty(first.nbytes or 0, dtype=torch.uint8)

            def put(name: str, data: memoryview, offset: int) -> None:
                codes[offset : offset + len(data)] = torch.frombuffer(data, dtype=torch.uint8)

            made = self._encode(site, put)
            parts = {"": codes.view(torch_dtypes()[first.dtype]).view(first.shape), **made}
            self._install(site, parts)
            return
        whole = torch.empty(site.numel, dtype=site.dtype)
        for at, values in self.weights.chunks(site, 1):
            whole[at : at + values.numel()] = values
        self._install(site, {"": whole.view(site.shape)})

    def _into_file(self, part: str, sites: list[Site], pool: ThreadPoolExecutor) -> None:
        """One part of the module, written and opened again."""
        assert self.folder is not None
        path = self.folder / (re.sub(r"[^A-Za-z0-9_.-]+", "-", part or "module") + ".safetensors")
        names = {dtype: name for name, dtype in torch_dtypes().items()}
        slots: list[Slot] = []
        for site in sites:
            if site.quantised:
                parts = self._held().parts(site.held_shape, self.settings.quant)
                slots += (Slot(p.name(site.name), p.dtype, p.shape, p.nbytes) for p in parts)
            else:
                slots.append(Slot(site.name, names[site.dtype], site.shape, site.numel * site.dtype.itemsize))
        try:
            with SafetensorsWriter(path, slots) as out:
                late = [*pool.map(lambda site: self._write(site, out), sites)]
                out.finish({name: data for each in late for name, data in each.items()})
        except OSError as error:
            raise BaseModelError(
                f"{path} cannot be written: {error.strerror or error}; {files.free_bytes(path) / 1e9:.2f} GB are free.",
                fix="name another offload_folder, or send less to disk in device_map",
            ) from error
        self._open(path, sites)

    def _write(self, site: Site, out: SafetensorsWriter) -> dict[str, bytes]:
        """Write one tensor; what is known only now is handed back."""
        if not site.quantised:
            for at, values in self.weights.chunks(site, 1):
                out.put(site.name, _bytes(values), at * site.dtype.itemsize)
            return {}
        made = self._encode(site, lambda name, data, offset: out.put(name, data, offset))
        late = {}
        for part in self._held().parts(site.held_shape, self.settings.quant)[1:]:
            if part.nbytes is None:
                late[part.name(site.name)] = bytes(_bytes(made[part.suffix]))
            else:
                out.put(part.name(site.name), _bytes(made[part.suffix]))
        return late

    def _open(self, path: Path, sites: list[Site]) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            for site in sites:
                if site.quantised:
                    parts = self._held().parts(site.held_shape, self.settings.quant)
                    self._install(site, {p.suffix: file.get_tensor(p.name(site.name)) for p in parts})
                else:
                    self._install(site, {"": file.get_tensor(site.name)})

    def _encode(self, site: Site, put: Callable[[str, memoryview, int], None]) -> dict[str, Tensor]:
        """Quantise; the codes are put as they come, the rest is handed back."""
        quant, held = self.settings.quant, self._held()
        encoder = held.encoder(quant, site.held_shape, site.dtype, site.name)
        for first, values in self.weights.chunks(site, held.unit(site.held_shape, quant)):
            data = encoder.codes(first, values).data.cast("B")
            put(site.name, data, encoder.code_bytes(first))
        return encoder.parts()

    def _held(self) -> NumberFormat:
        return formats.of(self.settings.quant)

    def _install(self, site: Site, parts: Mapping[str, Tensor]) -> None:
        place = self.places.of[site.name]
        if place != DISK:
            parts = {suffix: tensor.to(place) for suffix, tensor in parts.items()}
        with self._lock:  # a layer takes its bias along, which another thread may be about to fill
            if site.quantised:
                self._replace(site, parts)
            else:
                self._set(site, parts[""])

    def _set(self, site: Site, tensor: Tensor) -> None:
        old = getattr(self.root.get_submodule(_path(site.name)), _attribute(site.name))
        new = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        for name in site.names:
            setattr(self.root.get_submodule(_path(name)), _attribute(name), new)

    def _replace(self, site: Site, parts: Mapping[str, Tensor]) -> None:
        if site.stack:
            stack = self._held().stack(parts, site.shape, self.settings.quant, self.settings.compute)
            for name in site.names:
                self.root.get_submodule(_path(name)).register_parameter(_attribute(name), stack)
            return
        codes = parts[""]
        if codes.dtype == torch.uint8 and not codes.nbytes % self.settings.storage.itemsize:
            parts = {**parts, "": codes.view(-1).view(self.settings.storage).unsqueeze(1)}
        old = self.root.get_submodule(_path(site.name))
        rows, columns = site.held_shape
        made = self._held().layer(parts, (rows, columns), self.settings.quant, self.settings.compute)
        made.bias = old.bias
        made.requires_grad_(False).train(old.training)
        for name in site.names:
            self.root.set_submodule(_path(name), made)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _attribute(name: str) -> str:
    return name.rpartition(".")[2]
