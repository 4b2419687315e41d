"""What a GGUF model states, and its tensors as float32, in pieces of whole rows.

Why: transformers dequantises the whole model into memory. Blocks never cross a row of a tensor, so rows can be read,
dequantised and put into another order a few at a time. Every key that `get` reads is noted, so that what nobody has
read can be refused.
Source: `gguf.quants.dequantize`, the gguf package's own.
Cost: 16 MB a piece whatever the tensor's size, but for one that is turned; 50 to 300 million elements a second and
thread, by type.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from halfbyte.models.gguf.header import GgufHeader, GgufTensor

PIECE_ELEMENTS = 1 << 22


class GgufError(Exception):
    """The file is whole, but it cannot be turned into a faithful checkpoint."""


class FileNumbers(Protocol):
    """What looks up a number of a file's metadata."""

    def number(self, key: str) -> int: ...


Order = Callable[[FileNumbers, str, int], np.ndarray]
"""(numbers, a tensor's name, its rows) -> which row of the file each row of the model is."""


@dataclass(frozen=True)
class Transform:
    """What turns a tensor of the file into a parameter: rows and columns in another order, another value, (out, in)
    instead of (in, out). `order` and `columns` say from where in the file each one comes; `back` undoes `value`."""

    order: Order | None = None
    columns: Order | None = None
    value: Callable[[np.ndarray], np.ndarray] | None = None
    transposed: bool = False
    back: Callable[[np.ndarray], np.ndarray] | None = None

    def inverse(self, values: np.ndarray, numbers: FileNumbers, name: str) -> np.ndarray:
        """The tensor of the file that reads as this parameter. `numbers`: what the file will state of its heads and
        groups."""
        if self.transposed and values.ndim > 1:
            values = values.T
        for axis, order in ((0, self.order), (values.ndim - 1, self.columns)):
            if order is not None:
                places = np.empty(values.shape[axis], np.int64)
                places[order(numbers, name, values.shape[axis])] = np.arange(values.shape[axis])
                values = values.take(places, axis)
        if self.value is not None:
            if self.back is None:
                raise NotImplementedError(name)
            values = self.back(values)
        return np.ascontiguousarray(values)


PLAIN = Transform()


class GgufReader:
    """A model's metadata and tensors. The files are mapped, so nothing of them counts as this process's own memory."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.used = {"block_count", "nextn_predict_layers"}  # keys that were read
        self.tensors = {tensor.name: tensor for tensor in header.tensors}

    @cached_property
    def _maps(self) -> dict[Path, np.ndarray]:
        # private pages: torch takes no array that may not be written to
        return {file: np.memmap(file, np.uint8, "c") for file in self.header.files}

    def get(self, key: str, default: Any = None) -> Any:
        """A value below the architecture's name. One number for all layers where the file repeats it for each."""
        self.used.add(key)
        value = self.header.metadata.get(f"{self.header.architecture}.{key}", default)
        if isinstance(value, float):
            return float(str(np.float32(value)))  # 1e-05, the shortest number that it stands for, not 9.99999974e-06
        return value[0] if isinstance(value, list) and len(set(value)) == 1 else value

    def every_layer(self, key: str) -> list[Any]:
        """The value of each layer, repeated where the file says one for all."""
        value = self.get(key)
        values = value if isinstance(value, list) else [value] * self.layers
        if len(values) < self.layers:
            raise GgufError(f"its {key} has {len(values)} values for {self.layers} layers")
        return values[: self.layers]

    def stated(self) -> list[str]:
        start = f"{self.header.architecture}."
        return [key.removeprefix(start) for key in self.header.metadata if key.startswith(start)]

    def has(self, tensor: str) -> bool:
        return tensor in self.tensors

    def table(self, tensor: str) -> np.ndarray | None:
        """The values of a small tensor, if the file has it."""
        return self.whole(tensor).reshape(-1) if self.has(tensor) else None

    @property
    def layers(self) -> int:
        count = self.get("block_count", 0)
        if not isinstance(count, int) or not 0 < count <= len(self.tensors):
            raise GgufError(f"its block_count is {count!r}, and it holds {len(self.tensors)} tensors")
        return int(count - self.get("nextn_predict_layers", 0))

    def number(self, key: str) -> int:
        """A number of the metadata below the architecture's name; the largest where each layer has its own."""
        value = self.header.metadata.get(f"{self.header.architecture}.{key}", 0)
        return max(value) if isinstance(value, list) else int(value)

    def shape(self, name: str, expert: int | None = None) -> tuple[int, ...]:
        return self.tensors[name].shape[0 if expert is None else 1 :]

    def places(self, order: Order | None, name: str, count: int) -> np.ndarray | None:
        """From where in the file each row, or column, comes; None: they lie as they are. Raises GgufError."""
        try:
            return None if order is None else order(self, name, count)
        except (ValueError, ZeroDivisionError):
            raise GgufError(f"{name} has {count} rows or columns, which the file's own heads do not divide") from None

    def pieces(self, name: str, expert: int | None = None, transform: Transform = PLAIN) -> Iterator[np.ndarray]:
        """The values, row by row in pieces of (rows, columns); of a stack those of one expert, or of all in turn. A
        tensor that is transposed is one piece."""
        tensor = self.tensors[name]
        raw = self._rows(tensor, single=transform.order is not None and len(tensor.shape) == 1)
        if expert is not None:
            raw = raw.reshape(tensor.shape[0], -1, raw.shape[1])[expert]
        order = self.places(transform.order, name, len(raw))
        columns = self.places(transform.columns, name, tensor.shape[-1])
        columns_of_a_row = max(1, tensor.numel // (tensor.nbytes // raw.shape[1]))
        step = len(raw) if transform.transposed else max(1, PIECE_ELEMENTS // columns_of_a_row)
        for first in range(0, len(raw), step):
            part = raw[first : first + step] if order is None else raw[order[first : first + step]]
            values = _dequantised(np.array(part), tensor.type)
            if transform.value is not None:
                values = transform.value(values)
            if columns is not None:
                values = values[:, columns]
            yield np.ascontiguousarray(values.T if transform.transposed and len(tensor.shape) > 1 else values)

    def whole(self, name: str, expert: int | None = None) -> np.ndarray:
        """All of a matrix, or of one expert's."""
        return np.concatenate(list(self.pieces(name, expert)))

    def rows(self, name: str) -> np.ndarray:
        """A tensor's bytes as they lie in the mapped file: (rows, bytes of a row)."""
        return self._rows(self.tensors[name], single=False)

    def _rows(self, tensor: GgufTensor, *, single: bool) -> np.ndarray:
        """The tensor's bytes, (rows, bytes of a row); with `single` each value of a vector is a row."""
        data = self._maps[tensor.file][tensor.start : tensor.start + tensor.nbytes]
        return data.reshape(tensor.numel if single else tensor.numel // tensor.shape[-1], -1)


def _dequantised(rows: np.ndarray, kind: str) -> np.ndarray:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    # A block's scale may be any float16; whoever reads the values looks for what is not finite.
    with np.errstate(all="ignore"):
        values: np.ndarray = dequantize(rows, GGMLQuantizationType[kind])
    return values
