"""The weights of all experts of a layer in few bits, as one frozen parameter from which one expert is dequantised.

Why: a mixture's experts are one parameter [E, a, b] that bitsandbytes leaves in 16 bits; dequantised as a whole it
would be E / k times what its tokens need.
What: the parameter holds the codes of all experts, one expert after the other; `shape` is that of the weights that they
stand for. `stack[e]`, as a model's own loop over experts asks for it, and `expert` give one dense matrix. An expert is
whole blocks of 4-bit codes, or rows of 8-bit ones, so its bytes and scales are slices: of a mapped stack no other page
is read.
Cost: that of dequantising one matrix, and with double quantisation its scales, 1/64 of that.
"""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.quant import int8
from halfbyte.quant.dequantise import write

_CODES = {4: torch.uint8, 8: torch.int8}


class ExpertStack(nn.Parameter):
    """Frozen codes of E matrices (a, b). Made by `of_4bit` or `of_8bit`."""

    quant_state: Any  # of bitsandbytes, for 4 bits
    SCB: Tensor | None  # (E * a,) fp32, for 8 bits
    compute_dtype: torch.dtype
    _logical: torch.Size

    @classmethod
    def of_4bit(cls, packed: Tensor, state: Any) -> ExpertStack:
        """
        Args:
            packed: two codes a byte, of any shape.
            state: bitsandbytes' `QuantState` of them all, with the shape (E, a, b); a * b are whole blocks.
        """
        made = cls._of(packed, torch.Size(state.shape), state.dtype)
        if math.prod(made.shape[1:]) % state.blocksize:
            raise ValueError(f"experts of {tuple(made.shape[1:])} are not whole blocks of {state.blocksize}")
        made.quant_state = state
        return made

    @classmethod
    def of_8bit(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> ExpertStack:
        """
        Args:
            codes: (E, a, b) int8. scales: (E * a,) fp32. dtype: what `stack[e]` gives.
        """
        made = cls._of(codes, codes.shape, dtype)
        made.SCB = scales
        return made

    @classmethod
    def _of(cls, codes: Tensor, shape: torch.Size, dtype: torch.dtype) -> ExpertStack:
        made: ExpertStack = torch.Tensor._make_subclass(cls, codes, False)
        made._logical, made.compute_dtype, made.quant_state, made.SCB = shape, dtype, None, None
        return made

    @classmethod
    def empty(cls, shape: torch.Size, dtype: torch.dtype, *, bits: int) -> ExpertStack:
        """A place for a stack on the meta device, with the bytes that its codes will have."""
        codes = torch.empty(shape if bits == 8 else (shape.numel() // 2, 1), dtype=_CODES[bits], device="meta")
        return cls._of(codes, shape, dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertStack:
        made = self._of(self.data.clone(), self._logical, self.compute_dtype)
        made.quant_state, made.SCB = copy.deepcopy(self.quant_state, memo), copy.deepcopy(self.SCB, memo)
        return made

    @property
    def shape(self) -> torch.Size:
        """(E, a, b) of the weights, not of the bytes."""
        return self._logical

    @property
    def holder(self) -> Any:
        """Itself as the weight of a layer, as number formats ask for it."""
        return SimpleNamespace(weight=self)

    @property
    def ndim(self) -> int:
        return len(self._logical)

    def dim(self) -> int:
        return len(self._logical)

    def __len__(self) -> int:
        return self._logical[0]

    def __getitem__(self, expert: Any) -> Tensor:
        return self.expert(int(expert), self.compute_dtype)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What grows with the number of experts: codes, and a scale for each row or block."""
        scales = self.SCB if self.SCB is not None else self.quant_state.absmax
        return (self.data, scales)

    def of_expert(self, e: int) -> tuple[Tensor, ...]:
        """The part of each of `tensors` that belongs to one expert: views, of whole bytes."""
        return tuple(part.view(-1)[e * n : (e + 1) * n] for part, n in self._shares())

    def _shares(self) -> list[tuple[Tensor, int]]:
        return [(part, part.numel() // self._logical[0]) for part in self.tensors]

    def expert(self, e: int, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
        """The dense matrix (a, b) of one expert, in new memory or in `out`, (a, b) contiguous in `dtype`.

        Raises:
            IndexError: there is no such expert.
        """
        count, a, b = self._logical
        if not 0 <= e < count:
            raise IndexError(f"expert {e} of {count}")
        if out is None:
            out = torch.empty(a, b, dtype=dtype, device=self.device)
        if self.SCB is not None:
            return int8.write(self.data[e], self.SCB[e * a : (e + 1) * a], out)
        state, numel = self.quant_state, a * b
        codes = self.data.view(-1).view(torch.uint8)[e * numel // 2 : (e + 1) * numel // 2]
        blocks = slice(e * numel // state.blocksize, (e + 1) * numel // state.blocksize)
        write(codes, _scales(state, blocks), out.view(-1), state.blocksize, state.quant_type)
        return out


def _scales(state: Any, blocks: slice) -> Tensor:
    """The scales of some blocks, fp32; with double quantisation as `bitsandbytes.functional.dequantize_blockwise`
    gives them."""
    scales: Tensor = state.absmax[blocks]
    if not state.nested:
        return scales.float()
    outer = state.state2
    first, last = blocks.start // outer.blocksize, -(-blocks.stop // outer.blocksize)
    factors = outer.absmax[first:last].repeat_interleave(outer.blocksize)
    factors = factors[blocks.start - first * outer.blocksize :][: len(scales)]
    return (outer.code[scales.int()] * factors).add_(state.offset)
