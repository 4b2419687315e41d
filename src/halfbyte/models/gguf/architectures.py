"""What a GGUF file says of its model -> transformers' config, for the architectures whose layout is known.

transformers' own reading of these files has holes: rotary scaling, partial rotary, head sizes, widths of experts and
epsilons are left at the class's defaults for some architectures, and a Mixtral becomes a dense Llama. So every value
that a file states below its architecture's name has to find a place here; one that finds none is refused by name.
Source: llama.cpp's converter and graphs (conversion/, src/models/), and transformers' config classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from halfbyte.errors import first_line
from halfbyte.models.gguf.header import GgufHeader
from halfbyte.models.gguf.layouts import Refused
from halfbyte.models.gguf.said import Said, rope, scaling
from halfbyte.types import Config, Document

# Key below the architecture's name -> what config classes call it; a class takes those that it has.
NAMES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size n_inner ffn_hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads num_kv_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps norm_eps layer_norm_epsilon layer_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps layer_norm_epsilon norm_epsilon norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.clamp_kqv": "clip_qkv",
    "attention.scale": "attention_multiplier",
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "attention.value_length_mla": "v_head_dim",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logits_scaling logit_scale",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "use_parallel_residual": "use_parallel_residual",
    "expert_count": "num_local_experts num_experts n_routed_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size shared_intermediate_size",
    "expert_shared_count": "n_shared_experts",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "leading_dense_block_count": "first_k_dense_replace",
    "ssm.conv_kernel": "conv_kernel linear_conv_kernel_dim",
    "ssm.state_size": "state_size linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "time_step_rank linear_num_value_heads",
    "ssm.inner_size": "intermediate_size",
    "shortconv.l_cache": "conv_L_cache",
}
# What says nothing about what is computed, or is compared with the rest in `_check_all_used`.
_NO_MATTER = frozenset(
    (
        "vocab_size", "context_length", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.attn_factor",
        "pooling_type", "rope.scaling.original_context_length", "attention.causal",
    )
)  # fmt: skip
_SOFTMAX, _SIGMOID = 1, 2


def config_of(header: GgufHeader) -> Config:
    """transformers' config for a file.

    Raises:
        Refused: the architecture is not known here, or the file says something that the config has no place for.
    """
    from huggingface_hub.errors import StrictDataclassError

    said = Said(header)
    if header.architecture not in ARCHITECTURES:
        raise Refused(
            f"its architecture {header.architecture!r} is not supported; allowed: {', '.join(sorted(ARCHITECTURES))}"
        )
    _check_numbers(said)
    try:
        return _config_of(said)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        raise Refused(
            f"what it says of itself is no {header.architecture} of transformers: {first_line(error)}"
        ) from error


def _check_numbers(said: Said) -> None:
    for key in ("embedding_length", *NAMES):
        value = said.header.metadata.get(f"{said.header.architecture}.{key}", None if key == "embedding_length" else 0)
        if not all(
            isinstance(each, (int, float)) for each in (value if isinstance(value, list) and value else [value])
        ):
            raise Refused(f"its {said.header.architecture}.{key} is {value!r}, not a number")


def _config_of(said: Said) -> Config:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    own = ARCHITECTURES[said.header.architecture](said)
    kind = own.pop("model_type")
    names = {field.name for field in dataclasses.fields(CONFIG_MAPPING[kind])} | set(CONFIG_MAPPING[kind].attribute_map)
    values: Document = {"num_hidden_layers": said.layers, **_common(said, names)}
    values |= _biases(said, names) | _ids(said.header)
    if "rope_parameters" in names and "rope_parameters" not in own:
        values["rope_parameters"] = rope(said, AutoConfig.for_model(kind).rope_parameters or {}, values)
    values |= own
    for name, value in values.items():
        if isinstance(value, list) and name not in own:
            raise Refused(f"its layers differ in {name}, which transformers' class has once for all: {value[:8]}")
    _check_all_used(said, kind)
    return AutoConfig.for_model(kind, **values)


def _common(said: Said, names: set[str]) -> Document:
    """What most classes have under one name or another."""
    values: Document = {}
    for key in said.stated():
        takers = [name for name in NAMES.get(key, "").split() if name in names]
        if takers:
            value = said.get(key)
            values |= dict.fromkeys(takers, value)
    if said.has("token_embd.weight"):
        values["vocab_size"] = said.tensors["token_embd.weight"].shape[0]
    values["tie_word_embeddings"] = not said.has("output.weight")
    heads = values.get("num_key_value_heads") or values.get("num_attention_heads")
    if "head_dim" in names and "head_dim" not in values and isinstance(heads, int) and said.has("blk.0.attn_k.weight"):
        values["head_dim"] = said.tensors["blk.0.attn_k.weight"].shape[0] // max(1, heads)
    return values


def _biases(said: Said, names: set[str]) -> Document:
    """Which modules have a bias, by the tensors that are there."""
    flags = {
        "attention_bias": said.has("blk.0.attn_q.bias"),
        "qkv_bias": said.has("blk.0.attn_q.bias"),
        "use_qkv_bias": said.has("blk.0.attn_q.bias"),
        "mlp_bias": said.has("blk.0.ffn_up.bias"),
        "qk_layernorm": said.has("blk.0.attn_q_norm.weight"),
        "use_qk_norm": said.has("blk.0.attn_q_norm.weight"),
    }
    return {name: value for name, value in flags.items() if name in names}


def _ids(header: GgufHeader) -> Document:
    ids = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{name}_token_id": header.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in ids.items()}


def _check_all_used(said: Said, kind: str) -> None:
    if said.header.metadata.get(f"{said.header.architecture}.attention.causal") is False:
        raise Refused("its attention looks both ways (attention.causal is false): it is no causal language model")
    heads, width = said.get("attention.head_count", 0), said.get("embedding_length", 0)
    size = said.get("attention.key_length") if "attention.key_length" in said.used else width // (heads or 1)
    # What a class has no field for as it can be nothing else.
    implied = {
        "attention.head_count_kv": heads, "feed_forward_length": 4 * width, "attention.key_length": size,
        "attention.value_length": size, "rope.freq_base_swa": said.get("rope.freq_base"),
        "expert_gating_func": _SOFTMAX, "expert_weights_scale": 1.0,
    }  # fmt: skip
    # Zero is how a file says that it has no such thing.
    left = [
        key
        for key in said.stated()
        if key not in said.used | _NO_MATTER and said.get(key) not in (0, False, "none", implied.get(key))
    ]
    if left:
        what = ", ".join(f"{key} = {said.get(key)!r}" for key in left[:3])
        raise Refused(f"it says {what}, for which transformers' {kind} has no place: the model would compute otherwise")


# --- architectures ---------------------------------------------------------------------------------------------------


def _plain(model_type: str, **more: object) -> Callable[[Said], Document]:
    return lambda said: {"model_type": model_type, **more}


def _gating(said: Said, expected: int) -> None:
    if said.get("expert_gating_func", expected) != expected:
        raise Refused(f"its expert_gating_func is {said.get('expert_gating_func')}, and this class has {expected}")


def _llama(said: Said) -> Document:
    _gating(said, _SOFTMAX)
    return {"model_type": "mixtral" if said.get("expert_count", 0) else "llama"}


def _qwen2moe(said: Said) -> Document:
    widths = {"moe_intermediate_size": "ffn_gate_exps", "shared_expert_intermediate_size": "ffn_gate_shexp"}
    there = {name: said.tensors.get(f"blk.0.{leaf}.weight") for name, leaf in widths.items()}
    # Older files state neither width.
    sizes = {name: tensor.shape[-2] for name, tensor in there.items() if tensor is not None and len(tensor.shape) > 1}
    return {"model_type": "qwen2_moe", "norm_topk_prob": False, **sizes}


def _qwen3moe(said: Said) -> Document:
    return _qwen2moe(said) | {
        "model_type": "qwen3_moe", "norm_topk_prob": True, "head_dim": said.get("attention.key_length"),
    }  # fmt: skip


def _falcon(said: Said) -> Document:
    groups = said.get("attention.head_count_kv", 1)
    if groups == said.get("attention.head_count"):
        raise Refused("each of its heads has its own keys: Falcon's oldest models, with ALiBi, are not supported")
    norms = {"num_ln_in_parallel_attn": 2 if said.has("blk.0.attn_norm_2.weight") else 1}
    new = groups > 1
    return {
        "model_type": "falcon", "new_decoder_architecture": new, "multi_query": not new, "parallel_attn": True,
        "alibi": False, "bias": False, **(norms if new else {}),
    }  # fmt: skip


def _phi3(said: Said) -> Document:
    window, original = said.get("attention.sliding_window"), said.get("rope.scaling.original_context_length")
    more = {"original_max_position_embeddings": original} if original else {}
    return {"model_type": "phi3", "sliding_window": window or None, **more}


def _stablelm(said: Said) -> Document:
    return {"model_type": "stablelm", "use_parallel_residual": not said.has("blk.0.ffn_norm.weight")}


def _gemma_scale(said: Said, layers_of_27b: int) -> Document:
    """What queries are divided by: the head's size, but for the 27B models (as in llama.cpp's graphs)."""
    wide = said.layers == layers_of_27b
    size = (
        said.get("embedding_length") // said.get("attention.head_count") if wide else said.get("attention.key_length")
    )
    return {"query_pre_attn_scalar": size or 256}


def _gemma2(said: Said) -> Document:
    return {"model_type": "gemma2", **_gemma_scale(said, 46)}


def _gemma3(said: Said) -> Document:
    scaled = scaling(said, {}, 0, 0)
    whole = {"rope_type": "default", "rope_theta": said.get("rope.freq_base", 1000000.0), **scaled}
    local = {"rope_type": "default", "rope_theta": said.get("rope.freq_base_swa", 10000.0)}
    ropes = {"full_attention": whole, "sliding_attention": local}
    said.get("rope.dimension_count")
    return {"model_type": "gemma3_text", "rope_parameters": ropes, **_gemma_scale(said, 62)}


def _gemma4(said: Said) -> Document:
    """Two kinds of layers, each with its own heads, rotary base and share of the head that turns."""
    pattern = said.every_layer("attention.sliding_window_pattern")
    heads, widths = said.every_layer("attention.head_count_kv"), said.every_layer("feed_forward_length")
    local = pattern.index(True) if True in pattern else 0
    whole = pattern.index(False) if False in pattern else 0
    table = said.table("rope_freqs.weight")
    for same in ("rope.dimension_count", "rope.dimension_count_swa", "attention.value_length_swa"):
        said.get(same)
    if said.get("expert_count", 0):
        raise Refused("its feed-forward layers are mixtures of experts, which are not supported in this architecture")
    if table is None:
        raise Refused("it has no rope_freqs.weight, which tells how much of a head turns")
    share = float((table == 1).sum()) / table.size
    base, local_base = said.get("rope.freq_base", 1000000.0), said.get("rope.freq_base_swa", 10000.0)
    embedded = said.tensors.get("per_layer_token_embd.weight")
    return {
        "model_type": "gemma4_text", "layer_types": ["sliding_attention" if on else "full_attention" for on in pattern],
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": share, "rope_theta": base},
            "sliding_attention": {"rope_type": "default", "rope_theta": local_base},
        },
        "head_dim": said.get("attention.key_length_swa"), "global_head_dim": said.get("attention.key_length"),
        "num_key_value_heads": heads[local], "num_global_key_value_heads": heads[whole],
        "attention_k_eq_v": not said.has(f"blk.{whole}.attn_v.weight"),
        "intermediate_size": widths[0], "use_double_wide_mlp": widths[-1] == 2 * widths[0],
        "num_kv_shared_layers": said.get("attention.shared_kv_layers", 0),
        "hidden_size_per_layer_input": said.get("embedding_length_per_layer_input", 0),
        **({"vocab_size_per_layer_input": embedded.shape[0]} if embedded is not None else {}),
    }  # fmt: skip


def _olmo(said: Said) -> Document:
    if said.get("attention.layer_norm_epsilon", 1e-5) != 1e-5:
        raise Refused("its attention.layer_norm_epsilon is not OLMo's 1e-5")
    said.get("attention.layer_norm_rms_epsilon")
    return {"model_type": "olmo", "clip_qkv": said.get("attention.clamp_kqv")}


def _olmo2(said: Said) -> Document:
    pattern = said.get("attention.sliding_window_pattern")
    if not said.get("attention.sliding_window"):
        return {"model_type": "olmo2"}
    if not isinstance(pattern, list):
        pattern = [(layer + 1) % 4 != 0 for layer in range(said.layers)]
    if said.get("rope.scaling.type", "none") != "none":
        raise Refused("it scales its rotary positions, which OLMo 3 does in some layers only")
    return {"model_type": "olmo3", "layer_types": ["sliding_attention" if on else "full_attention" for on in pattern]}


def _deepseek2(said: Said) -> Document:
    experts = said.get("expert_count", 0)
    sigmoid = said.get("expert_gating_func", _SOFTMAX) == _SIGMOID or said.has(
        f"blk.{said.layers - 1}.exp_probs_b.bias"
    )
    rope, length = said.get("rope.dimension_count", 64), said.get("attention.key_length_mla")
    whole = said.get("attention.key_length")
    length = length or whole
    said.used |= {"attention.value_length", "attention.head_count_kv", "rope.scaling.yarn_log_multiplier"}
    heads = said.get("attention.head_count")
    if sigmoid and experts and "deepseek2.expert_group_count" not in said.header.metadata:
        raise Refused("it does not say expert_group_count, without which its router chooses other experts")
    params: Document = {"rope_type": "default", "rope_theta": said.get("rope.freq_base", 10000.0)}
    params |= scaling(said, {}, rope, params["rope_theta"])
    if params["rope_type"] == "yarn":
        # The converter wrote a tenth; both of transformers' scales are this one in every model there is.
        scale = said.get("rope.scaling.yarn_log_multiplier", 0.0)
        params |= {"mscale": round(10 * scale, 6), "mscale_all_dim": round(10 * scale, 6)}
    groups = {"topk_method": "group_limited_greedy" if said.get("expert_group_count", 1) > 1 else "greedy"}
    return {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2", "qk_rope_head_dim": rope,
        "qk_nope_head_dim": length - rope, "v_head_dim": said.get("attention.value_length_mla") or length - rope,
        "num_key_value_heads": heads, "head_dim": rope, "q_lora_rank": said.get("attention.q_lora_rank"),
        "rope_parameters": params, "norm_topk_prob": bool(said.get("expert_weights_norm", False)),
        **({} if sigmoid else groups),
    }  # fmt: skip


def _lfm2(said: Said) -> Document:
    heads = said.header.metadata.get("lfm2.attention.head_count_kv")
    said.get("attention.head_count_kv")
    if not isinstance(heads, list):
        raise Refused("its attention.head_count_kv does not tell which layers attend")
    kinds = ["full_attention" if count else "conv" for count in heads]
    return {
        "model_type": "lfm2", "layer_types": kinds, "num_key_value_heads": max(heads),
        "block_auto_adjust_ff_dim": False, "conv_bias": said.has("blk.0.shortconv.in_proj.bias"),
    }  # fmt: skip


def _minimax(said: Said) -> Document:
    _gating(said, _SIGMOID)
    width = said.get("expert_feed_forward_length") or said.get("feed_forward_length")
    return {"model_type": "minimax_m2", "intermediate_size": width}


def _mamba(said: Said) -> Document:
    for unused in ("feed_forward_length", "attention.head_count", "context_length"):
        said.get(unused)
    return {"model_type": "mamba", "intermediate_size": said.get("ssm.inner_size"), "use_bias": False}


def _gpt_oss(said: Said) -> Document:
    width = said.get("expert_feed_forward_length") or said.get("feed_forward_length")
    return {"model_type": "gpt_oss", "intermediate_size": width, "attention_bias": True}


def _qwen35(said: Said) -> Document:
    sections = said.get("rope.dimension_sections") or []
    sections = sections if isinstance(sections, list) else [sections] * 4
    heads = said.get("ssm.time_step_rank")
    rope = {
        "rope_type": "default", "rope_theta": said.get("rope.freq_base"),
        "mrope_section": [section for section in sections if section], "mrope_interleaved": True,
        "partial_rotary_factor": said.get("rope.dimension_count") / said.get("attention.key_length"),
    }  # fmt: skip
    moe = said.header.architecture == "qwen35moe"
    recurrent, every = said.get("attention.recurrent_layers"), said.get("full_attention_interval", 4)
    if not isinstance(recurrent, list):
        recurrent = [(layer + 1) % every != 0 for layer in range(said.layers)]
    if moe:
        said.get("feed_forward_length")
    return {
        "layer_types": ["linear_attention" if on else "full_attention" for on in recurrent[: said.layers]],
        "model_type": "qwen3_5_moe_text" if moe else "qwen3_5_text", "rope_parameters": rope,
        "linear_value_head_dim": said.get("ssm.inner_size") // heads,
    }  # fmt: skip


ARCHITECTURES: dict[str, Callable[[Said], Document]] = {
    "llama": _llama,
    "qwen2": _plain("qwen2"),
    "qwen2moe": _qwen2moe,
    "qwen3": _plain("qwen3"),
    "qwen3moe": _qwen3moe,
    "qwen35": _qwen35,
    "qwen35moe": _qwen35,
    "gpt-oss": _gpt_oss,
    "falcon": _falcon,
    "phi2": _plain("phi"),
    "phi3": _phi3,
    "bloom": _plain("bloom"),
    "stablelm": _stablelm,
    "gpt2": _plain("gpt2"),
    "gptneox": _plain("gpt_neox", attention_bias=True),
    "starcoder2": _plain("starcoder2", use_bias=True),
    "nemotron": _plain("nemotron"),
    "gemma": _plain("gemma"),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "mamba": _mamba,
    "lfm2": _lfm2,
    "minimax-m2": _minimax,
    "deepseek2": _deepseek2,
    "granite": _plain("granite"),
    "granitemoe": _plain("granitemoe"),
    "olmo": _olmo,
    "olmo2": _olmo2,
    "olmoe": _plain("olmoe", norm_topk_prob=False),
    "command-r": _plain("cohere"),
    "smollm3": _plain("smollm3"),
    "seed_oss": _plain("seed_oss"),
    "arcee": _plain("arcee"),
}
"""`general.architecture` -> the config's model_type and what only this architecture says its own way."""
