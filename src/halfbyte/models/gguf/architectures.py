"""What a GGUF file says of its model -> transformers' config, for the architectures whose layout is known.

transformers' own reading of these files has holes: rotary scaling, partial rotary, head sizes, widths of experts and
epsilons are left at the class's defaults for some architectures, and a Mixtral becomes a dense Llama. So every value
that a file states below its architecture's name has to find a place here; one that finds none is refused by name.
Source: llama.cpp's converter and graphs (conversion/, src/models/), and transformers' config classes.
"""

import dataclasses
import math
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from huggingface_hub.errors import StrictDataclassError

from halfbyte.errors import first_line
from halfbyte.models.gguf.header import GgufHeader
from halfbyte.models.gguf.reader import GgufError, GgufReader
from halfbyte.types import Config, ConfigFile, Document

# Key below the architecture's name -> what config classes call it.
NAMES: dict[str, str] = tomllib.loads(Path(__file__).with_name("names.toml").read_text(encoding="utf-8"))
# What says nothing about what is computed, or is compared with the rest in `_check_all_used`.
_NO_MATTER = frozenset(
    (
        "vocab_size", "context_length", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.attn_factor",
        "pooling_type", "rope.scaling.original_context_length", "attention.causal",
    )
)  # fmt: skip
_SOFTMAX, _SIGMOID = 1, 2


def config_of(header: GgufHeader) -> Config:
    """transformers' config for a file. Raises GgufError: the architecture is not known here, or the file says something
    that the config has no place for."""
    check_architecture(header)
    file = GgufReader(header)
    _check_numbers(file)
    try:
        return _config_of(file)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise GgufError(
            f"what it says of itself is no {header.architecture} of transformers: {first_line(error)}"
        ) from error


def check_architecture(header: GgufHeader) -> None:
    """Raises GgufError: none that is known here."""
    if header.architecture not in ARCHITECTURES:
        raise GgufError(
            f"its architecture {header.architecture!r} is not supported; allowed: {', '.join(sorted(ARCHITECTURES))}"
        )


def _check_numbers(file: GgufReader) -> None:
    for key in ("embedding_length", *NAMES):
        value = file.header.metadata.get(f"{file.header.architecture}.{key}", None if key == "embedding_length" else 0)
        if not all(isinstance(n, (int, float)) for n in (value if isinstance(value, list) and value else [value])):
            raise GgufError(f"its {file.header.architecture}.{key} is {value!r}, not a number")


def _config_of(file: GgufReader) -> Config:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stated = ARCHITECTURES[file.header.architecture](file)
    kind = stated.pop("model_type")
    names = {field.name for field in dataclasses.fields(CONFIG_MAPPING[kind])} | set(CONFIG_MAPPING[kind].attribute_map)
    values: Document = {"num_hidden_layers": file.layers, **_common(file, names)}
    values |= _biases(file, names) | _ids(file.header)
    if "rope_parameters" in names and "rope_parameters" not in stated:
        values["rope_parameters"] = rope(file, AutoConfig.for_model(kind).rope_parameters or {}, values)
    values |= stated
    for name, value in values.items():
        if isinstance(value, list) and name not in stated:
            raise GgufError(f"its layers differ in {name}, which transformers' class has once for all: {value[:8]}")
    _check_all_used(file, kind)
    return AutoConfig.for_model(kind, **values)


def _common(file: GgufReader, names: set[str]) -> Document:
    """What most classes have under one name or another."""
    values: Document = {}
    for key in file.stated():
        takers = [name for name in NAMES.get(key, "").split() if name in names]
        if takers:
            value = file.get(key)
            values |= dict.fromkeys(takers, value)
    if file.has("token_embd.weight"):
        values["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    values["tie_word_embeddings"] = not file.has("output.weight")
    heads = values.get("num_key_value_heads") or values.get("num_attention_heads")
    if "head_dim" in names and "head_dim" not in values and isinstance(heads, int) and file.has("blk.0.attn_k.weight"):
        values["head_dim"] = file.tensors["blk.0.attn_k.weight"].shape[0] // max(1, heads)
    return values


def _biases(file: GgufReader, names: set[str]) -> Document:
    """Which modules have a bias, by the tensors that are there."""
    flags = {
        **dict.fromkeys(("attention_bias", "qkv_bias", "use_qkv_bias"), file.has("blk.0.attn_q.bias")),
        **dict.fromkeys(("qk_layernorm", "use_qk_norm"), file.has("blk.0.attn_q_norm.weight")),
        "mlp_bias": file.has("blk.0.ffn_up.bias"),
    }
    return {name: value for name, value in flags.items() if name in names}


def _ids(header: GgufHeader) -> Document:
    ids = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{name}_token_id": header.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in ids.items()}


def _check_all_used(file: GgufReader, kind: str) -> None:
    if file.header.metadata.get(f"{file.header.architecture}.attention.causal") is False:
        raise GgufError("its attention looks both ways (attention.causal is false): it is no causal language model")
    heads, width = file.get("attention.head_count", 0), file.get("embedding_length", 0)
    size = file.get("attention.key_length") if "attention.key_length" in file.used else width // (heads or 1)
    # What a class has no field for as it can be nothing else.
    implied = {
        "attention.head_count_kv": heads, "feed_forward_length": 4 * width, "attention.key_length": size,
        "attention.value_length": size, "rope.freq_base_swa": file.get("rope.freq_base"),
        "expert_gating_func": _SOFTMAX, "expert_weights_scale": 1.0,
    }  # fmt: skip
    # Zero is how a file says that it has no such thing.
    left = [
        key
        for key in file.stated()
        if key not in file.used | _NO_MATTER and file.get(key) not in (0, False, "none", implied.get(key))
    ]
    if left:
        what = ", ".join(f"{key} = {file.get(key)!r}" for key in left[:3])
        raise GgufError(
            f"it says {what}, for which transformers' {kind} has no place: the model would compute otherwise"
        )


# --- architectures ---------------------------------------------------------------------------------------------------


def _plain(model_type: str, **more: object) -> Callable[[GgufReader], Document]:
    return lambda file: {"model_type": model_type, **more}


def _gating(file: GgufReader, expected: int) -> None:
    if file.get("expert_gating_func", expected) != expected:
        raise GgufError(f"its expert_gating_func is {file.get('expert_gating_func')}, and this class has {expected}")


def _llama(file: GgufReader) -> Document:
    _gating(file, _SOFTMAX)
    return {"model_type": "mixtral" if file.get("expert_count", 0) else "llama"}


def _qwen2moe(file: GgufReader) -> Document:
    widths = {"moe_intermediate_size": "ffn_gate_exps", "shared_expert_intermediate_size": "ffn_gate_shexp"}
    stacks = {name: file.tensors.get(f"blk.0.{leaf}.weight") for name, leaf in widths.items()}
    # Older files state neither width.
    sizes = {name: tensor.shape[-2] for name, tensor in stacks.items() if tensor is not None and len(tensor.shape) > 1}
    return {"model_type": "qwen2_moe", "norm_topk_prob": False, **sizes}


def _qwen3moe(file: GgufReader) -> Document:
    return _qwen2moe(file) | {
        "model_type": "qwen3_moe", "norm_topk_prob": True, "head_dim": file.get("attention.key_length"),
    }  # fmt: skip


def _falcon(file: GgufReader) -> Document:
    groups = file.get("attention.head_count_kv", 1)
    if groups == file.get("attention.head_count"):
        raise GgufError("each of its heads has its own keys: Falcon's oldest models, with ALiBi, are not supported")
    norms = {"num_ln_in_parallel_attn": 2 if file.has("blk.0.attn_norm_2.weight") else 1}
    new = groups > 1
    return {
        "model_type": "falcon", "new_decoder_architecture": new, "multi_query": not new, "parallel_attn": True,
        "alibi": False, "bias": False, **(norms if new else {}),
    }  # fmt: skip


def _phi3(file: GgufReader) -> Document:
    window, original = file.get("attention.sliding_window"), file.get("rope.scaling.original_context_length")
    more = {"original_max_position_embeddings": original} if original else {}
    return {"model_type": "phi3", "sliding_window": window or None, **more}


def _gemma_scale(file: GgufReader, layers_of_27b: int) -> Document:
    """What queries are divided by: the head's size, but for the 27B models (as in llama.cpp's graphs)."""
    wide = file.layers == layers_of_27b
    size = (
        file.get("embedding_length") // file.get("attention.head_count") if wide else file.get("attention.key_length")
    )
    return {"query_pre_attn_scalar": size or 256}


def _gemma3(file: GgufReader) -> Document:
    scaled = scaling(file, {}, 0, 0)
    whole = {"rope_type": "default", "rope_theta": file.get("rope.freq_base", 1000000.0), **scaled}
    local = {"rope_type": "default", "rope_theta": file.get("rope.freq_base_swa", 10000.0)}
    ropes = {"full_attention": whole, "sliding_attention": local}
    file.get("rope.dimension_count")
    return {"model_type": "gemma3_text", "rope_parameters": ropes, **_gemma_scale(file, 62)}


def _gemma4(file: GgufReader) -> Document:
    """Two kinds of layers, each with its own heads, rotary base and share of the head that turns."""
    pattern = file.every_layer("attention.sliding_window_pattern")
    heads, widths = file.every_layer("attention.head_count_kv"), file.every_layer("feed_forward_length")
    local = pattern.index(True) if True in pattern else 0
    whole = pattern.index(False) if False in pattern else 0
    table = file.table("rope_freqs.weight")
    for same in ("rope.dimension_count", "rope.dimension_count_swa", "attention.value_length_swa"):
        file.get(same)
    if file.get("expert_count", 0):
        raise GgufError("its feed-forward layers are mixtures of experts, which are not supported in this architecture")
    if table is None:
        raise GgufError("it has no rope_freqs.weight, which tells how much of a head turns")
    share = float((table == 1).sum()) / table.size
    base, local_base = file.get("rope.freq_base", 1000000.0), file.get("rope.freq_base_swa", 10000.0)
    embedded = file.tensors.get("per_layer_token_embd.weight")
    return {
        "model_type": "gemma4_text", "layer_types": ["sliding_attention" if on else "full_attention" for on in pattern],
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": share, "rope_theta": base},
            "sliding_attention": {"rope_type": "default", "rope_theta": local_base},
        },
        "head_dim": file.get("attention.key_length_swa"), "global_head_dim": file.get("attention.key_length"),
        "num_key_value_heads": heads[local], "num_global_key_value_heads": heads[whole],
        "attention_k_eq_v": not file.has(f"blk.{whole}.attn_v.weight"),
        "intermediate_size": widths[0], "use_double_wide_mlp": widths[-1] == 2 * widths[0],
        "num_kv_shared_layers": file.get("attention.shared_kv_layers", 0),
        "hidden_size_per_layer_input": file.get("embedding_length_per_layer_input", 0),
        **({"vocab_size_per_layer_input": embedded.shape[0]} if embedded is not None else {}),
    }  # fmt: skip


def _olmo(file: GgufReader) -> Document:
    if file.get("attention.layer_norm_epsilon", 1e-5) != 1e-5:
        raise GgufError("its attention.layer_norm_epsilon is not OLMo's 1e-5")
    file.get("attention.layer_norm_rms_epsilon")
    return {"model_type": "olmo", "clip_qkv": file.get("attention.clamp_kqv")}


def _olmo2(file: GgufReader) -> Document:
    pattern = file.get("attention.sliding_window_pattern")
    if not file.get("attention.sliding_window"):
        return {"model_type": "olmo2"}
    if not isinstance(pattern, list):
        pattern = [(layer + 1) % 4 != 0 for layer in range(file.layers)]
    if file.get("rope.scaling.type", "none") != "none":
        raise GgufError("it scales its rotary positions, which OLMo 3 does in some layers only")
    return {"model_type": "olmo3", "layer_types": ["sliding_attention" if on else "full_attention" for on in pattern]}


def _deepseek2(file: GgufReader) -> Document:
    experts = file.get("expert_count", 0)
    sigmoid = file.get("expert_gating_func", _SOFTMAX) == _SIGMOID or file.has(
        f"blk.{file.layers - 1}.exp_probs_b.bias"
    )
    rope, length = file.get("rope.dimension_count", 64), file.get("attention.key_length_mla")
    whole = file.get("attention.key_length")
    length = length or whole
    file.used |= {"attention.value_length", "attention.head_count_kv", "rope.scaling.yarn_log_multiplier"}
    heads = file.get("attention.head_count")
    if sigmoid and experts and "deepseek2.expert_group_count" not in file.header.metadata:
        raise GgufError("it does not say expert_group_count, without which its router chooses other experts")
    params: Document = {"rope_type": "default", "rope_theta": file.get("rope.freq_base", 10000.0)}
    params |= scaling(file, {}, rope, params["rope_theta"])
    if params["rope_type"] == "yarn":
        # The converter wrote a tenth; both of transformers' scales are this one in every model there is.
        scale = file.get("rope.scaling.yarn_log_multiplier", 0.0)
        params |= {"mscale": round(10 * scale, 6), "mscale_all_dim": round(10 * scale, 6)}
    groups = {"topk_method": "group_limited_greedy" if file.get("expert_group_count", 1) > 1 else "greedy"}
    return {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2", "qk_rope_head_dim": rope,
        "qk_nope_head_dim": length - rope, "v_head_dim": file.get("attention.value_length_mla") or length - rope,
        "num_key_value_heads": heads, "head_dim": rope, "q_lora_rank": file.get("attention.q_lora_rank"),
        "rope_parameters": params, "norm_topk_prob": bool(file.get("expert_weights_norm", False)),
        **({} if sigmoid else groups),
    }  # fmt: skip


def _lfm2(file: GgufReader) -> Document:
    heads = file.header.metadata.get("lfm2.attention.head_count_kv")
    file.get("attention.head_count_kv")
    if not isinstance(heads, list):
        raise GgufError("its attention.head_count_kv does not tell which layers attend")
    kinds = ["full_attention" if count else "conv" for count in heads]
    return {
        "model_type": "lfm2", "layer_types": kinds, "num_key_value_heads": max(heads),
        "block_auto_adjust_ff_dim": False, "conv_bias": file.has("blk.0.shortconv.in_proj.bias"),
    }  # fmt: skip


def _minimax(file: GgufReader) -> Document:
    _gating(file, _SIGMOID)
    width = file.get("expert_feed_forward_length") or file.get("feed_forward_length")
    return {"model_type": "minimax_m2", "intermediate_size": width}


def _mamba(file: GgufReader) -> Document:
    for unused in ("feed_forward_length", "attention.head_count", "context_length"):
        file.get(unused)
    return {"model_type": "mamba", "intermediate_size": file.get("ssm.inner_size"), "use_bias": False}


def _gpt_oss(file: GgufReader) -> Document:
    width = file.get("expert_feed_forward_length") or file.get("feed_forward_length")
    return {"model_type": "gpt_oss", "intermediate_size": width, "attention_bias": True}


def _qwen35(file: GgufReader) -> Document:
    sections = file.get("rope.dimension_sections") or []
    sections = sections if isinstance(sections, list) else [sections] * 4
    heads = file.get("ssm.time_step_rank")
    rope = {
        "rope_type": "default", "rope_theta": file.get("rope.freq_base"),
        "mrope_section": [section for section in sections if section], "mrope_interleaved": True,
        "partial_rotary_factor": file.get("rope.dimension_count") / file.get("attention.key_length"),
    }  # fmt: skip
    moe = file.header.architecture == "qwen35moe"
    recurrent, every = file.get("attention.recurrent_layers"), file.get("full_attention_interval", 4)
    if not isinstance(recurrent, list):
        recurrent = [(layer + 1) % every != 0 for layer in range(file.layers)]
    if moe:
        file.get("feed_forward_length")
    return {
        "layer_types": ["linear_attention" if on else "full_attention" for on in recurrent[: file.layers]],
        "model_type": "qwen3_5_moe_text" if moe else "qwen3_5_text", "rope_parameters": rope,
        "linear_value_head_dim": file.get("ssm.inner_size") // heads,
    }  # fmt: skip


# `general.architecture` -> the config's model_type and what only this architecture states its own way.
ARCHITECTURES: dict[str, Callable[[GgufReader], Document]] = {
    **{n: _plain(n) for n in ("qwen2", "qwen3", "bloom", "gpt2", "nemotron", "gemma", "granite", "granitemoe")},
    **{n: _plain(n) for n in ("smollm3", "seed_oss", "arcee")},
    "command-r": _plain("cohere"),
    "deepseek2": _deepseek2,
    "falcon": _falcon,
    "gemma2": lambda file: {"model_type": "gemma2", **_gemma_scale(file, 46)},
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gpt-oss": _gpt_oss,
    "gptneox": _plain("gpt_neox", attention_bias=True),
    "lfm2": _lfm2,
    "llama": _llama,
    "mamba": _mamba,
    "minimax-m2": _minimax,
    "olmo": _olmo,
    "olmo2": _olmo2,
    "olmoe": _plain("olmoe", norm_topk_prob=False),
    "phi2": _plain("phi"),
    "phi3": _phi3,
    "qwen2moe": _qwen2moe,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
    "qwen3moe": _qwen3moe,
    "stablelm": lambda file: {
        "model_type": "stablelm", "use_parallel_residual": not file.has("blk.0.ffn_norm.weight"),
    },
    "starcoder2": _plain("starcoder2", use_bias=True),
}  # fmt: skip


def rope(file: GgufReader, default: ConfigFile, values: ConfigFile) -> Document:
    """Base, share and scaling of rotary positions. `default` is the class's own."""
    params: Document = {"rope_type": "default", "rope_theta": file.get("rope.freq_base", 10000.0)}
    dims, heads = file.get("rope.dimension_count"), values.get("num_attention_heads") or 1
    size = values.get("head_dim") or values.get("hidden_size", 0) // heads
    if dims and size and (dims != size or "partial_rotary_factor" in default):
        params["partial_rotary_factor"] = dims / size
    params |= scaling(file, default, dims or size, params["rope_theta"])
    kinds = [kind for kind, each in default.items() if isinstance(each, dict)]  # of layers, each with its own
    return {kind: dict(params) for kind in kinds} or params


def scaling(file: GgufReader, default: ConfigFile, dims: int, theta: float) -> Document:
    kind, factor = file.get("rope.scaling.type", "none"), file.get("rope.scaling.factor", 1.0)
    original = file.get("rope.scaling.original_context_length")
    if (factors := file.table("rope_freqs.weight")) is not None:
        return _llama3(factors, dims, theta)
    if file.has("rope_factors_long.weight"):
        short, long = file.table("rope_factors_short.weight"), file.table("rope_factors_long.weight")
        if short is None or long is None or not original:
            raise GgufError("its rope_factors_long has no rope_factors_short or original_context_length beside it")
        lists: Document = {"short_factor": short.tolist(), "long_factor": long.tolist()}
        if (attention := file.get("rope.scaling.attn_factor")) is not None:
            lists["attention_factor"] = attention
        return {"rope_type": "longrope", "original_max_position_embeddings": original, **lists}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor != 1 else {}
    if kind == "yarn":
        ours = {k: v for k, v in default.items() if k != "rope_theta"} if default.get("rope_type") == "yarn" else {}
        named = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
        stated = {name: file.get(f"rope.scaling.{key}") for name, key in named.items()}
        if file.get("rope.scaling.yarn_ext_factor") not in (None, 1.0, -1.0):
            raise GgufError("it says rope.scaling.yarn_ext_factor, for which transformers has no place")
        params = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        return {**ours, **params, **{name: value for name, value in stated.items() if value is not None}}
    if kind not in ("none", ""):
        raise GgufError(f"its rope.scaling.type is {kind!r}; allowed: none, linear, yarn, and tables of factors")
    return {}


def _llama3(factors: np.ndarray, dims: int, theta: float) -> Document:
    """Llama 3's scaling from the table that a converter made of it; the numbers behind it are found by trying."""
    if np.allclose(factors, 1):
        return {}
    for original in (8192, 4096, 16384, 32768):
        params = {
            "rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }  # fmt: skip
        expected = llama3_factors(params, theta, dims)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4):
            return params
    raise GgufError("its rope_freqs.weight is not Llama 3's scaling, the only one of this form that is known")


def llama3_factors(params: Document, theta: float, dims: int) -> np.ndarray:
    """The divisor of each frequency: transformers, `modeling_rope_utils.py`, `_compute_llama3_parameters`."""
    wave = 2 * math.pi * theta ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
    factor, low, high = params["factor"], params["low_freq_factor"], params["high_freq_factor"]
    original = params["original_max_position_embeddings"]
    smooth = (original / wave - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wave < original / high, 1.0, np.where(wave > original / low, factor, between))
