"""What quantising has changed: each matrix of the source beside what its store holds of it, one matrix at a time.

Cost: the source is read once, front to back, past the page cache; memory of the largest matrix, a few times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from halfbyte.base.store import layout, mxfp4, shelf, supply
from halfbyte.base.store.reading import Piece, Source, SourceTensor, torch_dtypes
from halfbyte.errors import StoreError
from halfbyte.quant import formats, stack_load
from halfbyte.system import pages
from halfbyte.types import Model


@dataclass(frozen=True)
class Matrix:
    """One quantised matrix, under its module's full name, an expert's with its number at the end; `source` and `held`
    are (out, in), in the compute dtype; an expert's have its stack's order.

    `held` is what training multiplies with. It lies in memory that the next matrix overwrites.
    """

    name: str
    source: Tensor
    held: Tensor

    def difference(self) -> Tensor:
        """source - held: (out, in) fp32."""
        return self.source.to(torch.float32, copy=True).sub_(self.held)


def matrices(model: Model, wanted: shelf.Wanted, *, experts: bool = False) -> Iterator[Matrix]:
    """Every matrix of an open base that is quantised, in the order of the source's files.

    Args:
        model: opened from the store of `wanted`, without adapters, mapped or not. Pages of a mapped one are let go.
        experts: each expert of a stack too.

    Raises:
        CannotHold: the source's matrices are not the model's: transformers merges or splits them.
        StoreError: the source has changed while it was read.
    """
    source, modules = supply.open_source(wanted), dict(model.named_modules())
    stacks = {stack_load.stored_name(path): (path, stack) for path, stack in stack_load.stacks(model)}
    pieces = [p for plan in layout.lay_out(source.tensors, wanted).files for p in plan.pieces]
    pieces = [p for p in pieces if p.encoding == "quantised" and (p.target or experts)]
    maps = pages.FileMaps.read()
    with source:
        for piece in sorted(pieces, key=lambda p: (p.sources[0].file, p.sources[0].start)):
            if not piece.target:
                path, stack = stacks[piece.name]
                for e in range(len(stack)):
                    yield Matrix(f"{path}.{e}", _expert(source, piece, e), stack.expert(e, wanted.dtype).to("cpu"))
                    let_go(stack.of_expert(e)[0], maps)
                continue
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
    values = _values(source, tensor).view(tensor.shape)
    return (values.T.contiguous() if piece.transposed else values).to(piece.dtype)


def _expert(source: Source, piece: Piece, e: int) -> Tensor:
    """One expert of a stack as it was quantised: (a, b) of the stack's (E, a, b), cast as above. It lies in a tensor
    of all experts, or in one or more of its own, one after the other."""
    count, a, b = piece.shape
    if piece.mxfp4:
        blocks, scales = (_raw(source, half, e, count).reshape(half.shape[1:]) for half in piece.sources)
        return mxfp4.decoded(blocks, scales, piece.dtype).view(a, b)
    each = len(piece.sources) // count
    if each:
        own = [_values(source, tensor) for tensor in piece.sources[e * each : (e + 1) * each]]
        return torch.cat(own).view(a, b).to(piece.dtype)
    values = _values(source, piece.sources[0], e, count)
    return (values.view(b, a).T.contiguous() if piece.transposed else values.view(a, b)).to(piece.dtype)


def _values(source: Source, tensor: SourceTensor, share: int = 0, shares: int = 1) -> Tensor:
    return torch.from_numpy(_raw(source, tensor, share, shares)).view(torch_dtypes()[tensor.dtype])


def _raw(source: Source, tensor: SourceTensor, share: int, shares: int) -> np.ndarray:
    """The bytes of one of the equal shares of a tensor."""
    raw = np.empty(tensor.nbytes // shares, np.uint8)
    source.read(tensor, share * len(raw), raw.data)
    return raw


def let_go(codes: Tensor, maps: pages.FileMaps) -> None:
    """Let go of the pages of codes that are mapped from a file and have been read."""
    area = codes.data_ptr(), codes.nbytes
    if codes.device.type == "cpu" and pages.supported() and maps.holds(*area):
        for span in pages.whole_pages([area]):
            pages.let_go(span)
