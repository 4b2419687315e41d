"""Runs without a training: a tiny checkpoint, and an adapter that plain PEFT has saved with numbers of some size.

Use: `from tests.export import runs`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from halfbyte.inference.target import Target
from tests import tiny_run

Q_V = ["q_proj", "v_proj"]
# name -> (tiny's model, what LoraConfig gets)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": Q_V}),
    "rslora": ("llama", {"target_modules": Q_V, "use_rslora": True}),
    "patterns": ("llama", {"target_modules": Q_V, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 3}}),
    "dora": ("llama", {"target_modules": Q_V, "use_dora": True}),
    "dora of Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "Conv1D and biases": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "all"}),
    "bias in B": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "head and norms saved": ("llama", {"target_modules": Q_V, "modules_to_save": ["lm_head", "norm"]}),
    "tied head saved": ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}),
    "trained tokens": ("llama", {"target_modules": Q_V, "trainable_token_indices": [5, 7]}),
    "trained tokens, tied": ("gpt2", {"target_modules": ["c_attn"], "trainable_token_indices": [5, 7]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}),
}


def adapter(model: Any, folder: Path, settings: dict[str, Any], seed: int = 1) -> Any:
    """Save an adapter of `model` with numbers of some size, and return PEFT's model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, lora_alpha=9, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
        adapted = peft.get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return adapted


def make(folder: Path, kind: str, **overrides: Any) -> Target:
    """A checkpoint (`model/`, fp32) with an adapter of a kind (`adapter/`)."""
    name, settings = KINDS[kind]
    tiny_run.checkpoint(folder / "model", name)
    plain = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    adapter(plain, folder / "adapter", settings)
    recipe = tiny_run.recipe(folder, **overrides).recipe
    return Target(folder / "adapter", recipe, folder / "adapter")
