"""4 bits for models whose linears are a subclass of nn.Linear: transformers' quantiser, taught them.

Why: transformers puts `nn.Linear` itself into 4 bits and passes over Falcon's own subclass, whose forward is the same
product.
What: a quantiser and its config under a name of their own, in transformers' registry for custom quantisers. A store
that needs it says so in its config.json; plain transformers refuses to open it, as its shapes are not Falcon's.
Source: `transformers/quantizers/auto.py`, `register_quantizer`, `register_quantization_config`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from halfbyte.quant.policy import matches
from halfbyte.recipe.schema import Quant
from halfbyte.types import Config, Document, Model

if TYPE_CHECKING:
    from torch import nn
    from transformers import BitsAndBytesConfig

# By model type: subclasses of nn.Linear whose forward is the plain product, and which the loader leaves in 16 bits.
PLAIN_LINEARS = {"falcon": "FalconLinear"}
METHOD = "halfbyte_4bit"
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
    """A bitsandbytes config with which `from_pretrained` puts plain linears into 4 bits too."""
    return _config_class().from_dict(_ours(bits.to_dict(), quant.exempt))


def settle(model: Model) -> None:
    """After opening: the model says that it is bitsandbytes', which it is, so that PEFT and saving know it."""
    held = getattr(model.config, "quantization_config", None)
    if held is not None and getattr(held, "quant_method", None) == METHOD:
        model.config.quantization_config = held.plain()
        model.quantization_method = model.config.quantization_config.quant_method


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
    _config_class()
    inner = {name: value for name, value in bitsandbytes.items() if name != "quant_method"}
    return {"quant_method": METHOD, "exempt": exempt, "bitsandbytes": inner}


@cache
def _config_class() -> type[BitsAndBytesConfig]:
    """The class of our config, which is registered with its quantiser when it is first needed."""
    import bitsandbytes as bnb
    import torch
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import register_quantization_config, register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    @register_quantization_config(METHOD)
    class PlainLinearsConfig(BitsAndBytesConfig):
        """A bitsandbytes config, and the patterns of modules that stay as they are."""

        @classmethod
        def from_dict(cls, config_dict: Document, return_unused_kwargs: bool = False, **kwargs: object) -> object:
            made = super().from_dict(config_dict["bitsandbytes"])
            made.quant_method, made.exempt = METHOD, tuple(config_dict["exempt"])
            return (made, kwargs) if return_unused_kwargs else made

        def plain(self) -> BitsAndBytesConfig:
            inner = {k: v for k, v in self.to_dict().items() if k not in ("quant_method", "exempt")}
            return BitsAndBytesConfig.from_dict(inner)

    @register_quantizer(METHOD)
    class PlainLinearsQuantizer(Bnb4BitHfQuantizer):
        """bitsandbytes' quantiser, which prepares plain subclasses of nn.Linear too, as transformers'
        `replace_with_bnb_linear` does it for nn.Linear itself."""

        def _process_model_before_weight_loading(self, model: Model, device_map: object, **kwargs: object) -> None:
            super()._process_model_before_weight_loading(model, device_map, **kwargs)
            settings = self.quantization_config
            for name, module in plain_linears(model, settings.exempt):
                with torch.device("meta"):
                    made = bnb.nn.Linear4bit(
                        module.in_features,
                        module.out_features,
                        module.bias is not None,
                        settings.bnb_4bit_compute_dtype,
                        compress_statistics=settings.bnb_4bit_use_double_quant,
                        quant_type=settings.bnb_4bit_quant_type,
                    )
                if self.pre_quantized:  # the checkpoint's packed weights are bytes
                    made.weight.data = made.weight.data.to(settings.bnb_4bit_quant_storage)
                made.source_cls = type(module)
                made.requires_grad_(False)
                model.set_submodule(name, made)

    return PlainLinearsConfig
