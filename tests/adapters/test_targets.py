"""Targets: the choice for every causal-LM type, PEFT's agreement with it, counts, and the messages."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tools.reference import WELL_KNOWN, targets_table_markdown
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from halfbyte.adapters.targets import Targets, auto_targets, matched, resolve_targets
from halfbyte.errors import AdapterError, SourceError
from halfbyte.models.structure import meta_model
from halfbyte.recipe.schema import Lora
from tests.lora_count import lora_parameter_count

# Types whose default configuration does not build, or has none of the layers that its real checkpoints have.
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 256, "indexer_budget": 1024}
_INDEXER |= {"indexer_compress_ratio": 4}
_SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [3]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 4,
        }
    },
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True},
}

# The types that cannot be built here, with the reason. This table must not grow.
_CANNOT = {
    "gemma3n": "its vision tower needs timm and PIL (its text model is gemma3n_text)",
    "musicgen": "its causal model takes the decoder's own configuration, not this type's",
    "musicgen_melody": "its causal model takes the decoder's own configuration, not this type's",
}

# What must never carry an adapter that nobody asked for.
_NEVER = re.compile(
    r".*(lm_head|embed_out|score|router|vision|visual|image|audio|projector|tower|indexer|pooler|conv1d|patcher)(\..*)?"
    r"|(.*\.)?(gate|shared_expert_gate|wg|embed_tokens|wte)"
)

# The projections of each family, written by hand from the modelling files.
_EXPECTED: dict[str, tuple[str, ...]] = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qwen3": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "gemma3_text": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi3": ("o_proj", "qkv_proj"),
    "gpt2": ("c_attn", "c_proj"),
    "gpt_bigcode": ("c_attn", "c_proj"),
    "bloom": ("query_key_value", "dense"),
    "gpt_neox": ("query_key_value", "dense"),
    "falcon": ("query_key_value", "dense"),
    "opt": ("k_proj", "v_proj", "q_proj", "out_proj"),
    "mpt": ("Wqkv", "out_proj"),
    "mixtral": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "dbrx": ("Wqkv", "out_proj"),
    "deepseek_v3": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
    "mamba": ("in_proj",),
    "jamba": ("in_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    "nemotron_h": ("in_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    "lfm2": ("in_proj", "out_proj", "q_proj", "k_proj", "v_proj"),
    "qwen3_next": ("in_proj_qkvz", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"),
    "recurrent_gemma": ("linear_y", "linear_x", "linear_out", "q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("attention.key", "attention.value", "attention.receptance", "output"),
    "bert": ("query", "key", "value", "attention.output.dense"),
    "bart": ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj"),
    "modernbert-decoder": ("q_proj", "k_proj", "v_proj", "attn.Wo"),
    "afmoe": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "xlnet": ("layer_1", "layer_2"),
}
_MAIN = ["llama", "qwen3", "gemma3_text", "phi3", "gpt2", "bloom", "gpt_neox", "falcon", "opt", "mpt"]
_WITH_PEFT = [*_MAIN, "gemma3", "deepseek_v3", "glm4_moe", "mixtral", "mamba", "nemotron_h", "zamba", "bert"]


def _meta(model_type: str, **settings: Any) -> Any:
    return meta_model(CONFIG_MAPPING[model_type](**{**_SETTINGS.get(model_type, {}), **settings}))


def _tiny(model_type: str) -> Any:
    small: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    wide: dict[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    settings = {
        "gpt2": {"vocab_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 32},
        "bloom": {"vocab_size": 64, "n_layer": 2, "n_head": 4, "hidden_size": 32},
        "mpt": {"vocab_size": 64, "n_layers": 2, "n_heads": 4, "d_model": 32},
        "falcon": small,
        "gpt_neox": {**small, "intermediate_size": 48},
        "opt": {**small, "ffn_dim": 48, "word_embed_proj_dim": 32},
        "mamba": {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32},
        "mixtral": {**small, **wide, "num_local_experts": 2},
    }.get(model_type, {**small, **wide})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))


@pytest.fixture(scope="module")
def llama() -> Any:
    return _meta("llama", num_hidden_layers=4)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_causal_type_has_targets(step: int) -> None:
    """All types that transformers knows, or each so many: something is adapted, nothing forbidden; the table holds the
    rest."""
    failures, not_built, types = [], {}, list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[::step]
    for model_type in types:
        try:
            model = _meta(model_type)
        except SourceError as error:
            not_built[model_type] = str(error)
            continue
        linear = sum(isinstance(module, nn.Linear) for module in model.modules())
        for asked in ("auto", "all-linear"):
            try:
                names = matched(model, resolve_targets(model, asked))
            except AdapterError as error:
                failures.append(f"{model_type} {asked}: {error}")
                continue
            head = model.get_output_embeddings()
            forbidden = [name for name in names if _NEVER.fullmatch(name) or model.get_submodule(name) is head]
            if forbidden:
                failures.append(f"{model_type} {asked}: hits {forbidden[:3]}")
            if asked == "auto" and linear > 400 and len(names) < 40:
                failures.append(f"{model_type}: only {len(names)} of {linear}")
            if lora_parameter_count(model, names, 2) <= 0:
                failures.append(f"{model_type} {asked}: no parameters")
    assert not failures, "\n".join(failures)
    assert set(not_built) == set(_CANNOT) & set(types), not_built


@pytest.mark.parametrize("model_type", sorted(_EXPECTED))
def test_auto_is_what_the_modelling_file_says(model_type: str) -> None:
    assert auto_targets(_meta(model_type)).names == _EXPECTED[model_type]


@pytest.mark.parametrize("asked", ["auto", "all-linear"])
@pytest.mark.parametrize("model_type", _WITH_PEFT)
def test_peft_adapts_exactly_what_matched_says(model_type: str, asked: str) -> None:
    model = _meta(model_type)
    targets = resolve_targets(model, asked)
    names = matched(model, targets)
    count = lora_parameter_count(model, names, 4)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=targets.for_peft), low_cpu_mem_usage=True)
    inner = peft_model.get_base_model()
    assert [name for name, module in inner.named_modules() if isinstance(module, LoraLayer)] == names
    assert sum(p.numel() for p in peft_model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize("model_type", [*_MAIN, "mamba", "mixtral"])
def test_every_auto_adapter_gets_a_gradient(model_type: str) -> None:
    model = _tiny(model_type)
    targets = auto_targets(model)
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=targets.for_peft))
    tokens = torch.randint(1, 64, (1, 12), generator=torch.Generator().manual_seed(0))
    peft_model(input_ids=tokens, labels=tokens).loss.backward()
    dead = [n for n, p in peft_model.named_parameters() if "lora_B" in n and (p.grad is None or not p.grad.any())]
    assert not dead


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom", "gpt_neox", "falcon", "opt", "mpt", "starcoder2"])
def test_all_linear_is_pefts_own_without_experts(model_type: str) -> None:
    model = _meta(model_type)
    ours = matched(model, resolve_targets(model, "ALL-LINEAR"))
    theirs = get_peft_model(model, LoraConfig(target_modules="all-linear"), low_cpu_mem_usage=True).get_base_model()
    assert ours == [name for name, module in theirs.named_modules() if isinstance(module, LoraLayer)]


def test_all_linear_leaves_routers_and_untied_heads() -> None:
    """PEFT's own choice holds the routers of these; ours may not."""
    for model_type, router in (("longcat_flash", "classifier"), ("afmoe", "gate"), ("jetmoe", "layer")):
        names = matched(model := _meta(model_type), resolve_targets(model, "all-linear"))
        assert any(name.endswith(f"router.{router}") for name, _ in model.named_modules())
        assert not any("router" in name for name in names)
    japanese = _meta("gpt_neox_japanese")
    assert isinstance(japanese.embed_out, nn.Linear)
    assert "embed_out" not in matched(japanese, resolve_targets(japanese, "all-linear"))


def test_names_that_peft_turns_into_fused_experts_are_left_out_or_refused() -> None:
    model = _meta("glm4_moe")
    targets = resolve_targets(model, "all-linear")
    assert not {"gate_proj", "up_proj", "down_proj"} & set(targets.names)
    assert "fused experts" in targets.reason
    with pytest.raises(AdapterError, match="fused experts of glm4_moe"):
        resolve_targets(model, ["q_proj", "gate_proj", "up_proj"])


@pytest.mark.parametrize("asked", [["q_proj", "gate"], r".*\.(q_proj|gate)"])
def test_a_router_is_no_expert_and_may_train_whole(asked: str | list[str]) -> None:
    with pytest.raises(AdapterError, match="routers of mixtral") as refused:
        resolve_targets(_meta("mixtral"), asked)
    assert "lora.modules_to_save: [gate]" in str(refused.value) and "target_parameters" not in str(refused.value)


def test_towers_are_left_alone_by_a_regex() -> None:
    model = _meta("gemma3")
    targets = auto_targets(model)
    assert isinstance(targets.names, str)
    names = matched(model, targets)
    layers = model.config.text_config.num_hidden_layers
    assert len(names) == 4 * layers
    assert all(name.startswith("model.language_model.layers.") for name in names)


def test_four_bit_layers_are_chosen_alike() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = _meta("gpt2")
    before = auto_targets(model), matched(model, auto_targets(model))
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Conv1D":
            inputs, outputs = module.weight.shape
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, bnb.nn.Linear4bit(inputs, outputs, device="meta"))
    assert (auto_targets(model), matched(model, auto_targets(model))) == before
    assert lora_parameter_count(model, before[1], 8) == 12 * 8 * ((768 + 2304) + (768 + 768) + (3072 + 768))


def test_counts(llama: Any) -> None:
    names = matched(llama, Targets(("q_proj", "down_proj"), ""))
    hidden, wide = 4096, 11008
    assert lora_parameter_count(llama, names, 16) == 4 * 16 * (2 * hidden + wide + hidden)
    pattern = {"q_proj": 2, r"layers\.0\.mlp\.down_proj": 1}
    assert lora_parameter_count(llama, names, 16, pattern) == 4 * 2 * 2 * hidden + (3 * 16 + 1) * (wide + hidden)
    assert lora_parameter_count(llama, names, 16, use_dora=True) == lora_parameter_count(llama, names, 16) + 8 * hidden
    # The adapter of a Llama-2-7B shape: 32 layers, q/v, rank 16, fp32.
    assert lora_parameter_count(llama, matched(llama, Targets(("q_proj", "v_proj"), "")), 16) * 8 * 4 <= 34e6


def test_dora_count_is_pefts() -> None:
    model = _tiny("llama")
    names = matched(model, auto_targets(model))
    count = lora_parameter_count(model, names, 3, {"v_proj": 5}, use_dora=True)
    config = LoraConfig(
        r=3, rank_pattern={"v_proj": 5}, use_dora=True, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    assert sum(p.numel() for p in get_peft_model(model, config).parameters() if p.requires_grad) == count


def test_limits(llama: Any) -> None:
    targets = resolve_targets(llama, ["q_proj", "lm_head"])
    assert len(matched(llama, targets)) == 5
    second = Lora(layers_to_transform=(1,), exclude_modules=("lm_head",))
    assert matched(llama, targets, second) == ["model.layers.1.self_attn.q_proj"]
    assert len(matched(llama, targets, Lora(exclude_modules=r".*layers\.[01]\..*"))) == 3
    fourth = Lora(modules_to_save=("lm_head",), layers_to_transform=3, layers_pattern="layers")
    assert matched(llama, targets, fourth) == ["model.layers.3.self_attn.q_proj"]
    with pytest.raises(AdapterError, match="nothing is left after layers_to_transform"):
        matched(llama, Targets(("q_proj",), ""), Lora(layers_to_transform=(77,)))
    regex = resolve_targets(llama, r".*q_proj", Lora(layers_to_transform=(1, 3)))
    assert matched(llama, regex) == ["model.layers.1.self_attn.q_proj", "model.layers.3.self_attn.q_proj"]
    some = resolve_targets(
        llama, r".*layers\.(0\.self_attn\.q_proj|1\.self_attn\.v_proj)", Lora(layers_to_transform=(1, 2))
    )
    assert matched(llama, some) == ["model.layers.1.self_attn.v_proj"]
    mixed = resolve_targets(
        llama, r".*layers\.(1\.self_attn\.q_proj|2\.self_attn\.v_proj)", Lora(layers_to_transform=(1, 2))
    )
    assert matched(llama, mixed) == ["model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.v_proj"]
    with pytest.raises(AdapterError, match="nothing is left in layers"):
        resolve_targets(llama, r".*q_proj", Lora(layers_to_transform=77))
    with pytest.raises(AdapterError, match="PEFT refuses these settings"):
        matched(llama, targets, Lora(layers_pattern="layers"))


def test_regex(llama: Any) -> None:
    targets = resolve_targets(llama, r".*\.[01]\.self_attn\.(q|v)_proj")
    assert len(matched(llama, targets)) == 4


def test_messages(llama: Any) -> None:
    gpt2 = _meta("gpt2", n_layer=2)
    with pytest.raises(AdapterError) as caught:
        resolve_targets(gpt2, ["c_attn", "q_proj"])
    assert str(caught.value) == (
        "lora.target_modules: no module of gpt2 matches 'q_proj' (near: c_proj). "
        "Its linear layers: c_attn x2, c_proj x4, c_fc x2, lm_head x1\n  fix: lora.target_modules: auto"
    )
    with pytest.raises(AdapterError, match=r"write a list: \[q_proj, v_proj\]"):
        resolve_targets(llama, "q_proj, v_proj")
    with pytest.raises(AdapterError, match="is no regular expression"):
        resolve_targets(llama, "(q_proj")
    with pytest.raises(AdapterError, match="target_modules is empty"):
        resolve_targets(llama, [])
    with pytest.raises(AdapterError, match="'self_attn' is a LlamaAttention, which cannot carry an adapter"):
        resolve_targets(llama, ["self_attn"])
    mamba = _meta("mamba")
    with pytest.raises(AdapterError, match="would ignore an adapter"):
        resolve_targets(mamba, ["in_proj", "out_proj"])


def test_table() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        table = targets_table_markdown()
    lines = table.splitlines()
    assert len(lines) == len(WELL_KNOWN) + 2
    assert "| gpt2 | `c_attn` `c_proj` | `c_attn` `c_proj` `c_fc` |" in lines
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in lines)


def test_import_is_cheap() -> None:
    heavy = ("torch", "peft", "transformers")
    code = f"import sys, halfbyte.adapters.targets; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
