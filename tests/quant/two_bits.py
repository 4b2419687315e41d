"""A number format of this test's own, as one file: 2 bits a weight and an fp32 scale for each block of 16.

w = (code - 1.5) x scale, with a code of 0 to 3 and a scale by which the block's largest number is kept. Its reference
is `reference`, in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfbyte.quant.number_format import NumberFormat, StoredPart, own_weight
from halfbyte.recipe.schema import Quant

BLOCK = 16


def encoded(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes (n / 4,) uint8, four a byte, the first in its lowest bits; scales (n / 16,) fp32) of (n,) fp32."""
    blocks = flat.reshape(-1, BLOCK)
    scales = np.abs(blocks).max(1) / np.float32(1.5)
    steps = np.where(scales > 0, scales, 1)[:, None]
    codes = np.clip(np.rint(blocks / steps + np.float32(1.5)), 0, 3).astype(np.uint8).reshape(-1, 4)
    return (codes << np.arange(0, 8, 2, dtype=np.uint8)).sum(1).astype(np.uint8), scales.astype(np.float32)


def reference(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The numbers that codes and scales stand for, (n,) fp64."""
    two_bits = (codes[:, None] >> np.arange(0, 8, 2)) & 3
    return ((two_bits.reshape(-1, BLOCK) - 1.5) * scales[:, None].astype(np.float64)).reshape(-1)


@dataclass(frozen=True)
class TwoBits(NumberFormat):
    source: str = "tests"

    def nbytes(self, shape: tuple[int, ...], quant: Quant) -> int:
        return sum(part.nbytes or 0 for part in self.parts(shape, quant))

    def parts(self, shape: tuple[int, ...], quant: Quant) -> tuple[StoredPart, ...]:
        numel = math.prod(shape)
        return (
            StoredPart("", "U8", (numel // 4,), numel // 4),
            StoredPart(".scales", "F32", (numel // BLOCK,), 4 * numel // BLOCK),
        )

    def unit(self, shape: tuple[int, ...], quant: Quant) -> int:
        return BLOCK

    def encoding_bytes(self, count: int, shape: tuple[int, ...], quant: Quant) -> int:
        return 6 * count

    def encoder(self, quant: Quant, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> TwoBitEncoder:
        return TwoBitEncoder(shape)

    def layer(self, parts: Mapping[str, Tensor], shape: tuple[int, int], quant: Quant, dtype: torch.dtype) -> nn.Module:
        layer = TwoBitLinear(shape[1], shape[0], bias=False, device="meta", dtype=dtype)
        weight: Any = nn.Parameter(parts[""], requires_grad=False)
        weight.two_bits, weight.scales, weight.matrix = self, parts[".scales"], shape
        layer.weight = weight
        return layer

    def holds(self, module: nn.Module) -> bool:
        return getattr(own_weight(module), "two_bits", None) == self

    def weight(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8)
        codes = (module.weight.data[:, None] >> shifts & 3).view(-1, BLOCK)
        values = (codes.float() - 1.5) * module.weight.scales[:, None]
        return values.view(module.weight.matrix).to(dtype)

    def multiplies_in(self, module: nn.Module, dtype: torch.dtype) -> bool:
        return True

    def beside(self, module: nn.Module) -> Iterator[tuple[object, str]]:
        yield module.weight, "scales"

    def definition(self, module: nn.Module, positions: np.ndarray) -> np.ndarray:
        return reference(module.weight.data.numpy(), module.weight.scales.numpy())[positions]

    def kind_of(self, module: nn.Module) -> tuple[object, ...]:
        return (module.weight.matrix, self.name)


class TwoBitLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, TWO_BITS.weight(self, x.dtype), self.bias)


class TwoBitEncoder:
    def __init__(self, shape: tuple[int, ...]) -> None:
        self.scales = np.empty(math.prod(shape) // BLOCK, np.float32)

    def codes(self, first: int, values: Tensor) -> np.ndarray:
        codes, scales = encoded(values.detach().float().reshape(-1).numpy())
        self.scales[first // BLOCK : first // BLOCK + len(scales)] = scales
        return codes

    def decoded(self, codes: np.ndarray, first: int, out: Tensor) -> Tensor:
        scales = self.scales[first // BLOCK : first // BLOCK + out.numel() // BLOCK]
        return out.copy_(torch.from_numpy(reference(codes, scales)).view(out.shape))

    def code_bytes(self, first: int) -> int:
        return first // 4

    def parts(self) -> dict[str, Tensor]:
        return {".scales": torch.from_numpy(self.scales)}


TWO_BITS = TwoBits("two_bits")
