"""Tiny random models of real architectures, for tests: a few 10 KB each, no download.

Every hidden size is a multiple of 64 (one 4-bit block), attention is grouped where the architecture allows it
(4 query heads, 2 key/value heads), every dropout is 0, and the initial weights are ten times larger than usual:
with the usual 0.02 attention is nearly uniform, and a test could not tell a wrong mask from a right one.

Use: `from tests import tiny`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, POSITIONS = 64, 128, 2, 4, 2, 256
SLIDING_WINDOW = 4  # gemma3: shorter than the test sequences, so that a sliding layer really slides
_STD = 0.2

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": POSITIONS,
    "initializer_range": _STD,
}
_LLAMA_LIKE = {**_SIZES, "intermediate_size": INTERMEDIATE, "num_key_value_heads": KV_HEADS}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": POSITIONS,
            "n_inner": INTERMEDIATE,
            "initializer_range": _STD,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "bloom": ("BloomConfig", {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "initializer_range": _STD}),
    "opt": (
        "OPTConfig",
        {
            **{k: v for k, v in _SIZES.items() if k != "initializer_range"},
            "ffn_dim": INTERMEDIATE,
            "word_embed_proj_dim": HIDDEN,
            "init_std": _STD,
            "dropout": 0.0,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_SIZES, "intermediate_size": INTERMEDIATE}),
    "falcon": ("FalconConfig", {**_SIZES, "ffn_hidden_size": INTERMEDIATE}),  # multi-query, rotary, as falcon-7b
    "mpt": (
        "MptConfig",
        {"d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": POSITIONS, "initializer_range": _STD},
    ),
    "qwen3": ("Qwen3Config", {**_LLAMA_LIKE, "head_dim": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_LLAMA_LIKE,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mistral": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": None}),
    "phi3": ("Phi3Config", {**_LLAMA_LIKE, "original_max_position_embeddings": POSITIONS}),
}
ARCHITECTURES: tuple[str, ...] = tuple(_CONFIGS)
# Built by name, and not among those that every test of an architecture runs through.
_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {**_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "gptj": (  # no tape writes it
        "GPTJConfig",
        {
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": POSITIONS,
            "n_inner": INTERMEDIATE,
            "rotary_dim": 8,
            "initializer_range": _STD,
            "tie_word_embeddings": False,
        },
    ),
}


def config(name: str, *, vocab_size: int = 256, changes: Mapping[str, Any] | None = None) -> Any:
    """The real transformers config class of `name` at tiny sizes. `changes` overrides single config fields."""
    cls, sizes = (_CONFIGS | _OTHERS)[name]
    return getattr(transformers, cls)(**{**sizes, **_TOKENS, "vocab_size": vocab_size, **(changes or {})})


def model(
    name: str,
    *,
    seed: int = 0,
    vocab_size: int = 256,
    dtype: torch.dtype = torch.float32,
    changes: Mapping[str, Any] | None = None,
) -> Any:
    """A `PreTrainedModel` (…ForCausalLM) in eval mode; the same seed gives the same weights in every dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = transformers.AutoModelForCausalLM.from_config(
            config(name, vocab_size=vocab_size, changes=changes), dtype=torch.float32
        )
        for parameter in built.parameters():
            if parameter.dim() == 1:  # biases and norms off their 0 and 1: a lost one must show
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return built.to(dtype).eval()


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, vocab_size: int = 256) -> Path:
    """Write a checkpoint folder (config.json, model.safetensors; no tokenizer) and return it."""
    model(name, seed=seed, vocab_size=vocab_size, dtype=dtype).save_pretrained(folder)
    return folder


def batch(lengths: Sequence[int], vocab_size: int) -> dict[str, Any]:
    """A micro-batch of random examples, every token but the last of each labelled."""
    ids = torch.randint(3, vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    return batch_of(ids.split(list(lengths)))


def batch_of(rows: Sequence[torch.Tensor]) -> dict[str, Any]:
    """A micro-batch of these examples, every token but the last of each labelled."""
    ids, lengths = torch.cat(list(rows)), [len(row) for row in rows]
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    keep = torch.tensor([i for i in range(len(ids) - 1) if i + 1 not in starts.tolist()])
    return {
        "input_ids": ids[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": starts,
        "keep": keep,
        "targets": ids[keep + 1],
    }
