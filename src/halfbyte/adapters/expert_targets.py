"""Which stacks of experts get a LoRA adapter: `lora.target_parameters`, under PEFT's name and by its rule.

PEFT can wrap any parameter. Here an adapter of a parameter is computed where the experts are (`layers/experts`), so a
name must hit stacks of experts whose layout is known; everything else is refused by name.
Source: `peft/tuners/tuners_utils.py`, `_inject_parameters`, for the matching.
Cost: a walk over parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from halfbyte.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn

_ANOTHER_FIX = "leave lora.target_parameters out: lora.target_modules reaches linear layers"


def matched(model: nn.Module, asked: Sequence[str]) -> list[str]:
    """Full names of the stacks that PEFT will adapt, in the model's order.

    Raises:
        AdapterError: a name hits nothing, or something other than a stack of experts, or experts of a layout that is
            not known here.
    """
    from halfbyte.layers.experts import layout

    if not asked:
        return []
    outside = layout.outside_interface(model)
    stacks = stacks_of(model)
    hit = [name for name, _ in model.named_parameters() if any(_hits(name, target) for target in asked)]
    problems = []
    for name in hit:
        module = name.rpartition(".")[0]
        if module in outside:
            problems.append(
                f"{name} is of {outside[module]}, whose file does not use transformers' experts interface; its layout "
                "is not known here"
            )
        elif name not in stacks:
            problems.append(f"{name} is no stack of experts")
    for target in asked:
        if not any(_hits(name, target) for name in hit):
            leaves = sorted({name.rpartition(".")[2] for name in stacks})
            near = get_close_matches(target.rpartition(".")[2], leaves, n=2)
            said = f" (near: {', '.join(near)})" if near else f"; its stacks: {', '.join(leaves)}" if leaves else ""
            kinds = f"; its experts are {', '.join(sorted(set(outside.values())))}" if outside and not stacks else ""
            problems.append(f"no parameter of {_kind(model)} ends in {target!r}{said}{kinds}")
    if problems:
        short = problems[:3] + [f"and {len(problems) - 3} more"] * (len(problems) > 3)
        fix = _ANOTHER_FIX if not stacks else f"lora.target_parameters: [{', '.join(names_of(stacks))}]"
        raise AdapterError(f"lora.target_parameters: {'; '.join(short)}.", fix=fix)
    return hit


def stacks_of(model: nn.Module) -> list[str]:
    """Full names of all stacks of experts of a known layout."""
    from halfbyte.layers.experts import layout

    return [f"{name}.{stack}" for name, module in layout.experts_of(model) for stack in layout.stacks_of(module)]


def names_of(stacks: Sequence[str]) -> list[str]:
    """Their last parts, each once."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in stacks))


def remark(model: nn.Module, adapted: Sequence[str]) -> str:
    """What the choice of targets does with experts, to be said behind its reason; nothing for a model without any."""
    if adapted:
        return f"; and of the experts {', '.join(names_of(adapted))}"
    stacks = names_of(stacks_of(model))
    return f"; its experts get none: lora.target_parameters: [{', '.join(stacks)}]" if stacks else ""


def _hits(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _kind(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__)
