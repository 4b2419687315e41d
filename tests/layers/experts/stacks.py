"""Stacks of experts for tests: one that says which experts were asked for, and quantised ones in a whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.layers.experts.layout import experts_of, stacks_of
from halfbyte.quant.stack import ExpertStack
from halfbyte.recipe.schema import Quant
from tests.quant.test_stack import stack_of


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


def quantised(model: Any, quant: Quant) -> Any:
    """All experts of a model in few bits, in place."""
    for _, module in experts_of(model):
        for name in stacks_of(module):
            weight = getattr(module, name)
            setattr(module, name, stack_of(weight.detach(), quant, weight.dtype))
    return model


def dequantised(model: Any) -> Any:
    """The experts of a model that was `quantised` as plain parameters again, in place: what they then are."""
    for _, module in experts_of(model):
        for name in stacks_of(module):
            stack: ExpertStack = getattr(module, name)
            dense = torch.stack([stack.expert(e, stack.compute_dtype) for e in range(len(stack))])
            module.register_parameter(name, nn.Parameter(dense, requires_grad=False))
    return model
