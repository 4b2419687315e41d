"""A frozen linear layer with LoRA as one autograd function: y = x W^T + b + s (drop(x) A^T) B^T.

Why: PEFT's layer casts x to fp32 and back, keeps four tensors of x's size for backward, draws its dropout mask one
Bernoulli number at a time, and bitsandbytes keeps what it dequantised from alive through ctx. Here the base is
dequantised on the fly, twice a step, into memory that is free again at once; x and the (N, R) intermediate are all that
is kept; dropout's mask is made again from its seed where there are kernels.
Order: LoRA's part comes first and the base's product is accumulated onto it, so that their sum is rounded once. The
other way round the base is rounded to bf16 before, and what a young adapter adds is mostly below half a unit of that,
and vanishes: of 5e-4 on outputs about 1, 28% came through, and the first steps learned visibly less (docs/log).
Source: LoRA, arXiv:2106.09685 section 4.1; `peft/tuners/lora/layer.py` and `bnb.py` for the meaning of every flag.
Cost: 4 N D O FLOP a step and layer, 1 / (2 N) of that for dequantising, R / D for LoRA.

Letters: N tokens, D in, O out, R rank.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from halfbyte.layers.kernels import dropout, pool
from halfbyte.layers.kernels.cpu import available, lora_products
from halfbyte.layers.kernels.cpu.integer import products as integer
from halfbyte.layers.kernels.cpu.matmul import into, product
from halfbyte.layers.kernels.dropout import LoraPart
from halfbyte.layers.shared_input import SharedGradient, join
from halfbyte.quant import formats
from halfbyte.quant.dequantise import FrozenLinear

if TYPE_CHECKING:
    from halfbyte.layers.kernels.cpu.lora.common import LoraProducts

# Where kernels are at hand the mask is a hash of (seed, position), or of what `kernels.dropout` says; elsewhere it is
# made once and kept, a byte a number.
Seed = int | dropout.TokenSeed

# Under this name a tensor carries the way to make it again (`Remake`), where recomputation is selective.
REMAKE = "_halfbyte_remake"


class Remake:
    """A tensor that is cheap to make again from what is kept anyway. Made once for all that were promised it."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make: Callable[[], Tensor] | None = make
        self._value: Tensor | None = None
        self._promises = 0

    def promise(self) -> Self:
        self._promises += 1
        return self

    def take(self) -> Tensor:
        if self._value is None:
            if self._make is None:
                raise RuntimeError("backward a second time through a graph whose buffers are freed")
            with torch.no_grad():
                self._value = self._make()
        value = self._value
        self._promises -= 1
        if self._promises <= 0:
            self._value = self._make = None
        return value


def frozen_weight(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    """The (O, D) matrix that `layer` multiplies with, in `dtype`: dequantised, or the weight itself. To be used at
    once: a dequantised one is in memory that the next call overwrites."""
    weight = formats.of_module(layer).weight(layer, dtype)
    return weight if weight.dtype == dtype else weight.to(dtype)


def integer_weight(layer: nn.Module, dtype: torch.dtype) -> integer.Weight:
    """The weight of `layer` for an integer product: its codes, or `frozen_weight` in pieces of rows, in their order,
    each to be used before the next is asked for."""
    number_format = formats.of_module(layer)
    codes = number_format.codes(layer) or number_format.block_rows(layer)
    return codes if codes is not None and integer.takes(codes, dtype) else _pieces(layer, dtype)


def _pieces(layer: nn.Module, dtype: torch.dtype) -> Iterator[Tensor]:
    for piece in formats.of_module(layer).pieces(layer, dtype, integer.rows_of_piece(layer.in_features)):
        yield piece if piece.dtype == dtype else piece.to(dtype)


def frozen_input(layer: nn.Module, x: Tensor) -> Tensor:
    """What the frozen weight is multiplied with: x, or x rounded as the layer's format says. Its gradient is x's."""
    return formats.of_module(layer).inputs(layer, x)


def integer_input(layer: nn.Module, x: Tensor) -> integer.Int8Rows | None:
    """x in 8 bits where the layer's forward product is an integer one now, else None."""
    products = integer.products_of(layer, x)
    return integer.round_rows(frozen_input(layer, x)) if products is not None and products.forward else None


def integer_gradient(layer: nn.Module, x: Tensor) -> bool:
    """Whether the product of the gradient of the input x is an integer one."""
    products = integer.products_of(layer, x)
    return products is not None and products.backward


def frozen_forward(
    layer: nn.Module, x: Tensor, bias: Tensor | None, *, rounded: integer.Int8Rows | None = None
) -> Tensor:
    """x W^T + b (N, O) for a frozen W; `rounded`: x in 8 bits, for an integer product."""
    if rounded is None:
        return product(frozen_input(layer, x), frozen_weight(layer, x.dtype).T, bias)
    y = pool.empty((x.shape[0], layer.out_features), x)
    integer.forward(y, rounded, integer_weight(layer, x.dtype), add=False)
    return y if bias is None else y.add_(bias)


def frozen_backward(
    layer: nn.Module, dy: Tensor, dtype: torch.dtype, *, eight_bits: bool = False, shared: SharedGradient | None = None
) -> Tensor | None:
    """The gradient of x, dy W (N, D); `eight_bits`: by an integer product."""

    def add_to(total: Tensor | None) -> Tensor:
        dx = pool.empty((dy.shape[0], layer.in_features), dy) if total is None else total
        if not eight_bits:
            return into(dx, dy, frozen_weight(layer, dtype), add=total is not None)
        integer.backward(dx, dy, integer_weight(layer, dtype), add=total is not None)
        return dx

    return add_to(None) if shared is None else shared.give(add_to)


class LoraLinear(torch.autograd.Function):
    """x W^T + b + scale (drop(x) A^T) B^T for a frozen W and trained A, B (and b, if it trains).

    Args of `apply`:
        x: (N, D) in the compute dtype. a: (R, D), b: (O, R), masters of any float dtype. bias: (O,) or None.
        layer: the module that holds W. scale: LoRA's. p: dropout. seed: of the mask. remake: makes x again in backward,
        where it is then not kept; None keeps it. rounded: x in 8 bits, for an integer product.
        gradient8: whether the gradient's product is one. shared: of all that read x, their gradient of it.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, layer: nn.Module,
        scale: float, p: float, seed: Seed, remake: Remake | None = None,
        rounded: integer.Int8Rows | None = None, gradient8: bool = False, shared: SharedGradient | None = None,
    ) -> Tensor:  # fmt: skip
        scale = scale / (1 - p) if p else scale
        a16, b16 = a.to(x.dtype), b.to(x.dtype)
        h, mask = lora_down(x, a16, p, seed)
        y = pool.empty((x.shape[0], b16.shape[0]), x)
        lora = LoraPart(h, b16.T, scale)
        fused = rounded is not None and integer.takes_lora(lora)
        if not fused:
            y.addmm_(h, b16.T, beta=0, alpha=scale)  # (N, R) @ (R, O) -> (N, O)
        if rounded is not None:
            integer.forward(y, rounded, integer_weight(layer, x.dtype), add=not fused, lora=lora if fused else None)
        else:
            into(y, frozen_input(layer, x), frozen_weight(layer, x.dtype).T, add=True)  # (N, D) @ (D, O)
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(None if remake else x, h, a16, b16, mask)
        ctx.layer, ctx.gradient8 = layer, gradient8
        ctx.shared = shared
        ctx.scale, ctx.p = scale, p
        ctx.seed = seed
        ctx.remake = remake.promise() if remake else None
        ctx.dtypes = (a.dtype, b.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x, h, a16, b16, mask = ctx.saved_tensors
        if ctx.remake is not None:
            x = ctx.remake.take().view(-1, a16.shape[1])
        da = db = dbias = dx = None
        skinny = _ours(dy, 0.0)
        dh = (lora_down(dy, b16.T, 0.0, 0)[0] if skinny else dy @ b16).mul_(ctx.scale)  # (N, O) @ (O, R) -> (N, R)
        if ctx.needs_input_grad[2]:
            # (R, N) @ (N, O) -> (R, O), then turned: 1.7 times as fast on a CPU as (O, N) @ (N, R)
            db = lora_gradient(h, dy, b16.T, 0.0, 0, None) if skinny else h.T @ dy
            db = db.mul_(ctx.scale).T.to(ctx.dtypes[1], memory_format=torch.contiguous_format)
        if ctx.needs_input_grad[1]:
            da = lora_gradient(dh, x, a16, ctx.p, ctx.seed, mask).to(ctx.dtypes[0])
        if ctx.needs_input_grad[0]:
            part = partial(_add_gradient, ctx, dy, LoraPart(dh, a16, 1.0, ctx.p, ctx.seed), mask)
            dx = part(None) if ctx.shared is None else ctx.shared.give(part)
        if ctx.needs_input_grad[3]:
            dbias = dy.sum(0, dtype=torch.float32).to(ctx.dtypes[2])
        return dx, da, db, dbias, None, None, None, None, None, None, None, None


def _add_gradient(ctx: FunctionCtx, dy: Tensor, lora: LoraPart, mask: Tensor | None, total: Tensor | None) -> Tensor:
    """The gradient of x (N, D), dy W and LoRA's part, added to `total` where there is one."""
    fused = ctx.gradient8 and total is None and mask is None and integer.takes_lora(lora)
    if fused:
        dx = pool.empty((dy.shape[0], lora.right.shape[1]), dy)
    else:
        dx = lora_up(lora.left, lora.right, ctx.p, ctx.seed, mask, total)
    if ctx.gradient8:
        weight = integer_weight(ctx.layer, dy.dtype)
        integer.backward(dx, dy, weight, add=not fused, lora=lora if fused else None)
        return dx
    return into(dx, dy, frozen_weight(ctx.layer, dy.dtype), add=True)  # (N, O) @ (O, D)


def _ours(x: Tensor, p: float) -> bool:
    """Whether a kernel of ours is faster than a library's product: where it drops, and in fp32."""
    return p > 0 or x.dtype == torch.float32


def lora_down(x: Tensor, a: Tensor, p: float, seed: Seed) -> tuple[Tensor, Tensor | None]:
    """drop(x) A^T, (N, D) and (R, D) -> (N, R), and the mask where it has to be kept."""
    if _ours(x, p) and lora_products(x, a):
        return _lora(x.dtype).down(x, a, p, seed), None
    dropped, mask = drop(x, p, seed) if p else (x, None)
    return dropped @ a.T, mask


def lora_gradient(dh: Tensor, x: Tensor, a: Tensor, p: float, seed: Seed, mask: Tensor | None) -> Tensor:
    """The gradient of A: dh^T drop(x), (N, R) and (N, D) -> (R, D)."""
    if mask is None and lora_products(x, a):
        return _lora(x.dtype).gradient(dh, x, p, seed)
    return dh.T @ (drop(x, p, seed, mask)[0] if p else x)


def lora_up(dh: Tensor, a: Tensor, p: float, seed: Seed, mask: Tensor | None, total: Tensor | None = None) -> Tensor:
    """LoRA's part of the gradient of x: drop(dh A), (N, R), (R, D) -> (N, D), added to `total` where there is one."""
    if _ours(dh, p) and mask is None and lora_products(dh, a):
        return _lora(dh.dtype).up(dh, a, p, seed, total)
    if total is not None and not p:
        return into(total, dh, a, add=True)
    dx = product(dh, a)
    if p:
        drop_(dx, p, seed, mask)
    return dx if total is None else total.add_(dx)


@cache
def _lora(dtype: torch.dtype) -> "LoraProducts":
    """The kernels for these products in a dtype; compiled when they are first asked for."""
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    return import_module(f"halfbyte.layers.kernels.cpu.lora.{name}").PRODUCTS


def drop(x: Tensor, p: float, seed: Seed, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """x with dropped numbers set to 0, unscaled; and the mask where it has to be kept."""
    numbers = x.shape[-1] if isinstance(seed, dropout.TokenSeed) else x.numel()  # a word of two never crosses a row
    if available(x) and x.is_contiguous() and numbers % 2 == 0:
        out = pool.empty_like(x)
        _drop_by_hash(x, out, p, seed)
        return out, None
    if mask is None and isinstance(seed, dropout.TokenSeed):
        mask = dropout.keep_mask(seed, x.shape, p, x.device)
    elif mask is None:
        generator = torch.Generator(device=x.device).manual_seed(seed)
        mask = torch.rand(x.shape, device=x.device, generator=generator) >= p
    return x * mask, mask


def drop_(x: Tensor, p: float, seed: Seed, mask: Tensor | None) -> None:
    """Set to 0 in x what `drop` sets to 0 in a tensor of its shape."""
    if mask is not None:
        x.mul_(mask)
    else:
        _drop_by_hash(x, x, p, seed)


def _drop_by_hash(x: Tensor, out: Tensor, p: float, seed: Seed) -> None:
    from halfbyte.layers.kernels.cpu import gate

    if isinstance(seed, dropout.TokenSeed):
        gate.drop_rows(x, out, p, seed.seed, seed.keys)
    else:
        gate.drop(x, out, p, seed)


def frozen_linear(x: Tensor, layer: nn.Module, *, bias_after: bool = False) -> Tensor:
    """(..., D) -> (..., O) through a frozen layer. `bias_after`: the product is rounded before its bias is added, as it
    is beside LoRA."""
    forward = partial(frozen_forward, rounded=integer_input(layer, x))
    backward = partial(frozen_backward, eight_bits=integer_gradient(layer, x), shared=join(x))
    bias = None if bias_after else layer.bias
    y: Tensor = FrozenLinear.apply(x.reshape(-1, x.shape[-1]), bias, layer, forward, backward)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return (y + layer.bias).to(y.dtype) if bias is not layer.bias else y


def lora_linear(x: Tensor, layer: nn.Module, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
    """(..., D) -> (..., O) through a frozen layer and its LoRA; p is 0 outside training."""
    flat = x.reshape(-1, x.shape[-1])
    remake = getattr(x, REMAKE, None) if torch.is_grad_enabled() else None
    seed: Seed = 0
    if p:
        seed = dropout.token_seed(layer, flat, by_kernel=available(flat)) or dropout.draw_seed()
    eight = integer_input(layer, x), integer_gradient(layer, x)
    y = LoraLinear.apply(flat, a, b, layer.bias, layer, scale, p, seed, remake, *eight, join(x))
    return y.view(*x.shape[:-1], y.shape[-1])
