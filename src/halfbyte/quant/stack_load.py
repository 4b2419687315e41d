"""Experts in few bits for transformers' loader: which parameters become stacks, and how they come out of a checkpoint.

Why: transformers' quantisers look at linear layers alone. A mixture's experts, one parameter [E, a, b], stay in 16
bits.
What: a parameter of three dimensions whose module runs through transformers' experts interface is replaced by an empty
`ExpertStack` before weights are loaded. In a store its tensors are called as a linear layer's are:
`experts.down_proj.weight`, `experts.down_proj.weight.absmax`. Without a store the 16-bit stack is quantised when it is
merged.
Source: `transformers/integrations/moe.py`, `use_experts_implementation`; `core_model_loading.py`, `WeightConverter`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from halfbyte.quant.policy import matches
from halfbyte.recipe.schema import Quant
from halfbyte.types import Model

if TYPE_CHECKING:
    import torch
    from torch import nn

    from halfbyte.quant.stack import ExpertStack

# The 3-D parameters that the interface knows. A bias is a matrix [E, a].
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
_SUFFIXES = {
    4: ("", ".absmax", ".nested_absmax", ".nested_quant_map", ".quant_map", ".quant_state.bitsandbytes__nf4",
        ".quant_state.bitsandbytes__fp4"),
    8: ("",),
}  # fmt: skip
_BESIDE_8BIT = ("SCB", "weight_format")


@dataclass(frozen=True)
class ExpertParameter:
    """An expert parameter: `module.name`, called `path` from the model."""

    path: str
    module: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = getattr(self.module, self.name)
        return parameter

    @property
    def pattern(self) -> str:
        """What the loader knows it by: its name and its module's."""
        return ".".join(self.path.split(".")[-2:])


def stored_name(path: str) -> str:
    """What an expert parameter's codes are called in a store."""
    return f"{path}.weight"


def places(model: nn.Module, exempt: Iterable[str] = ()) -> list[ExpertParameter]:
    """Every expert parameter that runs through the experts interface, but those whose names `exempt` holds."""
    patterns = tuple(exempt)
    every = [
        ExpertParameter(f"{path}.{name}", module, name)
        for path, module in model.named_modules()
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate")  # set by the interface's decorator
        for name, parameter in module.named_parameters(recurse=False)
        if name in PARAMETERS and parameter.ndim == 3
    ]
    return [place for place in every if not matches(place.path, patterns)]


def stacks(model: nn.Module) -> Iterator[tuple[str, ExpertStack]]:
    """Every stack of a model, with its name."""
    from halfbyte.quant.stack import ExpertStack

    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, ExpertStack):
                yield f"{path}.{name}", parameter


def routers(model: nn.Module) -> list[str]:
    """Linear layers that choose experts, or say how much of a shared one is taken: they stay as they are."""
    from torch import nn

    homes = tuple({place.path.rpartition(".")[0].rpartition(".")[0] + "." for place in places(model)})
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] in ("gate", "router", "shared_expert_gate", "wg")
        and name.startswith(homes)
    ]


def make_room(model: nn.Module, exempt: Iterable[str], dtype: torch.dtype, *, bits: int) -> None:
    """Put empty stacks in the places of expert parameters."""
    from halfbyte.quant.stack import ExpertStack

    for place in places(model, exempt):
        empty = ExpertStack.empty(place.parameter.shape, dtype, bits=bits)
        place.module.register_parameter(place.name, empty)


def conversions(model: Model, quantiser: object, *, bits: int) -> list[object]:
    """What brings the stacks of a store into the model, to be tried before the model's own conversions."""
    from transformers.core_model_loading import WeightConverter

    ends = [f".weight{suffix}" for suffix in _SUFFIXES[bits]]
    ends += [f".{name}" for name in _BESIDE_8BIT if bits == 8]
    patterns = dict.fromkeys(".".join(path.split(".")[-2:]) for path, _ in stacks(model))
    return [
        WeightConverter([rf"(?<=\.){pattern}{end}" for end in ends], pattern, [_operations()[0](quantiser)])
        for pattern in patterns
    ]


def quantise_operation(upstream: object) -> object:
    """`upstream`, a quantiser's operation, that takes stacks too."""
    return _operations()[1](upstream)


@cache
def _operations() -> tuple[type, type]:
    import bitsandbytes.functional as bnb_f
    from transformers.core_model_loading import ConversionOps

    from halfbyte.quant.stack import ExpertStack

    class StackDeserialize(ConversionOps):
        """The tensors of a stack in a store become the stack."""

        def __init__(self, hf_quantizer: object) -> None:
            self.hf_quantizer = hf_quantizer  # an operation with this attribute gets its tensors uncast

        def convert(
            self,
            input_dict: dict[str, list[torch.Tensor]],
            target_patterns: list[str],
            full_layer_name: str,
            model: Model,
            **kwargs: object,
        ) -> dict[str, torch.Tensor]:
            pattern = target_patterns[0]
            parts = {key.partition(f"{pattern}.")[2]: value for key, (value,) in input_dict.items()}
            dtype = model.get_parameter(full_layer_name).compute_dtype
            codes = parts.pop("weight")
            if "SCB" in parts:
                return {pattern: ExpertStack.of_8bit(codes, parts["SCB"], dtype)}
            return {pattern: ExpertStack.of_4bit(codes, bnb_f.QuantState.from_dict(parts, codes.device))}

    class StackQuantize(ConversionOps):
        """A merged stack of 16 bits is quantised; whatever else, as upstream does it."""

        def __init__(self, upstream: ConversionOps) -> None:
            self.upstream = upstream

        def convert(
            self, input_dict: dict[str, torch.Tensor], model: Model, **kwargs: object
        ) -> dict[str, torch.Tensor]:
            made, others = {}, {}
            for name, given in input_dict.items():
                value = given[0] if isinstance(given, list) else given
                place = model.get_parameter(name)
                if isinstance(place, ExpertStack):
                    made[name] = _quantised(value.to(place.compute_dtype), name, self.upstream.hf_quantizer)
                else:
                    others[name] = given
            return made | (self.upstream.convert(others, model=model, **kwargs) if others else {})

    return StackDeserialize, StackQuantize


def _quantised(values: torch.Tensor, name: str, quantiser: Model) -> ExpertStack:
    """A merged stack in the format that a quantiser's config names."""
    import torch

    from halfbyte.quant import formats

    settings = quantiser.quantization_config
    if settings.load_in_8bit:
        quant = Quant(type="int8")
    else:
        quant = Quant(type=settings.bnb_4bit_quant_type, double_quant=settings.bnb_4bit_use_double_quant)
    shape, dtype = tuple(values.shape), values.dtype
    encoder = formats.of(quant).encoder(quant, shape, dtype, name)
    parts = {"": torch.from_numpy(encoder.codes(0, values.cpu().reshape(-1))), **encoder.parts()}
    return stack_of({key: part.to(values.device) for key, part in parts.items()}, shape, quant, dtype)


def stack_of(
    parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], quant: Quant, dtype: torch.dtype
) -> ExpertStack:
    """A stack from its tensors, by suffix, the codes under the empty one; nothing is copied.

    Args:
        shape: (experts, a, b). dtype: what an expert is dequantised to.
    """
    import bitsandbytes.functional as bnb_f

    from halfbyte.quant.stack import ExpertStack

    codes = parts[""]
    if quant.type == "int8":
        return ExpertStack.of_8bit(codes.view(shape), parts["SCB"], dtype)
    beside = {f"weight{key}": part for key, part in parts.items() if key}
    return ExpertStack.of_4bit(codes.view(-1, 1), bnb_f.QuantState.from_dict(beside, codes.device))
