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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from halfbyte.layers.experts.by_definition import experts_by_definition
from halfbyte.layers.experts.layout import NO_LORA, Loras, bias_of, gate_of, is_frozen, matrix, post_norm_of, stacks_of
from halfbyte.layers.experts.sizes import max_at_once, padded_rows
from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu.matmul import into
from halfbyte.upstream.transformers import plain_gate


@dataclass(frozen=True)
class Groups:
    """The pairs of a token and an expert, by expert. `spans`: (expert, first, last) of each that has any; several of
    one with more tokens than are taken at once."""

    tokens: Tensor  # (S,) the token of each pair
    order: Tensor  # (S,) the pair's place in the flat (T, k)
    spans: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, index: Tensor, experts: int) -> Self:
        """Of the experts (T, k) that the router chose. Numbers past the last expert are another process's."""
        flat, order = index.reshape(-1).sort(stable=True)
        counts = torch.bincount(flat, minlength=experts)[:experts].tolist()
        at_once = max_at_once(index.numel(), experts)
        spans, end = [], 0
        for expert, count in enumerate(counts):
            begin, end = end, end + count
            spans += [(expert, first, min(first + at_once, end)) for first in range(begin, end, at_once)]
        return cls(order // index.shape[1], order, tuple(spans))

    @property
    def span_rows(self) -> int:
        """Rows of the longest span's products."""
        return max((padded_rows(last - first) for _, first, last in self.spans), default=0)

    @property
    def rows(self) -> int:
        """Rows of all pairs, and of what the last products write behind them."""
        return max((first + padded_rows(last - first) for _, first, last in self.spans), default=0)


def _padded(x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """Those rows of x, and zeros up to what a product has: (padded n, D), in `out`."""
    out = out[: padded_rows(len(rows))]
    torch.index_select(x, 0, rows, out=out[: len(rows)])
    out[len(rows) :].zero_()
    return out


@dataclass
class _Stack:
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
    ) -> Self:
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
    def of(cls, product: _Stack, wanted: tuple[bool, bool, bool]) -> Self:
        parts = (product.a, None if product.b is None else product.b.transpose(1, 2), product.bias)
        return cls(*(
            torch.zeros(part.shape, dtype=torch.float32, device=part.device) if part is not None and need else None
            for part, need in zip(parts, wanted, strict=True)
        ))  # fmt: skip

    def add(self, expert: int, product: _Stack, x: Tensor, dy: Tensor, h: Tensor | None, dh: Tensor | None) -> None:
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
        return tuple(None if g is None or like is None else g.reshape(like.shape).to(like.dtype) for g, like in parts)


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
            _Stack.of(module, name, trained[3 * i : 3 * i + 3], scales[i], x.dtype)
            for i, name in enumerate(stacks_of(module))
        )
        # a span's products write past its end, where the next span's are written after it
        z = pool.empty((groups.rows, up.width), x)
        lora_outputs = [None if p.a is None else x.new_empty((groups.rows, p.a.shape[1])) for p in (up, down)]
        scratch = [pool.empty((groups.span_rows, x.shape[1]), x) for _ in range(2)]
        gate, norm = gate_of(module), post_norm_of(module)
        share = weights.reshape(-1).index_select(0, groups.order).float()
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert, first, last in groups.spans:
            rows = groups.tokens[first:last]
            x_expert = _padded(x, rows, scratch[0])  # (n, D)
            at = slice(first, first + len(x_expert))
            hs = [None if h is None else h[at] for h in lora_outputs]
            inner = _gated(module, gate, up.forward(expert, x_expert, z[at], hs[0]))  # (n, I)
            y = down.forward(expert, inner, scratch[1][: len(x_expert)], hs[1])[: len(rows)]  # (n, D)
            if norm is not None:
                y = norm(y)
            out.index_add_(0, rows, y.float() * share[first:last, None])
        ctx.save_for_backward(x, weights, z, *lora_outputs, up.a, up.b, down.a, down.b, *trained)
        ctx.module, ctx.groups = module, groups
        ctx.scales = scales
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, z, up_h, down_h, up_a, up_b, down_a, down_b, *trained = ctx.saved_tensors
        module, groups = cast(nn.Module, ctx.module), cast(Groups, ctx.groups)
        needs = ctx.needs_input_grad
        up, down = (
            _Stack(module, getattr(module, name), None if bias is None else bias.to(x.dtype), a, b, scale)
            for name, a, b, bias, scale in zip(
                stacks_of(module), (up_a, down_a), (up_b, down_b), trained[2::3], ctx.scales, strict=True
            )
        )
        of_up, of_down = _Grads.of(up, needs[2:5]), _Grads.of(down, needs[5:8])
        grad, inner_width = grads[0], z.shape[1] // (2 if module.has_gate else 1)
        share = weights.reshape(-1).index_select(0, groups.order).float()
        dx = torch.zeros_like(x, dtype=torch.float32)
        dshare = torch.zeros_like(share)
        scratch = [pool.empty((groups.span_rows, width), x) for width in (x.shape[1], inner_width, x.shape[1])]
        gate, norm = gate_of(module), post_norm_of(module)
        for expert, first, last in groups.spans:
            rows = groups.tokens[first:last]
            n = len(rows)
            dy = _padded(grad, rows, scratch[0])  # (n, D), zero past the span's end, as all that comes of it
            dy_rows, d_inner = (part[: len(dy)] for part in scratch[:2])
            at = slice(first, first + len(dy))
            weight, hs = share[first:last, None], [None if h is None else h[at] for h in (up_h, down_h)]
            z_expert = z[at]
            inner = _gated(module, gate, z_expert)  # (n, I)
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
            dz = _gated_backward(module, gate, z_expert, d_inner)
            x_expert = _padded(x, rows, scratch[0]) if of_up.a is not None else dy_rows
            dx_expert = scratch[2][: len(x_expert)]
            dh = up.backward(expert, dz, dx_expert)
            of_up.add(expert, up, x_expert, dz, hs[0], dh)
            dx.index_add_(0, rows, dx_expert[:n].float())
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
    trained = [t for lora, n in zip(given, stacks_of(self), strict=True) for t in (lora.a, lora.b, bias_of(self, n))]
    groups = Groups.of(top_k_index, int(self.num_experts))
    scales = (given[0].scale, given[1].scale)
    return Experts.apply(hidden_states, top_k_weights, *trained, self, groups, scales)


def _through_norm(
    norm: Callable[[Tensor], Tensor], down: _Stack, expert: int, inner: Tensor, grad: Tensor, weight: Tensor
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
    gate = getattr(module._apply_gate, "__func__", None) if module.has_gate else None
    return gate is plain_gate() and isinstance(module.act_fn, nn.SiLU)


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
