"""One tensor of a store: what it is made of, and how it is held."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from halfbyte.base.store.reading import SourceTensor

if TYPE_CHECKING:
    import torch

# What can be quantised, as safetensors calls it.
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Piece:
    """One tensor of a store, from one tensor of the source or from all experts' tensors, one after the other.

    Args:
        shape: as it is held: (out, in), or (experts, out, in) as the model has them.
        dtype: what its values are cast to, before they are quantised too.
        transposed: each matrix of the source is.
        mxfp4: the sources are blocks and scales of that format (`mxfp4.py`).
    """

    name: str
    sources: tuple[SourceTensor, ...]
    shape: tuple[int, ...]
    encoding: Literal["quantised", "copy"]
    dtype: torch.dtype
    transposed: bool = False
    mxfp4: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def source_bytes(self) -> int:
        return sum(source.nbytes for source in self.sources)
