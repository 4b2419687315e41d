"""One safetensors file, written piece by piece in any order, its header last.

A layer is quantised in chunks, so that neither its source nor its result is ever whole in memory; and the length of one
small tensor (the quantiser's state, as JSON) is known only at the end. So room is kept free for the header, which
spaces may fill up. The data begins on a page of its own, so that a file is one clean mapping. Tensors are ordered by
the alignment that their length keeps: packed weights come first and lie on multiples of 64.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.base.store import manifest
from halfbyte.system import files
from halfbyte.system.platforms import calls
from halfbyte.types import Document

if TYPE_CHECKING:
    from typing_extensions import Buffer

PAGE, SPARE_BYTES = 4096, 1024
# Digits that an offset may take in the header.
_LARGEST = 10**15


@dataclass(frozen=True)
class Slot:
    """One tensor of the file; `nbytes` None for bytes that are handed over at the end."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int | None


class SafetensorsWriter:
    """A file under construction: `NAME.tmp`, renamed to NAME when it is whole and on the disk. `slots`: every tensor;
    those whose length is not known yet get at most `SPARE_BYTES` each."""

    def __init__(self, path: Path, slots: Iterable[Slot]) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".tmp")
        every = list(slots)
        self.known = sorted((s for s in every if s.nbytes is not None), key=lambda s: -gcd(s.nbytes or 0, PAGE))
        self.late = [s for s in every if s.nbytes is None]
        bound = _header([(s, _LARGEST, _LARGEST) for s in [*self.known, *self.late]])
        room = len(bound) + 32 * len(self.late)  # their shapes come late too
        self.data_start = -(-(8 + room) // PAGE) * PAGE
        ends = [0, *accumulate(slot.nbytes or 0 for slot in self.known)]
        self.placed = list(zip(self.known, ends, ends[1:], strict=False))
        self.starts = {slot.name: start for slot, start, _ in self.placed}
        self.known_bytes = ends[-1]
        self.max_bytes = self.data_start + self.known_bytes + SPARE_BYTES * len(self.late)
        self.fd = -1

    def __enter__(self) -> "SafetensorsWriter":
        self.fd = os.open(self.partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | calls.BINARY, 0o644)
        return self

    def put(self, name: str, data: "Buffer", offset: int = 0) -> None:
        """Write bytes of a tensor, `offset` bytes after its beginning."""
        _write(self.fd, data, self.data_start + self.starts[name] + offset)

    def finish(self, late: Mapping[str, bytes]) -> manifest.Entry:
        """`close`, and the file's hash."""
        self.close(late)
        return manifest.entry_of(self.path)

    def close(self, late: Mapping[str, bytes]) -> None:
        """Write what was not known before, then the header; the file is durable and in its place afterwards."""
        placed, at = list(self.placed), self.known_bytes
        for slot in self.late:
            content = late[slot.name]
            _write(self.fd, content, self.data_start + at)
            placed.append((Slot(slot.name, slot.dtype, (len(content),), len(content)), at, at + len(content)))
            at += len(content)
        header = _header(placed)
        room = self.data_start - 8
        if len(header) > room:
            raise ValueError(f"the header of {self.path.name} takes {len(header)} bytes, and {room} were kept free")
        _write(self.fd, room.to_bytes(8, "little") + header.ljust(room), 0)
        os.ftruncate(self.fd, self.data_start + at)
        os.close(self.fd)
        self.fd = -1
        files.put(self.partial, self.path)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        if kind is not None:
            self.partial.unlink(missing_ok=True)


def _header(placed: Iterable[tuple[Slot, int, int]]) -> bytes:
    values: Document = {"__metadata__": {"format": "pt"}}
    for slot, start, end in placed:
        values[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [start, end]}
    return json.dumps(values, separators=(",", ":")).encode()


def _write(fd: int, data: "Buffer", offset: int) -> None:
    """Write all of it: the system may take less at a time."""
    view = memoryview(data).cast("B")
    while len(view):
        done = calls.write_at(fd, view, offset)
        view, offset = view[done:], offset + done
