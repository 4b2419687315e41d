"""Each architecture in Q8_0: the converted checkpoint computes what the gguf package's own dequantisation computes in
plain transformers' modules, bit for bit; and where transformers has a right loader of its own, that one too."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from halfbyte.errors import SourceError
from halfbyte.models.gguf import architectures, convert, layouts
from halfbyte.models.gguf.header import read_header
from halfbyte.models.gguf.reader import GgufError
from tests.models.gguf import files

SIZES = {
    "vocab_size": 288, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
RMS: dict[str, Any] = {"rms_norm_eps": 3e-5}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
SAID_MOE = {"expert_count": 4, "expert_used_count": 2}
HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}}
SAID_HALF = {"rope.dimension_count": 8, "rope.freq_base": 5000.0}
GRANITE = {
    "attention_multiplier": 0.1, "embedding_multiplier": 12.0, "residual_multiplier": 0.25, "logits_scaling": 8.0,
}  # fmt: skip
SAID_GRANITE = {"attention.scale": 0.1, "embedding_scale": 12.0, "residual_scale": 0.25, "logit_scale": 8.0}
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 8, "v_head_dim": 24, "n_group": 2, "topk_group": 1,
    "num_key_value_heads": 4, "n_shared_experts": 2, "routed_scaling_factor": 2.5, **RMS,
}  # fmt: skip
SAID_DEEPSEEK = {
    **SAID_MOE, "expert_feed_forward_length": 32, "leading_dense_block_count": 1, "attention.kv_lora_rank": 32,
    "attention.key_length": 40, "attention.value_length": 32, "attention.key_length_mla": 40,
    "attention.value_length_mla": 24, "rope.dimension_count": 8, "expert_group_count": 2, "expert_group_used_count": 1,
    "attention.head_count_kv": 1, "expert_shared_count": 2, "expert_weights_scale": 2.5,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
SAID_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
LINEAR = {
    "head_dim": 32, "num_hidden_layers": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 6, **RMS,
}  # fmt: skip
SAID_LINEAR = {
    "attention.key_length": 32, "attention.value_length": 32, "ssm.conv_kernel": 4, "ssm.state_size": 8,
    "ssm.group_count": 2, "ssm.time_step_rank": 6, "ssm.inner_size": 96, "rope.dimension_count": 8,
    "rope.dimension_sections": [11, 11, 10, 0], "full_attention_interval": 4,
}  # fmt: skip
WIDE = {"attention.key_length": 32, "attention.value_length": 32}
TIED = {"tie_word_embeddings": True}
OWN = {"num_key_value_heads": 4}

# (architecture of the file, model_type, its config, what the file says beside the sizes)
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "llama", {**RMS, "head_dim": 32, "attention_bias": True, "mlp_bias": True}, WIDE),
    "llama-plain": ("llama", "llama", RMS, {"rope.dimension_count": 16}),
    "llama-yarn": ("llama", "llama", {"rope_parameters": YARN}, SAID_YARN),
    "mixtral": ("llama", "mixtral", {**MOE, **RMS}, SAID_MOE),
    "qwen2": ("qwen2", "qwen2", {**RMS, **TIED}, {}),
    "qwen2moe": (
        "qwen2moe", "qwen2_moe", {**MOE, **RMS, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
        SAID_MOE,
    ),
    "qwen3": ("qwen3", "qwen3", {**RMS, "head_dim": 32}, WIDE),
    "qwen3moe": (
        "qwen3moe", "qwen3_moe", {**MOE, **RMS, "head_dim": 32, "moe_intermediate_size": 32, "norm_topk_prob": True},
        {**SAID_MOE, **WIDE, "expert_feed_forward_length": 32},
    ),
    "qwen35": ("qwen35", "qwen3_5_text", LINEAR, SAID_LINEAR),
    "qwen35moe": (
        "qwen35moe", "qwen3_5_moe_text",
        {**LINEAR, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "shared_expert_intermediate_size": 64},
        {**SAID_LINEAR, **SAID_MOE, "expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64},
    ),
    "gpt-oss": (
        "gpt-oss", "gpt_oss",
        {**MOE, "head_dim": 32, "sliding_window": 3, "rope_parameters": {
            **YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}},
        {**SAID_MOE, **WIDE, **SAID_YARN, "attention.sliding_window": 3, "expert_feed_forward_length": 96},
    ),
    "falcon": (
        "falcon", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False, **TIED},
        {"feed_forward_length": 256},
    ),
    "falcon-7b": ("falcon", "falcon", {"multi_query": True, "bias": False, **TIED}, {
        "attention.head_count_kv": 1, "feed_forward_length": 256}),
    "phi2": ("phi2", "phi", {**HALF, "num_key_value_heads": 4, "layer_norm_eps": 3e-5}, SAID_HALF),
    "phi3": ("phi3", "phi3", {**RMS, "sliding_window": 4, "original_max_position_embeddings": 128}, {
        "attention.sliding_window": 4, "rope.scaling.original_context_length": 128, "rope.dimension_count": 16}),
    "bloom": ("bloom", "bloom", {**OWN, "layer_norm_epsilon": 3e-5, **TIED}, {"feed_forward_length": 256}),
    "stablelm": ("stablelm", "stablelm", {**HALF, "use_qkv_bias": True, "layer_norm_eps": 3e-5}, SAID_HALF),
    "gpt2": ("gpt2", "gpt2", {**OWN, "layer_norm_epsilon": 3e-5, **TIED}, {"feed_forward_length": 256}),
    "gptneox": ("gptneox", "gpt_neox", {**HALF, **OWN, "layer_norm_eps": 3e-5, "use_parallel_residual": False}, {
        **SAID_HALF, "use_parallel_residual": False}),
    "starcoder2": ("starcoder2", "starcoder2", {"norm_epsilon": 3e-5, **TIED}, {}),
    "nemotron": ("nemotron", "nemotron", {**HALF, "head_dim": 16, "norm_eps": 3e-5}, SAID_HALF),
    "gemma": ("gemma", "gemma", {"head_dim": 32, **RMS, **TIED}, WIDE),
    "gemma2": (
        "gemma2", "gemma2",
        {"head_dim": 32, **RMS, **TIED, "query_pre_attn_scalar": 32, "sliding_window": 4,
         "attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0},
        {**WIDE, "attention.sliding_window": 4, "attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0},
    ),
    "gemma3": (
        "gemma3", "gemma3_text",
        {"head_dim": 32, **RMS, **TIED, "query_pre_attn_scalar": 32, "sliding_window": 4, "num_hidden_layers": 7,
         "rope_parameters": {
             "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
             "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        {**WIDE, "attention.sliding_window": 4, "rope.freq_base": 1e6, "rope.scaling.type": "linear",
         "rope.scaling.factor": 8.0},
    ),
    "gemma4": (
        "gemma4", "gemma4_text",
        {"head_dim": 32, "global_head_dim": 64, **RMS, **TIED, "sliding_window": 4, "num_hidden_layers": 12,
         "num_kv_shared_layers": 6, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 288,
         "use_double_wide_mlp": True, "final_logit_softcapping": 20.0},
        {"attention.key_length": 64, "attention.key_length_swa": 32, "attention.value_length": 64,
         "attention.sliding_window": 4, "attention.sliding_window_pattern": [True, True, True, True, True, False] * 2,
         "attention.shared_kv_layers": 6, "embedding_length_per_layer_input": 32, "rope.freq_base": 1e6,
         "feed_forward_length": [96] * 6 + [192] * 6, "final_logit_softcapping": 20.0},
    ),
    "mamba": (
        "mamba", "mamba",
        {"state_size": 8, "conv_kernel": 3, "time_step_rank": 32, "intermediate_size": 128, **TIED,
         "layer_norm_epsilon": 3e-5},
        {"ssm.state_size": 8, "ssm.conv_kernel": 3, "ssm.time_step_rank": 32, "ssm.inner_size": 128,
         "attention.layer_norm_rms_epsilon": 3e-5, "ssm.dt_b_c_rms": False, "feed_forward_length": 0,
         "attention.head_count": 0, "attention.head_count_kv": 0},
    ),
    "lfm2": (
        "lfm2", "lfm2",
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False,
         "conv_L_cache": 3, "norm_eps": 3e-5, **TIED},
        {"attention.head_count_kv": [0, 2, 0], "shortconv.l_cache": 3},
    ),
    "minimax-m2": (
        "minimax-m2", "minimax_m2", {**MOE, **RMS, "head_dim": 32, "rotary_dim": 16},
        {**SAID_MOE, **WIDE, "expert_feed_forward_length": 96, "rope.dimension_count": 16, "expert_gating_func": 2},
    ),
    "deepseek2-v2": (
        "deepseek2", "deepseek_v2", {**DEEPSEEK, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
        {**SAID_DEEPSEEK, "expert_gating_func": 1},
    ),
    "deepseek2-v3": (
        "deepseek2", "deepseek_v3",
        {**DEEPSEEK, "q_lora_rank": 64, "norm_topk_prob": True,
         "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
        {**SAID_DEEPSEEK, **SAID_YARN, "expert_gating_func": 2, "attention.q_lora_rank": 64,
         "expert_weights_norm": True, "rope.scaling.yarn_log_multiplier": 0.0707},
    ),
    "granite": ("granite", "granite", {**RMS, **GRANITE}, SAID_GRANITE),
    "granitemoe": ("granitemoe", "granitemoe", {**RMS, **GRANITE, **MOE}, {**SAID_GRANITE, **SAID_MOE}),
    "olmo": ("olmo", "olmo", {"clip_qkv": 0.5}, {"attention.clamp_kqv": 0.5, "attention.layer_norm_epsilon": 1e-5}),
    "olmo2": ("olmo2", "olmo2", RMS, {}),
    "olmo3": (
        "olmo2", "olmo3",
        {**RMS, "sliding_window": 3, "num_hidden_layers": 4, "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 5000.0} for kind in ("sliding_attention", "full_attention")}},
        {"attention.sliding_window": 3, "attention.sliding_window_pattern": [True, True, True, False],
         "rope.freq_base": 5000.0},
    ),
    "olmoe": ("olmoe", "olmoe", {**RMS, **MOE, "norm_topk_prob": False}, SAID_MOE),
    "command-r": ("command-r", "cohere", {"logit_scale": 0.25, "layer_norm_eps": 3e-5, **TIED}, {"logit_scale": 0.25}),
    "smollm3": ("smollm3", "smollm3", {**RMS, "num_hidden_layers": 5}, {}),
    "seed_oss": ("seed_oss", "seed_oss", {**RMS, "head_dim": 32, "attention_bias": True}, WIDE),
    "arcee": ("arcee", "arcee", RMS, {}),
}  # fmt: skip
# Each way that rows, values or tensors are put together once.
QUICK = (
    "llama",
    "mixtral",
    "qwen35moe",
    "gpt-oss",
    "falcon",
    "bloom",
    "gpt2",
    "gemma3",
    "olmo3",
    "mamba",
    "deepseek2-v3",
    "granitemoe",
)
# transformers' own loader is right about these tiny ones.
UPSTREAM = ("llama-plain", "qwen2", "starcoder2", "falcon-7b", "bloom")
RULES = {"qwen2": "qwen2", "qwen35": "qwen35", "qwen35moe": "qwen35"}
# Six of eight pairs turn.
TABLES = {"gemma4": {"rope_freqs.weight": [1.0] * 8 + [1e30] * 24}}


def sizes_of(config: Any) -> dict[str, Any]:
    """What every converter writes."""
    theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    said: dict[str, Any] = {
        "block_count": config.num_hidden_layers, "context_length": 128, "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
    }  # fmt: skip
    if getattr(config, "num_attention_heads", None):
        said["attention.head_count"] = config.num_attention_heads
        groups = getattr(config, "num_kv_heads", None) or getattr(config, "num_key_value_heads", None)
        said["attention.head_count_kv"] = groups or config.num_attention_heads
    for name in ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"):
        if (value := getattr(config, name, None)) is not None and config.model_type not in ("mamba", "olmo"):
            kind = "_rms" if name == "rms_norm_eps" or config.model_type == "lfm2" else ""
            said[f"attention.layer_norm{kind}_epsilon"] = float(value)
    return said | ({"rope.freq_base": float(theta)} if theta else {})


def written(tmp_path: Path, name: str) -> tuple[Path, Any]:
    architecture, kind, values, said = CASES[name]
    model = files.model_of(kind, **{**SIZES, "tie_word_embeddings": False, **values})
    file = tmp_path / "m.gguf"
    said = {**sizes_of(model.config), **said}
    return file, files.write(
        file, architecture, model, said, rule=RULES.get(architecture, "smollm"), tables=TABLES.get(name, {})
    )


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 259, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_an_architecture_computes_what_its_file_says(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "say", lambda stage: None)
    file, reference = written(tmp_path, name)
    (tmp_path / "out").mkdir()
    convert.convert(file, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert type(model) is type(reference) and not any(info.values()), info
    assert torch.equal(logits(model), logits(reference))
    if name in UPSTREAM:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = AutoModelForCausalLM.from_pretrained(
                tmp_path, gguf_file="m.gguf", dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
        assert torch.equal(logits(ours), logits(theirs))


def llama(tmp_path: Path, tables: dict[str, list[float]] | None = None, **said: Any) -> Path:
    model = files.model_of("llama", **{**SIZES, "tie_word_embeddings": False, "head_dim": 32})
    files.write(tmp_path / "m.gguf", "llama", model, {**sizes_of(model.config), **WIDE, **said}, tables=tables)
    return tmp_path / "m.gguf"


def llama3_table(original: int, theta: float) -> list[float]:
    """Llama 3's factors by transformers' own code: what the plain frequencies are divided by."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled = {"rope_type": "llama3", "rope_theta": theta, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": original}  # fmt: skip
    config = LlamaConfig(head_dim=32, rope_parameters=scaled, max_position_embeddings=131072)
    plain = 1 / theta ** (torch.arange(0, 32, 2).float() / 32)
    return (plain / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]).tolist()


def test_rotary_tables_become_what_they_were_made_of(tmp_path: Path) -> None:
    for original in (8192, 4096):
        table = llama3_table(original, 500000.0)
        config = architectures.config_of(
            read_header(llama(tmp_path, {"rope_freqs.weight": table}, **{"rope.freq_base": 5e5}))
        )
        assert config.rope_parameters == {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": pytest.approx(8.0), "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": original,
        }  # fmt: skip
    tables = {"rope_factors_short.weight": [1.0] * 16, "rope_factors_long.weight": [2.0] * 16}
    said = {"rope.scaling.original_context_length": 64, "rope.scaling.type": "longrope"}
    config = architectures.config_of(read_header(llama(tmp_path, tables, **said)))
    assert config.rope_parameters["rope_type"] == "longrope" and config.rope_parameters["long_factor"] == [2.0] * 16
    with pytest.raises(GgufError, match="not Llama 3's scaling"):
        architectures.config_of(read_header(llama(tmp_path, {"rope_freqs.weight": [1.0] * 8 + [3.0] * 8})))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"attention.scale": 0.5}, r"it says attention.scale = 0.5, for which transformers' llama has no place"),
        ({"attention.value_length": 16}, r"it says attention.value_length = 16, for which"),
        ({"attention.head_count_kv": [2, 1]}, r"its layers differ in num_key_value_heads"),
        ({"embedding_length": "wide"}, r"its llama.embedding_length is 'wide', not a number"),
        ({"attention.head_count": 0}, r"what it says of itself is no llama|other shapes"),
        ({"attention.causal": False}, r"attention.causal is false"),
        ({"rope.scaling.type": "dynamic"}, r"its rope.scaling.type is 'dynamic'; allowed: none, linear, yarn"),
        ({"expert_gating_func": 2, "expert_count": 4}, r"its expert_gating_func is 2"),
        ({"block_count": 0}, r"its block_count is 0"),
        ({"block_count": 3}, r"9 weights of the model are not in the file, such as model.layers.2"),
        (
            {"block_count": 1, "feed_forward_length": 64},
            r"3 of its tensors have other shapes than the model: blk.0.ffn",
        ),
        ({"attention.head_count": 3}, r"what it says of itself is no llama|have other shapes than the model"),
        ({"embedding_length": 0}, r"transformers cannot make a llama of what it says|have other shapes"),
    ],
)
def test_what_would_become_another_model_is_refused(
    tmp_path: Path, said: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "say", lambda stage: None)
    file = llama(tmp_path, **said)
    (tmp_path / "out").mkdir()
    with pytest.raises(GgufError, match=message):
        convert.convert(file, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gpt5x"}, "its architecture 'gpt5x' is not supported; allowed: arcee, bloom"),
        (
            {"architecture": "qwen2"},
            "weights of the model are not in the file, such as model.layers.0.self_attn.q_proj.bias",
        ),
        ({"rule": "klingon"}, r"cuts text by the rule 'klingon' \(tokenizer.ggml.pre\), which is not known"),
        (
            {"extra": "blk.0.attn_q_norm.weight"},
            "1 of its tensors have no place in transformers' llama, such as blk.0.",
        ),
        ({"extra": "blk.0.attn_q.bias"}, "weights of the model are not in the file, such as model.layers.0.self_attn"),
    ],
)
def test_another_layout_is_refused(
    tmp_path: Path, change: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "say", lambda stage: None)
    model = files.model_of("llama", **{**SIZES, "tie_word_embeddings": False})
    extra = {change["extra"]: [1.0] * 64} if "extra" in change else None
    architecture = change.get("architecture", "llama")
    file = tmp_path / "m.gguf"
    files.write(file, "llama", model, sizes_of(model.config), rule=change.get("rule", "smollm"), tables=extra)
    if architecture != "llama":  # the same tensors under another name
        content = file.read_bytes()
        old, new = (len(a).to_bytes(8, "little") + a.encode() for a in ("llama", architecture))
        assert content.count(old) == 1
        file.write_bytes(content.replace(old, new).replace(b"llama.", architecture.encode() + b"."))
    (tmp_path / "out").mkdir()
    with pytest.raises((GgufError, SourceError), match=message):
        convert.convert(file, tmp_path / "out")


def test_a_gguf_package_that_is_older_than_the_architecture_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = llama(tmp_path)
    monkeypatch.setattr(gguf, "MODEL_ARCH_NAMES", {})
    with pytest.raises(GgufError, match="the installed gguf package does not know 'llama': pip install -U gguf"):
        layouts.parameter_sources(read_header(file), "llama", {}, "model", 2)
