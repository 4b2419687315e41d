"""`python -m halfbyte.models.sources.gguf_convert`: the child process that turns one GGUF file into safetensors.

Why a process of its own: its memory is given back when it ends and is not counted in a run's measured peak, the
caller never imports torch, and a kill for lack of memory becomes an error message instead of a lost session.
Cost: about 4 bytes per parameter at the peak, over what torch and transformers take (docs/log.md).
"""

import gc
import os
import sys
from pathlib import Path

from halfbyte.models.sources.gguf_header import GgufHeader, read_header
from halfbyte.types import Config, Model, Tokenizer

# The vocabularies whose text is cut at every single digit before GPT-2's own pattern (llama.cpp's llama-vocab.cpp).
# transformers falls back to GPT-2's pattern alone, which cuts "a  1" differently from what the model was trained on.
DIGIT_SPLIT = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
# Tensors that hold a table the config could describe; they are no weights, and the loader drops them.
ROPE_TABLES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
PROBE = "Hello  world, it's 12345 + 6.  7\n\n\tdef f(x):\n    return x  # é 日本\n"


class Refused(Exception):
    """The file is whole, but it cannot be turned into a faithful checkpoint."""


def say(stage: str) -> None:
    """One line for the process that waits."""
    os.write(1, f"{stage}\n".encode())


def convert(source: Path, target: Path) -> None:
    """Write the model in bf16, its config, tokenizer and chat template into the empty folder `target`.

    `source` should be alone in its folder: transformers prefers a tokenizer.json that lies beside it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    say("reading its header")
    header = read_header(source)
    _refuse_lost_rope(header)
    folder, name = str(source.parent), source.name
    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=name)
    except (ValueError, KeyError) as error:
        raise Refused(f"its architecture {header.architecture!r} is not supported by transformers: {error}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Refused(f"its architecture {header.architecture!r} is not a causal language model")

    say("making its tokenizer")
    # The config is handed on: whoever lacks it parses the whole header once more.
    tokenizer = _tokenizer(folder, name, header, config)
    say(f"dequantising {header.numel / 1e6:,.0f} M weights")
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        gguf_file=name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        output_loading_info=True,
    )
    # A weight that the file lacks is filled with random numbers and only logged.
    if missing := sorted(loading["missing_keys"]):
        raise Refused(f"{len(missing)} weights of the model are not in the file, such as {', '.join(missing[:3])}")
    _check_nothing_dropped(header, model)
    say("writing it")
    model.save_pretrained(target, max_shard_size="5GB")
    tokenizer.save_pretrained(target)
    say("checking its tokenizer")
    _check_tokenizer(target, tokenizer, header)


def _refuse_lost_rope(header: GgufHeader) -> None:
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    tables = [tensor.name for tensor in header.tensors if tensor.name in ROPE_TABLES]
    # gpt-oss is the one architecture whose scaling transformers reads from the file.
    if header.architecture != "gpt-oss" and (scaling != "none" or tables):
        what = tables[0] if tables else f"rope scaling of type {scaling!r}"
        raise Refused(
            f"it uses {what}, which transformers drops when it reads a GGUF: the model would compute other positions; "
            "use the model's safetensors checkpoint instead"
        )


def _check_nothing_dropped(header: GgufHeader, model: Model) -> None:
    """The loader skips tensors that it has no name for, silently; count them."""
    in_model = sum(parameter.numel() for parameter in model.parameters())
    # A head that repeats a tied embedding may be stored as well.
    head = sum(tensor.numel for tensor in header.tensors if tensor.name == "output.weight")
    if in_model not in (header.numel, header.numel - head):
        raise Refused(
            f"the file holds {header.numel:,} parameters and the model takes {in_model:,}: "
            f"this kind of {header.architecture} is not supported by transformers' GGUF loader"
        )


def _tokenizer(folder: str, name: str, header: GgufHeader, config: Config) -> Tokenizer:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, config=config)
    if header.metadata.get("tokenizer.ggml.pre") in DIGIT_SPLIT:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    context = header.metadata.get(f"{header.architecture}.context_length")
    if isinstance(context, int) and context > 0:
        tokenizer.model_max_length = context
    return tokenizer


def _check_tokenizer(target: Path, tokenizer: Tokenizer, header: GgufHeader) -> None:
    """What was written must read back as what the file says."""
    from transformers import AutoTokenizer

    again = AutoTokenizer.from_pretrained(str(target))
    for token, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        said = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        found = getattr(again, f"{token}_token_id")
        if said is not None and found != said:
            raise Refused(f"its {token} token is {said}, and the tokenizer read from it has {found}")
    if again.chat_template != header.metadata.get("tokenizer.chat_template"):
        raise Refused("its chat template was changed by the conversion")
    if again(PROBE)["input_ids"] != tokenizer(PROBE)["input_ids"]:
        raise Refused("its tokenizer reads back differently from how it was written")


if __name__ == "__main__":
    gc.disable()  # a third of the time goes into it, over a vocabulary's million small arrays, and it frees nothing
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except Refused as refusal:
        sys.exit(f"REFUSED {refusal}")
