"""The merged model as a GGUF file: what llama.cpp's converter does, by the tables that a GGUF file is read with.

What: `models/gguf` says which tensor of a file is which parameter and how one becomes the other; here that is inverted.
The file is read back: a config that comes back otherwise is refused.
Source: llama.cpp's converter (conversion/) for what each architecture states; the gguf package for names and formats.
Cost: one tensor in fp32 at a time, and its encoding; K-quants by llama.cpp's own quantiser, from a file in F16.
"""

import copy
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape, quantize
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from halfbyte.errors import ExportError
from halfbyte.export.weights import Item, MergedModel
from halfbyte.models.gguf.architectures import NAMES, config_of, llama3_factors
from halfbyte.models.gguf.header import read_header
from halfbyte.models.gguf.layouts import transform_of
from halfbyte.models.gguf.reader import GgufError
from halfbyte.types import Config, Document

# transformers' model type -> the file's architecture.
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "phi3": "phi3", "gpt2": "gpt2", "bloom": "bloom", "granite": "granite",
    "smollm3": "smollm3",
}  # fmt: skip
READ_WHOLE = frozenset({"mistral", "phi3"})  # llama.cpp's layers of these look at all tokens, whatever their window
FTYPES = {kind.name.partition("_")[2]: kind.value for kind in gguf.LlamaFileType}
_KEYS = (
    "context_length", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon",
)  # fmt: skip
_MORE = {
    "gemma2": "attention.sliding_window attn_logit_softcapping final_logit_softcapping",
    "gemma3": "attention.sliding_window final_logit_softcapping",
    "phi3": "attention.sliding_window",
    "granite": "attention.scale embedding_scale residual_scale logit_scale",
}
# Always in fp32, as in llama.cpp's files.
_FP32 = ("position_embd.weight", "token_types.weight")
# The fields of a config that change what is computed; each must read back as it was.
_COMPUTES = frozenset(
    (
        "hidden_size", "n_embd", "intermediate_size", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head",
        "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "layer_norm_epsilon", "rope_parameters",
        "hidden_act", "hidden_activation", "activation_function", "attention_bias", "mlp_bias", "use_qk_norm",
        "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "attention_multiplier",
        "embedding_multiplier", "residual_multiplier", "logits_scaling", "layer_types", "no_rope_layers",
        "apply_residual_connection_post_layernorm", "scale_attn_weights", "scale_attn_by_inverse_layer_idx",
        "reorder_and_upcast_attn", "tie_word_embeddings", "use_bidirectional_attention",
    )
)  # fmt: skip


@dataclass(frozen=True)
class FileMetadata:
    """The metadata of a file to be, below its architecture's name; read like that of an existing one (`GgufReader`)."""

    architecture: str
    values: Document

    def number(self, key: str) -> int:
        return int(self.values.get(key, 0))


def architecture_of(config: Config) -> str:
    """The file's architecture for a model. Raises ExportError: none that is written here."""
    if (name := ARCHITECTURES.get(config.model_type)) is None:
        raise ExportError(
            f"{config.model_type} is not written as GGUF here; these are: {', '.join(ARCHITECTURES)}.",
            fix="halfbyte export RUN --gguf F16, by llama.cpp's own converter where it is installed",
        )
    return name


def describe(config: Config) -> tuple[FileMetadata, dict[str, np.ndarray]]:
    """Metadata and tables of rotary factors for a model's config. Raises ExportError: the file has no place for
    something that the model computes with."""
    architecture = architecture_of(config)
    values: Document = {"block_count": config.num_hidden_layers, "vocab_size": config.vocab_size}
    for key in [*_KEYS, *_MORE.get(architecture, "").split()]:
        value = next((v for n in NAMES[key].split() if (v := getattr(config, n, None)) is not None), None)
        if value is not None:
            values[key] = value
    hidden, heads = config.hidden_size, config.num_attention_heads
    values.setdefault("feed_forward_length", 4 * hidden)
    if architecture == "bloom":
        values |= {"context_length": getattr(config, "seq_length", None) or 2048, "attention.head_count_kv": heads}
    if architecture == "gpt2":
        values.pop("attention.head_count_kv", None)
        values["context_length"] = config.n_positions
    if architecture in ("gpt2", "bloom"):
        return FileMetadata(architecture, values), {}
    size = getattr(config, "head_dim", None) or hidden // heads
    values |= {"attention.key_length": size, "attention.value_length": size}
    if architecture == "granite":
        values |= {"attention.scale": float(config.attention_multiplier)}
    _check_pattern(config, architecture, size)
    tables = _rope(config, architecture, values, size)
    return FileMetadata(architecture, values), tables


def _check_pattern(config: Config, architecture: str, size: int) -> None:
    """What llama.cpp takes for granted of an architecture."""
    every = {"gemma2": 2, "gemma3": 6}.get(architecture)
    if every is None:
        return
    kinds = ["full_attention" if (n + 1) % every == 0 else "sliding_attention" for n in range(config.num_hidden_layers)]
    if list(config.layer_types) != kinds:
        raise ExportError(
            f"its layer_types are not those of {architecture} (every {every}th sees everything), and GGUF has no place "
            "for others."
        )
    wide = config.num_hidden_layers == {"gemma2": 46, "gemma3": 62}[architecture]
    scale = config.hidden_size // config.num_attention_heads if wide else size
    if config.query_pre_attn_scalar != scale:
        raise ExportError(
            f"its query_pre_attn_scalar is {config.query_pre_attn_scalar}; llama.cpp computes {architecture} of this "
            f"size with {scale}."
        )


def _rope(config: Config, architecture: str, values: Document, size: int) -> dict[str, np.ndarray]:
    """The keys of rotary positions; returns tables of factors."""
    params: Document = dict(config.rope_parameters or {})
    if "full_attention" in params:  # one for each kind of layer
        local, params = params["sliding_attention"], dict(params["full_attention"])
        if local["rope_theta"] != {"gemma2": params["rope_theta"], "gemma3": 10000.0}[architecture]:
            raise ExportError(f"its sliding layers turn by {local['rope_theta']}, for which GGUF has no place.")
    theta, kind = float(params.get("rope_theta", 10000.0)), params.get("rope_type", "default")
    dims = int(size * params.get("partial_rotary_factor", 1.0))
    values |= {"rope.freq_base": theta}
    if architecture not in ("gemma2", "gemma3"):
        values["rope.dimension_count"] = dims
    if kind == "default":
        return {}
    if kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(params["factor"])}
        return {}
    if kind == "llama3":
        return {"rope_freqs.weight": llama3_factors(params, theta, dims).astype(np.float32)}
    if kind == "yarn":
        original = params.get("original_max_position_embeddings") or config.max_position_embeddings
        values |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(params["factor"])}
        values["rope.scaling.original_context_length"] = int(original)
        return {}
    if kind == "longrope":
        original = params.get("original_max_position_embeddings") or config.original_max_position_embeddings
        values["rope.scaling.original_context_length"] = int(original)
        scale = params.get("factor") or config.max_position_embeddings / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        values["rope.scaling.attn_factor"] = float(params.get("attention_factor") or factor)
        return {f"rope_factors_{s}.weight": np.array(params[f"{s}_factor"], np.float32) for s in ("long", "short")}
    raise ExportError(f"its rotary positions are scaled by {kind!r}; written as GGUF: linear, yarn, llama3, longrope.")


def names_of(config: Config, items: list[Item], metadata: FileMetadata) -> dict[str, str]:
    """The tensor of the file for each of a checkpoint. Raises ExportError: a tensor has no place in the file."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[metadata.architecture], config.num_hidden_layers)
    names = {}
    for item in items:
        candidates = [item.name, item.parameter, item.parameter.partition(".")[2]]
        mapped = [table.get_name(name, try_suffixes=(".weight", ".bias")) for name in candidates]
        if (name := next((each for each in mapped if each), None)) is None:
            raise ExportError(f"{item.name} has no place in a GGUF file of {metadata.architecture}.")
        names[item.name] = name
    return names


def write(
    merged: MergedModel, path: Path, kind: str, add_tokenizer: Callable[[gguf.GGUFWriter], None], *,
    weights: bool = True,
) -> None:  # fmt: skip
    """Write one file in a format of `inputs.OWN_FORMATS`. `add_tokenizer`: puts `tokenizer.*` and the name into a
    writer. `weights`: False leaves their place empty, and no weight is read. Raises ExportError: the architecture, or
    something that it computes with, has no place in the file."""
    config = copy.deepcopy(merged.config.get_text_config())
    config.tie_word_embeddings = config.tie_word_embeddings and not merged.untied
    metadata, tables = describe(config)
    writer = gguf.GGUFWriter(path, metadata.architecture)
    writer.add_type("model")
    writer.add_file_type(FTYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in metadata.values.items():
        kind_of = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(f"{metadata.architecture}.{key}", value, kind_of)
    add_tokenizer(writer)
    items = [item for item in merged.items if item.parameter in set(merged.plain.state_dict())]
    names = names_of(config, items, metadata)
    head = next((name for name in names.values() if name == "output.weight"), "token_embd.weight")
    plans = {names[item.name]: (item, _type_of(names[item.name], item, kind, head)) for item in items}
    for name, table in tables.items():
        _announce(writer, name, table.shape, "F32")
    for name, (item, tensor_kind) in plans.items():
        turned = transform_of(metadata.architecture, name).transposed and len(item.source.shape) > 1
        _announce(writer, name, item.source.shape[::-1] if turned else item.source.shape, tensor_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for table in tables.values():
        writer.write_tensor_data(table)
    if weights:
        with merged:
            for name, (item, tensor_kind) in plans.items():
                values = transform_of(metadata.architecture, name).inverse(merged.value(item).numpy(), metadata, name)
                writer.write_tensor_data(encode(values, tensor_kind))
    writer.close()
    if not weights:
        unit = writer.data_alignment
        room = unit + sum(writer.ggml_pad(info.nbytes, unit) for info in writer.tensors[0].values())
        os.truncate(path, path.stat().st_size + room)
    check(path, config)


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """fp32 values in a format."""
    if kind == "F32":
        return values.astype(np.float32)
    if kind == "F16" and np.abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise ExportError(f"a weight is {np.abs(values).max():.3g}, which F16 cannot hold.", fix="--gguf BF16")
    return quantize(values, gguf.GGMLQuantizationType[kind])


def _type_of(name: str, item: Item, kind: str, head: str) -> str:
    """The format of a tensor. The head, tied or not, is not rounded to 4 or 5 bits, as in llama.cpp's own files."""
    if len(item.source.shape) < 2 or name in _FP32 or name.endswith("_norm.weight"):
        return "F32"
    rows = item.source.shape[-1]
    if kind not in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        return kind
    return "F16" if rows % 32 else "Q8_0" if name == head else kind


def _announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: str) -> None:
    ggml_kind = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[ggml_kind]
    total = math.prod(shape) // block * nbytes
    if kind in ("F32", "F16"):
        writer.add_tensor_info(name, shape, np.dtype(np.float32 if kind == "F32" else np.float16), total)
    else:
        byte_shape = quant_shape_to_byte_shape(shape, ggml_kind)
        writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), total, raw_dtype=ggml_kind)


def check(path: Path, config: Config) -> None:
    """The file must read back as the model that was written. Raises ExportError: names what came back otherwise."""
    try:
        read = config_of(read_header(path))
    except GgufError as refusal:
        raise ExportError(f"{path.name} does not read back: {refusal}") from refusal
    differ = [f"{k}: {a!r}, read back {b!r}" for k, a, b in _differences(config, read)]
    if differ:
        raise ExportError(f"GGUF has no place for what the model computes with: {'; '.join(differ[:3])}.")


def _differences(config: Config, read: Config) -> Iterator[tuple[str, object, object]]:
    written, again = config.to_dict(), read.to_dict()
    for key in sorted(set(written) & set(again) & _COMPUTES):
        a, b = written[key], again[key]
        same = a == b or (isinstance(a, float) and isinstance(b, (float, int)) and math.isclose(a, b, rel_tol=1e-6))
        if key == "rope_parameters":
            same = _plain_rope(a) == _plain_rope(b) and _turn_alike(config, read)
        if not same and not (not a and not b):
            yield key, a, b


def _turn_alike(config: Config, read: Config) -> bool:
    """Whether scaled rotary positions are turned by the same frequencies, of short and of long texts, and cos and sin
    multiplied by the same factor; of two configs whose types of scaling are alike."""
    params: Document = config.rope_parameters or {}
    kinds: list[str | None] = [kind for kind, each in params.items() if isinstance(each, dict)]
    for kind in kinds or [None]:
        function = ROPE_INIT_FUNCTIONS.get((params if kind is None else params[kind]).get("rope_type"))
        for length in (1, 10**9) if function is not None else ():
            (a, by), (b, other) = (function(each, "cpu", length, layer_type=kind) for each in (config, read))
            if not (np.allclose(a, b, rtol=1e-4, atol=0) and math.isclose(by, other, rel_tol=1e-4)):
                return False
    return True


def _plain_rope(params: Document) -> object:
    if isinstance(params, dict) and any(isinstance(v, dict) for v in params.values()):
        return {key: _plain_rope(value) for key, value in params.items()}
    keys = ("rope_type", "rope_theta", "partial_rotary_factor")
    values = {key: params[key] for key in keys if params and params.get(key) not in (None, 1.0)}
    return {key: value if isinstance(value, str) else round(float(value), 4) for key, value in values.items()}
