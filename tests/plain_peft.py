"""The reference for what a run learns: transformers and PEFT as they are, each text alone. No code of ours is in here.

Use: `from tests import plain_peft`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch import Tensor


def texts(lengths: Sequence[int], vocabulary: int, seed: int = 2) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (n,), generator=draw) for n in lengths]


def adapt(model: Any, targets: Any, get_peft_model: Any = peft.get_peft_model) -> Any:
    """LoRA on a model, with a B that is not 0: otherwise A has no gradient, whatever the code does."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn_like(parameter) * 0.2
    return model.train()


def gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of everything that trains, which are taken away from the model."""
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return grads


def learn(model: Any, rows: Sequence[Tensor]) -> tuple[float, dict[str, Tensor]]:
    """(the loss summed over the labelled tokens of all texts, its gradients): each text a batch of its own."""
    total = 0.0
    for row in rows:
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        if len(row) > 1:
            loss = torch.nn.functional.cross_entropy(logits[:-1].float(), row[1:], reduction="sum")
            loss.backward()
            total += loss.item()
    return total, gradients(model)


def apart(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """||got - wanted|| / ||wanted|| over all gradients together."""
    assert got.keys() == wanted.keys() and wanted
    off = sum(float((got[n].double() - wanted[n].double()).square().sum()) for n in wanted) ** 0.5
    return float(off / sum(float(g.double().square().sum()) for g in wanted.values()) ** 0.5)
