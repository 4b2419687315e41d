"""What quantising has changed: each matrix of the source beside what its store holds of it, one matrix at a time.

Cost: the source is read once, front to back, past the page cache; memory of the largest matrix, a few times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halfbyte.base.store import layout, shelf, supply
from halfbyte.base.store.reading import Piece, Source, torch_dtypes
from halfbyte.errors import StoreError
from halfbyte.quant import formats
from halfbyte.system import pages
from halfbyte.types import Model


@dataclass(frozen=True)
class Matrix:
    """One quantised matrix, under its module's full name; `source` and `held` are (out, in), in the compute dtype.

    `held` is what training multiplies with. It lies in memory that the next matrix overwrites.
    """

    name: str
    source: Tensor
    held: Tensor

    def difference(self) -> Tensor:
        """source - held: (out, in) fp32."""
        return self.source.to(torch.float32, copy=True).sub_(self.held)


def matrices(model: Model, wanted: shelf.Wanted) -> Iterator[Matrix]:
    """Every matrix of an open base that is quantised, in the order of the source's files; stacks of experts are not.

    Args:
        model: opened from the store of `wanted`, without adapters, mapped or not. Pages of a mapped one are let go.

    Raises:
        CannotHold: the source's matrices are not the model's: transformers merges or splits them.
        StoreError: the source has changed while it was read.
    """
    source, modules = supply.open_source(wanted), dict(model.named_modules())
    pieces = [p for plan in layout.lay_out(source.tensors, wanted).files for p in plan.pieces]
    pieces = [p for p in pieces if p.encoding == "quantised" and p.target]
    maps = pages.FileMaps.read()
    with source:
        for piece in sorted(pieces, key=lambda p: (p.sources[0].file, p.sources[0].start)):
            name = piece.target.removesuffix(".weight")
            module = modules[name]
            held = formats.of_module(module).weight(module, wanted.dtype)
            yield Matrix(name, _read(source, piece), held.to("cpu"))
            let_go(module.weight.data, maps)
    if changed := source.changed():
        raise StoreError(
            f"{changed[0]} was changed while it was read.", fix="run the same command again when the file is complete"
        )


def _read(source: Source, piece: Piece) -> Tensor:
    """A matrix of the source as it was quantised: (out, in), cast to the dtype that is computed in."""
    (tensor,) = piece.sources
    raw = np.empty(tensor.nbytes, np.uint8)
    source.read(tensor, 0, raw.data)
    values = torch.from_numpy(raw).view(torch_dtypes()[tensor.dtype]).view(tensor.shape)
    return (values.T.contiguous() if piece.transposed else values).to(piece.dtype)


def let_go(codes: Tensor, maps: pages.FileMaps) -> None:
    """Let go of the pages of codes that are mapped from a file and have been read."""
    area = codes.data_ptr(), codes.nbytes
    if codes.device.type == "cpu" and pages.supported() and maps.holds(*area):
        for span in pages.whole_pages([area]):
            pages.let_go(span)
