"""RMS norm and the gated MLP's activation as autograd functions over the kernels, each with its formula beside it.

Cost: RMS norm keeps its input and one fp32 a row; the gate keeps its two inputs.
Letters: N rows, D width, I the MLP's inner width.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from halfbyte.layers.kernels.cpu import available

SILU, GELU_TANH = 0, 1
ACTIVATIONS = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU_TANH, "gelu_new": GELU_TANH}


class RmsNorm(torch.autograd.Function):
    """x / rms(x) * w, or * (1 + w) for gemma's. The weight is frozen. x: (N, D) contiguous, in w's dtype."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, w: Tensor, eps: float, one_plus: bool) -> Tensor:
        from halfbyte.layers.kernels.cpu import norm

        y, rstd = norm.rms_norm(x, w, eps, one_plus=one_plus)
        ctx.save_for_backward(x, w, rstd)
        ctx.one_plus = one_plus
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from halfbyte.layers.kernels.cpu import norm

        x, w, rstd = ctx.saved_tensors
        return norm.rms_norm_backward(grads[0].contiguous(), x, w, rstd, one_plus=ctx.one_plus), None, None, None


class Gated(torch.autograd.Function):
    """act(g) * u. g, u: (N, I) contiguous."""

    @staticmethod
    def forward(ctx: FunctionCtx, g: Tensor, u: Tensor, kind: int) -> Tensor:
        from halfbyte.layers.kernels.cpu import gate

        ctx.save_for_backward(g, u)
        ctx.kind = kind
        return gate.gated(g, u, kind)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from halfbyte.layers.kernels.cpu import gate

        g, u = ctx.saved_tensors
        return *gate.gated_backward(grads[0].contiguous(), g, u, ctx.kind), None


def rms_norm(x: Tensor, w: Tensor, eps: float, *, one_plus: bool) -> Tensor:
    """(..., D) -> (..., D)."""
    if available(x, w) and x.dtype == w.dtype:
        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = RmsNorm.apply(flat.contiguous(), w, eps, one_plus)
        return y.view(x.shape)
    return rms_norm_formula(x, w, eps, one_plus=one_plus)


def rms_norm_formula(x: Tensor, w: Tensor, eps: float, *, one_plus: bool) -> Tensor:
    """As transformers has it: llama rounds before it multiplies with the weight, gemma after."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normal * (1.0 + w.float())).to(x.dtype) if one_plus else w * normal.to(x.dtype)


def gated(g: Tensor, u: Tensor, kind: int) -> Tensor:
    """act(g) * u, elementwise."""
    if available(g, u) and g.is_contiguous() and u.is_contiguous() and g.dtype == u.dtype:
        h: Tensor = Gated.apply(g, u, kind)
        return h
    return (F.silu(g) if kind == SILU else F.gelu(g, approximate="tanh")) * u
