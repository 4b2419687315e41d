"""A GGUF file's own blocks as frozen weights: what a matrix holds are the bytes of the mapped file, as they lie there.

Why: people train in one number format and answer in another. Here the base is the very file that llama.cpp or Ollama
runs, so an adapter learns beside the weights that it will stand beside, and nothing is quantised a second time.
What: a layer's weight is (rows, bytes of a row) of the file, with the blocks' type. Where the converter has put rows
or columns into another order, the weight says from where each one comes; a row is whole blocks, so rows cost nothing.
Experts are one tensor of the file, or the gate's and the up projection's, one below the other.
Source: ggml's block formats as the gguf package reads them (`gguf.quants`), whose numpy is also the slow path.
Cost: 4.5 bits a weight (Q4_0, Q4_K) to 8.5 (Q8_0); dequantising `kernels/gguf_cpu.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.models.gguf import blocks
from halfbyte.quant.number_format import BlockRows, NumberFormat, StoredPart, own_weight
from halfbyte.recipe.schema import Quant

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from halfbyte.models.tensors import TensorSpec
    from halfbyte.quant.stack import ExpertStack

_TYPES = {number: kind for kind, (number, _, _) in blocks.BLOCKS.items()}
# Types that are dequantised by the gguf package from now on, as a proof has seen our kernel to be wrong.
_distrusted: set[str] = set()


@dataclass(frozen=True)
class MatrixLayout:
    """How a matrix lies in the file: `types` of its tensors, one for each part of its rows. `turned`: experts, each
    (in, out), the parts' columns in turns."""

    types: tuple[str, ...]
    shape: tuple[int, ...]
    order: Tensor | None = None
    columns: Tensor | None = None
    turned: bool = False


@dataclass(frozen=True)
class GgufBlocks(NumberFormat):
    """`gguf`."""

    source: str = "the types of the file's tensors"
    speed: float = 0.9

    def takes(self, spec: TensorSpec) -> bool:
        return bool(spec.blocks)

    def nbytes_of(self, spec: TensorSpec, quant: Quant) -> int:
        return blocks.nbytes(spec.numel, spec.blocks)

    def parts(self, shape: tuple[int, ...], quant: Quant) -> tuple[StoredPart, ...]:
        """How many bytes they are the file says."""
        return (
            StoredPart("", "U8", (0,), None),
            StoredPart(".layout", "I32", (1,), None),  # turned, and the number of each tensor's type
            StoredPart(".order", "I32", (0,), None),
            StoredPart(".columns", "I32", (0,), None),
            StoredPart(".second", "U8", (0,), None),
        )

    def layer(self, parts: Mapping[str, Tensor], shape: tuple[int, int], quant: Quant, dtype: torch.dtype) -> nn.Module:
        from torch import nn

        layer = self.empty_layer(shape, quant, dtype)
        weight: Any = nn.Parameter(parts[""], requires_grad=False)
        weight.gguf = _layout(parts, shape)
        layer.weight = weight
        return layer

    def empty_layer(self, shape: tuple[int, int], quant: Quant, dtype: torch.dtype) -> nn.Module:
        return _layer_class()(shape[1], shape[0], bias=False, dtype=dtype, device="meta")

    def stack(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], quant: Quant, dtype: torch.dtype
    ) -> ExpertStack:
        from halfbyte.quant.stack import ExpertStack

        second = {"second": parts[".second"]} if ".second" in parts else {}
        return ExpertStack.of(self, parts[""], shape, dtype, gguf=_layout(parts, shape), **second)

    def expert(self, module: nn.Module, e: int, out: Tensor) -> Tensor:
        import torch

        layout: MatrixLayout = module.weight.gguf
        count = len(layout.types)
        for i, (codes, kind) in enumerate(zip(self.divided(module), layout.types, strict=True)):
            rows, columns = out.shape[::-1] if layout.turned else out.shape
            of_expert = codes.view(layout.shape[0], rows // count, -1)[e]
            if not layout.turned:
                write(of_expert, kind, out[i * (rows // count) : (i + 1) * (rows // count)])
            else:
                part = torch.empty((rows // count, columns), dtype=out.dtype)
                write(of_expert, kind, part)
                out[:, i::count] = part.T
        return out

    def divided(self, module: nn.Module) -> tuple[Tensor, ...]:
        second = getattr(module.weight, "second", None)
        return (module.weight.data,) if second is None else (module.weight.data, second)

    def holds(self, module: nn.Module) -> bool:
        return getattr(own_weight(module), "gguf", None) is not None

    def weight(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        return next(self.pieces(module, dtype, module.weight.gguf.shape[0]))

    def pieces(self, module: nn.Module, dtype: torch.dtype, rows: int) -> Iterator[Tensor]:
        import torch

        from halfbyte.quant.dequantise import scratch

        codes, layout = module.weight.data, module.weight.gguf
        count, width = layout.shape
        for first in range(0, count, rows):
            last = min(first + rows, count)
            out = scratch(torch.Size((last - first, width)), dtype, codes.device)
            some = codes[first:last] if layout.order is None else codes
            write(some, layout.types[0], out, None if layout.order is None else layout.order[first:last])
            yield out if layout.columns is None else out[:, layout.columns]

    def block_rows(self, module: nn.Module) -> BlockRows | None:
        layout: MatrixLayout = module.weight.gguf
        if layout.columns is not None or _distrusted.intersection(layout.types):
            return None
        number, weights, _ = blocks.BLOCKS[layout.types[0]]
        rows, columns = layout.shape
        return BlockRows(module.weight.data, number, weights, (rows, columns), layout.order)

    def multiplies_in(self, module: nn.Module, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point

    def beside(self, module: nn.Module) -> Iterator[tuple[object, str]]:
        if getattr(module.weight, "second", None) is not None:
            yield module.weight, "second"

    def definition(self, module: nn.Module, positions: np.ndarray) -> np.ndarray:
        codes, layout = module.weight.data.numpy(), module.weight.gguf
        rows, columns = np.divmod(positions, layout.shape[1])
        rows = rows if layout.order is None else layout.order.numpy()[rows]
        columns = columns if layout.columns is None else layout.columns.numpy()[columns]
        there, places = np.unique(rows, return_inverse=True)
        return _by_package(codes[there], layout.types[0])[places, columns].astype(np.float64)

    def kind_of(self, module: nn.Module) -> tuple[object, ...]:
        layout: MatrixLayout = module.weight.gguf
        return (layout.shape, layout.types, layout.order is None, layout.columns is None)

    def distrust(self, module: nn.Module) -> None:
        _distrusted.update(module.weight.gguf.types)


def _layout(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> MatrixLayout:
    turned, *numbers = parts[".layout"].tolist()
    types = tuple(_TYPES[number] for number in numbers)
    return MatrixLayout(types, shape, parts.get(".order"), parts.get(".columns"), bool(turned))


def parts_of(
    codes: list[np.ndarray], types: tuple[str, ...], order: np.ndarray | None = None, columns: np.ndarray | None = None,
    *, turned: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of `GgufBlocks.parts` of one matrix, by suffix; nothing but the orders is copied.

    Args:
        codes: (rows, bytes of a row) of each tensor of the file. types: of their blocks.
        order, columns: which of the file's each row and column of the model is.
    """
    import torch

    layout = torch.tensor([int(turned), *(blocks.BLOCKS[kind][0] for kind in types)], dtype=torch.int32)
    parts = {"": torch.from_numpy(codes[0]), ".layout": layout}
    if len(codes) > 1:
        parts[".second"] = torch.from_numpy(codes[1])
    for name, places in ((".order", order), (".columns", columns)):
        if places is not None:
            parts[name] = torch.from_numpy(places.astype(np.int32))
    return parts


def write(codes: Tensor, kind: str, out: Tensor, order: Tensor | None = None) -> None:
    """Dequantise rows of a mapped file into `out`, (rows, columns) contiguous. order: which row each one is."""
    from halfbyte.layers.kernels.cpu import available

    if available(out) and kind not in _distrusted:
        from halfbyte.quant.kernels import gguf_cpu

        gguf_cpu.write(codes, kind, out, order)
        return
    import torch

    rows = (codes if order is None else codes[order]).numpy()
    out.copy_(torch.from_numpy(_by_package(rows, kind)))


def _by_package(rows: np.ndarray, kind: str) -> np.ndarray:
    """(rows, bytes of a row) -> (rows, columns) fp32."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):
        values: np.ndarray = dequantize(np.ascontiguousarray(rows), GGMLQuantizationType[kind])
    return values


@cache
def _layer_class() -> type[nn.Module]:
    from torch import nn

    from halfbyte.quant.dequantise import frozen_product

    blocks_ = GgufBlocks("gguf")

    class GgufLinear(nn.Linear):
        """A linear layer whose weight are blocks of a GGUF file; it dequantises in training and out."""

        def forward(self, x: Tensor) -> Tensor:
            return frozen_product(x, self, blocks_)

    return GgufLinear
