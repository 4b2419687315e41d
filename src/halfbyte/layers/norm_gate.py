"""Norms, activations, a model's own dropout and the sums of a residual stream as autograd functions over the kernels,
each with its formula beside it.

Cost: a norm keeps its input and one fp32 a row (a layer norm two); a gate its two inputs, an activation its one; a sum
and dropout keep nothing.
Letters: N rows, D width, I the MLP's inner width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.cpu import available
from halfbyte.layers.kernels.dropout import TokenSeed

aten = torch.ops.aten

SILU, GELU_TANH, GELU, RELU2 = range(4)
GATES = SILU, GELU_TANH, GELU  # of an MLP that a kernel has
_APPROXIMATE = {GELU_TANH: "tanh", GELU: "none"}
ACTIVATIONS = {"silu": SILU, "swish": SILU, "gelu_pytorch_tanh": GELU_TANH, "gelu_new": GELU_TANH}


@dataclass(frozen=True)
class NormKind:
    """Which formula a norm computes: * w or * (1 + w), of x / rms(x), or `centred`, of x less its mean."""

    one_plus: bool = False
    centred: bool = False


class Norm(torch.autograd.Function):
    """x itself, for a sum behind the norm, and its norm. Both gradients of x are added while the norm's is made. Weight
    and bias are frozen. x: (N, D) contiguous, in w's dtype."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, w: Tensor, bias: Tensor | None, eps: float, kind: NormKind
    ) -> tuple[Tensor, Tensor]:
        from halfbyte.layers.kernels.cpu import norm

        y, rstd, mean = norm.norm(x, w, eps, one_plus=kind.one_plus, centred=kind.centred, bias=bias)
        ctx.save_for_backward(x, w, rstd, mean)
        ctx.one_plus = kind.one_plus
        ctx.set_materialize_grads(False)
        return x, y

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from halfbyte.layers.kernels.cpu import norm

        (x, w, rstd, mean), (beside, dy) = ctx.saved_tensors, grads
        if dy is None:
            return beside, None, None, None, None
        beside = None if beside is None else beside.contiguous()
        dx = norm.norm_backward(dy.contiguous(), x, w, rstd, mean, one_plus=ctx.one_plus, beside=beside)
        return dx, None, None, None, None


class ResidualSum(torch.autograd.Function):
    """x + factor y in memory of the pool. Both of one shape and dtype."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, y: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return torch.add(x, y, alpha=factor, out=pool.empty_like(x))

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        dy = grads[0] if ctx.factor == 1.0 else torch.mul(grads[0], ctx.factor, out=pool.empty_like(grads[0]))
        return grads[0], dy, None


class Glu(torch.autograd.Function):
    """act(scale g) * u of g and u (.., I), or of one with both side by side (.., 2 I): contiguous, of at least two
    axes."""

    @staticmethod
    def forward(ctx: FunctionCtx, kind: int, scale: float, *given: Tensor) -> Tensor:
        from halfbyte.layers.kernels.cpu import gate

        ctx.save_for_backward(*given)
        ctx.kind, ctx.scale = kind, scale
        g, u = given if len(given) == 2 else given[0].chunk(2, -1)
        return gate.glu(g, u, kind, scale)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from halfbyte.layers.kernels.cpu import gate

        given = ctx.saved_tensors
        out = [pool.empty_like(x) for x in given]
        (g, u), (dg, du) = (xs if len(xs) == 2 else xs[0].chunk(2, -1) for xs in (given, out))
        gate.glu_backward(grads[0].contiguous(), g, u, ctx.kind, dg, du, ctx.scale)
        return None, None, *out


class Activation(torch.autograd.Function):
    """act(x) in memory of the pool; keeps x. x: contiguous. SILU and GELU by tanh by our kernels, others by torch's."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, kind: int) -> Tensor:
        from halfbyte.layers.kernels.cpu import gate

        ctx.save_for_backward(x)
        ctx.kind = kind
        out = pool.empty_like(x)
        if kind in ACTIVATIONS.values():
            gate.activation(x, out, kind)
        elif kind == RELU2:
            torch.clamp_min(x, 0, out=out).square_()
        else:
            aten.gelu.out(x, out=out)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        from halfbyte.layers.kernels.cpu import gate

        (x,), dy = ctx.saved_tensors, grads[0].contiguous()
        dx = pool.empty_like(x)
        if ctx.kind in ACTIVATIONS.values():
            gate.activation_backward(dy, x, dx, ctx.kind)
        elif ctx.kind == RELU2:
            torch.clamp_min(x, 0, out=dx).mul_(dy).mul_(2)
        else:
            aten.gelu_backward.grad_input(dy, x, grad_input=dx)
        return dx, None


class Dropout(torch.autograd.Function):
    """x (N, D) where the mask of a seed keeps it, over 1 - p, else 0; D even. The mask is made again in backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, p: float, seed: TokenSeed) -> Tensor:
        from halfbyte.layers.kernels.cpu import gate

        ctx.p, ctx.seed = p, seed
        out = pool.empty_like(x)
        gate.drop_rows(x, out, p, seed.seed, seed.keys)
        return out.mul_(1 / (1 - p))

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None]:
        return Dropout.forward(ctx, grads[0].contiguous(), ctx.p, ctx.seed), None, None


def norm(x: Tensor, w: Tensor, eps: float, kind: NormKind, bias: Tensor | None = None) -> Tensor:
    """(..., D) -> (..., D)."""
    if available(x, w) and x.dtype == w.dtype:
        return residual_and_norm(x, w, eps, kind, bias)[1]
    return norm_formula(x, w, eps, kind, bias)


def residual_and_norm(
    x: Tensor, w: Tensor, eps: float, kind: NormKind, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x, its norm), both (..., D), for a sum with x after the norm. For what `available` says, in w's dtype."""
    residual, y = Norm.apply(x.reshape(-1, x.shape[-1]).contiguous(), w, bias, eps, kind)
    return residual.view(x.shape), y.view(x.shape)


def residual_sum(x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
    """x + factor y, (..., D) each."""
    if not available(x, y) or x.dtype != y.dtype or x.shape != y.shape:
        return x + (y if factor == 1.0 else y * factor)
    return ResidualSum.apply(x, y, factor)


def norm_formula(x: Tensor, w: Tensor, eps: float, kind: NormKind, bias: Tensor | None = None) -> Tensor:
    """As transformers has it: llama rounds before it multiplies with the weight, all others after."""
    wide = x.float()
    wide = wide - wide.mean(-1, keepdim=True) if kind.centred else wide
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if not (kind.one_plus or kind.centred):
        return w * normal.to(x.dtype)
    scaled = normal * (kind.one_plus + w.float())
    return (scaled if bias is None else scaled + bias.float()).to(x.dtype)


def activation(x: Tensor, kind: int) -> Tensor:
    """act(x), elementwise."""
    return Activation.apply(x.contiguous(), kind)


def activation_formula(x: Tensor, kind: int) -> Tensor:
    if kind in _APPROXIMATE:
        return F.gelu(x, approximate=_APPROXIMATE[kind])
    return F.silu(x) if kind == SILU else F.relu(x).square()


def glu(given: Sequence[Tensor], kind: int, scale: float = 1.0) -> Tensor:
    """act(scale g) * u of g and u (.., I), or of one tensor (.., 2 I) with both."""
    plain = all(x.is_contiguous() and x.dim() > 1 and x.dtype == given[0].dtype for x in given)
    if plain and available(*given):
        return Glu.apply(kind, scale, *given)
    g, u = given if len(given) == 2 else given[0].chunk(2, -1)
    g = g * scale if scale != 1.0 else g
    return activation_formula(g, kind) * u
