"""A linear layer, quantised or not, with LoRA or without, as operations of a tape.

Why: the bytes of the base are read where they are, in memory or in a mapped file; only LoRA, which trains in fp32, is
copied, in the dtype that its product is computed in.
Cost: of a LoRA of rank 16 on all linears of a 7B model 80 MB in bf16.
Several adapters in one tape (`TextAdapters`): their A stand below each other, their B side by side, and a text gets
zeros from the A of the other adapters. So the base is read once for all texts, and each text's sum is the one that it
has with its adapter alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.layers import fuse
from halfbyte.layers.decoding.tape import Scales, Tape, TextAdapters, Vectors
from halfbyte.quant import formats
from halfbyte.quant.number_format import BlockRows, Codes

_BLOCK = 64
_PIECE_BYTES = 32
_DENSE = {"Conv1D", "FalconLinear"}  # a linear layer under another name


class Unsupported(Exception):
    """Why a module is left to its own forward."""


@dataclass(frozen=True)
class LoraFactors:
    a: Tensor  # (R, D)
    b: Tensor  # (O, R)
    scale: float
    uses: Tensor | None = None  # (M,) fp32, 0.0 where a text does not use it


@dataclass(frozen=True)
class Parts:
    """A linear layer: what is frozen, and what LoRA adds to it."""

    base: nn.Module
    loras: tuple[LoraFactors, ...] = ()


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
    return Parts(module.base_layer, (_lora(module, name),))


def _lora(module: nn.Module, name: str, uses: Tensor | None = None) -> LoraFactors:
    return LoraFactors(module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name]), uses)


def parts_of_all(module: nn.Module, adapters: TextAdapters) -> Parts:
    """The same with all adapters, whichever is active. Raises Unsupported likewise."""
    if not fuse.is_lora(module):
        return Parts(module)
    if module.merged:
        raise Unsupported("LoRA: merged")
    names = [name for name in adapters.names if name in module.lora_A]
    if reason := fuse.not_plain(module, names):
        raise Unsupported(f"LoRA: {reason}")
    return Parts(module.base_layer, tuple(_lora(module, n, adapters.uses[adapters.names.index(n)]) for n in names))


def scales_of(codes: Codes) -> Scales:
    nested = codes.nested
    if nested is None:
        return Scales(codes.scales.float())
    if nested.block != 256 or codes.scales.dtype != torch.uint8:
        raise Unsupported(f"scales quantised in blocks of {nested.block}")
    return Scales(codes.scales, nested.scales.float(), nested.values.float(), nested.offset)


class Linear:
    """A layer's part of a tape: `down` is LoRA's first product, `up` the rest, in a later group."""

    def __init__(self, tape: Tape, module: nn.Module) -> None:
        adapters = tape.adapters
        self.tape, parts = tape, parts_of(module) if adapters is None else parts_of_all(module, adapters)
        self.base, self.loras = parts.base, parts.loras
        self.a: list[Tensor] = []
        self.b: Tensor | None = None
        self.h: Tensor | None = None
        self.dense: Tensor | BlockRows = parts.base.weight.data
        number_format, weight = formats.of_module(parts.base), parts.base.weight
        if weight.device.type != "cpu":
            raise Unsupported("not on the CPU")
        self.codes = number_format.codes(parts.base)
        rows = number_format.block_rows(parts.base) if self.codes is None else None
        # what its product adds LoRA to itself
        self.is_codes = self.codes is not None or (
            rows is not None and tape.block_rows.multiplies(rows.kind, rows.shape[1], tape.isa)
        )
        if self.codes is not None:
            self.shape = self.codes.shape
            if self.codes.block != _BLOCK or self.shape[1] % _BLOCK:
                raise Unsupported(f"shape {self.shape} in blocks of {self.codes.block}")
        elif rows is not None:
            self.dense, self.shape = rows, rows.shape
        elif (type(parts.base) is nn.Linear or type(parts.base).__name__ in _DENSE) and (
            weight.dtype == tape.dtype and weight.is_contiguous()
        ):
            turned = type(parts.base).__name__ == "Conv1D"  # GPT-2's, (D, O)
            self.dense = weight.data.T.contiguous() if turned else weight.data
            self.shape = (self.dense.shape[0], self.dense.shape[1])
        else:
            raise Unsupported(f"{type(parts.base).__name__} in {number_format.name}, {weight.dtype}")
        self.bias = parts.base.bias
        if parts.loras:
            copies: dict[nn.Module, tuple[list[Tensor], Tensor]] = {} if adapters is None else adapters.copies
            if module not in copies:
                copies[module] = [x.a.detach().to(tape.dtype).contiguous() for x in parts.loras], self._side_by_side()
            self.a, self.b = copies[module]
            ranks = sum(map(self._columns, parts.loras))
            self.h = tape.buffer(tape.m, ranks, dtype=tape.dtype if self.is_codes else torch.float32)

    def _columns(self, lora: LoraFactors) -> int:
        """Columns of its B: with codes whole pieces."""
        piece = _PIECE_BYTES // self.tape.dtype.itemsize if self.is_codes else 1
        return -(-lora.a.shape[0] // piece) * piece

    def _side_by_side(self) -> Tensor:
        """All B (O, R), padded with zeros; with LoRA's scale where `down` does not multiply by it. Beside codes in fp32
        it is (R, O), in rows of whole 16, as many as it has rows in bf16."""
        o, ranks = self.shape[0], sum(map(self._columns, self.loras))
        b, at = torch.zeros((-(-o // 16) * 16 if self.is_codes else o, ranks), dtype=self.tape.dtype), 0
        for lora in self.loras:
            b[:o, at : at + lora.a.shape[0]] = lora.b.detach() if self.is_codes else lora.b.detach() * lora.scale
            at += self._columns(lora)
        if self.is_codes and self.tape.isa == "avx2":
            return b.T.contiguous()
        return b

    def down(self, x: Vectors) -> None:
        """h = s x A^T, where there is LoRA; and x as codes read it."""
        at = 0
        if self.codes is not None:
            self.tape.order(x)
        for lora, a in zip(self.loras, self.a, strict=True):
            assert self.h is not None
            out = self.h[:, at : at + a.shape[0]]
            self.tape.dense(a, x.plain, out, scale=lora.scale if self.is_codes else 0.0, uses=lora.uses)
            at += self._columns(lora)

    def up(self, x: Vectors, out: Tensor, *, add: bool = False) -> None:
        """out (M, O) = or += x W^T + bias + h B^T."""
        if self.codes is not None:
            self.tape.codes(
                self.codes.packed, scales_of(self.codes), self.codes.values, self.shape, x, out,
                add=add, bias=self.bias, up=self.b, h=self.h,
            )  # fmt: skip
            return
        if self.is_codes and isinstance(self.dense, BlockRows):
            self.tape.blocks(self.dense, x, out, add=add, bias=self.bias, up=self.b, h=self.h)
            return
        self.tape.dense(self.dense, x.plain, out, add=add, bias=self.bias)
        if self.b is not None and self.h is not None:
            self.tape.then()
            self.tape.dense(self.b, self.h, out, add=True)


def write(tape: Tape, x: Vectors, layers: list[tuple[nn.Module, Tensor]], *, add: bool = False) -> None:
    """Layers that read the same x: (module, out (M, O)); `add`: onto what is in `out`. Ends its last group."""
    linears = [(Linear(tape, module), out) for module, out in layers]
    for linear, _ in linears:
        linear.down(x)
    tape.then()
    for linear, out in linears:
        linear.up(x, out, add=add)
    tape.then()
