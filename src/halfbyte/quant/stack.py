"""The weights of all experts of a layer in few bits, as one frozen parameter from which one expert is dequantised.

Why: a mixture's experts are one parameter [E, a, b] that bitsandbytes leaves in 16 bits; dequantised as a whole it
would be E / k times what its tokens need.
What: the parameter holds the codes of all experts, one expert after the other; `shape` is that of the weights that they
stand for. `stack[e]`, as a model's own loop over experts asks for it, and `expert` give one dense matrix. An expert is
whole blocks of 4-bit codes, or rows of 8-bit ones, so its bytes and scales are slices: of a mapped stack no other page
is read. Number formats keep what belongs to the codes as attributes of the parameter (`NumberFormat.stack`).
Cost: that of dequantising one matrix, and with double quantisation its scales, 1/64 of that.
"""

import copy
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn

from halfbyte.quant.number_format import NumberFormat, torch_dtypes
from halfbyte.recipe.schema import Quant


class ExpertStack(nn.Parameter):
    """Frozen codes of E matrices (a, b). Made by `NumberFormat.stack`."""

    number_format: NumberFormat
    compute_dtype: torch.dtype
    _logical: torch.Size

    @classmethod
    def of(
        cls, number_format: NumberFormat, codes: Tensor, shape: Iterable[int], dtype: torch.dtype, **beside: object
    ) -> Self:
        """
        Args:
            codes: of all experts, of any shape. shape: (E, a, b) of the weights. dtype: what `stack[e]` gives.
            beside: what the format looks for on the parameter.
        """
        stack: Self = torch.Tensor._make_subclass(cls, codes, False)
        stack.__dict__.update(
            number_format=number_format, _logical=torch.Size(shape), compute_dtype=dtype, **beside
        )  # fmt: skip
        return stack

    @classmethod
    def empty(
        cls, number_format: NumberFormat, shape: Iterable[int], dtype: torch.dtype, quant: Quant, *, coded: bool
    ) -> Self:
        """A place for a stack on the meta device, with as many codes as it will have. `coded`: in their own dtype, or
        in `dtype`, to which transformers 5.10.1 casts weights before it quantises them."""
        first, *_ = number_format.parts(tuple(shape), quant)
        codes = torch.empty(first.shape, dtype=torch_dtypes()[first.dtype] if coded else dtype, device="meta")
        return cls.of(number_format, codes, shape, dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        attributes = copy.deepcopy(vars(self), memo)
        stack: Self = torch.Tensor._make_subclass(type(self), self.data.clone(), False)
        stack.__dict__.update(attributes)
        return stack

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
        return self.number_format.divided(self.holder)

    def of_expert(self, e: int) -> tuple[Tensor, ...]:
        """The part of each of `tensors` that belongs to one expert: views, of whole bytes."""
        shares = [(part, part.numel() // self._logical[0]) for part in self.tensors]
        return tuple(part.view(-1)[e * n : (e + 1) * n] for part, n in shares)

    def expert(self, e: int, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
        """The dense matrix (a, b) of one expert, in new memory or in `out`, (a, b) contiguous in `dtype`. Raises
        IndexError: there is no such expert."""
        count, a, b = self._logical
        if not 0 <= e < count:
            raise IndexError(f"expert {e} of {count}")
        if out is None:
            out = torch.empty(a, b, dtype=dtype, device=self.device)
        return self.number_format.expert(self.holder, e, out)
