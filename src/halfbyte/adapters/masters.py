"""fp32 masters for whatever trains beside LoRA: modules of `modules_to_save`, biases, trained rows of tokens.

Why: half a unit in the last place of bf16 is 1/512 of a number, and a step of 2e-4 on a weight of 0.1 or more is less:
four of five numbers would stay where they were, and Adam's moments would be kept in bf16 too.
What: the parameter itself is fp32. While its part of a decoder layer computes (attention, mixer, MLP, norm; around the
layers its module) it is seen in the base's dtype, through a differentiable cast, so that the residual stream keeps its
dtype and the first step computes what the base computes. By such a part, as some mixers read the bias of a convolution
that they do not call; not by the layer, whose forward is called past its hooks where it is done again for backward.
LoRA's own parts are fp32 and cast by their layer already (`peft/tuners/tuners_utils.py`, `cast_adapter_dtype`).
Source: mixed-precision training, arXiv:1710.03740, section 3.1.
Cost: two hooks on each part that holds some; a copy in the compute dtype while a micro-batch lasts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from halfbyte.errors import BaseModelError
from halfbyte.models import structure
from halfbyte.types import Model

HALVES = (torch.bfloat16, torch.float16)


def hold(adapted: Model) -> int:
    """Make every 16-bit parameter that trains an fp32 master, in place. Returns how many there are. The parameters stay
    the same objects, so an optimiser that has them already is right too. What was held before and made 16-bit since, by
    a trainer, keeps its hooks."""
    count = _raise_adapters(adapted)
    masters = {id(p) for p in adapted.parameters() if p.requires_grad and p.dtype in HALVES}
    if not masters:
        return count
    hooks = (getattr(hook, "__self__", None) for m in adapted.modules() for hook in m._forward_pre_hooks.values())
    taken = {id(part) for cast in hooks if isinstance(cast, _Cast) for part, _ in cast.places}
    like = next((p for p in adapted.parameters() if id(p) not in masters and p.dtype in HALVES), None)
    for parameter in adapted.parameters():
        if id(parameter) in masters:
            parameter.data = parameter.data.float()
    holders: list[tuple[nn.Module, Iterable[nn.Module]]] = [(x, x.modules()) for x in _parts_of_layers(adapted)]
    for holder, parts in [*holders, *((module, (module,)) for module in adapted.modules())]:
        places = [
            (part, name)
            for part in parts
            if id(part) not in taken and not isinstance(part, (nn.ParameterDict, BaseTunerLayer))
            for name, parameter in part.named_parameters(recurse=False)
            if id(parameter) in masters
        ]
        if places and like is not None:
            taken |= {id(part) for part, _ in places}
            cast = _Cast(places, like)
            holder.register_forward_pre_hook(cast.before, with_kwargs=True)
            holder.register_forward_hook(cast.after, always_call=True)
    return count + len(masters)


def _raise_adapters(adapted: Model) -> int:
    """The same for LoRA's own parts, which PEFT makes fp32 and a trainer (TRL's) may have made 16-bit again.

    PEFT's `cast_adapter_dtype` would put new parameters in their places, of which an optimiser does not know.
    """
    layers = [layer for layer in adapted.modules() if isinstance(layer, BaseTunerLayer)]
    parts = [getattr(layer, name) for layer in layers for name in layer.adapter_layer_names if hasattr(layer, name)]
    halves = [p for part in parts for p in part.parameters() if p.requires_grad and p.dtype in HALVES]
    for parameter in halves:
        parameter.data = parameter.data.float()
    return len(halves)


def _parts_of_layers(adapted: Model) -> list[nn.Module]:
    """The modules that the decoder layers call."""
    try:
        layers = structure.decoder_layers(adapted)
    except BaseModelError:  # it has no list of layers
        return []
    parts = [part for layer in layers for part in layer.children()]
    return [m for part in parts for m in (part if isinstance(part, nn.ModuleList) else (part,))]


@dataclass
class _Cast:
    """Two hooks around a forward: masters in the dtype that is computed in, and back."""

    is_cast = True  # which an output head does by itself

    places: list[tuple[nn.Module, str]]  # modules and the names of their parameters
    like: nn.Parameter  # a frozen parameter of that dtype, now and later
    masters: list[nn.Parameter | None] = field(default_factory=list)

    def before(self, module: nn.Module, args: object, kwargs: object) -> None:
        if self.masters:
            return
        self.masters = [part._parameters[name] for part, name in self.places]
        for (part, name), master in zip(self.places, self.masters, strict=True):
            if master is not None:
                part._parameters[name] = master.to(self.like.dtype)

    def after(self, module: nn.Module, args: object, output: object) -> None:
        for (part, name), master in zip(self.places, self.masters, strict=False):
            part._parameters[name] = master
        self.masters = []
