"""Small GGUF files for tests, written with the gguf package's own writer, quantiser and name map, and the model that
each of them stands for. What llama.cpp's converter does to rows and values is written down here once more, by hand."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "ĠĠ", "he"]
Array = np.ndarray[Any, np.dtype[Any]]
There = Callable[[Array, Any], Array]
"""(a parameter, the config) -> the tensor of the file."""


def add_tokenizer(
    writer: gguf.GGUFWriter,
    rule: str = "smollm",
    size: int = len(TOKENS),
    pad: str = TOKENS[0],
    add_bos: bool | None = False,
) -> None:
    tokens = [pad, *TOKENS[1:]] + [f"[PAD{n}]" for n in range(len(TOKENS), size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_chat_template(TEMPLATE)


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A value of the metadata, by its Python type."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def model_of(model_type: str, **values: Any) -> Any:
    """A random model whose matrices spread over a quantiser's levels, and whose vectors are not all alike."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values)).float().eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name and "embed_scale" not in name and "A_log" not in name:
                value += torch.randn_like(value) * (0.2 if value.ndim > 1 else 0.1)
    return model


def _neighbours(heads: str) -> There:
    def there(value: Array, config: Any) -> Array:
        count = getattr(config, heads)
        shape = (count, 2, len(value) // count // 2, *value.shape[1:])
        return value.reshape(shape).swapaxes(1, 2).reshape(value.shape)

    return there


def _heads_apart(value: Array, config: Any) -> Array:
    each = value.reshape(config.num_attention_heads, 3, -1, *value.shape[1:])
    return np.concatenate([each[:, part].reshape(-1, *value.shape[1:]) for part in range(3)])


def _groups_apart(value: Array, config: Any) -> Array:
    groups, heads = config.num_kv_heads if config.new_decoder_architecture else 1, config.num_attention_heads
    each = value.reshape(groups, heads // groups + 2, -1, value.shape[1])
    return np.concatenate([part.reshape(-1, value.shape[1]) for part in (each[:, :-2], each[:, -2], each[:, -1])])


def _values_in_turns(value: Array, config: Any) -> Array:
    keys = config.linear_num_key_heads
    return (
        value.reshape(keys, config.linear_num_value_heads // keys, -1, *value.shape[1:])
        .swapaxes(0, 1)
        .reshape(value.shape)
    )


def _values_after_keys(value: Array, config: Any) -> Array:
    first = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return np.concatenate([value[:first], _values_in_turns(value[first:], config)])


def _transposed(value: Array, config: Any) -> Array:
    return np.ascontiguousarray(value.T) if value.ndim == 2 else value


# Architecture -> tensor -> what a converter makes of the parameter: an order of its rows, or its transpose.
_LLAMA = {"blk.*.attn_q.*": _neighbours("num_attention_heads"), "blk.*.attn_k.*": _neighbours("num_key_value_heads")}
_GPT2 = dict.fromkeys(("*attn_qkv.weight", "*attn_output.weight", "*ffn_up.weight", "*ffn_down.weight"), _transposed)
_QWEN35: dict[str, There] = {
    **dict.fromkeys(("*ssm_a", "*ssm_dt.bias", "*ssm_alpha.weight", "*ssm_beta.weight"), _values_in_turns),
    "*attn_gate.weight": _values_in_turns,
    "*attn_qkv.weight": _values_after_keys,
    "*ssm_conv1d.weight": _values_after_keys,
    "*ssm_out.weight": lambda value, config: np.ascontiguousarray(_values_in_turns(value.T, config).T),
}
ORDERS: dict[str, dict[str, There]] = {
    **dict.fromkeys(("llama", "granite", "granitemoe", "olmo", "smollm3", "arcee"), _LLAMA),
    "bloom": {"*attn_qkv.*": _heads_apart},
    "gptneox": {"*attn_qkv.*": _heads_apart},
    **dict.fromkeys(("qwen35", "qwen35moe"), _QWEN35),
    "falcon": {"*attn_qkv.weight": _groups_apart},
    "gpt2": _GPT2,
}
PLUS_ONE = ("gemma", "gemma2", "gemma3", "nemotron", "qwen35", "qwen35moe")


def stored(value: Array, kind: Type) -> tuple[Array, Array]:
    """(the bytes in the file, the values that the gguf package reads from them); vectors stay in float32."""
    block = gguf.GGML_QUANT_SIZES[kind][0]
    if value.ndim < 2 or value.shape[-1] % block or kind == Type.F32:
        return value.astype(np.float32), value.astype(np.float32)
    data = gguf.quants.quantize(value, kind)
    return data, gguf.quants.dequantize(data, kind).reshape(value.shape)


def write(
    path: Path,
    architecture: str,
    model: Any,
    said: Mapping[str, Any],
    kind: Type = Type.Q8_0,
    rule: str = "smollm",
    tables: Mapping[str, list[float]] | None = None,
    rounded: bool = True,
) -> Any:
    """Write `model` as a file of this architecture.

    Args:
        said: the metadata below the architecture's name.

    Returns:
        The model with the values that the gguf package itself dequantises, matrices rounded to bf16 if `rounded`.
    """
    config, reference = model.config, copy.deepcopy(model)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in said.items():
        add(writer, f"{architecture}.{key}", value)
    add_tokenizer(writer, rule, config.vocab_size)
    state, into = model.state_dict(), reference.state_dict()
    names = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture], config.num_hidden_layers
    )
    with torch.no_grad():
        for name, parameter in state.items():
            if name in model.all_tied_weights_keys:
                continue
            parts = _parts(architecture, name, parameter.numpy(), config)
            for part, value, back in parts:
                mapped = names.get_name(part, try_suffixes=(".weight", ".bias"))
                mapped = mapped or names.get_name(
                    part.removeprefix(f"{model.base_model_prefix}."), (".weight", ".bias")
                )
                assert mapped is not None, part
                there, undone = _changed(architecture, mapped, value, config)
                data, read = stored(there, kind)
                quantised = data.dtype != np.float32
                writer.add_tensor(mapped, data, raw_dtype=kind if quantised else None)
                values = torch.from_numpy(np.ascontiguousarray(undone(read)))
                back(into[name], values.bfloat16().float() if quantised and rounded else values)
    for name, values in (tables or {}).items():
        writer.add_tensor(name, np.array(values, np.float32))
    close(writer)
    return reference


def _put(into: torch.Tensor, values: torch.Tensor) -> None:
    into.copy_(values.reshape(into.shape))


Back = Callable[[torch.Tensor, torch.Tensor], None]


def _parts(architecture: str, name: str, value: Array, config: Any) -> list[tuple[str, Array, Back]]:
    """(a name that the name map knows, the tensor, how its values get back into the parameter)."""
    if "experts.gate_up_proj" in name or name.endswith("moe.input_linear.weight"):
        return _gate_and_up(architecture, name, value)
    if architecture == "gpt-oss" and name.endswith("experts.down_proj"):
        turned = np.ascontiguousarray(value.swapaxes(1, 2))
        return [(f"{name}.weight", turned, lambda into, values: into.copy_(values.swapaxes(1, 2)))]
    if name.endswith("kv_b_proj.weight"):
        keys = config.qk_nope_head_dim
        heads = value.reshape(config.num_attention_heads, -1, value.shape[-1])
        view = lambda into: into.view(heads.shape)  # noqa: E731
        return [
            (name.replace("kv_b", "k_b"), np.ascontiguousarray(heads[:, :keys].swapaxes(1, 2)),
             lambda into, values: view(into)[:, :keys].copy_(values.swapaxes(1, 2))),
            (name.replace("kv_b", "v_b"), np.ascontiguousarray(heads[:, keys:]),
             lambda into, values: view(into)[:, keys:].copy_(values)),
        ]  # fmt: skip
    if name.endswith("experts.down_proj"):
        name = name.replace("block_sparse_moe.experts.down_proj", "block_sparse_moe.output_linear")
        return [(f"{name}.weight", value, _put)]
    if name.endswith("_bias"):  # no bias of a module
        name = re.sub("dt_bias$", "dt_proj.bias", name) if name.endswith("dt_bias") else re.sub("_bias$", ".bias", name)
    if name.endswith("sinks"):
        name += ".weight"
    name = name.replace("moe.router.weight", "moe.router.layer.weight")
    return [(name, value.squeeze() if value.ndim == 3 and 1 in value.shape else value, _put)]


def _gate_and_up(architecture: str, name: str, value: Array) -> list[tuple[str, Array, Back]]:
    bias, stem = name.endswith("_bias"), name[: name.rindex(".experts") + 8] if ".experts" in name else ""
    ending = "bias" if bias else "weight"
    if architecture == "gpt-oss":  # in turns, and (in, out)
        halves = [value[..., 0::2], value[..., 1::2]]
        halves = halves if bias else [half.swapaxes(1, 2) for half in halves]
        puts: list[Back] = [
            lambda into, v: into[..., 0::2].copy_(v if bias else v.swapaxes(1, 2)),
            lambda into, v: into[..., 1::2].copy_(v if bias else v.swapaxes(1, 2)),
        ]
    else:
        width = value.shape[1] // 2
        halves = [value[:, :width], value[:, width:]]
        puts = [lambda into, v: into[:, :width].copy_(v), lambda into, v: into[:, width:].copy_(v)]
    layer = re.search(r"\.(\d+)\.", name)
    assert layer is not None
    parts = (
        f"model.layers.{layer[1]}.mlp.experts.gate_proj.{ending}",
        f"model.layers.{layer[1]}.mlp.experts.up_proj.{ending}",
    )
    if stem.endswith("block_sparse_moe.experts"):
        parts = tuple(
            p.replace("mlp", "block_sparse_moe").replace("gate_proj", "w1").replace("up_proj", "w3") for p in parts
        )  # type: ignore[assignment]
    return [(part, np.ascontiguousarray(half), put) for part, half, put in zip(parts, halves, puts, strict=True)]


def _changed(architecture: str, name: str, value: Array, config: Any) -> tuple[Array, Callable[[Array], Array]]:
    """What the file has for a parameter, and what undoes it."""
    if architecture in PLUS_ONE and name.endswith("norm.weight") and "ssm_norm" not in name:
        return value + 1, lambda read: read - 1
    order = next((there for pattern, there in ORDERS.get(architecture, {}).items() if fnmatchcase(name, pattern)), None)
    log = name.endswith("ssm_a")
    if order is None:
        return (-np.exp(value), lambda read: np.log(-read)) if log else (value, lambda read: read)
    moved = order(np.arange(value.size).reshape(value.shape), config)

    def undone(read: Array) -> Array:
        flat = np.empty(value.size, np.float32)
        flat[moved.reshape(-1)] = read.reshape(-1)
        return (np.log(-flat) if log else flat).reshape(value.shape)

    return (-np.exp(order(value, config)) if log else order(value, config)), undone


def split(whole: Path, folder: Path, count: int) -> list[Path]:
    """The parts of a file, as llama-gguf-split makes them: the metadata in the first, the tensors in all."""
    reader, parts = gguf.GGUFReader(whole), []
    for number in range(count):
        part = folder / f"model-{number + 1:05}-of-{count:05}.gguf"
        writer = gguf.GGUFWriter(part, "llama")
        if number == 0:
            for key, field in reader.fields.items():
                if not key.startswith("GGUF.") and key != "general.architecture":
                    writer.add_key_value(
                        key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
                    )
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        close(writer)
        parts.append(part)
    return parts
