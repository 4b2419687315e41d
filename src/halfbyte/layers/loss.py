"""Cross-entropy of one packed pass, from logits of labelled tokens only.

Why: a vocabulary of 50,000 to 250,000 makes whole logits the largest tensor of a step, and on completion-only data most
rows of it carry no label. `logits_to_keep` (a documented forward argument) takes the positions that do; scaling and
softcapping of logits happen inside the model's own forward, so they stay exact.
Cost: (K, V) logits in fp32 for K labelled tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from halfbyte.layers import packing


def accepts(model: Any, name: str) -> bool:
    """Whether the base model's forward takes the keyword `name`."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(type(inner).forward).parameters


def pass_loss(model: Any, batch: Mapping[str, Any], *, label_smoothing: float = 0.0) -> torch.Tensor:
    """Summed cross-entropy over the labelled tokens of one packed pass, fp32. Scalar.

    Args:
        batch: as `data.collate.collate` makes it, with `keep` (positions whose next token is labelled) and `targets`.
        label_smoothing: as `TrainingArguments.label_smoothing_factor`.
    """
    device = next(model.parameters()).device
    keep, targets = batch["keep"].to(device), batch["targets"].to(device)  # (K,), (K,)
    inputs = packing.forward_inputs(model, {k: v for k, v in batch.items() if k != "labels"})
    inputs = {k: v.to(device) if k == "input_ids" else v for k, v in inputs.items()}
    if accepts(model, "logits_to_keep"):
        logits = model(**inputs, logits_to_keep=keep).logits[0]  # (K, V)
    else:
        logits = model(**inputs).logits[0]  # (N, V)
        logits = logits.index_select(0, keep.to(logits.device))  # (K, V)
    targets = targets.to(logits.device)
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=label_smoothing)


def mean_loss(model: Any, batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mean loss per labelled token over passes, in eval mode and without gradients; the model's mode is put back.

    Returns:
        `loss`, `perplexity`, `labelled_tokens`, `tokens`.
    """
    was_training = model.training
    model.eval()
    total, labelled, tokens = 0.0, 0, 0
    try:
        with torch.no_grad():
            for batch in batches:
                total += float(pass_loss(model, batch))
                labelled += batch["targets"].numel()
                tokens += batch["input_ids"].numel()
    finally:
        model.train(was_training)
    loss = total / max(labelled, 1)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "labelled_tokens": labelled, "tokens": tokens}
