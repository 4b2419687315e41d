"""Every causal LM of transformers, as small as its config lets it be: windows and chunks of 8 tokens, dropout off.

What a config calls its sizes is found by name; what a type needs besides stands in `NEEDS`. No code of ours is in here.
Use: `from tests import small_models`.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WINDOW = 8
VOCAB = 128
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCAB),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "d_embed"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "rotary_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "d_ff", "ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"), WINDOW),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_groups"), 1),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups"), 1),
    "mamba_d_ssm": 128,
    "depth": 2,
    "out_hidden_size": 64,  # of towers
    "max_window_layers": 1,
    "use_sliding_window": True,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 16,
    "first_k_dense_replace": 1,
    "partial_rotary_factor": 1.0,
}
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
NEEDS: dict[str, dict[str, Any]] = {
    **{kind: {"head_dim": 16} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    **{kind: {"layer_types": ["conv", "full_attention"] * 16} for kind in ("lfm2", "lfm2_moe")},
    "reformer": {"is_decoder": True},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "nemotron": {"num_key_value_heads": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "gemma4": {"vision_config": {}, "audio_config": {}},
    "recurrent_gemma": {"num_hidden_layers": 3},  # recurrent, recurrent, attention
    "ergo": {"first_dense_intermediate_size": 96, "shared_intermediate_size": 32},
}


_SECTIONED = ("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text")  # whose sections must fill a head
# Types with towers, and those of them that are looked at one by one.
WHOLE_TYPES = tuple(dict.fromkeys(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES))
WHOLE = ("gemma3", "gemma4", "mistral3", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "smolvlm", "lfm2_vl", "glm4v")


def longcat_is_on_the_interface() -> bool:
    """Whether this transformers computes LongCat-Flash's experts as it does those of most: from 5.25 on."""
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

    return "@use_experts_implementation" in inspect.getsource(LongcatFlashExperts)


def config(kind: str, **changes: Any) -> Any:
    """The config of a type, small."""
    cls, needs = CONFIG_MAPPING[kind], NEEDS.get(kind, {})
    return cls(**needs | _shrunk(cls(**needs)) | changes)


def _shrunk(full: Any) -> dict[str, Any]:
    values = full.to_dict()
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name.endswith("_config") and hasattr(getattr(full, name, None), "to_dict"):
            small[name] = _shrunk(getattr(full, name))
        elif name in _SIZES and (value is not None or name in ("sliding_window", "attention_chunk_size")):
            small[name] = _SIZES[name]
        elif name == "rope_parameters" and full.model_type in _SECTIONED:
            small[name] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        elif ("drop" in name or "jitter" in name) and isinstance(value, float):
            small[name] = 0.0
        elif name.endswith("token_id") and isinstance(value, int):
            small[name] = min(value, 2)
    if "kv_lora_rank" in small:  # latent attention has as many key heads as query heads
        small["num_key_value_heads"] = _SIZES["num_attention_heads"]
    lists = {name: list(dict.fromkeys(values[name])) for name in _KINDS if values.get(name)}  # one layer of each kind
    if lists:
        count = max(2, *map(len, lists.values()))
        small |= {name: (kinds * count)[:count] for name, kinds in lists.items()} | {"num_hidden_layers": count}
    return small


# One of each kind of recurrent layer: short convolutions, the delta rule, state spaces after attention and beside it.
HYBRIDS: dict[str, dict[str, Any]] = {
    "lfm2": {}, "qwen3_5_text": {}, "granitemoehybrid": {"num_local_experts": 0}, "falcon_h1": {},
}  # fmt: skip


def build(kind: str, **changes: Any) -> Any:
    """The model, in fp32. An error of any kind says why a type cannot be built."""
    return _built(AutoModelForCausalLM, config(kind, **changes))


def whole(kind: str, most: int | None = None, vocab_size: int = VOCAB) -> Any:
    """The same of a type with towers, with them; None where it has more than `most` parameters."""
    small = config(kind)
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if hasattr(small.get_text_config(), name):
            setattr(small.get_text_config(), name, vocab_size)
    if most is not None:
        with torch.device("meta"):
            empty = AutoModelForMultimodalLM.from_config(copy.deepcopy(small))
        if sum(p.numel() for p in empty.parameters()) > most:
            return None
    return _built(AutoModelForMultimodalLM, small)


def _built(auto: Any, small: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = auto.from_config(small, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms off their 0 and 1: a lost one must show
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()
