"""The header of a GGUF file: its metadata and the table of its tensors, without the tensor data.

Why: a file that is cut, foreign, hostile or of an unknown kind must be refused in milliseconds, before torch is
imported and before anything is allocated by what it says.
Source: the GGUF specification, versions 2 and 3 (github.com/ggml-org/ggml/blob/master/docs/gguf.md).
Cost: one walk over the metadata through a memory map, about 0.1 s for a vocabulary of 49,152.
"""

import glob
import mmap
import re
import struct
from collections import Counter
from collections.abc import Sequence
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
# Of an array more values than this (a vocabulary) only the length is kept.
KEPT_VALUES = 4096
# ggml's own limit.
MAX_AXES = 4
# What the shortest pair (key, type, one byte) and the shortest tensor (name, rank, one size, type, offset) take.
PAIR_BYTES, TENSOR_BYTES = 13, 32
# The types that `gguf.quants.dequantize` reads; a seam test compares.
READABLE = frozenset(
    (
        "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0",
        "TQ2_0", "MXFP4", "NVFP4", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL",
        "IQ4_XS",
    )
)  # fmt: skip
_AGAIN = "download or copy the file again"
_ANOTHER = "use a file in a common type such as Q4_K_M, Q8_0 or F16"
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class GgufTensor:
    """`shape` has the outermost dimension first, as torch has it; `start` counts from the beginning of `file`."""

    name: str
    shape: tuple[int, ...]
    type: str
    file: Path
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """`metadata` holds scalars, strings and short arrays of numbers, of other arrays their length only. Of a model in
    several files it is the first one's, and `tensors` are those of all; the headers take `header_bytes` together."""

    architecture: str
    metadata: Document
    tensors: list[GgufTensor]
    header_bytes: int
    files: tuple[Path, ...]

    @property
    def numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def quantised_as(self) -> str:
        """The type that holds most of its weights."""
        counts = Counter[str]()
        for tensor in self.tensors:
            counts[tensor.type] += tensor.numel
        return counts.most_common(1)[0][0]


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF model, of each of its files where it is split. Raises SourceError: not a
    GGUF, an unknown version or tensor type, cut short, a part missing, or no tokenizer."""
    first = _read_file(path)
    count = _number(path, first, "split.count", 1)
    if count <= 1:
        return _checked(path, first)
    parts = [_read_file(part) for part in _parts(path, count)]
    for number, part in enumerate(parts):
        if _number(part.files[0], part, "split.no", -1) != number:
            raise SourceError(f"{part.files[0]} is called part {number + 1}, and its split.no is not {number}")
    tensors = [tensor for part in parts for tensor in part.tensors]
    if (stated := parts[0].metadata.get("split.tensors.count", len(tensors))) != len(tensors):
        raise SourceError(
            f"{path}: its split.tensors.count is {stated}, and its {count} parts hold {len(tensors)} tensors"
        )
    header_bytes = sum(part.header_bytes for part in parts)
    files = tuple(part.files[0] for part in parts)
    return _checked(files[0], GgufHeader(parts[0].architecture, parts[0].metadata, tensors, header_bytes, files))


def vocabulary(header: GgufHeader) -> tuple[list[str], list[int]]:
    """A file's tokens as it spells them, and llama.cpp's kind of each, where it says that."""
    names = ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")
    values = _read_file(header.files[0], whole=names).metadata
    return values[names[0]], values.get(names[1], [])


def parts_of(path: Path) -> list[Path]:
    """The files of a model by the name of one of them, as far as they are there; itself where it is the only one."""
    match = _PART.search(path.name)
    pattern = f"{glob.escape(path.name[: match.start()])}-*-of-{match[2]}.gguf" if match is not None else ""
    return sorted(path.parent.glob(pattern)) if match is not None else [path]


def _parts(path: Path, count: int) -> list[Path]:
    """The files of a split model, by the name of one of them."""
    match = _PART.search(path.name)
    if match is None or int(match[2]) != count:
        raise SourceError(
            f"{path} is one part of {count}, and it is not called NAME-00001-of-{count:05}.gguf as a part is",
            fix="give the parts their names again, or join them: llama-gguf-split --merge FIRST_PART.gguf WHOLE.gguf",
        )
    stem = path.name[: match.start()]
    parts = [path.with_name(f"{stem}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise SourceError(
            f"{path} is one part of {count}, and {len(missing)} are not beside it: {', '.join(missing[:5])}",
            fix="download all parts into one folder",
        )
    return parts


def _number(path: Path, header: GgufHeader, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if not isinstance(value, int):
        raise SourceError(f"{path}: its {key} is {value!r}, not a number", fix=_AGAIN)
    return value


def _checked(path: Path, header: GgufHeader) -> GgufHeader:
    if not header.architecture:
        raise SourceError(f"{path} does not say its general.architecture, so it is not a model")
    if not header.tensors:
        raise SourceError(f"{path} holds no tensors: it is a vocabulary, not a model")
    if "tokenizer.ggml.tokens" not in header.metadata:
        raise SourceError(f"{path} holds no tokenizer (tokenizer.ggml.tokens), so no text can be read for it")
    name, count = Counter(tensor.name for tensor in header.tensors).most_common(1)[0]
    if count > 1:
        raise SourceError(f"{path} holds the tensor {name} twice")
    return header


def _read_file(path: Path, whole: Sequence[str] = ()) -> GgufHeader:
    """`whole`: long arrays of which all values are read."""
    parser = None
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != MAGIC:
                raise SourceError(f"{path} is not a GGUF file: it starts with {magic!r}, not {MAGIC!r}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
                parser = _Parser(path, blob, size_bytes, whole)
                return parser.header()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
    except (struct.error, UnicodeDecodeError) as error:
        where = f" (at {parser.field})" if parser is not None else ""
        raise SourceError(
            f"{path} is cut short or damaged: its {size_bytes:,} bytes end inside its own header{where}", fix=_AGAIN
        ) from error


class _Parser:
    """A position in the file, moved forward by each read; `field` is what is being read, for errors."""

    def __init__(self, path: Path, blob: mmap.mmap, size_bytes: int, whole: Sequence[str]) -> None:
        self.path, self.blob, self.size_bytes, self.whole = path, blob, size_bytes, whole
        self.position, self.field = len(MAGIC), "version"

    def header(self) -> GgufHeader:
        (version,) = self._unpack("I")
        if version not in VERSIONS:
            endian = " (a big-endian file)" if version.to_bytes(4, "little").startswith(b"\0\0\0") else ""
            raise SourceError(f"{self.path} is GGUF version {version}{endian}; allowed: little-endian 2 or 3")
        tensor_count = self._count("tensor_count", TENSOR_BYTES)
        pair_count = self._count("metadata_kv_count", PAIR_BYTES)
        metadata: Document = {}
        for number in range(pair_count):
            self.field = f"the key of metadata value {number + 1} of {pair_count}"
            key = self.field = self._string()
            (kind,) = self._unpack("I")
            metadata[key] = self._value(kind)
        entries = []
        for number in range(tensor_count):
            self.field = f"tensor {number + 1} of {tensor_count}"
            entries.append(self._tensor())
        return self._placed(metadata, entries)

    def _placed(self, metadata: Document, tensors: list[tuple[str, tuple[int, ...], str, int, int]]) -> GgufHeader:
        """The header with each tensor's place in the file; none of them ends behind it."""
        unit = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(unit, int) or isinstance(unit, bool) or unit < 1 or unit % 8:
            raise SourceError(f"{self.path}: its general.alignment is {unit!r}; allowed: a multiple of 8", fix=_AGAIN)
        data = -(-self.position // unit) * unit
        # Offsets count from the start of the data, so the furthest end is the least size of a whole file.
        needed_bytes = data + max((offset + nbytes for *_, offset, nbytes in tensors), default=0)
        if self.size_bytes < needed_bytes:
            raise SourceError(f"{self.path} is cut short: {self.size_bytes:,} bytes of {needed_bytes:,}", fix=_AGAIN)
        architecture = metadata.get("general.architecture")
        return GgufHeader(
            architecture if isinstance(architecture, str) else "",
            metadata,
            [GgufTensor(name, shape, kind, self.path, data + at, nbytes) for name, shape, kind, at, nbytes in tensors],
            self.position,
            (self.path,),
        )

    def _count(self, field: str, least_bytes: int) -> int:
        """A number of things of at least so many bytes each, which the rest of the file can hold."""
        self.field = field
        (count,) = self._unpack("Q")
        self._check_count(count, least_bytes)
        return int(count)

    def _check_count(self, count: int, least_bytes: int) -> None:
        if count * least_bytes > self.size_bytes - self.position:
            raise SourceError(
                f"{self.path} is cut short or damaged: {self.field} says {count:,} entries, which do not fit into the "
                f"{self.size_bytes - self.position:,} bytes that follow",
                fix=_AGAIN,
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
            raise SourceError(f"{self.path}: its {self.field} is a value of unknown type {kind}")
        element, count = self._unpack("IQ")
        if element in SCALARS:
            self._check_count(count, struct.calcsize(f"<{SCALARS[element]}"))
            if count <= KEPT_VALUES or self.field in self.whole:
                return list(self._unpack(f"{count}{SCALARS[element]}"))
            self._skip(count * struct.calcsize(f"<{SCALARS[element]}"))
        elif element == STRING:
            self._check_count(count, 8)
            if self.field in self.whole:
                return [self._string() for _ in range(count)]
            for _ in range(count):
                self._skip(self._unpack("Q")[0])
        else:
            raise SourceError(f"{self.path}: its {self.field} is an array of unknown type {element}")
        return count

    def _tensor(self) -> tuple[str, tuple[int, ...], str, int, int]:
        """(name, shape, type, offset, bytes)."""
        from gguf.constants import GGML_QUANT_SIZES

        name = self._string()
        self.field = f"the tensor {name}"
        (rank,) = self._unpack("I")
        if not 1 <= rank <= MAX_AXES:
            raise SourceError(f"{self.path}: {self.field} has {rank} dimensions; allowed: 1 to {MAX_AXES}", fix=_AGAIN)
        # ggml stores the innermost dimension first.
        shape = tuple(reversed(self._unpack(f"{rank}Q")))
        kind, offset = self._unpack("IQ")
        known = {int(number): number.name for number in GGML_QUANT_SIZES}
        if kind not in known:
            raise SourceError(
                f"{self.path}: {self.field} has type {kind}, which the installed gguf package does not know",
                fix=f"pip install -U gguf, or {_ANOTHER}",
            )
        if known[kind] not in READABLE:
            raise SourceError(
                f"{self.path}: {self.field} has type {known[kind]}, which cannot be read; allowed: "
                f"{', '.join(sorted(READABLE))}",
                fix=_ANOTHER,
            )
        block_elements, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block_elements:
            raise SourceError(
                f"{self.path}: {self.field} has the shape {list(shape)}, whose rows are not whole blocks of "
                f"{block_elements} ({known[kind]})",
                fix=_AGAIN,
            )
        return name, shape, known[kind], offset, prod(shape) // block_elements * block_bytes
