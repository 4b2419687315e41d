"""The language model of a checkpoint that reads images or sound too: opened alone, under the whole checkpoint's names.

Why: training on text has no use for a tower. An adapter whose names are not those of the whole model is loaded by
other programs without effect and without an error.
What: transformers' causal LM of the text config, with its body one step deeper (`model.language_model`), where the
whole class has it. Where that config has no causal LM, one that computes the same: with text alone the three positions
of M-RoPE are one. A type that does not fit opens as `AutoModelForCausalLM` opens it.
Source: `transformers/models/*/modeling_*.py`; a test compares names and logits with every whole class.
Cost: none; torch and transformers are imported inside functions.
"""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TypeAlias

from halfbyte.types import Config, ConfigFile, Document, Model

_Class: TypeAlias = Model  # a class of transformers, or what one of its functions takes and gives
# A text config without a causal LM of its own -> a type that computes the same, and what that one calls its settings.
_SAME_AS: dict[str, tuple[str, Document]] = {
    "qwen2_vl_text": ("qwen2", {}), "qwen2_5_vl_text": ("qwen2", {}), "qwen3_vl_text": ("qwen3", {}),
    "glm4v_text": ("glm4", {"attention_bias": True}),
}  # fmt: skip
_SCALED = ("aya_vision", "cohere2_vision")  # their whole class scales no logits, and the text's does
# Files of before 5.0 have the text config's fields beside the tower's.
_FLAT = {"qwen2_vl": "qwen2_vl_text", "qwen2_5_vl": "qwen2_5_vl_text"}
# What a file leaves out because it is the config class's default, and a plan needs.
_DEFAULTS: dict[str, Document] = {
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
}
_OF_ROPE = ("mrope_section", "mrope_interleaved")
_TEXT = re.compile(r"(?:model\.)?(language_model|text_model)\.(?:model\.)?(?!lm_head)(.*)")
_TOWER = re.compile(r"(^|\.)(visual|vision_\w+|audio_\w+|multi_modal_projector|connector|embed_(vision|audio)|mtp)\.")


# ------------------------------------------------------------------ files
def text_config(config: ConfigFile) -> ConfigFile:
    """What `config.json` says of the language model; the whole of it where there is nothing else."""
    kind = config.get("model_type")
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        flat = _FLAT.get(str(kind))
        return {**config, "model_type": _SAME_AS[flat][0], "text_half_of": kind} if flat else config
    beside = {k: config[k] for k in ("tie_word_embeddings", "quantization_config") if config.get(k) is not None}
    name, more = _SAME_AS.get(str(inner.get("model_type", kind)), (inner.get("model_type", kind), {}))
    values = {**_DEFAULTS.get(str(name), {}), **config, **inner, **beside, **more}
    return values | {"model_type": name, "text_half_of": kind, "text_config": None}


def text_tensors(names: Iterable[str], config: ConfigFile) -> dict[str, str]:
    """Of a checkpoint's tensors those that the language model reads, and what the whole class calls each, whichever
    version has written the file. `config`: as `text_config` gives it."""
    names = list(names)
    if not config.get("text_half_of"):
        return {name: name for name in names}
    heads = {name: name[name.index("lm_head.") :] for name in names if "lm_head." in name}
    inside = {name: f"model.{match[1]}.{match[2]}" for name in names if (match := _TEXT.fullmatch(name))}
    flat = {name: name.replace("model.", "model.language_model.", 1) for name in names if not _TOWER.search(name)}
    return (inside or flat) | heads


# ------------------------------------------------------------------ models
def half_of(config: Config) -> "Config | None":
    """The config of a checkpoint's language model, of a class that `AutoModelForCausalLM` opens under the checkpoint's
    own names; None where there is none."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    text = config.get_text_config()
    whole = whole_class(config)
    if text is config or whole is None or config.model_type in _SCALED:
        return None
    kind, more = _SAME_AS.get(text.model_type, (text.model_type, {}))
    cls = CONFIG_MAPPING[kind] if text.model_type in _SAME_AS else type(text)
    if cls not in AutoModelForCausalLM._model_mapping or _place(whole) is None:
        return None
    half = _registered(type(config), whole, cls)  # type: ignore[arg-type]  # classes are hashable
    values = text.to_dict() | more | {"model_type": kind}
    values["tie_word_embeddings"] = getattr(config, "tie_word_embeddings", False)
    if more and "head_dim" not in values:
        values["head_dim"] = text.hidden_size // text.num_attention_heads
    if kind != text.model_type:
        rope = {name: value for name, value in text.rope_parameters.items() if name not in _OF_ROPE}
        values["rope_parameters"] = {"partial_rotary_factor": 1.0, **rope}
    opened = half.from_dict(values)
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        opened.quantization_config = quantised
    return opened


def whole_class(config: Config) -> _Class:
    """transformers' class of a whole checkpoint, with its towers; None for a type that reads text alone."""
    from transformers import AutoModelForMultimodalLM

    return AutoModelForMultimodalLM._model_mapping.get(type(config), None)


def is_half(model: _Class) -> bool:
    """Whether a model or a config is that of a text half."""
    return type(model).__module__ == __name__


def _place(whole: _Class) -> str | None:
    """What the whole class calls its language model, below `model`; None where it is built in another way."""
    tied = getattr(whole, "_tied_weights_keys", None)
    match = re.fullmatch(r"model\.(\w+)\.embed_tokens\.weight", str((tied or {}).get("lm_head.weight")))
    return match and match[1]


@cache
def _registered(config_class: _Class, whole: _Class, text_class: _Class) -> _Class:
    """A config class of its own for a half, which the automatic classes and the loader know."""
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping

    half = type(f"{config_class.__name__}TextHalf", (text_class,), {"__module__": __name__})
    model = _model_class(AutoModelForCausalLM._model_mapping[text_class], half, whole)
    AutoModelForCausalLM.register(half, model)
    register_checkpoint_conversion_mapping(model.__name__, _renamings(config_class, whole), overwrite=True)
    return half


def _model_class(lm: _Class, half: _Class, whole: _Class) -> _Class:
    """The causal LM `lm` with its body where `whole` has it."""
    from torch import nn

    place = _place(whole)
    assert place is not None

    class Beside(nn.Module):
        """Where the whole model has its language model, beside its towers. It answers for it."""

        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.add_module(place, body)

        def forward(self, *args: object, **kwargs: object) -> object:
            return self._modules[place](*args, **kwargs)

        def __getattr__(self, name: str) -> _Class:
            body = self.__dict__.get("_modules", {}).get(place)
            if body is None:
                raise AttributeError(name)
            return body if name == place else getattr(body, name)

    class TextHalf(lm):
        config_class = half
        _tied_weights_keys = whole._tied_weights_keys
        _keys_to_ignore_on_load_unexpected = (rf"^(?!model\.{place}\.|lm_head\.)",)

        def post_init(self) -> None:
            self.model: nn.Module = Beside(self.model)
            super().post_init()

        def set_input_embeddings(self, value: nn.Module) -> None:
            self.get_decoder().set_input_embeddings(value)

    name = whole.__name__.removesuffix("ForConditionalGeneration")
    TextHalf.__name__ = TextHalf.__qualname__ = f"{name}TextHalfForCausalLM"
    return TextHalf


def _renamings(config_class: _Class, whole: _Class) -> list[_Class]:
    """How transformers renames a checkpoint's tensors for the whole class, but for what its parts do by themselves."""
    from transformers import AutoModel
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    kind = config_class.model_type
    by_name = get_checkpoint_conversion_mapping(whole.__name__)
    base = get_checkpoint_conversion_mapping(AutoModel._model_mapping[config_class].__name__)
    if by_name is not None:
        base = base or get_checkpoint_conversion_mapping(kind)
    for each in base or ():
        each.scope_prefix, each.base_model_prefix = "", whole.base_model_prefix
    return [*(by_name or get_checkpoint_conversion_mapping(kind) or ()), *(base or ())]
