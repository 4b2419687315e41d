"""A quantiser of ours for transformers' loader: few bits for what its quantisers pass over, and formats that it does
not know.

Why: transformers quantises `nn.Linear` itself. It passes over Falcon's own subclass, whose forward is the same product,
and over a mixture's experts, which are parameters (`experts.py`); a router that is a linear layer it takes along.
What: a quantiser and its config under a name of our own, in transformers' registry for custom quantisers. It asks the
number format alone. A store that needs it says so in its config.json; plain transformers refuses to open it, as its
shapes are not the model's. Every other store is opened by transformers' own quantisers for bitsandbytes.
Source: `transformers/quantizers/auto.py`, `register_quantizer`, `register_quantization_config`;
`core_model_loading.py`, `WeightConverter`, `ConversionOps`.
"""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte.quant import experts, formats
from halfbyte.quant.policy import matches
from halfbyte.quant.stack import ExpertStack
from halfbyte.recipe import number_formats
from halfbyte.recipe.schema import Quant
from halfbyte.types import Config, Document, Model

# By model type: subclasses of nn.Linear whose forward is the plain product, and which the loader leaves in 16 bits.
PLAIN_LINEARS = {"falcon": "FalconLinear"}
METHOD = "halfbyte"
# The key in the `quantization_config` of a store that says bitsandbytes: patterns of modules that stay as they are.
MARK = "halfbyte_plain_linears_but"


def load_config(
    model: Model, quant: Quant, dtype: torch.dtype, head_names: Iterable[str] = ()
) -> QuantizationConfigMixin | None:
    """What `from_pretrained` needs to quantise while it loads; None if nothing is quantised. `model`: on the meta
    device, or any other of its kind; not quantised yet. `head_names`: as for `NumberFormat.load_config`."""
    config = formats.of(quant).load_config(quant, dtype, head_names)
    if not quant.quantises or (config is not None and not _passes_over(model, quant.exempt)):
        return config
    return _own_config(quant, head_names)


def stored_config(quant: Quant, dtype: torch.dtype, head_names: Iterable[str], *, marked: bool) -> Document:
    """What a store's config.json says of its quantising; nothing for 16 bits. `marked`: transformers knows the format,
    but our quantiser is needed to open the store."""
    config = formats.of(quant).load_config(quant, dtype, head_names)
    if config is None and quant.quantises:
        config = _own_config(quant, head_names)
    values: Document = {} if config is None else config.to_dict()
    return {**values, MARK: sorted(set(quant.exempt))} if marked else values


def opening_config(config: Config) -> "Config | None":
    """A copy of a store's config that sends `from_pretrained` to our quantiser; None where its own opens it."""
    values = getattr(config, "quantization_config", None)
    if not isinstance(values, dict) or not (MARK in values or values.get("quant_method") == METHOD):
        return None
    config = copy.deepcopy(config)
    if MARK in values:
        upstream = BitsAndBytesConfig.from_dict({k: v for k, v in values.items() if k not in (MARK, "quant_method")})
        quant = {**formats.settings_of(upstream), "skip_modules": values[MARK]}
        skipped = upstream.llm_int8_skip_modules
        config.quantization_config = {"quant_method": METHOD, "quant": quant, "skipped": skipped}
    return config


def is_own(config: QuantizationConfigMixin | None) -> bool:
    """Whether our quantiser is needed."""
    return config is not None and config.quant_method == METHOD


def settle(model: Model, dtype: torch.dtype) -> None:
    """After opening: a model in a format of bitsandbytes says that it is bitsandbytes', so that PEFT and saving know
    it."""
    config = getattr(model.config, "quantization_config", None)
    if config is not None and is_own(config):
        upstream = formats.of(config.settings).load_config(config.settings, dtype, ())
        if upstream is not None:
            upstream.llm_int8_skip_modules = config.skipped
            model.config.quantization_config, model.quantization_method = upstream, upstream.quant_method


def plain_linears(model: Model, exempt: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """(name, module) of the linear layers that transformers passes over, but modules named by `exempt` and the output
    head."""
    patterns = tuple(exempt)
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__ == PLAIN_LINEARS.get(model.config.model_type)
        and module is not model.get_output_embeddings()
        and not matches(name, patterns)
    ]


def _passes_over(model: Model, exempt: Iterable[str]) -> bool:
    """Whether transformers' own quantisers would not hold a model as the policy says."""
    # Llama 4's experts they replace by linear layers, but only where a checkpoint is quantised already
    replaced = any(type(module).__name__ == "Llama4TextExperts" for module in model.modules())
    return bool(replaced or plain_linears(model, exempt) or experts.expert_parameters(model))


@register_quantization_config(METHOD)
class OwnConfig(QuantizationConfigMixin):
    """The fields of a recipe's `quant:`; `skipped`: names of modules, None for transformers' own choice."""

    def __init__(self, quant: Document, skipped: list[str] | None = None, **_: object) -> None:
        self.quant_method = METHOD
        self.quant, self.skipped = quant, skipped

    @property
    def settings(self) -> Quant:
        return Quant(**self.quant)


def _own_config(quant: Quant, head_names: Iterable[str]) -> OwnConfig:
    fields = {"type", *number_formats.UNSET, "skip_modules", "fp32_modules"}
    return OwnConfig(quant.model_dump(mode="json", include=fields), [*head_names, *quant.exempt] or None)


@register_quantizer(METHOD)
class OwnQuantizer(HfQuantizer):
    is_trainable, requires_calibration = True, False

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Model, **_: object) -> None:
        quant, kinds = self.quantization_config.settings, (nn.Linear, Conv1D)
        self.modules_to_not_convert = [
            *self.get_modules_to_not_convert(model, self.quantization_config.skipped, model._keep_in_fp32_modules),
            *experts.routers(model),
        ]
        linears = [item for item in model.named_modules() if type(item[1]) in kinds]
        taken = [item for item in linears if should_convert_module(item[0], self.modules_to_not_convert)]
        for name, module in (*taken, *plain_linears(model, quant.exempt)):
            model.set_submodule(name, _empty_layer(module, quant, model.dtype))
        for each in experts.expert_parameters(model, quant.exempt):
            args = (formats.of(quant), each.parameter.shape, model.dtype, quant)
            each.module.register_parameter(each.name, ExpertStack.empty(*args, coded=self.pre_quantized))
        self.stacks = dict(experts.stacks(model)) if self.pre_quantized else {}

    def _process_model_after_weight_loading(self, model: Model, **_: object) -> Model:
        bits = number_formats.FORMATS[self.quantization_config.settings.type].bits
        if bits in (4, 8):  # PEFT asks for these
            setattr(model, f"is_loaded_in_{bits}bit", True)
        return model

    def param_needs_quantization(self, model: Model, param_name: str, **_: object) -> bool:
        path, _dot, name = param_name.rpartition(".")
        is_stack = isinstance(model.get_parameter_or_buffer(param_name), ExpertStack)
        return is_stack or (name == "weight" and hasattr(model.get_submodule(path), "source_cls"))

    def get_quantize_ops(self) -> object:
        return Quantize(self)

    def get_weight_conversions(self) -> list[object]:
        quant = self.quantization_config.settings
        names = [part.name("weight") for part in formats.of(quant).parts((1, 1), quant)]
        return [self._converter(names, "weight")] if self.pre_quantized else []

    def update_weight_conversions(self, weight_conversions: list[object], *model: Model) -> list[object]:
        """A store's stacks come before the model's own conversions. `model`: transformers 5.10.1 gives none."""
        conversions: dict[str, object] = {}
        for path, stack in self.stacks.items():
            pattern = ".".join(path.split(".")[-2:])  # a parameter's name and its module's
            parts = stack.number_format.parts(tuple(stack.shape), self.quantization_config.settings)
            names = [rf"(?<=\.){part.name(pattern + '.weight')}" for part in parts]
            conversions[pattern] = self._converter(names, pattern)
        return [*conversions.values(), *super().update_weight_conversions(weight_conversions, *model)]

    def _converter(self, names: list[str], target: str) -> WeightConverter:
        """Longest names first: transformers 5.10.1 takes the first that matches a part of a tensor's name."""
        return WeightConverter(sorted(names, key=len, reverse=True), target, [Deserialize(self)])


def _empty_layer(module: nn.Module, quant: Quant, dtype: torch.dtype) -> nn.Module:
    """A quantised layer on the meta device, in the place of a linear one."""
    shape = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
    layer = formats.of(quant).empty_layer(shape, quant, dtype)
    if module.bias is not None:
        layer.bias = nn.Parameter(torch.empty(shape[0], dtype=dtype, device="meta"))
    layer.source_cls = type(module)
    return layer.requires_grad_(False)


def _parameter(quantiser: Model, model: Model, name: str, parts: Mapping[str, torch.Tensor]) -> torch.nn.Parameter:
    """What parts, by suffix, make of the empty parameter of this name: a stack of experts, or a layer's weight."""
    place, quant = model.get_parameter(name), quantiser.quantization_config.settings
    if isinstance(place, ExpertStack):
        return formats.of(quant).stack(parts, tuple(place.shape), quant, place.compute_dtype)
    layer = model.get_submodule(name.rpartition(".")[0])
    layer._is_hf_initialized = True
    return formats.of(quant).layer(parts, (layer.out_features, layer.in_features), quant, model.dtype).weight


class _Operation(ConversionOps):
    def __init__(self, hf_quantizer: Model) -> None:
        self.hf_quantizer = hf_quantizer  # an operation with this attribute gets its tensors uncast


class Deserialize(_Operation):
    """The tensors of a stack, or of a layer's weight, in a store become the parameter."""

    def convert(
        self, input_dict: dict[str, list[torch.Tensor]], target_patterns: list[str], full_layer_name: str, model: Model,
        **kwargs: object,
    ) -> dict[str, torch.Tensor]:  # fmt: skip
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


class Quantize(_Operation):
    """Stacks and weights in 16 bits are quantised as they are loaded."""

    def convert(self, input_dict: dict[str, torch.Tensor], model: Model, **kwargs: object) -> dict[str, torch.Tensor]:
        quant, parameters = self.hf_quantizer.quantization_config.settings, {}
        for name, given in input_dict.items():
            values = given[0] if isinstance(given, list) else given
            source = getattr(model.get_submodule(name.rpartition(".")[0]), "source_cls", object)
            values = (values.T.contiguous() if issubclass(source, Conv1D) else values).to(model.dtype)
            encoder = formats.of(quant).encoder(quant, tuple(values.shape), values.dtype, name)
            first, *_ = formats.of(quant).parts(tuple(values.shape), quant)
            codes = torch.from_numpy(encoder.codes(0, values.cpu().reshape(-1))).view(first.shape)
            parts = {s: part.to(values.device) for s, part in {"": codes, **encoder.parts()}.items()}
            parameters[name] = _parameter(self.hf_quantizer, model, name, parts)
        return parameters
