"""Which modules of a model hold experts, and how their stacked weights are laid out.

What: transformers marks an experts class with `use_experts_implementation`; its instances say how their weights are
stored, and compute by the function that is registered under the config's name. A class that holds experts without that
mark (llama4, dbrx, jetmoe) computes as it likes; such are named, so that a caller can refuse them.
A stack is a plain 3-D parameter, indexed by its first axis, or holds quantised numbers and gives each expert's matrix
by `expert(number, dtype)`.
Source: `transformers/integrations/moe.py`.
Cost: a walk over modules.

Letters: E experts, D hidden width, I an expert's inner width, W what the first stack makes: 2 I with a gate, else I.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from halfbyte.quant import dequantise
from halfbyte.upstream.transformers import EXPERTS

# The flags that `use_experts_implementation` sets on each instance, in every version of transformers.
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "down_proj")


@dataclass(frozen=True)
class LoraOfExperts:
    """The LoRA of one stack, as PEFT's `ParamWrapper` holds it, whatever the way that the stack is stored in."""

    a: Tensor | None  # (E R, in), all of an expert together
    b: Tensor | None  # (out, R E), all experts of one rank together
    scale: float  # LoRA's


NO_LORA = LoraOfExperts(None, None, 1.0)
# By the name of the stack's attribute.
Loras: TypeAlias = dict[str, LoraOfExperts]


def is_experts(module: nn.Module) -> bool:
    """Whether a module computes its experts through transformers' interface."""
    return not hasattr(module, "base_layer") and all(hasattr(module, flag) for flag in _FLAGS) and EXPERTS.there


def experts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(full name, module) of each."""
    return ((name, module) for name, module in model.named_modules() if is_experts(module))


def outside_interface(model: nn.Module) -> dict[str, str]:
    """Modules that hold several experts in one parameter, outside the interface: full name -> class."""
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if "expert" in type(module).__name__.lower() and not is_experts(module) and not hasattr(module, "base_layer")
        if any(p.dim() >= 2 for p in module.parameters(recurse=False))
    }


def is_routed(model: nn.Module) -> bool:
    """Whether tokens choose among experts, of whatever layout: a choice that any rounding can turn."""
    return next(experts_of(model), None) is not None or bool(outside_interface(model))


def stacks_of(module: nn.Module) -> tuple[str, str]:
    """Names of the two stacks of an experts module, in the order in which they are multiplied with."""
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def is_quantised(module: nn.Module) -> bool:
    return any(hasattr(getattr(module, name), "expert") for name in stacks_of(module))


def is_frozen(module: nn.Module) -> bool:
    """Whether no weight of an experts module trains, but biases. PEFT's own wrapper makes a stack one that does."""
    norm = post_norm_of(module)
    parts = [
        *(getattr(module, name) for name in stacks_of(module)),
        *(norm.parameters() if isinstance(norm, nn.Module) else ()),
    ]
    return not any(getattr(part, "requires_grad", False) for part in parts)


def matrix(module: nn.Module, stack: Any, expert: int, dtype: torch.dtype) -> Tensor:
    """(in, out) of one expert: a view, or dequantised into memory that the next call overwrites."""
    if hasattr(stack, "expert"):
        out = dequantise.scratch(torch.Size(stack.shape[1:]), dtype, stack.device)
        weight: Tensor = stack.expert(expert, dtype, out=out)
    else:
        weight = stack[expert]
    weight = weight if weight.dtype == dtype else weight.to(dtype)
    return weight if module.is_transposed else weight.T


def bias_of(module: nn.Module, name: str) -> Tensor | None:
    """(E, out), or None."""
    return getattr(module, f"{name}_bias") if module.has_bias else None


def gate_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """(n, W) -> (n, I): what stands between the two stacks."""
    return module._apply_gate if module.has_gate else module.act_fn


def post_norm_of(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    has = getattr(module, "has_post_expert_norm", False)  # the first versions of transformers 5 know of none
    return module.post_expert_norm if has else None
