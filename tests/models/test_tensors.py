"""tensors.py: roles and layers of real architectures, damaged files, and the 4-bit arithmetic against bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.errors import SourceError
from halfbyte.models.tensors import Facts, facts_of, read_checkpoint, read_config, spec_of


def folder(root: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 32, **(config or {})}))
    save_file(tensors, root / "model.safetensors")
    return root


def raw(root: Path, content: bytes) -> Path:
    (root / "config.json").write_text("{}")
    (root / "model.safetensors").write_bytes(content)
    return root


def header(entries: dict[str, Any], data: int = 0) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def shapes_and_kinds(model_type: str) -> tuple[Any, dict[str, Any]]:
    """A two-layer model of an architecture without storage, and its config as in config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type)
    for name in ("num_hidden_layers", "n_layer", "n_layers"):
        if hasattr(config, name):
            setattr(config, name, 2)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model, {**json.loads(config.to_json_string(use_diff=False)), "model_type": model_type}


@pytest.mark.parametrize(
    "model_type",
    ["llama", "mistral", "gpt2", "bloom", "opt", "gpt_neox", "gptj", "mpt", "falcon", "qwen2", "qwen3", "gemma3_text",
     "phi3", "phi", "mixtral", "qwen3_moe", "olmo2", "stablelm", "codegen", "gpt_oss", "granite", "cohere", "xglm"],
)  # fmt: skip
def test_linear_is_what_is_a_linear_module(model_type: str) -> None:
    """The policy quantises role `linear`; transformers quantises nn.Linear and Conv1D but for the head. They agree."""
    from transformers.pytorch_utils import Conv1D

    model, config = shapes_and_kinds(model_type)
    head = model.get_output_embeddings()
    linears, embeddings = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head:
            linears[f"{name}.weight"] = module
        if isinstance(module, torch.nn.Embedding):
            embeddings.add(f"{name}.weight")
    specs = {name: spec_of(name, tuple(p.shape), "BF16", config) for name, p in model.named_parameters()}
    assert {n for n, s in specs.items() if s.role == "linear"} == set(linears)
    assert {n for n, s in specs.items() if s.role == "embedding"} >= embeddings
    assert {n for n, s in specs.items() if s.transposed} == {n for n, m in linears.items() if isinstance(m, Conv1D)}
    assert {s.layer for s in specs.values() if s.role == "linear"} - {None} == {0, 1}
    assert all(s.role in ("norm", "bias", "other", "expert", "router") for s in specs.values() if len(s.shape) != 2)


def test_a_learned_position_table_is_an_embedding() -> None:
    assert spec_of("transformer.wpe.weight", (1024, 768), "F32", {"model_type": "gpt2"}).role == "embedding"
    assert (
        spec_of("model.decoder.embed_positions.weight", (2050, 768), "F16", {"model_type": "opt"}).role == "embedding"
    )


@pytest.mark.parametrize(
    ("name", "shape", "role", "layer"),
    [
        ("model.layers.3.mlp.experts.7.w1.weight", (14336, 4096), "linear", 3),
        ("model.layers.3.mlp.experts.gate_up_proj", (8, 4096, 28672), "expert", 3),
        ("transformer.blocks.5.ffn.experts.mlp.w1", (172032, 6144), "expert", 5),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 4096), "router", 0),
        ("model.layers.0.mlp.router.classifier.weight", (8, 4096), "router", 0),
        ("model.layers.0.block_sparse_moe.input_linear.weight", (8, 2048, 1024), "expert", 0),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (8, 28672), "bias", 0),
        ("backbone.layers.1.mixer.A_log", (4096, 16), "other", 1),
        ("backbone.layers.1.mixer.conv1d.weight", (8, 1, 4), "other", 1),
        ("model.layers.2.self_attn.q_norm.weight", (64,), "norm", 2),
        ("transformer.h.2.ln_1.bias", (64,), "norm", 2),
        ("transformer.word_embeddings_layernorm.weight", (64,), "norm", None),
        ("lm_head.weight", (32000, 4096), "head", None),
        ("embed_out.weight", (32000, 4096), "head", None),
        ("model.layers.0.mlp.gate_proj.weight", (11008, 4096), "linear", 0),
    ],
)
def test_roles_by_name_and_shape(name: str, shape: tuple[int, ...], role: str, layer: int | None) -> None:
    spec = spec_of(name, shape, "BF16", {"vocab_size": 32000, "num_local_experts": 8})
    assert (spec.role, spec.layer) == (role, layer)


def test_a_gate_is_a_router_only_in_a_mixture_of_experts() -> None:
    assert spec_of("model.layers.0.mlp.gate.weight", (64, 64), "BF16", {}).role == "linear"


def test_reading_a_folder_gives_names_sizes_and_no_buffers(tmp_path: Path) -> None:
    tensors = {
        "transformer.wte.weight": torch.zeros(32, 8),
        "transformer.h.0.attn.c_attn.weight": torch.zeros(8, 24, dtype=torch.bfloat16),
        "transformer.h.0.attn.bias": torch.zeros(1, 1, 4, 4),  # an old causal mask, not a parameter
        "transformer.h.0.attn.masked_bias": torch.zeros(()),
    }
    specs = {s.name: s for s in read_checkpoint(folder(tmp_path, tensors, {"model_type": "gpt2"}))}
    assert set(specs) == {"transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"}
    linear = specs["transformer.h.0.attn.c_attn.weight"]
    assert (linear.dtype, linear.numel, linear.nbytes, linear.transposed) == ("BF16", 192, 384, True)


@pytest.mark.parametrize(("tied", "roles"), [(True, ["embedding"]), (False, ["head", "embedding"])])
def test_a_tied_head_is_listed_once(tmp_path: Path, tied: bool, roles: list[str]) -> None:
    tensors = {"lm_head.weight": torch.zeros(32, 8), "model.embed_tokens.weight": torch.zeros(32, 8)}
    specs = read_checkpoint(folder(tmp_path, tensors, {"tie_word_embeddings": tied}))
    assert sorted(s.role for s in specs) == sorted(roles)


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    folder(tmp_path, {"model.embed_tokens.weight": torch.zeros(32, 8)})
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(4, 8)}, tmp_path / "model-2.safetensors")
    save_file({"not.in.the.index": torch.zeros(4)}, tmp_path / "stray.safetensors")
    weight_map = {
        "model.embed_tokens.weight": "model-1.safetensors",
        "model.layers.0.mlp.up_proj.weight": "model-2.safetensors",
    }
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert [s.name for s in read_checkpoint(tmp_path)] == list(weight_map)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(SourceError, match=r"lacks 1 of the 2 files in its index: model-2\.safetensors"):
        read_checkpoint(tmp_path)
    index.write_text("[1, 2]")
    with pytest.raises(SourceError, match=r"index\.json has no weight_map"):
        read_checkpoint(tmp_path)


def test_pickles_missing_weights_and_missing_config_have_their_own_message(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no config\.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"has no \.safetensors file"):
        read_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"only pickled weights \(pytorch_model\.bin\).*\n.*allow_pickle: true"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(SourceError, match=r"config\.json holds a JSON list"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"config\.json cannot be read as JSON"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "attention", "residual"),
    [
        ({"model_type": "gpt2", "attn_pdrop": 0.0, "resid_pdrop": 0.2}, 0.0, 0.2),
        ({"model_type": "opt"}, 0.0, 0.1),
        ({"model_type": "opt", "dropout": 0.0, "attention_dropout": 0.3}, 0.3, 0.0),
        ({"model_type": "bloom", "hidden_dropout": 0.1, "attention_dropout": 0.1}, 0.1, 0.1),
        ({"model_type": "mpt", "attn_config": {"attn_pdrop": 0.1}}, 0.1, 0.0),
        ({"model_type": "llama"}, 0.0, 0.0),
    ],
)
def test_a_models_own_dropout(config: dict[str, Any], attention: float, residual: float) -> None:
    found = facts_of(config, [])
    assert (found.attention_dropout, found.residual_dropout) == (attention, residual)


def test_facts_under_every_config_spelling(tmp_path: Path) -> None:
    gpt2 = facts_of(
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_inner": None, "vocab_size": 50257, "n_head": 12}, []
    )
    assert gpt2 == Facts(
        "gpt2", 768, 3072, 12, 50257, tied_head=True, heads=12, key_heads=12, head_size=64, attention_dropout=0.1,
        residual_dropout=0.1,
    )  # fmt: skip
    towers = {
        "model_type": "x",
        "text_config": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "vocab_size": 9},
    }
    assert facts_of(towers, []) == Facts("x", 64, 96, 2, 9, tied_head=True)
    tensors = {"model.embed_tokens.weight": torch.zeros(32, 8), "model.layers.4.mlp.up_proj.weight": torch.zeros(4, 8)}
    config = {"num_experts": 4, "num_experts_per_tok": 2}
    folder(tmp_path, {**tensors, "lm_head.weight": torch.zeros(32, 8)}, config)
    read = facts_of(read_config(tmp_path), read_checkpoint(tmp_path))
    assert read == Facts("llama", 8, 32, 5, 32, experts=4, experts_per_token=2, tied_head=False)


@pytest.mark.parametrize(("kind", "keys"), [("gpt_neox", 16), ("opt", 16), ("llama", 4)])
def test_shared_keys_count_only_where_the_attention_knows_them(kind: str, keys: int) -> None:
    """A config may carry fields that its model does not read."""
    config = {"model_type": kind, "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4}
    assert facts_of({**config, "num_hidden_layers": 2, "vocab_size": 256}, []).key_heads == keys


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "mistral"},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mistral", "sliding_window": 7},
        {"model_type": "gemma3_text"},
        {"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 3},
        {"model_type": "gemma2", "sliding_window": 9},
        {"model_type": "qwen2", "sliding_window": 9},
        {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2},
        {"model_type": "qwen3", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 3},
        {"model_type": "qwen3", "layer_types": ["sliding_attention", "full_attention"] * 3, "use_sliding_window": True,
         "sliding_window": 9},
        {"model_type": "phi3"},
        {"model_type": "phi3", "sliding_window": 2047},
        {"model_type": "smollm3", "sliding_window": 9},
        {"model_type": "llama"},
    ],
    ids=str,
)  # fmt: skip
def test_windows_are_those_of_the_real_config(values: dict[str, Any]) -> None:
    from transformers import AutoConfig

    real = AutoConfig.for_model(**values, num_hidden_layers=6)
    kinds = getattr(real, "layer_types", None) or ["sliding_attention"] * 6
    window = getattr(real, "sliding_window", None) or 0
    wanted = [window if kind == "sliding_attention" else 0 for kind in kinds]
    found = facts_of({**values, "num_hidden_layers": 6}, ()).windows
    assert list(found) == wanted or (found == () and not any(wanted))
