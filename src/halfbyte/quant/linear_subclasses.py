"""Pre-quantised checkpoints of models whose linears are a subclass of nn.Linear: transformers' quantiser, taught them.

Why: transformers puts `nn.Linear` itself into 4 bits and passes over Falcon's own subclass, whose forward is the same
product. What `quant.quantise_plain_linears` does after a load is done here before it, so such a store opens mapped.
What: a quantiser and its config under a name of their own, in transformers' registry for custom quantisers. A store
that needs it says so in its config.json; plain transformers refuses to open it, as its shapes are not Falcon's.
Source: `transformers/quantizers/auto.py`, `register_quantizer`, `register_quantization_config`.
Cost: none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

from halfbyte.quant.policy import matches

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    from halfbyte.recipe.schema import Quant
    from halfbyte.types import Config, Document, Model


# Subclasses of nn.Linear in transformers whose forward is the plain product, and which its loader leaves in 16 bits.
PLAIN_LINEARS = frozenset(("FalconLinear",))
METHOD = "halfbyte_4bit"
# The key in a store's `quantization_config`: patterns of modules that stay as they are.
MARK = "halfbyte_plain_linears_but"


def is_marked(quantised: object) -> bool:
    """Whether a config's `quantization_config` is of a store that only opens with `opening_config`."""
    return isinstance(quantised, dict) and MARK in quantised


def mark(values: Document, quant: Quant) -> Document:
    """A bitsandbytes config as a dictionary, marked."""
    return {**values, MARK: sorted({*quant.skip_modules, *quant.fp32_modules})}


def opening_config(config: Config) -> Config:
    """A copy of a model's config that sends `from_pretrained` to our quantiser."""
    _register()
    found = copy.deepcopy(config)
    values = dict(found.quantization_config)
    inner = {name: value for name, value in values.items() if name not in (MARK, "quant_method")}
    found.quantization_config = {"quant_method": METHOD, "exempt": values[MARK], "bitsandbytes": inner}
    return found


def quantiser(bnb: BitsAndBytesConfig, quant: Quant, *, pre_quantised: bool) -> Bnb4BitHfQuantizer:
    """The quantiser itself, for what a load would do: see `store/layout.py`."""
    config_class, quantiser_class = _register()
    values = {"exempt": [*quant.skip_modules, *quant.fp32_modules], "bitsandbytes": bnb.to_dict()}
    return quantiser_class(config_class.from_dict(values), pre_quantized=pre_quantised)


def settle(model: Model) -> None:
    """After opening: the model says that it is bitsandbytes', which it is, so that PEFT and saving know it."""
    found: Any = getattr(model.config, "quantization_config", None)
    if getattr(found, "quant_method", None) == METHOD:
        model.config.quantization_config = found.plain()
        model.quantization_method = model.config.quantization_config.quant_method


def plain_linears(model: Model, exempt: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """(name, module) of what transformers passes over: it puts `nn.Linear` itself into 4 bits, not Falcon's own
    subclass of it, whose forward is the same product. Modules named by `exempt` and the output head are not meant.
    """
    from torch import nn

    patterns = tuple(exempt)
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__ in PLAIN_LINEARS
        and isinstance(module, nn.Linear)
        and module is not model.get_output_embeddings()
        and not matches(name, patterns)
    ]


def replace_plain_linears(
    model: Model, settings: BitsAndBytesConfig, exempt: Iterable[str], *, pre_quantised: bool
) -> None:
    """On an empty model, as transformers' `replace_with_bnb_linear` does it for `nn.Linear`. A checkpoint's packed
    weights are bytes: pre-quantised layers wait for those."""
    for name, module in plain_linears(model, exempt):
        made = _empty_linear4bit(
            module,
            settings.bnb_4bit_compute_dtype,
            double_quant=settings.bnb_4bit_use_double_quant,
            kind=settings.bnb_4bit_quant_type,
        )
        if pre_quantised:
            made.weight.data = made.weight.data.to(settings.bnb_4bit_quant_storage)
        made.source_cls = type(module)
        made.requires_grad_(False)
        model.set_submodule(name, made)


def quantise_plain_linears(model: Model, quant: Quant, dtype: torch.dtype) -> list[str]:
    """Put plain linears of a loaded model into 4 bits, one at a time, on this instance. Returns the names."""
    found = plain_linears(model, (*quant.skip_modules, *quant.fp32_modules)) if quant.quantises else []
    if not found:
        return []
    import bitsandbytes as bnb
    from torch import nn

    for name, module in found:
        made = _empty_linear4bit(module, dtype, double_quant=quant.double_quant, kind=quant.type)
        values = made.weight.__dict__  # block size, type and module, as Linear4bit chose them
        made.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, **values).to(module.weight.device)
        if module.bias is not None:
            made.bias = nn.Parameter(module.bias.data, requires_grad=False)
        made.train(module.training)
        model.set_submodule(name, made)
    return [name for name, _ in found]


def _empty_linear4bit(module: nn.Module, dtype: torch.dtype, *, double_quant: bool, kind: str) -> nn.Module:
    """A `Linear4bit` on the meta device with the sizes of a linear layer."""
    import bitsandbytes as bnb
    import torch

    with torch.device("meta"):
        return bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            module.bias is not None,
            dtype,
            compress_statistics=double_quant,
            quant_type=kind,
        )


@cache
def _register() -> tuple[type[BitsAndBytesConfig], type[Bnb4BitHfQuantizer]]:
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import register_quantization_config, register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    class PlainLinearsConfig(BitsAndBytesConfig):
        """A bitsandbytes config, and the patterns of modules that stay as they are."""

        @classmethod
        def from_dict(cls, config_dict: Document, return_unused_kwargs: bool = False, **kwargs: object) -> object:
            inner = {k: v for k, v in config_dict["bitsandbytes"].items() if k != "quant_method"}
            made = super().from_dict(inner)
            made.quant_method, made.exempt = METHOD, tuple(config_dict["exempt"])
            return (made, kwargs) if return_unused_kwargs else made

        def plain(self) -> BitsAndBytesConfig:
            inner = {k: v for k, v in self.to_dict().items() if k not in ("quant_method", "exempt")}
            return BitsAndBytesConfig.from_dict(inner)

    class PlainLinearsQuantizer(Bnb4BitHfQuantizer):
        """bitsandbytes' quantiser, which prepares plain subclasses of nn.Linear too."""

        def _process_model_before_weight_loading(self, model: Model, device_map: object, **kwargs: object) -> None:
            super()._process_model_before_weight_loading(model, device_map, **kwargs)
            settings = self.quantization_config
            replace_plain_linears(model, settings, settings.exempt, pre_quantised=self.pre_quantized)

    register_quantization_config(METHOD)(PlainLinearsConfig)
    register_quantizer(METHOD)(PlainLinearsQuantizer)
    return PlainLinearsConfig, PlainLinearsQuantizer
