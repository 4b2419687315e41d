"""Which parameters of a model become stacks of experts, and the linear layers beside them that stay as they are.

What: parameters of three dimensions whose module runs through transformers' experts interface. In a store their tensors
are called as a linear layer's are: `experts.down_proj.weight`, `experts.down_proj.weight.absmax`.
Source: `transformers/integrations/moe.py`, `use_experts_implementation`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from halfbyte.models.tensors import is_router
from halfbyte.quant.policy import matches
from halfbyte.quant.stack import ExpertStack

# The 3-D parameters that the interface knows. A bias is a matrix [E, a].
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter that becomes a stack: `module.name`, called `path` from the model."""

    path: str
    module: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.name)


def stored_name(path: str) -> str:
    """What an expert parameter's codes are called in a store."""
    return f"{path}.weight"


def expert_parameters(model: nn.Module, exempt: Iterable[str] = ()) -> list[ExpertParameter]:
    """Every parameter that runs through the experts interface, but those whose names `exempt` holds."""
    patterns = tuple(exempt)
    every = [
        ExpertParameter(f"{path}.{name}", module, name)
        for path, module in model.named_modules()
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate")  # set by the interface's decorator
        for name, parameter in module.named_parameters(recurse=False)
        if name in PARAMETERS and parameter.ndim == 3
    ]
    return [each for each in every if not matches(each.path, patterns)]


def stacks(model: nn.Module) -> Iterator[tuple[str, ExpertStack]]:
    """Every stack of a model, with its name."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, ExpertStack):
                yield f"{path}.{name}", parameter


def routers(model: nn.Module) -> list[str]:
    """Linear layers that choose experts, or say how much of a shared one is taken: they stay as they are."""
    homes = tuple({each.path.rpartition(".")[0].rpartition(".")[0] + "." for each in expert_parameters(model)})
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_router(name) and name.startswith(homes)
    ]
