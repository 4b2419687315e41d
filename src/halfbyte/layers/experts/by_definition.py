"""The experts of a layer by definition, slowly: what the proof at start compares the fast forward with.

What: one expert after the other in plain torch under autograd, LoRA as what it is defined to be, an addition to the
weight. Each expert is computed again in backward, so that a dequantised weight is there one expert at a time.
Why: transformers' own code indexes stacks of numbers, and a quantised stack has none.
Rows of zeros are added up to a multiple of `FILL`: oneDNN keeps the code of a product of each shape, and every expert
has another number of tokens (gpt-oss of 16 experts: 106 MB less in the process after the proof).
Cost: three products for each of the forward's, and a dense addition for each expert with LoRA.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from halfbyte.layers.experts.layout import (  # isort: skip
    NO_LORA, LoraOfExperts, Loras, bias_of, gate_of, matrix, post_norm_of, stacks_of,
)  # fmt: skip
from halfbyte.layers.experts.sizes import FILL


def experts_by_definition(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, loras: Loras | None = None
) -> Tensor:
    """(T, D) -> (T, D), by the interface of `ALL_EXPERTS_FUNCTIONS`; `top_k_index` and `top_k_weights` are (T, k)."""
    out = torch.zeros_like(hidden_states, dtype=torch.promote_types(hidden_states.dtype, torch.float32))
    # taken now: PEFT's own wrapper changes what the module's attributes are while a forward lasts
    products = [
        _SlowProduct(self, getattr(self, n), bias_of(self, n), (loras or {}).get(n, NO_LORA)) for n in stacks_of(self)
    ]
    for expert in top_k_index.unique().tolist():
        if expert >= self.num_experts:  # experts of another process
            continue
        tokens, places = torch.where(top_k_index == expert)
        x = nn.functional.pad(hidden_states[tokens], (0, 0, 0, -len(tokens) % FILL))
        y = checkpoint(_one, self, products, expert, x, use_reentrant=False)[: len(tokens)]
        out = out.index_add(0, tokens, y.to(out.dtype) * top_k_weights[tokens, places, None].to(out.dtype))
    return out.to(hidden_states.dtype)


@dataclass(frozen=True)
class _SlowProduct:
    module: nn.Module
    stack: Any
    bias: Tensor | None
    lora: LoraOfExperts

    def of(self, x: Tensor, expert: int) -> Tensor:
        """(n, in) -> (n, out)."""
        weight = matrix(self.module, self.stack, expert, x.dtype).clone()  # (in, out); its memory is used again
        if self.lora.a is not None and self.lora.b is not None:
            a = self.lora.a.unflatten(0, (self.module.num_experts, -1))[expert]  # (R, in)
            b = self.lora.b.unflatten(1, (-1, self.module.num_experts))[..., expert]  # (out, R)
            weight = weight + (self.lora.scale * (b @ a).T).to(x.dtype)
        y = x @ weight
        return y if self.bias is None else y + self.bias[expert].to(x.dtype)


def _one(module: nn.Module, products: list[_SlowProduct], expert: int, x: Tensor) -> Tensor:
    first, second = products
    y = second.of(gate_of(module)(first.of(x, expert)), expert)
    norm = post_norm_of(module)
    return norm(y) if norm is not None else y
