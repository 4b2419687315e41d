"""The header of a GGUF file: its metadata and the table of its tensors, without the tensor data.

Why: a file that is cut, foreign or of an unknown kind must be refused in milliseconds, before torch is imported.
Source: the GGUF specification, versions 2 and 3 (github.com/ggml-org/ggml/blob/master/docs/gguf.md).
Cost: one walk over the metadata through a memory map, about 0.1 s for a vocabulary of 49,152.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from halfbyte.errors import SourceError
from halfbyte.types import Document

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
# Value type -> struct code. 8 is a string and 9 an array; both are read by hand.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """`shape` has the outermost dimension first, as torch has it; `end` counts from where the data begins."""

    name: str
    shape: tuple[int, ...]
    end: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """`metadata` holds scalars and strings, of an array its length only; the header ends at `header_bytes`."""

    architecture: str
    metadata: Document
    tensors: list[GgufTensor]
    header_bytes: int

    @property
    def numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        SourceError: not a GGUF, an unknown version or tensor type, cut short, one part of several, or no tokenizer.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != MAGIC:
                raise SourceError(f"{path} is not a GGUF file: it starts with {magic!r}, not {MAGIC!r}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
                return _Parser(path, blob, size_bytes).header()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    except (struct.error, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path} is cut short or damaged: its {size_bytes:,} bytes end inside its own header",
            fix="download or copy the file again",
        ) from error


class _Parser:
    """A position in the file, moved forward by each read."""

    def __init__(self, path: Path, blob: mmap.mmap, size_bytes: int) -> None:
        self.path, self.blob, self.size_bytes, self.position = path, blob, size_bytes, len(MAGIC)

    def header(self) -> GgufHeader:
        (version,) = self._unpack("I")
        if version not in VERSIONS:
            endian = " (a big-endian file)" if version.to_bytes(4, "little").startswith(b"\0\0\0") else ""
            raise SourceError(f"{self.path} is GGUF version {version}{endian}; allowed: little-endian 2 or 3")
        tensor_count, pair_count = self._unpack("QQ")
        metadata: Document = {}
        for _ in range(pair_count):
            key = self._string()
            (kind,) = self._unpack("I")
            metadata[key] = self._value(kind)
        entries = [self._tensor() for _ in range(tensor_count)]
        self._check(metadata, entries)
        return GgufHeader(metadata["general.architecture"], metadata, entries, self.position)

    def _check(self, metadata: Document, tensors: list[GgufTensor]) -> None:
        path = self.path
        if not isinstance(metadata.get("general.architecture"), str):
            raise SourceError(f"{path} does not say its general.architecture, so it is not a model")
        if metadata.get("split.count", 1) > 1:
            raise SourceError(
                f"{path} is one part of {metadata['split.count']}",
                fix="join the parts first: llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf",
            )
        if not tensors:
            raise SourceError(f"{path} holds no tensors: it is a vocabulary, not a model")
        if "tokenizer.ggml.tokens" not in metadata:
            raise SourceError(f"{path} holds no tokenizer (tokenizer.ggml.tokens), so no text can be read for it")
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        start = -(-self.position // alignment) * alignment
        # Offsets count from the start of the data, so the furthest end is the least size of a whole file.
        needed_bytes = start + max(tensor.end for tensor in tensors)
        if self.size_bytes < needed_bytes:
            raise SourceError(
                f"{path} is cut short: {self.size_bytes:,} bytes of {needed_bytes:,}",
                fix="download or copy the file again",
            )

    def _unpack(self, codes: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{codes}", self.blob, self.position)
        self.position += struct.calcsize(f"<{codes}")
        return values

    def _skip(self, nbytes: int) -> None:
        self.position += nbytes
        if self.position > self.size_bytes:
            raise struct.error("the file ends before its header does")

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        start = self.position
        self._skip(length)
        return self.blob[start : self.position].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._unpack(SCALARS[kind])[0]
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise SourceError(f"{self.path} has a metadata value of unknown type {kind}")
        element, count = self._unpack("IQ")
        if element in SCALARS:
            self._skip(count * struct.calcsize(f"<{SCALARS[element]}"))
        else:
            for _ in range(count):
                if element == STRING:
                    self._skip(self._unpack("Q")[0])
                else:
                    self._value(element)
        return count

    def _tensor(self) -> GgufTensor:
        from gguf.constants import GGML_QUANT_SIZES

        name = self._string()
        (rank,) = self._unpack("I")
        # ggml stores the innermost dimension first.
        shape = tuple(reversed(self._unpack(f"{rank}Q")))
        kind, offset = self._unpack("IQ")
        if kind not in GGML_QUANT_SIZES:
            raise SourceError(
                f"{self.path}: the tensor {name} has type {kind}, which the installed gguf package does not know",
                fix="pip install -U gguf, or use a file in a common type such as Q4_K_M, Q8_0 or F16",
            )
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        return GgufTensor(name, shape, offset + prod(shape) // block_elements * block_bytes)
