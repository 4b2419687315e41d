"""The experts of a layer as one autograd function: tokens grouped by expert, LoRA as x A B, frozen weights not kept.

Why: a quantised stack is dequantised one expert at a time, only those that a token chose, and again in backward;
PEFT's own way adds a dense B A to every expert's weight, in every forward, and its backward makes a gradient of a
stack's size (OLMoE: 537 MB a layer). Here the gradients are those of A and B alone.
Order: LoRA's product first, the base's accumulated onto it, as in `lora_linear.py` and for its reason. The sum over
the experts of a token is in fp32.
Source: `transformers/integrations/moe.py` for the meaning of every flag, `peft/tuners/lora/layer.py`, `ParamWrapper`,
for LoRA's layout.
Cost: 12 k D I FLOP a token, forward and backward. Kept: the input, k W numbers a token, k R for each LoRA.

Letters: T tokens, k experts of a token, S = T k pairs, n tokens of one expert; D, I, W as in `layout.py`; R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from transformers.integrations import moe

from halfbyte.layers.experts.by_definition import experts_by_definition
from halfbyte.layers.experts.layout import (
    NO_LORA,
    Loras,
    bias_of,
    gate_of,
    is_frozen,
    matrix,
    post_norm_of,
    stacks_of,
)
from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu.matmul import into

# Rows of a product are filled up with zeros to a multiple of this, or of a sixteenth of them: oneDNN compiles each
# shape (2 ms) and keeps it, and every expert of every micro-batch would have one of its own.
FILL = 16
# Tokens of one expert that are taken at once: at most so many times the mean of all experts, or so many. It bounds what
# is in memory for a moment, however a router chooses; an expert with more is dequantised once more for each part.
BUSIEST, LEAST_AT_ONCE = 2, 256


@dataclass(frozen=True)
class Groups:
    """The pairs of a token and an expert, by expert.

    Args:
        tokens: (S,) the token of each pair. order: (S,) the pair's place in the flat (T, k).
        spans: (expert, first, last) of each that has any; several of one with more tokens than are taken at once.
    """

    tokens: Tensor
    order: Tensor
    spans: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, index: Tensor, experts: int) -> Groups:
        """Of the experts (T, k) that the router chose. Numbers past the last expert are another process's."""
        flat, order = index.reshape(-1).sort(stable=True)
        counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
        at_once = max(LEAST_AT_ONCE, BUSIEST * -(-index.numel() // experts))
        spans, end = [], 0
        for expert, count in enumerate(counts):
            begin, end = end, end + count
            spans += [(expert, first, min(first + at_once, end)) for first in range(begin, end, at_once)]
        return cls(order // index.shape[1], order, tuple(spans))

    @property
    def most(self) -> int:
        """Rows of the longest span's products."""
        return max((filled(last - first) for _, first, last in self.spans), default=0)

    @property
    def room(self) -> int:
        """Rows of all pairs, and of what the last products write behind them."""
        return max((first + filled(last - first) for _, first, last in self.spans), default=0)


def filled(rows: int) -> int:
    """Rows of a product for the tokens of one expert."""
    step = max(FILL, (1 << (rows - 1).bit_length()) // FILL)
    return -(-rows // step) * step


def _taken(x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """Those rows of x, and zeros up to what a product has: (filled n, D), in `out`."""
    own = out[: filled(len(rows))]
    torch.index_select(x, 0, rows, out=own[: len(rows)])
    own[len(rows) :].zero_()
    return own


@dataclass
class _Product:
    """One of the two stacks and its LoRA, in the dtype that is computed in."""

    module: nn.Module
    stack: Any
    bias: Tensor | None  # (E, out)
    a: Tensor | None = None  # (E, R, in)
    b: Tensor | None = None  # (E, out, R)
    scale: float = 1.0

    @classmethod
    def of(
        cls, module: nn.Module, name: str, trained: tuple[Tensor | None, ...], scale: float, dtype: torch.dtype
    ) -> _Product:
        """`trained`: A, B and the bias, as parameters."""
        a, b, bias = (None if part is None else part.to(dtype) for part in trained)
        experts = int(module.num_experts)
        if a is not None and b is not None:
            a, b = a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1).contiguous()
        return cls(module, getattr(module, name), bias, a, b, scale)

    @property
    def width(self) -> int:
        """Numbers of its output."""
        return int(self.stack.shape[2 if self.module.is_transposed else 1])

    def forward(self, expert: int, x: Tensor, y: Tensor, h: Tensor | None) -> Tensor:
        """x (n, in) -> y (n, out), written into `y`; x A into `h` (n, R)."""
        if self.a is not None and self.b is not None and h is not None:
            torch.mm(x, self.a[expert].T, out=h)
            y.addmm_(h, self.b[expert].T, beta=0, alpha=self.scale)
            into(y, x, matrix(self.module, self.stack, expert, x.dtype), add=True)
        else:
            into(y, x, matrix(self.module, self.stack, expert, x.dtype))
        return y if self.bias is None else y.add_(self.bias[expert])

    def backward(self, expert: int, dy: Tensor, dx: Tensor) -> Tensor | None:
        """dy (n, out) -> the gradient of the input, written into `dx` (n, in). Returns that of x A (n, R)."""
        dh = None
        if self.a is not None and self.b is not None:
            dh = torch.mm(dy, self.b[expert]).mul_(self.scale)
            torch.mm(dh, self.a[expert], out=dx)
            into(dx, dy, matrix(self.module, self.stack, expert, dy.dtype).T, add=True)
        else:
            into(dx, dy, matrix(self.module, self.stack, expert, dy.dtype).T)
        return dh


@dataclass
class _Grads:
    """Where the gradients of one product's LoRA and bias are gathered, expert by expert: as their masters, or None."""

    a: Tensor | None  # (E, R, in)
    b: Tensor | None  # (E, R, out)
    bias: Tensor | None

    @classmethod
    def of(cls, product: _Product, wanted: tuple[bool, bool, bool]) -> _Grads:
        parts = (product.a, None if product.b is None else product.b.transpose(1, 2), product.bias)
        return cls(*(
            torch.zeros(part.shape, dtype=torch.float32, device=part.device) if part is not None and need else None
            for part, need in zip(parts, wanted, strict=True)
        ))  # fmt: skip

    def add(self, expert: int, product: _Product, x: Tensor, dy: Tensor, h: Tensor | None, dh: Tensor | None) -> None:
        if self.a is not None and dh is not None:
            self.a[expert] += dh.T @ x  # (R, n) @ (n, in)
        if self.b is not None and h is not None:
            self.b[expert] += (h.T @ dy).mul_(product.scale)  # (R, n) @ (n, out)
        if self.bias is not None:
            self.bias[expert] += dy.sum(0, dtype=torch.float32)

    def like(self, a: Tensor | None, b: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        """In the shapes and dtypes of the parameters."""
        turned = None if self.b is None else self.b.permute(2, 1, 0)  # (out, R, E): expert fastest
        parts = ((self.a, a), (turned, b), (self.bias, bias))
        return tuple(
            None if grad is None or like is None else grad.reshape(like.shape).to(like.dtype) for grad, like in parts
        )


class Experts(torch.autograd.Function):
    """sum over a token's experts of weight * expert(x).

    Args of `apply`:
        x: (T, D). weights: (T, k), the router's. up_a, up_b, up_bias, down_a, down_b, down_bias: masters of any float
        dtype, or None. module: holds the stacks. groups: who goes where. scales: of the two LoRAs.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weights: Tensor, up_a: Tensor | None, up_b: Tensor | None, up_bias: Tensor | None,
        down_a: Tensor | None, down_b: Tensor | None, down_bias: Tensor | None, module: nn.Module, groups: Groups,
        scales: tuple[float, float],
    ) -> Tensor:  # fmt: skip
        trained = (up_a, up_b, up_bias, down_a, down_b, down_bias)
        up, down = (
            _Product.of(module, name, trained[3 * i : 3 * i + 3], scales[i], x.dtype)
            for i, name in enumerate(stacks_of(module))
        )
        # a span's products write past its end, where the next span's are written after it
        z = pool.empty((groups.room, up.width), x)
        kept = [None if p.a is None else x.new_empty((groups.room, p.a.shape[1])) for p in (up, down)]
        room = [pool.empty((groups.most, x.shape[1]), x) for _ in range(2)]
        gate, norm = gate_of(module), post_norm_of(module)
        share = weights.reshape(-1).index_select(0, groups.order).float()
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert, first, last in groups.spans:
            rows = groups.tokens[first:last]
            own = _taken(x, rows, room[0])  # (n, D)
            at = slice(first, first + len(own))
            hs = [None if h is None else h[at] for h in kept]
            inner = _gated(module, gate, up.forward(expert, own, z[at], hs[0]))  # (n, I)
            y = down.forward(expert, inner, room[1][: len(own)], hs[1])[: len(rows)]  # (n, D)
            if norm is not None:
                y = norm(y)
            out.index_add_(0, rows, y.float() * share[first:last, None])
        ctx.save_for_backward(x, weights, z, *kept, up.a, up.b, down.a, down.b, *trained)
        ctx.module, ctx.groups, ctx.scales = module, groups, scales
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, z, up_h, down_h, up_a, up_b, down_a, down_b, *trained = ctx.saved_tensors
        module, groups, needs = cast(nn.Module, ctx.module), cast(Groups, ctx.groups), ctx.needs_input_grad
        up, down = (
            _Product(module, getattr(module, name), None if bias is None else bias.to(x.dtype), a, b, scale)
            for name, a, b, bias, scale in zip(
                stacks_of(module), (up_a, down_a), (up_b, down_b), trained[2::3], ctx.scales, strict=True
            )
        )
        of_up, of_down = _Grads.of(up, needs[2:5]), _Grads.of(down, needs[5:8])
        grad, inner_width = grads[0], z.shape[1] // (2 if module.has_gate else 1)
        share = weights.reshape(-1).index_select(0, groups.order).float()
        dx = torch.zeros_like(x, dtype=torch.float32)
        dshare = torch.zeros_like(share)
        room = [pool.empty((groups.most, width), x) for width in (x.shape[1], inner_width, x.shape[1])]
        gate, norm = gate_of(module), post_norm_of(module)
        for expert, first, last in groups.spans:
            rows = groups.tokens[first:last]
            n = len(rows)
            dy = _taken(grad, rows, room[0])  # (n, D), zero past the span's end, as all that comes of it
            into, d_inner = (part[: len(dy)] for part in room[:2])
            at = slice(first, first + len(dy))
            weight, hs = share[first:last, None], [None if h is None else h[at] for h in (up_h, down_h)]
            z_own = z[at]
            inner = _gated(module, gate, z_own)  # (n, I)
            if norm is not None:
                dy[:n], dshare[first:last] = _through_norm(norm, down, expert, inner, dy[:n], weight)
            dh = down.backward(expert, dy, d_inner)
            if norm is None:  # <dy, y> is <d_inner, inner>, without the bias: y need not be made again
                dshare[first:last] = (d_inner[:n].float() * inner[:n]).sum(1)
                if down.bias is not None:
                    dshare[first:last] += dy[:n].float() @ down.bias[expert].float()
                for part in (d_inner, dy, dh):
                    if part is not None:
                        part[:n].mul_(weight)
            of_down.add(expert, down, inner, dy, hs[1], dh)
            del inner, dy
            dz = _gated_backward(module, gate, z_own, d_inner)
            own = _taken(x, rows, room[0]) if of_up.a is not None else into
            d_own = room[2][: len(own)]
            dh = up.backward(expert, dz, d_own)
            of_up.add(expert, up, own, dz, hs[0], dh)
            dx.index_add_(0, rows, d_own[:n].float())
        dweights = torch.empty_like(dshare)
        dweights[groups.order] = dshare
        of_trained = (*of_up.like(*trained[:3]), *of_down.like(*trained[3:]))
        return dx.to(x.dtype), dweights.view(weights.shape).to(weights.dtype), *of_trained, None, None, None


def experts(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, loras: Loras | None = None
) -> Tensor:
    """(T, D) -> (T, D), by the interface of `ALL_EXPERTS_FUNCTIONS`; `top_k_index` and `top_k_weights` are (T, k)."""
    if not is_frozen(self):
        return experts_by_definition(self, hidden_states, top_k_index, top_k_weights, loras=loras)
    given = [(loras or {}).get(name, NO_LORA) for name in stacks_of(self)]
    trained = [
        t for lora, name in zip(given, stacks_of(self), strict=True) for t in (lora.a, lora.b, bias_of(self, name))
    ]
    groups = Groups.of(top_k_index, int(self.num_experts))
    scales = (given[0].scale, given[1].scale)
    y: Tensor = Experts.apply(hidden_states, top_k_weights, *trained, self, groups, scales)
    return y


def _through_norm(
    norm: Callable[[Tensor], Tensor], down: _Product, expert: int, inner: Tensor, grad: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of what the norm reads (n, D) and of the routing weights (n,), for the output's."""
    y = grad.new_empty((len(inner), grad.shape[1]))
    h = None if down.a is None else y.new_empty((len(y), down.a.shape[1]))
    y = down.forward(expert, inner, y, h)[: len(grad)].requires_grad_()
    with torch.enable_grad():
        normed = norm(y)
    (dy,) = torch.autograd.grad(normed, y, (grad * weight).to(normed.dtype))
    return dy.to(grad.dtype), (grad.float() * normed.detach()).sum(1)


def _is_silu_gate(module: nn.Module) -> bool:
    """silu(first half) * second half, which has its own formula below."""
    own = getattr(module._apply_gate, "__func__", None) if module.has_gate else None
    return own is moe._default_apply_gate and isinstance(module.act_fn, nn.SiLU)


def _gated(module: nn.Module, gate: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """(n, W) -> (n, I)."""
    if not _is_silu_gate(module):
        return gate(z)
    g, u = z.chunk(2, 1)
    return F.silu(g).mul_(u)


def _gated_backward(module: nn.Module, gate: Callable[[Tensor], Tensor], z: Tensor, grad: Tensor) -> Tensor:
    """(n, I) -> (n, W); overwrites `grad`."""
    if not _is_silu_gate(module):
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            inner = gate(z)
        return torch.autograd.grad(inner, z, grad)[0]
    dz = torch.empty_like(z)
    (g, u), (dg, du) = z.chunk(2, 1), dz.chunk(2, 1)
    torch.mul(F.silu(g), grad, out=du)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(u), g, grad_input=dg)
    return dz
