"""The auxiliary loss that keeps a mixture's experts evenly used, where the model's config asks for it.

What: with `output_router_logits` in its config a model adds `router_aux_loss_coef` times a loss of its routers' logits
to the mean over labelled tokens. It is the model's own function, over the tokens of a micro-batch; a step's
micro-batches count by their labelled tokens. An evaluation is told without it, as it says nothing of the text.
Source: Switch Transformers, arXiv:2101.03961, section 2.2; `load_balancing_loss_func` in transformers' models.
Cost: E numbers a token and layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from halfbyte.layers import loss
from halfbyte.models import structure

if TYPE_CHECKING:
    from halfbyte.types import Batch, Model

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def micro_batch_loss(model: Model, batch: Batch, *, label_smoothing: float = 0.0) -> torch.Tensor:
    """`loss.micro_batch_loss`, and what the auxiliary loss adds to it. Scalar, fp32."""
    lm = structure.causal_lm(model)
    function = _function(lm)
    if function is None:
        return loss.micro_batch_loss(model, batch, label_smoothing=label_smoothing)
    seen: list[tuple[torch.Tensor, ...]] = []
    body = structure.body(lm)
    asked = body.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "output_router_logits": True}), with_kwargs=True
    )
    told = body.register_forward_hook(lambda module, args, output: seen.append(output.router_logits))
    try:
        summed = loss.micro_batch_loss(model, batch, label_smoothing=label_smoothing)
    finally:
        asked.remove()
        told.remove()
    logits = tuple(each for each in seen[-1] if each is not None)
    tokens = batch["input_ids"].shape[1]
    mask = None
    if logits[0].shape[0] > tokens:  # filled up by `packing.aligned`
        mask = (torch.arange(logits[0].shape[0], device=logits[0].device) < tokens).long()[None]
    config = lm.config.get_text_config()
    coefficient = next(getattr(config, name) for name in _COEFFICIENTS if hasattr(config, name))
    added: torch.Tensor = function(logits, logits[0].shape[-1], config.num_experts_per_tok, mask)
    return summed + coefficient * len(batch["targets"]) * added.to(summed.device)


def _function(lm: Model) -> Callable[..., Any] | None:
    """The model's own auxiliary loss; None where the config does not ask for it, or the model has none."""
    config = lm.config.get_text_config()
    if not getattr(config, "output_router_logits", False) or not any(hasattr(config, n) for n in _COEFFICIENTS):
        return None
    return getattr(sys.modules.get(type(lm).__module__), "load_balancing_loss_func", None)
