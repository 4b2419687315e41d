"""How many numbers LoRA adds to named modules, counted from the modules themselves. `plan` counts by the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn


def lora_parameter_count(
    model: nn.Module,
    modules: Iterable[str],
    r: int,
    rank_pattern: Mapping[str, int] | None = None,
    *,
    use_dora: bool = False,
) -> int:
    """Trainable numbers that LoRA adds to `modules` (from `matched`): r x (in + out) each, and out more for DoRA."""
    patterns = dict(rank_pattern or {})
    total = 0
    for name in modules:
        inputs, outputs = _in_out(model.get_submodule(name))
        rank = patterns.get(get_pattern_key(patterns.keys(), name), r)
        total += rank * (inputs + outputs) + (outputs if use_dora else 0)
    return total


def _in_out(module: Any) -> tuple[int, int]:
    if hasattr(module, "in_features"):
        return int(module.in_features), int(module.out_features)
    if hasattr(module, "num_embeddings"):
        return int(module.num_embeddings), int(module.embedding_dim)
    inputs, outputs = module.weight.shape  # Conv1D keeps (in, out)
    return int(inputs), int(outputs)
