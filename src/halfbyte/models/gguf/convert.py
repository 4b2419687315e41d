"""`python -m halfbyte.models.gguf.convert`: the child process that turns one GGUF model into safetensors.

Why a process of its own: its memory is given back when it ends and is not counted in a run's measured peak, the
caller never imports torch, and a kill for lack of memory becomes an error message instead of a lost session.
Cost: what torch and transformers take and some pieces of 16 MB, whatever the model's size (docs/log).
"""

import gc
import json
import math
import os
import sys
from pathlib import Path

from halfbyte.models.gguf import blocks
from halfbyte.models.gguf.architectures import config_of
from halfbyte.models.gguf.header import GgufHeader, read_header
from halfbyte.models.gguf.layouts import ParameterSource, parameter_sources
from halfbyte.models.gguf.reader import GgufError, GgufReader
from halfbyte.models.gguf.tokenizer import check_tokenizer, tokenizer_of
from halfbyte.types import Config, Document, Model

WEIGHTS = "model.safetensors"


def say(stage: str) -> None:
    """One line for the process that waits."""
    os.write(1, f"{stage}\n".encode())


def convert(source: Path, target: Path, *, in_blocks: bool = False) -> None:
    """Write the model in bf16, its config, tokenizer and chat template into the empty folder `target`; `in_blocks`:
    instead of the weights the manifest of them (`blocks.py`). `source` should be alone in its folder but for its own
    parts: transformers prefers a tokenizer.json beside it. Raises GgufError: the file does not hold what this
    architecture's class needs, or says what that has no place for."""
    say("reading its header")
    header = read_header(source)
    config = config_of(header)
    model = _empty(config)
    shapes = shapes_of(model)
    sources = parameter_sources(header, config.model_type, shapes, model.base_model_prefix, config.num_hidden_layers)
    say("making its tokenizer")
    tokenizer = tokenizer_of(str(source.parent), source.name, header, config)
    if in_blocks:
        say("hashing it")
        blocks.write(target, header, blocks.describe(header, shapes, sources))
    else:
        say(f"dequantising {header.numel / 1e6:,.0f} M weights")
        _write(target / WEIGHTS, header, shapes, sources)
    say("writing it")
    config.architectures, config.dtype = [type(model).__name__], "bfloat16"
    config.save_pretrained(target)
    if model.can_generate():
        model.generation_config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    say("checking its tokenizer")
    check_tokenizer(target, tokenizer, header)


def _empty(config: Config) -> Model:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (ValueError, RuntimeError, AssertionError, ArithmeticError, TypeError) as error:
        raise GgufError(f"transformers cannot make a {config.model_type} of what it says: {error}") from error


def shapes_of(model: Model) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a checkpoint of this model, by the checkpoint's own names."""
    from transformers.core_model_loading import revert_weight_conversion

    untied = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return {name: tuple(value.shape) for name, value in revert_weight_conversion(model, untied).items()}


def _write(
    path: Path, header: GgufHeader, shapes: dict[str, tuple[int, ...]], sources: dict[str, ParameterSource]
) -> None:
    """One safetensors file, its tensors one after the other and each in pieces. What a file has in float32 stays so
    where bf16 would change a value; the rest becomes bf16."""
    import torch

    torch.set_num_threads(1)  # pieces are small: threads would wait for each other, long on a busy machine
    entries: Document = {"__metadata__": {"format": "pt"}}
    file, end = GgufReader(header), 0
    kinds = {name: "BF16" if _fits_bf16(sources[name], file) else "F32" for name in shapes}
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16}
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtypes[kinds[name]].itemsize
        entries[name] = {"dtype": kinds[name], "shape": list(shape), "data_offsets": [start, end]}
    head = json.dumps(entries, separators=(",", ":")).encode()
    head = head.ljust(-(-len(head) // 8) * 8)
    with path.open("wb") as out:
        out.write(len(head).to_bytes(8, "little") + head)
        for name, shape in shapes.items():
            given = 0
            for piece in sources[name].pieces(file):
                values = torch.from_numpy(piece)
                if not bool(torch.isfinite(values).all()):
                    raise GgufError(f"its tensor {sources[name].name} holds values that are not finite")
                given += piece.size
                out.write(values.to(dtypes[kinds[name]]).view(torch.uint8).numpy().data)
            if given != math.prod(shape):
                raise GgufError(f"its {sources[name].name} gives {given:,} values, and {name} has {math.prod(shape):,}")


def _fits_bf16(parameter: ParameterSource, file: GgufReader) -> bool:
    """Whether a parameter is written in bf16: it was rounded further already, or nothing of it is lost."""
    import torch

    if file.tensors[parameter.name].type != "F32":
        return True
    pieces = map(torch.from_numpy, parameter.pieces(file))
    return all(torch.equal(piece, piece.bfloat16().float()) for piece in pieces)


if __name__ == "__main__":
    gc.disable()  # a third of the time goes into it, over a vocabulary's million small arrays, and it frees nothing
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]), in_blocks="--in-blocks" in sys.argv)
    except GgufError as refusal:
        sys.exit(f"REFUSED {refusal}")
