"""A tiny model with the weights that a store holds, by plain transformers and bitsandbytes. No code of ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM


def weights(store: Path) -> dict[str, torch.Tensor]:
    """(out, in) of each quantised module, by its name, as bitsandbytes dequantises it; widths are multiples of 64."""
    model = AutoModelForCausalLM.from_pretrained(store)
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            found[name] = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scales = weight.SCB if weight.SCB is not None else module.state.SCB
            found[name] = weight.data.float() * scales[:, None] / 127
    return found


def of(model: Any, held: dict[str, torch.Tensor]) -> Any:
    """A copy of a plain model with these weights in place of its own."""
    made = copy.deepcopy(model)
    for name, value in held.items():
        own = made.get_submodule(name)
        with torch.no_grad():
            own.weight.copy_(value.T if type(own).__name__ == "Conv1D" else value)
    return made


def source(model: Any, name: str) -> torch.Tensor:
    """(out, in) of a module of a plain model."""
    own = model.get_submodule(name)
    value: torch.Tensor = own.weight.detach().float()
    return value.T if type(own).__name__ == "Conv1D" else value
