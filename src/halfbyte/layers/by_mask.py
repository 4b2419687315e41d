"""Attention outside transformers' interface on a pack, by our kernel: Bloom and MPT (ALiBi), and Falcon.

Why: as padded rows these models compute padding, and keep fp32 scores of every pair of tokens.
What: the mask that a packed forward hands to all layers brings the lengths (`packed_attention.no_mask`), also where a
forward is done again. An instance's forward is ours where it gets such a mask, and its class's own elsewhere.
Source: the three modeling files; ALiBi, arXiv:2108.12409.
Cost: as `attention.py`: no scores in memory, no padding.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfbyte.layers import attention, instances, norm_gate
from halfbyte.layers.kernels import dropout
from halfbyte.layers.kernels.cpu import whole_attention
from halfbyte.layers.packed_attention import lengths_on
from halfbyte.types import Document


class _ByMask(instances.Instance):
    """Marks an instance whose class was put here."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, p: float, given: Document) -> Tensor:
        """q, k, v (T, heads, D) -> (1, T, H D), causal in each example; keys and values also to a cache, if any."""
        cos, sin = (table[0] for table in given["position_embeddings"]) if self.rotates else (None, None)
        cache = given.get("layer_past") if given.get("cache") is None else given["cache"]
        if cache is not None:
            if self.rotates:
                q, k, cos, sin = _rotated(q, cos, sin), _rotated(k, cos, sin), None, None
            cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], self.layer_idx)
        pack, p = lengths_on(given["attention_mask"]), p if self.training else 0.0
        assert pack is not None  # `forward` has asked
        seed = dropout.some_seed(self, q) if p else None
        out = attention.attention(q, k, v, pack.lengths, scale, cos, sin, pack.levels, self.slopes(given), p, seed)
        return out.reshape(1, len(q), -1)

    rotates = False

    def slopes(self, given: Document) -> Tensor | None:
        """(H,) of ALiBi; None for none."""
        return None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


class _Bloom(_ByMask):
    def forward(self, hidden_states: Tensor, residual: Tensor, *args: object, **given: object) -> object:
        if args or lengths_on(given.get("attention_mask")) is None:
            return super().forward(hidden_states, residual, *args, **given)
        q, k, v = self.query_key_value(hidden_states)[0].unflatten(-1, (self.num_heads, 3, self.head_dim)).unbind(2)
        out = self.dense(self._attend(q, k, v, self.inv_norm_factor, self.attention_dropout.p, given))
        return norm_gate.residual_sum(residual, F.dropout(out, self.hidden_dropout, self.training)), None

    def slopes(self, given: Document) -> Tensor | None:
        return given["alibi"][:, 0, 0]


class _BloomBody(_ByMask):
    def build_alibi_tensor(self, attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        """On a pack ALiBi's slopes themselves (H, 1, 1) in fp32, which the attention above takes."""
        if lengths_on(attention_mask) is None:
            return super().build_alibi_tensor(attention_mask, num_heads, dtype)  # type: ignore[misc]
        ones = torch.ones((1, 2), dtype=torch.int64, device=attention_mask.device)
        return super().build_alibi_tensor(ones, num_heads, torch.float32)[:, :, 1:]  # type: ignore[misc]


class _Mpt(_ByMask):
    def forward(self, hidden_states: Tensor, position_bias: Tensor, *args: object, **given: object) -> object:
        if args or lengths_on(given.get("attention_mask")) is None:
            return super().forward(hidden_states, position_bias, *args, **given)
        qkv = self.Wqkv(hidden_states)[0]
        qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv) if self.clip_qkv else qkv
        q, k, v = (x.unflatten(-1, (self.n_heads, self.head_dim)) for x in qkv.chunk(3, 1))
        given["position_bias"] = position_bias
        return self.out_proj(self._attend(q, k, v, self.softmax_scale, self.attn_dropout_p, given)), None

    def slopes(self, given: Document) -> Tensor | None:
        bias: Tensor = given["position_bias"]  # (H, 1, T), 0 at the last place
        return bias[:, 0, -1] - bias[:, 0, -2]


class _Falcon(_ByMask):
    rotates = True

    def forward(self, hidden_states: Tensor, *args: object, **given: object) -> object:
        if args or given.get("alibi") is not None or lengths_on(given.get("attention_mask")) is None:
            return super().forward(hidden_states, *args, **given)
        qkv, groups = self.query_key_value(hidden_states)[0], self.num_heads // self.num_kv_heads
        q, k, v = qkv.unflatten(-1, (self.num_kv_heads, groups + 2, self.head_dim)).split([groups, 1, 1], 2)
        out = self._attend(q.flatten(1, 2), k[:, :, 0], v[:, :, 0], self.inv_norm_factor, 0.0, given)
        return self.dense(out), None


_CLASSES = {"BloomAttention": _Bloom, "BloomModel": _BloomBody, "MptAttention": _Mpt, "FalconAttention": _Falcon}


def fits(lm: nn.Module) -> bool:
    """Whether its attention is one of these, and the kernel is at hand for the model's dtype."""
    there = any(True for _ in _known(lm)) and not getattr(lm.config, "alibi", False)
    return there and whole_attention(torch.empty(0, dtype=lm.dtype, device=lm.device))


def is_on(lm: nn.Module) -> bool:
    return bool(instances.of(lm, _ByMask))


def install(lm: nn.Module) -> None:
    """Give these instances our forwards."""
    for module in list(_known(lm)):
        instances.become(module, _CLASSES[type(module).__name__])


def remove(lm: nn.Module) -> None:
    """Give them their own classes back."""
    for module in instances.of(lm, _ByMask):
        instances.give_back(module)


def _known(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if type(part).__name__ in _CLASSES and not isinstance(part, _ByMask))
