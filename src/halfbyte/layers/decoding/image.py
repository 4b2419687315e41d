"""Tapes in a file, to be run from there without torch and without a model, which take seconds to open.

What: the operations of tapes, with each address as a place: in memory that is zero at first (buffers and caches), in
the image's own file of numbers (LoRA, tables, a head in 8 bits), or in a file that was mapped (the base). What is
between 2^32 and 2^47 in an operation is an address: all else is smaller, or the bits of a float64.
Cost: a hash of the image's own numbers when it is opened, 1 GB/s.
"""

import json
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from halfbyte.layers.decoding.decoder import CannotKeep, Decoder, TapeRun
from halfbyte.layers.kernels.cpu.decoding import interpreter
from halfbyte.system import files, pages
from halfbyte.types import Document

if TYPE_CHECKING:
    from torch import Tensor

INDEX, NUMBERS = "tape.json", "numbers.bin"
MOST_BYTES = 500_000_000
_LEAST, _MOST = 1 << 32, 1 << 47
_ZERO, _OWN, _FIRST_FILE = range(3)  # areas
_ALIGN = 64  # bytes
_BUFFERS = ("hidden", "logits", "positions", "places", "entry", "normed")
_SETTINGS = ("body", "residual_multiplier", "logits_divisor", "final_cap")
Where = tuple[tuple[int, int], Sequence[int]]
"""An area, and bytes from its beginning; and a shape."""


class _Addresses:
    """What each address of some tapes will be, whose caches are those of the first one."""

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        self.spans: dict[int, tuple[int, tuple[int, int]]] = {}  # address -> bytes, and the place
        self.sizes, self.own = [0, 0], list[np.ndarray]()
        self.maps = [each for each in pages.file_maps() if ".so" not in each[-1]]
        self.files: list[str] = []
        buffers = [buffer for decoder in decoders for buffer in decoder.tape.buffers]
        for zero in (*decoders[0].keys, *decoders[0].values, *decoders[0].states, *buffers):
            nbytes = max(zero.nbytes, zero.stride(0) * len(zero) * zero.itemsize)
            self.spans[zero.data_ptr()] = nbytes, self._take(_ZERO, nbytes)
        for constant in (constant for decoder in decoders for constant in decoder.tape.constants):
            self.of(constant)

    def _take(self, area: int, nbytes: int) -> tuple[int, int]:
        at = self.sizes[area]
        self.sizes[area] += -(-nbytes // _ALIGN) * _ALIGN
        return area, at

    def of(self, tensor: "Tensor") -> Where:
        """Of a tensor that keeps its numbers."""
        start, nbytes = tensor.data_ptr(), tensor.nbytes
        if start not in self.spans:
            if (there := pages.in_file(start, nbytes, self.maps)) is not None:
                self.files += [there[0]] * (there[0] not in self.files)
                place = _FIRST_FILE + self.files.index(there[0]), there[1]
            else:
                import torch

                place = self.numbers(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())[0]
            self.spans[start] = nbytes, place
        return self.spans[start][1], list(tensor.shape)

    def numbers(self, array: np.ndarray) -> Where:
        """Of an array in the image's own file."""
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.own += [raw, np.zeros(-len(raw) % _ALIGN, np.uint8)]
        return self._take(_OWN, len(raw)), array.shape

    def document(self, decoder: Decoder) -> Document:
        """A decoder as JSON."""
        tape, operations = decoder.tape, decoder.tape.prepared(1).operations
        starts = np.array(sorted(self.spans))
        (at,) = np.nonzero((operations >= starts[0]) & (operations < _MOST))
        nearest = starts[np.searchsorted(starts, operations[at], "right") - 1]
        table = np.array([(self.spans[start][0], *self.spans[start][1]) for start in nearest.tolist()])
        inside = operations[at] - nearest
        is_ours = inside < table[:, 0]
        # where a Python is not moved when it is loaded, its heap begins below 2^32
        rest = np.delete(operations, at[is_ours])
        heap = np.array([(span.start, span.end) for span in pages.heap()]).reshape(-1, 2)
        if not len(heap):
            raise CannotKeep("this system does not say where its memory is")
        in_heap = rest < heap[np.searchsorted(heap[:, 0], rest, "right") - 1, 1]
        is_address = (rest < _MOST) & ((rest >= _LEAST) | (in_heap & (rest >= heap[0, 0])))
        if is_address.any() or decoder.final_cap or decoder.places_of is not None:
            raise CannotKeep("its logits are capped, its positions learned, or an address none of the tape's")
        at, table = at[is_ours], np.column_stack([table[:, 1], table[:, 2] + inside])[is_ours]
        return {
            "kernel": tape.kernel,
            "sizes": tape.sizes,
            "operations": self.numbers(operations),
            "addresses": self.numbers(np.column_stack([at, table])),
            "rough": decoder.rough and [decoder.rough.start, decoder.rough.stop],
            "buffers": {name: self.of(b) for name in _BUFFERS if (b := getattr(decoder, name)) is not None},
            "ropes": [[self.of(table), self.of(row)] for table, row in decoder.ropes],
            "settings": {name: getattr(decoder, name) for name in _SETTINGS},
        }


def save(folder: Path, decoders: Sequence[Decoder], embedding: "Tensor", facts: Document) -> None:
    """Decoders whose caches are those of the first one. `facts`: what whoever opens it has to know. Raises
    CannotKeep."""
    addresses = _Addresses(decoders)
    document = {
        "decoders": [addresses.document(decoder) for decoder in decoders],
        "embedding": addresses.of(embedding),
        "itemsize": embedding.itemsize,
        "amx": interpreter.AMX,
        "zero_bytes": addresses.sizes[_ZERO],
        "files": [[path, _stamp(Path(path))] for path in addresses.files],
        **facts,
    }
    if addresses.sizes[_OWN] > MOST_BYTES:
        raise CannotKeep(f"it would take {addresses.sizes[_OWN] / 1e9:.1f} GB of the disk: the base is in no file")
    files.write(folder / NUMBERS, np.concatenate(addresses.own).tobytes())
    files.write(folder / INDEX, files.as_json(files.seal({**document, "sha256": files.sha256(folder / NUMBERS)})))


def read(folder: Path) -> Document:
    """What `save` has written. Raises CannotKeep: a file of it is not whole, one of the base is not as it was, or this
    process has other kernels."""
    try:
        document: Document = json.loads((folder / INDEX).read_bytes())
        same = files.is_sealed(document) and all(_stamp(Path(path)) == stamp for path, stamp in document["files"])
        if same and document["amx"] == interpreter.AMX and files.sha256(folder / NUMBERS) == document["sha256"]:
            return document
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CannotKeep("the base's files")


class TapeImage:
    """An image, ready to be run. `document`: as `read` gives it. threads: to compute with."""

    def __init__(self, folder: Path, document: Document, threads: int) -> None:
        # its pages are taken as they are written to
        zeros = mmap.mmap(-1, document["zero_bytes"], access=mmap.ACCESS_COPY)
        self._areas = [
            np.frombuffer(zeros, np.uint8),
            _map(folder / NUMBERS),
            *(_map(Path(path)) for path, _ in document["files"]),
        ]
        self._element = np.dtype(np.uint16 if document["itemsize"] == 2 else np.float32)
        self.embedding = self._array(document["embedding"], self._element)
        self.decoders = [self._decoder(each, threads) for each in document["decoders"]]

    def _array(self, where: Where, dtype: np.dtype | type = np.float32) -> np.ndarray:
        (area, at), shape = where
        return self._areas[area][at : at + math.prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)

    def _decoder(self, each: Document, threads: int) -> Decoder:
        operations, table = self._array(each["operations"], np.int64).copy(), self._array(each["addresses"], np.int64)
        bases = np.array([area.ctypes.data for area in self._areas])
        operations[table[:, 0]] = bases[table[:, 1]] + table[:, 2]
        tape = TapeRun(operations, getattr(interpreter, each["kernel"])(self._element), threads, **each["sizes"])
        integers, fields = {"positions": np.int64, "places": np.int64}, dict(each["settings"])
        fields |= {name: self._array(at, integers.get(name, np.float32)) for name, at in each["buffers"].items()}
        ropes = [(self._array(table), self._array(row)) for table, row in each["ropes"]]
        rough = each["rough"] and range(*each["rough"])
        return Decoder(tape=tape, ropes=ropes, rough=rough, **fields)

    def embedded(self, tokens: Sequence[int], factor: float) -> np.ndarray:
        """(n, D) in fp32."""
        rows = self.embedding[list(tokens)]
        wide = (rows.astype(np.uint32) << 16).view(np.float32) if rows.itemsize == 2 else rows
        return wide if factor == 1.0 else wide * np.float32(factor)


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _map(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
