"""A checkpoint's config.json as transformers reads it, refused with a fix where no causal LM can be opened from it."""

from pathlib import Path
from typing import Any

from halfbyte.errors import BaseModelError, first_line
from halfbyte.models import structure, text_half
from halfbyte.recipe.task import CAUSAL_LM
from halfbyte.system import limits
from halfbyte.types import Config


def open_config(folder: Path, *, trust_remote_code: bool = False) -> Config:
    """The checkpoint's config as transformers reads it; of one with towers that of its text half. Raises
    BaseModelError: the architecture is unknown, is no causal LM and has none, or comes as code that is not trusted."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        limits.read_config(folder / "config.json")
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{folder / 'config.json'} cannot be used: {first_line(error)}.") from error
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any kind: a config class checks its values in its own way
        if "trust_remote_code" in str(error):
            raise BaseModelError(
                f"{folder} brings Python code of its own (`auto_map` in config.json), which is not run unasked.",
                fix="read that code; if you trust it, set `trust_remote_code: true` in the recipe",
            ) from error
        raise BaseModelError(
            f"{folder / 'config.json'} is not a config that transformers knows: {first_line(error)}"
        ) from error
    own_code = trust_remote_code and hasattr(config, "auto_map")
    config = config if own_code else text_half.half_of(config) or config
    if type(config) not in AutoModelForCausalLM._model_mapping and not own_code and not structure.is_encoder(config):
        raise BaseModelError(
            f"{folder}: model type {config.model_type!r} is not a causal language model, and has none that is opened "
            "alone.",
            fix="choose a model with a causal-LM head, such as a Llama, Qwen, Gemma, Mistral, GPT-2 or BLOOM",
        )
    # gpt-oss's experts are decoded when the store is built (`store/mxfp4.py`)
    if getattr(config, "quantization_config", None) is not None and _method(config.quantization_config) == "mxfp4":
        del config.quantization_config
    return config


def check_task(config: Config, task: str) -> None:
    """Raise a BaseModelError where an encoder is to write."""
    if task == CAUSAL_LM and structure.is_encoder(config):
        what = f"a {config.model_type} is an encoder: it reads texts and writes none"
        raise BaseModelError(f"{what}.", fix="task: classify, regress, tag or embed")


def _method(quantised: Any) -> str:
    values = quantised if isinstance(quantised, dict) else quantised.to_dict()
    return str(getattr(values.get("quant_method"), "value", values.get("quant_method")))


def is_quantised_already(config: Config, folder: Path) -> bool:
    """Whether the checkpoint was quantised before it came here. Raises BaseModelError: in a way that no base can be
    held in."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return False
    method = _method(quantised)
    if method == "bitsandbytes":
        return True
    raise BaseModelError(
        f"{folder} is already quantised with {method!r}; LoRA here is trained on a base that bitsandbytes holds.",
        fix="use the unquantised checkpoint of the same model",
    )
