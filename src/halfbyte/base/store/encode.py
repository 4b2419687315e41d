"""A tensor on its way from a source into a file or memory: read in chunks, cast, turned, quantised.

So what is held beside the result does not grow with a tensor, not even with an embedding; but a transposed matrix comes
at once. Reading, hashing, quantising and writing all run without Python's lock.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from halfbyte.base.store import mxfp4
from halfbyte.base.store.reading import Source, TensorPlan
from halfbyte.base.store.writer import SafetensorsWriter, Slot
from halfbyte.plan import store_build
from halfbyte.quant import formats
from halfbyte.quant.number_format import torch_dtypes
from halfbyte.recipe.schema import Quant

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Memory:
    """Tensors in memory, filled as a file is written."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        kinds = torch_dtypes()
        known = (slot for slot in slots if slot.nbytes is not None)
        self.tensors = {slot.name: torch.empty(slot.shape, dtype=kinds[slot.dtype]) for slot in known}

    def put(self, name: str, data: "Buffer", offset: int = 0) -> None:
        """Fill bytes of a tensor, `offset` bytes after its beginning."""
        given = torch.frombuffer(data, dtype=torch.uint8) if memoryview(data).nbytes else torch.empty(0)
        self.tensors[name].view(-1).view(torch.uint8)[offset : offset + given.numel()] = given

    def finish(self, late: dict[str, bytes]) -> None:
        """Take what was not known before."""
        self.tensors |= {n: torch.frombuffer(bytearray(data), dtype=torch.uint8) for n, data in late.items()}


def slots(plans: Iterable[TensorPlan], quant: Quant) -> list[Slot]:
    """The tensors that a file holds for these."""
    names = {dtype: name for name, dtype in torch_dtypes().items()}
    every: list[Slot] = []
    for plan in plans:
        if plan.encoding == "copy":
            every.append(Slot(plan.name, names[plan.dtype], plan.shape, plan.numel * plan.dtype.itemsize))
        else:
            parts = formats.of(quant).parts(plan.shape, quant)
            every += (Slot(part.name(plan.name), part.dtype, part.shape, part.nbytes) for part in parts)
    return every


class TensorReader:
    """Reads tensors, on one thread, with a buffer that is used again. `on_read`: is told the bytes of each chunk when
    it has been used. `hashes`: gets the hash of each tensor of the source, by its name; None makes none."""

    def __init__(
        self, source: Source, quant: Quant, *, on_read: Callable[[int], None] = lambda nbytes: None,
        hashes: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.source, self.quant = source, quant
        self.on_read, self.hashes = on_read, hashes
        self.buffer = np.empty(0, np.uint8)

    def chunks(self, plan: TensorPlan) -> Iterator[tuple[int, torch.Tensor]]:
        """(first element, values in the plan's dtype), flat and in order, whole units of the number format at a time.
        What is yielded is overwritten by the next chunk."""
        if plan.mxfp4:
            yield from self._experts_of_mxfp4(plan)
            return
        unit = 1 if plan.encoding == "copy" else formats.of(self.quant).unit(plan.shape, self.quant)
        most = max(1, store_build.CHUNK_ELEMENTS // unit) * unit
        start = 0
        for source in plan.sources:
            kind, numel = torch_dtypes()[source.dtype], math.prod(source.shape)
            digest = hashlib.sha256(f"{source.dtype}{list(source.shape)}".encode())
            at_once = math.prod(source.shape[-2:]) if plan.transposed else most
            for first in range(0, numel, max(1, at_once)):
                nbytes = min(at_once, numel - first) * kind.itemsize
                if len(self.buffer) < nbytes:
                    self.buffer = np.empty(nbytes, np.uint8)
                raw = self.buffer[:nbytes]
                self.source.read(source, first * kind.itemsize, raw.data)
                if self.hashes is not None:
                    digest.update(raw.data)
                values = torch.from_numpy(raw).view(kind).to(plan.dtype)
                if plan.transposed:
                    values = values.view(source.shape[-2:]).T.contiguous().view(-1)
                yield start + first, values
                self.on_read(nbytes)
            if self.hashes is not None:
                self.hashes[source.name] = digest.hexdigest()
            start += numel

    def _experts_of_mxfp4(self, plan: TensorPlan) -> Iterator[tuple[int, torch.Tensor]]:
        """The same for a stack in MXFP4: an expert at a time."""
        digests = [hashlib.sha256(f"{source.dtype}{list(source.shape)}".encode()) for source in plan.sources]
        numel = plan.numel // plan.shape[0]
        for expert in range(plan.shape[0]):
            raw = [bytearray(source.nbytes // source.shape[0]) for source in plan.sources]
            for source, digest, half in zip(plan.sources, digests, raw, strict=True):
                self.source.read(source, expert * len(half), memoryview(half))
                digest.update(half)
            shapes = (source.shape[1:] for source in plan.sources)
            blocks, scales = (np.frombuffer(h, np.uint8).reshape(n) for h, n in zip(raw, shapes, strict=True))
            yield expert * numel, mxfp4.decoded(blocks, scales, plan.dtype)
            self.on_read(sum(map(len, raw)))
        if self.hashes is not None:
            self.hashes |= {source.name: d.hexdigest() for source, d in zip(plan.sources, digests, strict=True)}

    def write(self, plan: TensorPlan, out: SafetensorsWriter | Memory) -> dict[str, bytes]:
        """Put a tensor into its place; what is known only when all of it is read is handed back, by name. Raises
        BaseModelError: a weight that is not finite."""
        if plan.encoding == "copy":
            for first, values in self.chunks(plan):
                out.put(plan.name, values.view(torch.uint8).numpy(), first * plan.dtype.itemsize)
            return {}
        number_format = formats.of(self.quant)
        encoder = number_format.encoder(self.quant, plan.shape, plan.dtype, plan.name)
        for first, values in self.chunks(plan):
            out.put(plan.name, encoder.codes(first, values).data, encoder.code_bytes(first))
        beside, late = encoder.parts(), {}
        for part in number_format.parts(plan.shape, self.quant)[1:]:
            data = beside[part.suffix].contiguous().view(-1).view(torch.uint8).numpy()
            if part.nbytes is None:
                late[part.name(plan.name)] = data.tobytes()
            else:
                out.put(part.name(plan.name), data)
        return late
