"""A linear layer, quantised or not, with LoRA or without, as operations of a tape.

Why: the bytes of the base are read where they are, in memory or in a mapped file; only LoRA, which trains in fp32, is
copied, in the dtype that its product is computed in.
Cost: of a LoRA of rank 16 on all linears of a 7B model 80 MB in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.layers import fuse
from halfbyte.layers.decoding.tape import Scales, Tape, Vectors
from halfbyte.quant import formats

_BLOCK = 64
_PIECE_BYTES = 32


class Unsupported(Exception):
    """Why a module is left to its own forward."""


@dataclass(frozen=True)
class Parts:
    """A linear layer: what is frozen, and what LoRA adds to it."""

    base: nn.Module
    a: Tensor | None = None  # (R, D)
    b: Tensor | None = None  # (O, R)
    scale: float = 1.0


def parts_of(module: nn.Module) -> Parts:
    """Raises Unsupported where the layer does more than y = x W^T + bias + s (x A^T) B^T."""
    if not fuse.is_lora(module):
        return Parts(module)
    reason = fuse.unfused_reason(module)
    if reason in (fuse.ADAPTERS_DISABLED, fuse.NO_ADAPTER):
        return Parts(module.base_layer)
    if reason:
        raise Unsupported(f"LoRA: {reason}")
    (name,) = module.active_adapters
    if name not in module.lora_A:
        return Parts(module.base_layer)
    return Parts(module.base_layer, module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


def scales_of(module: nn.Module) -> Scales:
    state = module.weight.quant_state
    if not state.nested:
        return Scales(state.absmax.float())
    outer = state.state2
    if outer.blocksize != 256 or state.absmax.dtype != torch.uint8:
        raise Unsupported(f"scales quantised in blocks of {outer.blocksize}")
    return Scales(state.absmax, outer.absmax.float(), outer.code.float(), float(state.offset))


class Linear:
    """A layer's part of a tape: `down` is LoRA's first product, `up` the rest, in a later group."""

    def __init__(self, tape: Tape, module: nn.Module) -> None:
        self.tape, parts = tape, parts_of(module)
        self.base = parts.base
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        self.h: Tensor | None = None
        self.held = formats.of_module(parts.base)
        weight = parts.base.weight
        if weight.device.type != "cpu":
            raise Unsupported("not on the CPU")
        self.is_codes = self.held.name in ("nf4", "fp4")
        if self.is_codes:
            state = weight.quant_state
            self.shape = (int(state.shape[0]), int(state.shape[1]))
            if len(state.shape) != 2 or state.blocksize != _BLOCK or self.shape[1] % _BLOCK:
                raise Unsupported(f"shape {tuple(state.shape)} in blocks of {state.blocksize}")
        elif type(parts.base) is nn.Linear and weight.dtype == tape.dtype and weight.is_contiguous():
            self.shape = (weight.shape[0], weight.shape[1])
        else:
            raise Unsupported(f"{type(parts.base).__name__} in {self.held.name}, {weight.dtype}")
        self.bias = parts.base.bias
        if parts.a is not None and parts.b is not None:
            self._with_lora(parts.a, parts.b, parts.scale)

    def _with_lora(self, a: Tensor, b: Tensor, scale: float) -> None:
        dtype, rank = self.tape.dtype, a.shape[0]
        self.a, self.scale = a.detach().to(dtype).contiguous(), float(scale)
        if not self.is_codes:
            self.b, self.h = (b.detach() * scale).to(dtype).contiguous(), self.tape.buffer(self.tape.m, rank)
            return
        piece = _PIECE_BYTES // dtype.itemsize
        wide = -(-rank // piece) * piece
        padded = torch.zeros((b.shape[0], wide), dtype=dtype)
        padded[:, :rank] = b.detach()
        self.b = padded
        self.h = self.tape.buffer(self.tape.m, wide, dtype=dtype)

    def down(self, x: Vectors) -> None:
        """h = s x A^T, where there is LoRA."""
        if self.a is not None and self.h is not None:
            self.tape.dense(self.a, x.plain, self.h, scale=self.scale if self.is_codes else 0.0)

    def up(self, x: Vectors, out: Tensor, *, onto: bool = False) -> None:
        """out (M, O) = or += x W^T + bias + h B^T."""
        if self.is_codes:
            self.tape.codes(
                self.base.weight.data, scales_of(self.base), self.held.name, self.shape, x, out,
                onto=onto, bias=self.bias, up=self.b, h=self.h,
            )  # fmt: skip
            return
        self.tape.dense(self.base.weight.data, x.plain, out, onto=onto, bias=self.bias)
        if self.b is not None and self.h is not None:
            self.tape.then()
            self.tape.dense(self.b, self.h, out, onto=True)


def add(tape: Tape, x: Vectors, layers: list[tuple[nn.Module, Tensor, bool]]) -> None:
    """Layers that read the same x: (module, out (M, O), whether onto it). Ends its last group."""
    made = [(Linear(tape, module), out, onto) for module, out, onto in layers]
    for linear, _, _ in made:
        linear.down(x)
    tape.then()
    for linear, out, onto in made:
        linear.up(x, out, onto=onto)
    tape.then()
