"""Our experts under their names in transformers, put on a model and taken off; and PEFT's LoRA on their stacks.

Seams: `ALL_EXPERTS_FUNCTIONS.register`, and `set_experts_implementation` of the instance; an experts module hands on
whatever arguments it is given, so that LoRA reaches our function by an argument of its own.
Source: `transformers/integrations/moe.py`; `peft/tuners/lora/layer.py`, `ParamWrapper`.
"""

from typing import Any

from torch import nn

from halfbyte.layers.experts.by_definition import experts_by_definition
from halfbyte.layers.experts.forward import experts
from halfbyte.layers.experts.layout import LoraOfExperts, experts_of, is_experts, is_quantised
from halfbyte.models import structure
from halfbyte.types import Model
from halfbyte.upstream import transformers as upstream
from halfbyte.upstream.peft import EXPERT_LORA

NAME, BY_DEFINITION = "halfbyte", "halfbyte_by_definition"
_BEFORE = "_halfbyte_experts_before"


def register() -> None:
    """Make both names known to transformers. Calling it again changes nothing."""
    functions = upstream.experts_functions()
    functions.register(NAME, experts)
    functions.register(BY_DEFINITION, experts_by_definition)


def install(model: Model) -> int:
    """Compute all experts by our function. Returns how many modules do."""
    lm, modules = structure.causal_lm(model), [module for _, module in experts_of(model)]
    if not modules or not hasattr(lm, "set_experts_implementation"):
        return 0
    register()
    before = upstream.experts_implementation(lm)
    if not {NAME, BY_DEFINITION} & set(before.values()):
        lm.__dict__[_BEFORE] = before
    lm.set_experts_implementation(NAME)
    return sum(module.config._experts_implementation == NAME for module in modules)


def compute_all(root: nn.Module) -> None:
    """Compute the experts of every transformers model in a module by our function, for good."""
    register()
    for module in root.modules():
        if hasattr(module, "set_experts_implementation") and any(experts_of(module)):
            module.set_experts_implementation(NAME)


def remove(model: Model) -> int:
    """Compute them by transformers' own code; quantised ones, which it cannot read, by definition. Returns how many."""
    lm = structure.causal_lm(model)
    ours = [module for _, module in experts_of(model) if module.config._experts_implementation == NAME]
    if ours:
        slow = any(map(is_quantised, ours))
        lm.set_experts_implementation(BY_DEFINITION if slow else lm.__dict__.pop(_BEFORE, None))
    return len(ours)


def is_lora_of_experts(module: nn.Module) -> bool:
    """Whether this is PEFT's `ParamWrapper` on a stack of experts."""
    return hasattr(module, "parameter_name") and is_experts(module.get_base_layer()) and EXPERT_LORA.there


def takes_lora(module: nn.Module) -> bool:
    """Whether an experts module computes by a function of ours, which takes LoRA as an argument."""
    return module.config._experts_implementation in (NAME, BY_DEFINITION)


def wrappers_of(outer: nn.Module) -> list[Any]:
    """PEFT's wrappers around an experts module, from the outer one in: one for each stack with LoRA."""
    wrappers: list[Any] = []
    layer: Any = outer
    while hasattr(layer, "parameter_name"):
        wrappers.append(layer)
        layer = layer.base_layer
    return wrappers


def lora_of(wrapper: Any) -> tuple[str, LoraOfExperts] | None:
    """The stack's name and the LoRA of the one active adapter; None where it has none."""
    (name,) = wrapper.active_adapters
    if name not in wrapper.lora_A:
        return None
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    return wrapper.parameter_name, LoraOfExperts(a, b, wrapper.scaling[name])
