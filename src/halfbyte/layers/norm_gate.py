"""RMS norm, the gated MLP's activation and the sums of a residual stream as autograd functions over the kernels, each
with its formula beside it.

Cost: RMS norm keeps its input and one fp32 a row; the gate keeps its two inputs; a sum keeps nothing.
Letters: N rows, D width, I the MLP's inner width.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu import available

SILU, GELU_TANH = 0, 1
ACTIVATIONS = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU_TANH, "gelu_new": GELU_TANH}


class RmsNorm(torch.autograd.Function):
    """x itself, for a sum behind the norm, and x / rms(x) * w, or * (1 + w) for gemma's. Both gradients of x are added
    while the norm's is made. The weight is frozen. x: (N, D) contiguous, in w's dtype."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, w: Tensor, eps: float, one_plus: bool) -> tuple[Tensor, Tensor]:
        from halfbyte.layers.kernels.cpu import norm

        y, rstd = norm.rms_norm(x, w, eps, one_plus=one_plus)
        ctx.save_for_backward(x, w, rstd)
        ctx.one_plus = one_plus
        ctx.set_materialize_grads(False)
        return x, y

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from halfbyte.layers.kernels.cpu import norm

        (x, w, rstd), (beside, dy) = ctx.saved_tensors, grads
        if dy is None:
            return beside, None, None, None
        beside = None if beside is None else beside.contiguous()
        dx = norm.rms_norm_backward(dy.contiguous(), x, w, rstd, one_plus=ctx.one_plus, beside=beside)
        return dx, None, None, None


class ResidualSum(torch.autograd.Function):
    """x + y in memory of the pool. Both of one shape and dtype."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, y: Tensor) -> Tensor:
        return torch.add(x, y, out=pool.empty_like(x))

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


class Glu(torch.autograd.Function):
    """act(g) * u. g, u: (N, I) contiguous."""

    @staticmethod
    def forward(ctx: FunctionCtx, g: Tensor, u: Tensor, kind: int) -> Tensor:
        from halfbyte.layers.kernels.cpu import gate

        ctx.save_for_backward(g, u)
        ctx.kind = kind
        return gate.glu(g, u, kind)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from halfbyte.layers.kernels.cpu import gate

        g, u = ctx.saved_tensors
        return *gate.glu_backward(grads[0].contiguous(), g, u, ctx.kind), None


def rms_norm(x: Tensor, w: Tensor, eps: float, *, one_plus: bool) -> Tensor:
    """(..., D) -> (..., D)."""
    if available(x, w) and x.dtype == w.dtype:
        return residual_and_norm(x, w, eps, one_plus=one_plus)[1]
    return rms_norm_formula(x, w, eps, one_plus=one_plus)


def residual_and_norm(x: Tensor, w: Tensor, eps: float, *, one_plus: bool) -> tuple[Tensor, Tensor]:
    """(x, its norm), both (..., D), for a sum with x after the norm. For what `available` says, in w's dtype."""
    residual, y = RmsNorm.apply(x.reshape(-1, x.shape[-1]).contiguous(), w, eps, one_plus)
    return residual.view(x.shape), y.view(x.shape)


def residual_sum(x: Tensor, y: Tensor) -> Tensor:
    """x + y, (..., D) each."""
    if not available(x, y) or x.dtype != y.dtype or x.shape != y.shape:
        return x + y
    total: Tensor = ResidualSum.apply(x, y)
    return total


def rms_norm_formula(x: Tensor, w: Tensor, eps: float, *, one_plus: bool) -> Tensor:
    """As transformers has it: llama rounds before it multiplies with the weight, gemma after."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * (1.0 + w.float())).to(x.dtype) if one_plus else w * normal.to(x.dtype)


def glu(g: Tensor, u: Tensor, kind: int) -> Tensor:
    """act(g) * u, elementwise."""
    if available(g, u) and g.is_contiguous() and u.is_contiguous() and g.dtype == u.dtype:
        h: Tensor = Glu.apply(g, u, kind)
        return h
    return (F.silu(g) if kind == SILU else F.gelu(g, approximate="tanh")) * u
