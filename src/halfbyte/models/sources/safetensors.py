"""Safetensors files: their headers, and the index over several of them. No weight is read.

Source: the safetensors format: 8 bytes with the header's length, a JSON header, then data without holes to the end.
"""

import math
from pathlib import Path
from typing import Any

from halfbyte.errors import SourceError
from halfbyte.system import limits
from halfbyte.types import Document

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
AGAIN = "download it again"
_HEADER_LIMIT_BYTES = limits.MAX_JSON_BYTES  # the format's own is three times as much; a name takes about 100
_MOST_DIMENSIONS, _LARGEST = 32, 2**63

Header = dict[str, Document]
"""Name -> {dtype, shape, data_offsets}, in the order of the data."""


def indexed_files(index: Path) -> list[str]:
    """The files that an index names, of safetensors or of pickled weights. Raises SourceError: it is no index, or it
    names a path: that could point anywhere on this disk."""
    try:
        listed: Any = limits.read_json(index)
        names = sorted(set(listed["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
    except OSError as error:
        raise SourceError(f"{index.name} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise SourceError(f"{index.name} is not JSON: {error}.") from error
    except (KeyError, AttributeError, TypeError):
        names, outside = [], []
    if not names:
        raise SourceError(f"{index.name} has no weight_map.")
    if outside:
        raise SourceError(f"{index.name} names a path, not a file: {', '.join(outside)}.")
    return names


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, as its index lists them or as they are there."""
    index = folder / INDEX
    if index.is_file():
        names = indexed_files(index)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise SourceError(
                f"{folder} lacks {len(missing)} of the {len(names)} files in its index: {', '.join(missing[:5])}.",
                fix="download the model again; what is there already is kept",
            )
        return [folder / name for name in names]
    single = folder / SINGLE
    files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
    if pickles:
        raise SourceError(
            f"{folder} has only pickled weights ({', '.join(pickles[:3])}), which can run code when they are opened.",
            fix="use a revision with .safetensors files, or set allow_pickle: true if you trust the source",
        )
    raise SourceError(f"{folder} has no .safetensors file.", fix="name the folder that holds the weights")


def read_header(file: Path, name: str | None = None) -> Header:
    """The header of one file, checked against the file's size; `name` is what errors call it. Raises SourceError: the
    file is cut short, or its header is not a safetensors header."""
    name, size = name or str(file), file.stat().st_size
    with file.open("rb") as stream:
        return parse_header(stream.read(header_length(stream.read(8), size, name)), size, name)


def header_length(start: bytes, size: int, name: str) -> int:
    """Bytes of the JSON header of a file of `size` bytes, from its first eight."""
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= length <= _HEADER_LIMIT_BYTES:
        raise SourceError(f"{name} is not a safetensors file ({size:,} bytes).", fix=AGAIN)
    if 8 + length > size:
        raise SourceError(
            f"{name} is cut short inside its header: {size:,} bytes of at least {8 + length:,}.", fix=AGAIN
        )
    return length


def parse_header(raw: bytes, size: int, name: str) -> Header:
    """The entries of a header; `name` and `size` are those of its file."""
    try:
        header: Any = limits.parse_json(raw)
        header.pop("__metadata__", None)
        for key, entry in header.items():
            _check(key, entry)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise SourceError(f"{name} is not a safetensors file: its header cannot be read: {error}.") from error
    end = 8 + len(raw) + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < end:
        raise SourceError(f"{name} is cut short: {size:,} bytes of {end:,}.", fix=AGAIN)
    if size > end:
        raise SourceError(f"{name} has {size - end:,} bytes more than its header says.", fix=AGAIN)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]))


def _check(name: str, entry: Any) -> None:
    shape, dtype, (begin, end) = entry["shape"], entry["dtype"], entry["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise ValueError(f"{name} has the unknown dtype {dtype!r}")
    if len(shape) > _MOST_DIMENSIONS or not all(isinstance(n, int) and 0 <= n < _LARGEST for n in (*shape, begin, end)):
        raise ValueError(f"{name[:100]} has the shape {str(shape)[:100]} and the offsets {begin!s:.30}, {end!s:.30}")
    if end - begin != (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8:
        raise ValueError(f"{name} has {end - begin} bytes, which do not hold {dtype} {shape}")
