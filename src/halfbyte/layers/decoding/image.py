"""Tapes in a file, to be run from there without torch and without a model, which take seconds to open.

What: the operations of tapes, with each address as a place: in memory that is zero at first, in a cache, in the image's
own file of numbers (LoRA, tables, a head in 8 bits), or in a file that was mapped (the base). What is between 2^32 and
2^47 in an operation is an address: all else is smaller, or the bits of a float64.
Cost: a hash of the image's own numbers when it is opened, 1 GB/s.
"""

from __future__ import annotations

import json
import math
import mmap
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from halfbyte.layers.decoding.decoder import CannotKeep, Decoder
from halfbyte.layers.decoding.tape_run import TapeRun
from halfbyte.layers.kernels.cpu.decoding import interpreter
from halfbyte.layers.kernels.cpu.decoding import slots as s
from halfbyte.system import files, pages
from halfbyte.types import Document

if TYPE_CHECKING:
    from torch import Tensor

INDEX, NUMBERS = "tape.json", "numbers.bin"
_LEAST, _MOST = 1 << 32, 1 << 47
_ZERO, _OWN, _CACHE, _FILE = range(4)  # kinds of places
_ALIGN = 64  # bytes
_BUFFERS = ("hidden", "logits", "positions", "places", "entry", "normed")
_SETTINGS = ("body", "residual_multiplier", "logits_divisor", "final_cap")
Where = tuple[tuple[int, int, int], Sequence[int]]
"""A kind, which of its kind, and bytes from its beginning; and a shape."""


class _Addresses:
    """What each address of some tapes will be, whose caches are those of the first one."""

    def __init__(self, decoders: Sequence[Decoder]) -> None:
        self.spans: list[tuple[int, int, tuple[int, int, int]]] = []  # in their order
        self.own: list[np.ndarray] = []
        self.maps = [each for each in pages.file_maps() if ".so" not in each[-1]]
        self.files: dict[str, int] = {}
        self.caches = [cache for pair in zip(decoders[0].keys, decoders[0].values, strict=True) for cache in pair]
        for number, cache in enumerate(self.caches):
            self._add(cache.data_ptr(), cache.stride(0) * len(cache) * cache.itemsize, (_CACHE, number, 0))
        self.zero_bytes = self.own_bytes = 0
        for buffer in (buffer for decoder in decoders for buffer in decoder.tape.buffers):
            self._add(buffer.data_ptr(), buffer.nbytes, (_ZERO, 0, self.zero_bytes))
            self.zero_bytes += _whole(buffer.nbytes)
        for constant in (constant for decoder in decoders for constant in decoder.tape.constants):
            self.of(constant)

    def _add(self, start: int, nbytes: int, place: tuple[int, int, int]) -> None:
        self.spans.insert(bisect_right(self.spans, start, key=lambda span: span[0]), (start, nbytes, place))

    def of(self, tensor: Tensor) -> Where:
        """Of a tensor that keeps its numbers."""
        start, nbytes = tensor.data_ptr(), tensor.nbytes
        if (place := self.find(start, nbytes)) is None:
            if (there := pages.in_file(start, nbytes, self.maps)) is not None:
                place = _FILE, self.files.setdefault(there[0], len(self.files)), there[1]
            else:
                import torch

                place = self.numbers(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())[0]
            self._add(start, nbytes, place)
        return place, list(tensor.shape)

    def numbers(self, array: np.ndarray) -> Where:
        """Of an array in the image's own file."""
        raw, at = np.ascontiguousarray(array).reshape(-1).view(np.uint8), self.own_bytes
        self.own += [raw, np.zeros(_whole(len(raw)) - len(raw), np.uint8)]
        self.own_bytes += _whole(len(raw))
        return (_OWN, 0, at), array.shape

    def find(self, address: int, nbytes: int = 1) -> tuple[int, int, int] | None:
        start, size, place = self.spans[bisect_right(self.spans, address, key=lambda span: span[0]) - 1]
        kind, number, offset = place
        return (kind, number, offset + address - start) if 0 <= address - start <= size - nbytes else None

    def document(self, decoder: Decoder) -> Document:
        """A decoder as JSON."""
        tape, operations = decoder.tape, decoder.tape.prepared(1).operations
        (at,) = np.nonzero((operations >= _LEAST) & (operations < _MOST))
        there = [self.find(int(address)) for address in operations[at]]
        if None in there or decoder.final_cap or decoder.places_of is not None:
            raise CannotKeep("its logits are capped, its positions learned, or an address none of the tape's")
        return {
            "kernel": tape.kernel,
            "sizes": {"groups": tape.groups, "scratch_bytes": tape.scratch_bytes},
            "operations": self.numbers(operations),
            "addresses": self.numbers(np.column_stack([at, np.array(there, np.int64).reshape(-1, 3)])),
            "rough": decoder.rough and [decoder.rough.start, decoder.rough.stop],
            "buffers": {name: self.of(b) for name in _BUFFERS if (b := getattr(decoder, name)) is not None},
            "ropes": [[self.of(table), self.of(row)] for table, row in decoder.ropes],
            "settings": {name: getattr(decoder, name) for name in _SETTINGS},
        }


def save(folder: Path, decoders: Sequence[Decoder], embedding: Tensor, facts: Document) -> None:
    """Decoders whose caches are those of the first one. `facts`: what whoever opens it has to know. Raises
    CannotKeep."""
    places, tokens = _Addresses(decoders), decoders[0].tape.max_tokens
    document = {
        "decoders": [places.document(decoder) for decoder in decoders],
        "embedding": places.of(embedding),
        "itemsize": embedding.itemsize,
        "max_tokens": tokens,
        "caches": [cache.stride(0) * cache.itemsize // tokens for cache in places.caches],
        "zero_bytes": places.zero_bytes,
        "files": [[path, _stamp(Path(path))] for path in places.files],
        "facts": facts,
    }
    files.write(folder / NUMBERS, np.concatenate(places.own).tobytes())
    files.write(folder / INDEX, files.as_json(files.seal({**document, "sha256": files.sha256(folder / NUMBERS)})))


def read(folder: Path) -> Document:
    """What `save` has written. Raises CannotKeep: a file of it is not whole, or one of the base is not as it was."""
    try:
        document: Document = json.loads((folder / INDEX).read_bytes())
        same = files.is_sealed(document) and all(_stamp(Path(path)) == stamp for path, stamp in document["files"])
        if same and files.sha256(folder / NUMBERS) == document["sha256"]:
            return document
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CannotKeep("the base's files")


class TapeImage:
    """An image for a text of up to so many tokens. `document`: as `read` gives it. threads: to compute with."""

    def __init__(self, folder: Path, document: Document, tokens: int, threads: int) -> None:
        self.tokens, self.threads = -(-tokens // 64) * 64, threads
        sizes, at = [_whole(row * self.tokens) for row in document["caches"]], document["zero_bytes"]
        zeros = np.zeros(at + sum(sizes) + _ALIGN, np.uint8)
        zeros = zeros[-zeros.ctypes.data % _ALIGN :]
        self._areas = {(_ZERO, 0): zeros, (_OWN, 0): _map(folder / NUMBERS)}
        for number, size in enumerate(sizes):
            self._areas[_CACHE, number] = zeros[at : at + size]
            at += size
        for number, (path, _) in enumerate(document["files"]):
            self._areas[_FILE, number] = _map(Path(path))
        self._element = np.dtype(np.uint16 if document["itemsize"] == 2 else np.float32)
        self.embedding = self._array(document["embedding"], self._element)
        self.decoders = [self._decoder(each) for each in document["decoders"]]

    def _array(self, where: Where, dtype: np.dtype | type = np.float32) -> np.ndarray:
        (kind, number, offset), shape = where
        raw = self._areas[kind, number][offset : offset + math.prod(shape) * np.dtype(dtype).itemsize]
        return raw.view(dtype).reshape(shape)

    def _decoder(self, each: Document) -> Decoder:
        operations, table = self._array(each["operations"], np.int64).copy(), self._array(each["addresses"], np.int64)
        for (kind, number), area in self._areas.items():
            here = table[(table[:, 1] == kind) & (table[:, 2] == number)]
            operations[here[:, 0]] = area.ctypes.data + here[:, 3]
        rows = operations.reshape(-1, s.WIDTH)
        rows[np.isin(rows[:, s.KIND], (s.ROTATE, s.ATTEND)), s.ATTEND_MAX_TOKENS] = self.tokens
        kernel = getattr(interpreter, each["kernel"])(self._element)
        tape = TapeRun(operations, kernel, self.threads, max_tokens=self.tokens, **each["sizes"])
        integers = {"positions": np.int64, "places": np.int64}
        fields: Document = {
            name: self._array(at, integers.get(name, np.float32)) for name, at in each["buffers"].items()
        }
        fields |= {"ropes": [tuple(map(self._array, pair)) for pair in each["ropes"]], **each["settings"]}
        return Decoder(tape=tape, rough=each["rough"] and range(*each["rough"]), **fields)

    def embedded(self, tokens: Sequence[int], factor: float) -> np.ndarray:
        """(n, D) in fp32."""
        rows = self.embedding[list(tokens)]
        wide = (rows.astype(np.uint32) << 16).view(np.float32) if rows.itemsize == 2 else rows
        return wide if factor == 1.0 else wide * np.float32(factor)


def _whole(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _map(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
