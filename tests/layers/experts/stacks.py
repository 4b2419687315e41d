"""A stack of experts that gives one matrix at a time, in memory that the next overwrites, and says which were asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class OneAtATime:
    """Stands for a quantised stack: it cannot be indexed, only asked for an expert."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.shape, self.device = weight.detach().clone(), weight.shape, weight.device
        self.asked: list[int] = []

    def expert(self, number: int, dtype: torch.dtype, *, out: Tensor) -> Tensor:
        """Into `out`, as `quant.stack.ExpertStack`."""
        self.asked.append(number)
        return out.copy_(self.weight[number])


def hide_stacks(module: nn.Module, names: tuple[str, ...]) -> list[OneAtATime]:
    """Put one in the place of each parameter."""
    made = []
    for name in names:
        stack: Any = OneAtATime(module._parameters.pop(name))  # type: ignore[arg-type]
        setattr(module, name, stack)
        made.append(stack)
    return made
