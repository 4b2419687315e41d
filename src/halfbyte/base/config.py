"""A checkpoint's config.json and tokenizer as transformers reads them, refused with a fix where no causal LM can be
opened from it, and no tokenizer be read, or it belongs to another model."""

from pathlib import Path
from typing import Any

from halfbyte.errors import BaseModelError, first_line
from halfbyte.models import structure, text_half
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.recipe.task import CAUSAL_LM
from halfbyte.system import limits
from halfbyte.types import Config, Model, Tokenizer


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


# File names, without their ending, that any of transformers' tokenizers is read from.
TOKENIZER_STEMS = frozenset({"tokenizer", "vocab", "spiece", "sentencepiece", "tekken"})
MOST_BYTES, MOST_TEMPLATE_BYTES = 100_000_000, 1_000_000
BESIDE = "put the model's tokenizer.json and tokenizer_config.json beside its config.json"


def open_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Tokenizer:
    """The checkpoint's tokenizer. Raises BaseModelError: none is there, or it knows no text."""
    from transformers import AutoTokenizer

    for file in checkpoint.path.glob("*"):
        most = MOST_TEMPLATE_BYTES if file.name.startswith("chat_template") else MOST_BYTES
        if (file.stem in TOKENIZER_STEMS or file.name.startswith("chat_template")) and file.stat().st_size > most:
            raise BaseModelError(f"{file} has {file.stat().st_size:,} bytes; at most {most:,} are read.", fix=BESIDE)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
    except BaseException as error:  # of any kind: the files are read by many classes, some in Rust, which panics
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        there = any(f.stem in TOKENIZER_STEMS for f in checkpoint.path.iterdir())
        why = first_line(error) if there else "it has no tokenizer.json"
        raise BaseModelError(f"no tokenizer could be read from {checkpoint.path}: {why}", fix=BESIDE) from error
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():  # made by transformers out of no file
        looked_for = {"tokenizer.json", *type(tokenizer).vocab_files_names.values()}
        raise BaseModelError(
            f"{checkpoint.path} has no tokenizer: what is there knows not one word; looked for "
            f"{', '.join(sorted(looked_for))}.",
            fix=BESIDE,
        )
    return tokenizer


def check_vocabulary(checkpoint: Checkpoint, tokenizer: Tokenizer, model: Model) -> None:
    """Refuse a tokenizer that knows more tokens than the embedding has rows (BaseModelError)."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise BaseModelError(
            f"{checkpoint.id}: the tokenizer knows {len(tokenizer)} tokens, the embedding has {rows} rows.",
            fix="use the tokenizer that belongs to this checkpoint",
        )
