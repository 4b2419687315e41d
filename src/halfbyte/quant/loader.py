"""Quantisers of our own for transformers' loader: few bits for what its quantisers pass over, and formats that it does
not know.

Why: transformers quantises `nn.Linear` itself. It passes over Falcon's own subclass, whose forward is the same product,
and over a mixture's experts, which are parameters (`experts.py`); a router that is a linear layer it takes along.
What: quantisers and their configs under names of their own, in transformers' registry for custom quantisers: its own
for bitsandbytes, taught the rest, and one for every other format. A store that needs one says so in its config.json;
plain transformers refuses to open it, as its shapes are not the model's.
Source: `transformers/quantizers/auto.py`, `register_quantizer`, `register_quantization_config`;
`core_model_loading.py`, `WeightConverter`, `ConversionOps`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING

from halfbyte.quant import formats
from halfbyte.quant.number_format import torch_dtypes
from halfbyte.quant.policy import matches
from halfbyte.recipe import number_formats
from halfbyte.recipe.schema import Quant
from halfbyte.types import Config, Document, Model

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers.utils.quantization_config import QuantizationConfigMixin

# By model type: subclasses of nn.Linear whose forward is the plain product, and which the loader leaves in 16 bits.
PLAIN_LINEARS = {"falcon": "FalconLinear"}
# Our quantisers' names: of a format that transformers does not know, and of bitsandbytes' by `load_in_8bit`.
METHOD = "halfbyte"
TAUGHT = {False: "halfbyte_4bit", True: "halfbyte_8bit"}
# The key in a store's `quantization_config`: patterns of modules that stay as they are.
MARK = "halfbyte_plain_linears_but"


def stored_config(quant: Quant, dtype: torch.dtype, head_names: Iterable[str], *, taught: bool) -> Document:
    """What a store's config.json says of its quantising; nothing for 16 bits.

    Args:
        taught: it opens with `opening_config` only.
    """
    config = formats.of(quant).load_config(quant, dtype, head_names) or _own_config(quant, head_names)
    values: Document = {} if config is None else config.to_dict()
    return {**values, MARK: sorted(set(quant.exempt))} if taught else values


def opening_config(config: Config) -> Config | None:
    """A copy of a store's config that sends `from_pretrained` to our quantiser; None where its own opens it."""
    values = getattr(config, "quantization_config", None)
    if not isinstance(values, dict) or not (MARK in values or values.get("quant_method") == METHOD):
        return None
    _registered()
    config = copy.deepcopy(config)
    if MARK in values:
        config.quantization_config = _taught({k: v for k, v in values.items() if k != MARK}, values[MARK])
    return config


def load_config(
    model: Model, quant: Quant, dtype: torch.dtype, head_names: Iterable[str] = ()
) -> QuantizationConfigMixin | None:
    """What `from_pretrained` needs to quantise while it loads, as `NumberFormat.load_config`, taught what transformers'
    own quantiser would leave out.

    Args:
        model: on the meta device, or any other of its kind; not quantised yet.
    """
    config = formats.of(quant).load_config(quant, dtype, head_names)
    if config is None:
        return _own_config(quant, head_names)
    if not _needs_teaching(model, quant.exempt):
        return config
    values = _taught(config.to_dict(), quant.exempt)
    return _registered()[values["quant_method"]].from_dict(values)


def is_taught(config: QuantizationConfigMixin | None) -> bool:
    """Whether a store that is opened with it has to be marked."""
    return config is not None and config.quant_method in TAUGHT.values()


def settle(model: Model) -> None:
    """After opening: the model says that it is bitsandbytes', which it is, so that PEFT and saving know it."""
    config = getattr(model.config, "quantization_config", None)
    if config is not None and getattr(config, "quant_method", None) in TAUGHT.values():
        model.config.quantization_config = config.plain()
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


def _own_config(quant: Quant, head_names: Iterable[str]) -> QuantizationConfigMixin | None:
    if not quant.quantises:
        return None
    fields = {"type", *number_formats.UNSET, "skip_modules", "fp32_modules"}
    skipped = [*head_names, *quant.exempt] if quant.exempt else None
    config: QuantizationConfigMixin = _registered()[METHOD](quant.model_dump(mode="json", include=fields), skipped)
    return config


def _needs_teaching(model: Model, exempt: Iterable[str]) -> bool:
    from halfbyte.quant import experts

    # Llama 4's experts they replace by linear layers, but only where a checkpoint is quantised already
    replaced = any(type(module).__name__ == "Llama4TextExperts" for module in model.modules())
    return bool(replaced or plain_linears(model, exempt) or experts.expert_parameters(model))


def _taught(bitsandbytes: Document, exempt: Iterable[str]) -> Document:
    _registered()
    inner = {name: value for name, value in bitsandbytes.items() if name != "quant_method"}
    in_8bit = bool(inner.get("load_in_8bit", inner.get("_load_in_8bit")))
    return {"quant_method": TAUGHT[in_8bit], "exempt": exempt, "bitsandbytes": inner}


@cache
def _registered() -> dict[str, Model]:
    """The config class of each method, which is registered with its quantiser when it is first needed."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import register_quantization_config, register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class TaughtConfig(BitsAndBytesConfig):
        """A bitsandbytes config, and the patterns of modules that stay as they are."""

        method: str

        @classmethod
        def from_dict(cls, config_dict: Document, return_unused_kwargs: bool = False, **kwargs: object) -> object:
            config = super().from_dict(config_dict["bitsandbytes"])
            config.quant_method, config.exempt = cls.method, tuple(config_dict["exempt"])
            return (config, kwargs) if return_unused_kwargs else config

        def plain(self) -> BitsAndBytesConfig:
            inner = {k: v for k, v in self.to_dict().items() if k not in ("quant_method", "exempt")}
            return BitsAndBytesConfig.from_dict(inner)

        @property
        def settings(self) -> Quant:
            return Quant(**formats.settings_of(self))

    class OwnConfig(QuantizationConfigMixin):
        """The fields of a recipe's `quant:`; `skipped`: names of modules, None for transformers' own choice."""

        def __init__(self, quant: Document, skipped: list[str] | None = None, **_: object) -> None:
            self.quant_method, self.quant, self.skipped = METHOD, quant, skipped

        @property
        def settings(self) -> Quant:
            return Quant(**self.quant)

        @property
        def exempt(self) -> tuple[str, ...]:
            return self.settings.exempt

    def register(method: str, config: type, quantiser: type) -> type:
        register_quantizer(method)(_with_experts(quantiser))
        registered: type = register_quantization_config(method)(config)
        return registered

    by_bits = {False: Bnb4BitHfQuantizer, True: Bnb8BitHfQuantizer}
    configs = {
        method: register(method, type("TaughtConfig", (TaughtConfig,), {"method": method}), by_bits[in_8bit])
        for in_8bit, method in TAUGHT.items()
    }
    return {**configs, METHOD: register(METHOD, OwnConfig, _own_quantiser())}


def _with_experts(quantiser: type) -> type:
    """A quantiser that takes plain subclasses of nn.Linear and experts too, and leaves routers out."""
    import torch
    from torch import nn
    from transformers.core_model_loading import WeightConverter

    from halfbyte.quant import experts
    from halfbyte.quant.stack import ExpertStack

    class WithExperts(quantiser):
        def get_modules_to_not_convert(self, model: Model, *args: object, **kwargs: object) -> list[str]:
            return [*super().get_modules_to_not_convert(model, *args, **kwargs), *experts.routers(model)]

        def _process_model_before_weight_loading(self, model: Model, device_map: object = None, **more: object) -> None:
            settings, exempt = self.quantization_config.settings, self.quantization_config.exempt
            for name, module in plain_linears(model, exempt):
                with torch.device("meta"):
                    plain = nn.Linear(
                        module.in_features, module.out_features, module.bias is not None, dtype=model.dtype
                    )
                model.set_submodule(name, plain)
            super()._process_model_before_weight_loading(model, device_map=device_map, **more)
            for each in experts.expert_parameters(model, exempt):
                empty = ExpertStack.empty(formats.of(settings), each.parameter.shape, model.dtype, settings)
                each.module.register_parameter(each.name, empty)

        def param_needs_quantization(self, model: Model, param_name: str, **kwargs: object) -> bool:
            is_stack = isinstance(model.get_parameter_or_buffer(param_name), ExpertStack)
            return is_stack or bool(super().param_needs_quantization(model, param_name, **kwargs))

        def get_quantize_ops(self) -> object:
            return _quantize()(self, super().get_quantize_ops())

        def update_weight_conversions(self, weight_conversions: list[object], model: Model) -> list[object]:
            """What brings the stacks of a store into the model is tried before the model's own conversions."""
            conversions: dict[str, object] = {}
            for path, each in experts.stacks(model) if self.pre_quantized else ():
                pattern = ".".join(path.split(".")[-2:])  # a parameter's name and its module's
                parts = each.number_format.parts(tuple(each.shape), self.quantization_config.settings)
                names = [rf"(?<=\.){part.name(pattern + '.weight')}" for part in parts]
                conversions[pattern] = WeightConverter(names, pattern, [_deserialize()(self)])
            return [*conversions.values(), *super().update_weight_conversions(weight_conversions, model)]

    return WithExperts


def _own_quantiser() -> type:
    """The quantiser of every format that transformers does not know."""
    import torch
    from torch import nn
    from transformers.core_model_loading import WeightConverter
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    class OwnQuantizer(HfQuantizer):
        is_trainable, requires_calibration = True, False

        def is_serializable(self) -> bool:
            return True

        def _process_model_before_weight_loading(self, model: Model, **_: object) -> None:
            self.modules_to_not_convert = self.get_modules_to_not_convert(
                model, self.quantization_config.skipped, model._keep_in_fp32_modules
            )
            for name, module in list(model.named_modules()):
                if type(module) in (nn.Linear, Conv1D) and should_convert_module(name, self.modules_to_not_convert):
                    model.set_submodule(name, _empty_layer(module, self.quantization_config.settings, model.dtype))

        def param_needs_quantization(self, model: Model, param_name: str, **_: object) -> bool:
            path, _dot, name = param_name.rpartition(".")
            return name == "weight" and formats.is_quantised(model.get_submodule(path))

        def get_quantize_ops(self) -> None:
            return None

        def get_weight_conversions(self) -> list[object]:
            settings = self.quantization_config.settings
            names = [part.name("weight") for part in formats.of(settings).parts((1, 1), settings)]
            return [WeightConverter(names, "weight", [_deserialize()(self)])] if self.pre_quantized else []

    def _empty_layer(module: nn.Module, quant: Quant, dtype: torch.dtype) -> nn.Module:
        shape = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
        parts = {
            part.suffix: torch.empty(part.shape, dtype=torch_dtypes()[part.dtype], device="meta")
            for part in formats.of(quant).parts(shape, quant)
        }
        layer = formats.of(quant).layer(parts, shape, quant, dtype)
        if module.bias is not None:
            layer.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype, device="meta"))
        layer.source_cls = type(module)
        return layer.requires_grad_(False)

    return OwnQuantizer


def _parameter(quantiser: Model, model: Model, name: str, parts: Mapping[str, torch.Tensor]) -> torch.nn.Parameter:
    """What parts, by suffix, make of the empty parameter of this name: a stack of experts, or a layer's weight."""
    from halfbyte.quant.stack import ExpertStack

    place, quant = model.get_parameter(name), quantiser.quantization_config.settings
    if isinstance(place, ExpertStack):
        return formats.of(quant).stack(parts, tuple(place.shape), quant, place.compute_dtype)
    layer = model.get_submodule(name.rpartition(".")[0])
    layer._is_hf_initialized = True
    weight: torch.nn.Parameter = (
        formats.of(quant).layer(parts, (layer.out_features, layer.in_features), quant, model.dtype).weight
    )
    return weight


@cache
def _deserialize() -> type:
    from transformers.core_model_loading import ConversionOps

    from halfbyte.quant.stack import ExpertStack

    class Deserialize(ConversionOps):
        """The tensors of a stack, or of a layer's weight, in a store become the parameter."""

        def __init__(self, hf_quantizer: Model) -> None:
            self.hf_quantizer = hf_quantizer  # an operation with this attribute gets its tensors uncast

        def convert(
            self,
            input_dict: dict[str, list[torch.Tensor]],
            target_patterns: list[str],
            full_layer_name: str,
            model: Model,
            **kwargs: object,
        ) -> dict[str, torch.Tensor]:
            pattern, place = target_patterns[0], model.get_parameter(full_layer_name)
            tensors = {key: value[0] for key, value in input_dict.items()}
            if isinstance(place, ExpertStack):
                tensors = {key.partition(f"{pattern}.")[2]: value for key, value in tensors.items()}
            elif len(tensors) == 1:  # a layer that is not quantised
                return {pattern: tensors["weight"]}
            quant = self.hf_quantizer.quantization_config.settings
            names = {part.suffix: part.name("weight") for part in formats.of(quant).parts(tuple(place.shape), quant)}
            parts = {suffix: tensors[name] for suffix, name in names.items() if name in tensors}
            return {pattern: _parameter(self.hf_quantizer, model, full_layer_name, parts)}

    return Deserialize


@cache
def _quantize() -> type:
    import torch
    from transformers.core_model_loading import ConversionOps
    from transformers.pytorch_utils import Conv1D

    from halfbyte.quant.stack import ExpertStack

    class Quantize(ConversionOps):
        """A stack, or a weight that upstream does not know, is quantised as it is loaded; others by upstream."""

        def __init__(self, hf_quantizer: Model, upstream: ConversionOps | None) -> None:
            self.hf_quantizer, self.upstream = hf_quantizer, upstream

        def convert(
            self, input_dict: dict[str, torch.Tensor], model: Model, **kwargs: object
        ) -> dict[str, torch.Tensor]:
            parameters, others = {}, {}
            for name, given in input_dict.items():
                value, place = given[0] if isinstance(given, list) else given, model.get_parameter(name)
                if isinstance(place, ExpertStack):
                    parameters[name] = self._quantised(value.to(place.compute_dtype), name, model)
                elif self.upstream is None:
                    turned = issubclass(model.get_submodule(name.rpartition(".")[0]).source_cls, Conv1D)
                    parameters[name] = self._quantised(value.T.contiguous() if turned else value, name, model)
                else:
                    others[name] = given
            if self.upstream is not None and others:
                parameters |= self.upstream.convert(others, model=model, **kwargs)
            return parameters

        def _quantised(self, values: torch.Tensor, name: str, model: Model) -> torch.nn.Parameter:
            quant = self.hf_quantizer.quantization_config.settings
            encoder = formats.of(quant).encoder(quant, tuple(values.shape), values.dtype, name)
            parts = {"": torch.from_numpy(encoder.codes(0, values.cpu().reshape(-1))), **encoder.parts()}
            there = {suffix: part.to(values.device) for suffix, part in parts.items()}
            return _parameter(self.hf_quantizer, model, name, there)

    return Quantize
