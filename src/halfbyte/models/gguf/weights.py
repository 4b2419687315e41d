"""The tensors of a GGUF model as float32, in pieces of whole rows.

Why: transformers dequantises the whole model into memory. Blocks never cross a row of a tensor, so rows can be read,
dequantised and put into another order a few at a time.
Source: `gguf.quants.dequantize`, the gguf package's own.
Cost: 16 MB a piece whatever the tensor's size; 50 to 300 million elements a second and thread, by type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from halfbyte.models.gguf.header import GgufHeader, GgufTensor

if TYPE_CHECKING:
    import numpy as np

    Order = Callable[["Stated", str, int], np.ndarray]
    """(weights, a tensor's name, its rows) -> which row of the file each row of the model is."""

PIECE_ELEMENTS = 1 << 22


class Stated(Protocol):
    """Who knows the numbers of a file's metadata."""

    def said(self, key: str) -> int: ...


@dataclass(frozen=True)
class How:
    """What turns a tensor of the file into a parameter: rows and columns in another order, another value, (out, in)
    instead of (in, out). `order` and `columns` say from where in the file each one comes; `back` undoes `value`."""

    order: Order | None = None
    columns: Order | None = None
    value: Callable[[np.ndarray], np.ndarray] | None = None
    transposed: bool = False
    back: Callable[[np.ndarray], np.ndarray] | None = None

    def undone(self, values: np.ndarray, said: Stated, name: str) -> np.ndarray:
        """The tensor of the file that reads as this parameter.

        Args:
            said: what the file will say of its heads and groups.
        """
        import numpy as np

        if self.transposed and values.ndim > 1:
            values = values.T
        for axis, order in ((0, self.order), (values.ndim - 1, self.columns)):
            if order is not None:
                places = np.empty(values.shape[axis], np.int64)
                places[order(said, name, values.shape[axis])] = np.arange(values.shape[axis])
                values = values.take(places, axis)
        if self.value is not None:
            if self.back is None:
                raise NotImplementedError(name)
            values = self.back(values)
        return np.ascontiguousarray(values)


PLAIN = How()


class Weights:
    """Reads a model's tensors; the files are mapped, so nothing of them counts as this process's own memory."""

    def __init__(self, header: GgufHeader) -> None:
        import numpy as np

        self.header = header
        self.by_name = {tensor.name: tensor for tensor in header.tensors}
        self._maps = {file: np.memmap(file, np.uint8, "r") for file in header.files}

    def said(self, key: str) -> int:
        """A number of the metadata below the architecture's name; the largest where each layer has its own."""
        value = self.header.metadata.get(f"{self.header.architecture}.{key}", 0)
        return max(value) if isinstance(value, list) else int(value)

    def shape(self, name: str, expert: int | None = None) -> tuple[int, ...]:
        return self.by_name[name].shape[0 if expert is None else 1 :]

    def pieces(self, name: str, expert: int | None = None, how: How = PLAIN) -> Iterator[np.ndarray]:
        """The values, row by row in pieces of (rows, columns); of a stack those of one expert, or of all in turn.

        A tensor that is transposed is one piece.
        """
        import numpy as np

        tensor = self.by_name[name]
        raw = self._rows(tensor, single=how.order is not None and len(tensor.shape) == 1)
        if expert is not None:
            raw = raw.reshape(tensor.shape[0], -1, raw.shape[1])[expert]
        order = how.order(self, name, len(raw)) if how.order is not None else None
        columns = how.columns(self, name, tensor.shape[-1]) if how.columns is not None else None
        columns_of_a_row = max(1, tensor.numel // (tensor.nbytes // raw.shape[1]))
        step = len(raw) if how.transposed else max(1, PIECE_ELEMENTS // columns_of_a_row)
        for first in range(0, len(raw), step):
            part = raw[first : first + step] if order is None else raw[order[first : first + step]]
            values = _dequantised(np.array(part), tensor.type)
            if how.value is not None:
                values = how.value(values)
            if columns is not None:
                values = values[:, columns]
            yield np.ascontiguousarray(values.T if how.transposed and len(tensor.shape) > 1 else values)

    def whole(self, name: str, expert: int | None = None) -> np.ndarray:
        """All of a matrix, or of one expert's."""
        import numpy as np

        return np.concatenate(list(self.pieces(name, expert)))

    def _rows(self, tensor: GgufTensor, *, single: bool) -> np.ndarray:
        """The tensor's bytes, (rows, bytes of a row); with `single` each value of a vector is a row."""
        data = self._maps[tensor.file][tensor.start : tensor.start + tensor.nbytes]
        rows = tensor.numel if single else tensor.numel // tensor.shape[-1]
        return data.reshape(rows, -1)


def _dequantised(rows: np.ndarray, kind: str) -> np.ndarray:
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    # A block's scale may be any float16; whoever reads the values looks for what is not finite.
    with np.errstate(all="ignore"):
        values: np.ndarray = dequantize(rows, GGMLQuantizationType[kind])
    return values
