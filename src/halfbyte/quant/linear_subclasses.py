"""Few bits for what transformers' quantisers pass over, by quantisers of our own that are taught it.

Why: transformers quantises `nn.Linear` itself. It passes over Falcon's own subclass, whose forward is the same product,
and over a mixture's experts, which are parameters (`stack_load.py`); a router that is a linear layer it takes along.
What: quantisers and their configs under names of their own, in transformers' registry for custom quantisers. A store
that needs it says so in its config.json; plain transformers refuses to open it, as its shapes are not the model's.
Source: `transformers/quantizers/auto.py`, `register_quantizer`, `register_quantization_config`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING

from halfbyte.quant import stack_load
from halfbyte.quant.policy import matches
from halfbyte.recipe.schema import Quant
from halfbyte.types import Config, Document, Model

if TYPE_CHECKING:
    from torch import nn
    from transformers import BitsAndBytesConfig

# By model type: subclasses of nn.Linear whose forward is the plain product, and which the loader leaves in 16 bits.
PLAIN_LINEARS = {"falcon": "FalconLinear"}
METHODS = {"4 bits": "halfbyte_4bit", "8 bits": "halfbyte_8bit"}
# The key in a store's `quantization_config`: patterns of modules that stay as they are.
MARK = "halfbyte_plain_linears_but"


def mark(values: Document, quant: Quant) -> Document:
    """The bitsandbytes config of a store as a dictionary, marked to be opened with `opening_config`."""
    return {**values, MARK: sorted(set(quant.exempt))}


def opening_config(config: Config) -> Config | None:
    """A copy of a marked store's config that sends `from_pretrained` to our quantiser; None for any other config."""
    values = getattr(config, "quantization_config", None)
    if not isinstance(values, dict) or MARK not in values:
        return None
    config = copy.deepcopy(config)
    config.quantization_config = _ours({k: v for k, v in values.items() if k != MARK}, values[MARK])
    return config


def load_config(bits: BitsAndBytesConfig, quant: Quant) -> BitsAndBytesConfig:
    """A bitsandbytes config with which `from_pretrained` quantises plain linears too."""
    values = _ours(bits.to_dict(), quant.exempt)
    return _registered()[values["quant_method"]].from_dict(values)


def settle(model: Model) -> None:
    """After opening: the model says that it is bitsandbytes', which it is, so that PEFT and saving know it."""
    held = getattr(model.config, "quantization_config", None)
    if held is not None and getattr(held, "quant_method", None) in METHODS.values():
        model.config.quantization_config = held.plain()
        model.quantization_method = model.config.quantization_config.quant_method


def is_needed(model: Model, exempt: Iterable[str]) -> bool:
    """Whether transformers' own quantisers would not hold an empty model as the policy says."""
    # Llama 4's experts they replace by linear layers, but only where a checkpoint is quantised already
    replaced = any(type(module).__name__ == "Llama4TextExperts" for module in model.modules())
    return bool(replaced or plain_linears(model, exempt) or stack_load.places(model))


def plain_linears(model: Model, exempt: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """(name, module) of what transformers passes over, but modules named by `exempt` and the output head."""
    patterns = tuple(exempt)
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__ == PLAIN_LINEARS.get(model.config.model_type)
        and module is not model.get_output_embeddings()
        and not matches(name, patterns)
    ]


def _ours(bitsandbytes: Document, exempt: Iterable[str]) -> Document:
    _registered()
    inner = {name: value for name, value in bitsandbytes.items() if name != "quant_method"}
    in_8bit = bool(inner.get("load_in_8bit", inner.get("_load_in_8bit")))
    return {"quant_method": METHODS["8 bits" if in_8bit else "4 bits"], "exempt": exempt, "bitsandbytes": inner}


@cache
def _registered() -> dict[str, type[BitsAndBytesConfig]]:
    """The config class of each method, which is registered with its quantiser when it is first needed."""
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

    quantisers = {"4 bits": (Bnb4BitHfQuantizer, _linear_4bit), "8 bits": (Bnb8BitHfQuantizer, _linear_8bit)}
    return {METHODS[bits]: _register(METHODS[bits], *ours) for bits, ours in quantisers.items()}


def _linear_4bit(module: nn.Module, settings: BitsAndBytesConfig, *, packed: bool) -> nn.Module:
    """The empty layer that takes a linear's place, as transformers' `replace_with_bnb_linear` makes it.

    Args:
        packed: the checkpoint holds codes.
    """
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(
        module.in_features,
        module.out_features,
        module.bias is not None,
        settings.bnb_4bit_compute_dtype,
        compress_statistics=settings.bnb_4bit_use_double_quant,
        quant_type=settings.bnb_4bit_quant_type,
    )
    if packed:
        made.weight.data = made.weight.data.to(settings.bnb_4bit_quant_storage)
    return made


def _linear_8bit(module: nn.Module, settings: BitsAndBytesConfig, *, packed: bool) -> nn.Module:
    """The same in 8 bits."""
    import bitsandbytes as bnb
    import torch

    made = bnb.nn.Linear8bitLt(
        module.in_features,
        module.out_features,
        module.bias is not None,
        has_fp16_weights=False,
        threshold=settings.llm_int8_threshold,
    )
    if packed:
        made.weight.data = made.weight.data.to(torch.int8)
    return made


def _register(method: str, quantiser: type, make: Callable[..., nn.Module]) -> type[BitsAndBytesConfig]:
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import register_quantization_config, register_quantizer

    from halfbyte.quant.stack import ExpertStack

    @register_quantization_config(method)
    class TaughtConfig(BitsAndBytesConfig):
        """A bitsandbytes config, and the patterns of modules that stay as they are."""

        @classmethod
        def from_dict(cls, config_dict: Document, return_unused_kwargs: bool = False, **kwargs: object) -> object:
            made = super().from_dict(config_dict["bitsandbytes"])
            made.quant_method, made.exempt = method, tuple(config_dict["exempt"])
            return (made, kwargs) if return_unused_kwargs else made

        def plain(self) -> BitsAndBytesConfig:
            inner = {k: v for k, v in self.to_dict().items() if k not in ("quant_method", "exempt")}
            return BitsAndBytesConfig.from_dict(inner)

    @register_quantizer(method)
    class TaughtQuantizer(quantiser):
        """bitsandbytes' quantiser, which prepares plain subclasses of nn.Linear and experts too, as transformers'
        `replace_with_bnb_linear` does it for nn.Linear itself."""

        @property
        def bits(self) -> int:
            return 8 if self.quantization_config.load_in_8bit else 4

        def get_modules_to_not_convert(self, model: Model, *args: object, **kwargs: object) -> list[str]:
            return [*super().get_modules_to_not_convert(model, *args, **kwargs), *stack_load.routers(model)]

        def _process_model_before_weight_loading(self, model: Model, device_map: object, **kwargs: object) -> None:
            super()._process_model_before_weight_loading(model, device_map, **kwargs)
            for name, module in plain_linears(model, self.quantization_config.exempt):
                with torch.device("meta"):
                    made = make(module, self.quantization_config, packed=self.pre_quantized)
                made.source_cls = type(module)
                made.requires_grad_(False)
                model.set_submodule(name, made)
            stack_load.make_room(model, self.quantization_config.exempt, model.dtype, bits=self.bits)

        def param_needs_quantization(self, model: Model, param_name: str, **kwargs: object) -> bool:
            stack = isinstance(model.get_parameter_or_buffer(param_name), ExpertStack)
            return stack or bool(super().param_needs_quantization(model, param_name, **kwargs))

        def get_quantize_ops(self) -> object:
            return stack_load.quantise_operation(super().get_quantize_ops())

        def update_weight_conversions(self, weight_conversions: list[object], model: Model) -> list[object]:
            own = stack_load.conversions(model, self, bits=self.bits) if self.pre_quantized else []
            return [*own, *super().update_weight_conversions(weight_conversions, model)]

    return TaughtConfig
