"""LoRA's part of a result, as the kernel that adds integer sums to it takes it."""

from dataclasses import dataclass

from torch import Tensor

from halfbyte.layers.kernels import dropout


@dataclass(frozen=True)
class Lora:
    """LoRA's part of a result: drop(scale left right). left: (N, R), right: (R, D), bf16. p, seed: of the mask."""

    left: Tensor
    right: Tensor
    scale: float = 1.0
    p: float = 0.0
    seed: int | dropout.Keyed = 0
