"""What differs between the versions of transformers 5."""

import inspect
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

from halfbyte.types import Document, Model
from halfbyte.upstream.seam import Seam, fields_of, source_of

# What a model and its layers take their cache by: the name of newer versions, and that of older ones.
CACHE_ARGUMENTS = ("cache", "past_key_values")


def cache_argument(model: Model) -> str:
    """Of `CACHE_ARGUMENTS` the one that the forward of this model has."""
    new, old = CACHE_ARGUMENTS
    return new if new in inspect.signature(model.forward).parameters else old


def recompute(model: Model, options: Document) -> None:
    """Recompute activations of a model's layers in backward. `options`: of `torch.utils.checkpoint`."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(options)


def recompute_nothing(model: Model) -> None:
    (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()


def recomputes(model: Model) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def attention() -> Any:
    """The registry of attention functions, by name."""
    from transformers import AttentionInterface

    return AttentionInterface


def attention_masks() -> Any:
    """The registry of the functions that make their masks, by the same names."""
    from transformers import AttentionMaskInterface

    return AttentionMaskInterface


@cache
def _moe() -> ModuleType:
    from transformers.integrations import moe

    return moe


def experts_functions() -> Any:
    """The registry of functions that compute experts, by name."""
    return _moe().ALL_EXPERTS_FUNCTIONS


def experts_implementation(model: Model) -> dict[str, str | None]:
    """By which function a model and its parts compute experts, as `set_experts_implementation` takes it."""
    parts = {name: getattr(model.config, name, None) for name in model.config.sub_configs}
    configs = {"": model.config, **parts}
    return {name: config._experts_implementation for name, config in configs.items() if config is not None}


def has_experts_interface(family: str) -> bool:
    """Whether the code of a family of models computes its experts through the interface, by its source."""
    return "@use_experts_implementation" in source_of(f"transformers.models.{family}.modeling_{family}")


def plain_gate() -> object:
    """What stands between an expert's two stacks where its class says nothing else."""
    return getattr(_moe(), "_default_apply_gate", None)


def gguf_splits() -> Mapping[str, str]:
    """Rule (`tokenizer.ggml.pre`) -> the expression that text is cut by, of those that transformers knows. ImportError
    with a version whose reader of GGUF tokenizers does not go by the file's rule."""
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    return gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS


def has_plain_loss(lm: Model) -> bool:
    """Whether a causal LM's loss is transformers' own: cross-entropy of each token by those before it."""
    from transformers.loss.loss_utils import LOSS_MAPPING

    return getattr(lm, "loss_function", None) is LOSS_MAPPING["ForCausalLM"]


@cache
def byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes as."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


def training_fields() -> frozenset[str]:
    """The fields of TrainingArguments."""
    return fields_of("transformers.training_args", "TrainingArguments")


def quantization_fields() -> frozenset[str]:
    """The arguments of BitsAndBytesConfig."""
    return fields_of("transformers.utils.quantization_config", "BitsAndBytesConfig")


def _lfm2_is_told() -> bool:
    """Whether the last family to take lengths does."""
    layer = import_module("transformers.models.lfm2.modeling_lfm2").Lfm2ShortConv
    return any(p.kind == p.VAR_KEYWORD for p in inspect.signature(layer.forward).parameters.values())


PACKED_ATTENTION = Seam(
    "transformers", "registry of attention functions with its masks", "each micro-batch is one example",
    lambda: "sdpa" in attention()() and "sdpa" in attention_masks()(),
)  # fmt: skip
EXPERTS = Seam(
    "transformers", "registry of experts functions", "mixtures of experts are not quantised",
    lambda: bool(experts_functions()),
)  # fmt: skip
GGUF_RULES = Seam(
    "transformers", "table of rules for GGUF tokenizers", "a GGUF file is not read as a model",
    lambda: bool(gguf_splits()),
)  # fmt: skip
RECURRENT_LENGTHS = Seam(
    "transformers", "lengths for every recurrent layer", "rows of some hybrids are padded, or one a micro-batch",
    lambda: hasattr(import_module("transformers.masking_utils"), "create_recurrent_attention_mask") and _lfm2_is_told(),
)  # fmt: skip
SEAMS = (PACKED_ATTENTION, EXPERTS, GGUF_RULES, RECURRENT_LENGTHS)
