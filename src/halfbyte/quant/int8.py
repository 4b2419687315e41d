"""LLM.int8's weights: 8 bits a weight, and a scale for each output row. w = code x scale / 127.

Why a layer of our own: bitsandbytes computes two different functions on a CPU. In training it dequantises and
multiplies in the input's dtype; in evaluation it rounds the activations to 8 bits too, but for columns with outliers:
those that hold a number of at least the threshold in any token that is computed along. So what becomes of a row depends
on its neighbours in the batch. Ours dequantises always. Without a threshold activations are not rounded at all. With
one, each token is rounded by itself, as upstream does it for a token alone; in training too, where the gradient passes
through the rounding unchanged. So an adapter is evaluated with the function that it was trained with, in any batch.
Source: LLM.int8, arXiv:2208.07339; `bitsandbytes/nn/modules.py`, `Int8Params` and `Linear8bitLt`;
`bitsandbytes/autograd/_functions.py`, `MatMul8bitFp` and `MatMul8bitLt`; encoding: `backends/default/ops.py`.
Cost: 8.0 bits a weight and 32 a row; dequantising takes about 1.5 times as long as from NF4.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from halfbyte.errors import BaseModelError
from halfbyte.models.structure import replaced
from halfbyte.quant.number_format import NumberFormat, StoredPart, own_weight
from halfbyte.recipe.schema import Quant
from halfbyte.types import Config, Document

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import BitsAndBytesConfig

    from halfbyte.quant.stack import ExpertStack

LARGEST = 127.0
# bitsandbytes rounds a weight to fp16 first.
FP16_MAX = 65504.0
# The smallest number of fp16 above 0, which stands for no threshold: with it plain transformers takes every column of
# the activations for an outlier, and multiplies it in 16 bits. That is the function that we train.
EVERY_COLUMN = 2.0**-24
# So that a row of zeros can be divided by its step.
_SMALLEST_STEP = 2.0**-126
# Weights that a thread dequantises at a time: their fp32 values stay in its cache.
_PIECE = 1 << 17


@dataclass(frozen=True)
class RowWise8(NumberFormat):
    """`int8`. Codes and scales are bit for bit those of bitsandbytes."""

    source: str = "quant.int8; LLM.int8, arXiv:2208.07339"
    speed: float = 0.65

    def nbytes(self, shape: tuple[int, ...], quant: Quant) -> int:
        return math.prod(shape) + 4 * math.prod(shape[:-1])

    def parts(self, shape: tuple[int, ...], quant: Quant) -> tuple[StoredPart, ...]:
        rows = math.prod(shape[:-1])
        return (
            StoredPart("", "I8", shape, math.prod(shape)),
            StoredPart("SCB", "F32", (rows,), 4 * rows, beside_weight=True),
            StoredPart("weight_format", "U8", (), 1, likely_bytes=1, beside_weight=True),
        )

    def unit(self, shape: tuple[int, ...], quant: Quant) -> int:
        return max(1, shape[-1])

    def encoding_bytes(self, count: int, shape: tuple[int, ...], quant: Quant) -> int:
        return (2 + 4 + 1) * count + 4 * math.prod(shape[:-1])  # fp16, fp32, codes; scales

    def encoder(self, quant: Quant, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> RowEncoder:
        return RowEncoder(shape, name)

    def layer(self, parts: Mapping[str, Tensor], shape: tuple[int, int], quant: Quant, dtype: torch.dtype) -> nn.Module:
        import bitsandbytes as bnb

        layer = self.empty_layer(shape, quant, dtype)
        layer.weight = bnb.nn.Int8Params(parts[""], requires_grad=False, SCB=parts["SCB"])
        return layer

    def empty_layer(self, shape: tuple[int, int], quant: Quant, dtype: torch.dtype) -> nn.Module:
        threshold = activation_threshold(quant)
        return _layer_class()(shape[1], shape[0], False, has_fp16_weights=False, threshold=threshold, device="meta")

    def stack(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], quant: Quant, dtype: torch.dtype
    ) -> ExpertStack:
        from halfbyte.quant.stack import ExpertStack

        return ExpertStack.of(self, parts[""].view(shape), shape, dtype, SCB=parts["SCB"])

    def expert(self, module: nn.Module, e: int, out: Tensor) -> Tensor:
        return write(module.weight.data[e], module.weight.SCB[e * len(out) : (e + 1) * len(out)], out)

    def divided(self, module: nn.Module) -> tuple[Tensor, ...]:
        return module.weight.data, module.weight.SCB

    def load_config(self, quant: Quant, dtype: torch.dtype, head_names: Iterable[str] = ()) -> BitsAndBytesConfig:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_threshold=activation_threshold(quant),
            llm_int8_skip_modules=[*head_names, *quant.exempt] or None,
        )

    def settings_of(self, config: Config) -> Document | None:
        if not config.load_in_8bit:
            return None
        threshold = float(config.llm_int8_threshold)
        return {"type": self.name, "llm_int8_threshold": None if threshold == EVERY_COLUMN else threshold}

    def rounds_inputs(self, quant: Quant) -> bool:
        return quant.llm_int8_threshold is not None

    def without_rounding(self, model: nn.Module) -> AbstractContextManager[None]:
        states = [m.state for m in model.modules() if isinstance(m, _layer_class())]
        return replaced(*((state, "threshold", EVERY_COLUMN) for state in states))

    def settle(self, model: nn.Module) -> None:
        """Make every 8-bit layer one that dequantises always, with its scales where its weight is."""
        if "bitsandbytes" not in sys.modules:  # seconds; who made such a layer has imported it
            return
        import bitsandbytes as bnb

        for module in model.modules():
            if isinstance(module, bnb.nn.Linear8bitLt) and not module.state.has_fp16_weights:
                if getattr(module.weight, "SCB", None) is None and module.state.SCB is not None:  # after a forward
                    module.weight.SCB = module.state.SCB
                module.weight.CB = None
                module.state.reset_grads()
                if type(module) is bnb.nn.Linear8bitLt:
                    module.__class__ = _layer_class()

    def holds(self, module: nn.Module) -> bool:
        return getattr(own_weight(module), "SCB", None) is not None

    def weight(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        from halfbyte.quant.dequantise import scratch

        codes = module.weight.data
        return write(codes, module.weight.SCB.to(codes.device), scratch(codes.shape, dtype, codes.device))

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        threshold = float(module.state.threshold)
        return x if threshold == EVERY_COLUMN else rounded(x, threshold)

    def multiplies_in(self, module: nn.Module, dtype: torch.dtype) -> bool:
        return dtype.is_floating_point

    def beside(self, module: nn.Module) -> Iterator[tuple[object, str]]:
        yield module.weight, "SCB"

    def definition(self, module: nn.Module, positions: np.ndarray) -> np.ndarray:
        codes, scales = module.weight.data.cpu().numpy(), module.weight.SCB.cpu().numpy()
        rows = scales[positions // codes.shape[-1]].astype(np.float64)
        return codes.reshape(-1)[positions].astype(np.float64) * rows / LARGEST

    def kind_of(self, module: nn.Module) -> tuple[object, ...]:
        return (tuple(module.weight.shape), self.name)


class RowEncoder:
    """One matrix on its way into rows of 8 bits, bit for bit as bitsandbytes makes them."""

    def __init__(self, shape: tuple[int, ...], name: str) -> None:
        self.shape, self.name = tuple(shape), name
        self.scales = np.empty(math.prod(shape[:-1]), np.float32)

    def codes(self, first: int, values: Tensor) -> np.ndarray:
        import torch

        width = self.shape[-1]
        halves = values.detach().view(-1, width).to(torch.float16)
        scales = halves.abs().amax(1).float()  # (rows,)
        if not bool(scales.isfinite().all()):
            self._refuse(first, values.reshape(-1))
        self.scales[first // width : first // width + len(scales)] = scales.numpy()
        factors = (LARGEST / scales).nan_to_num_(posinf=0.0)  # a row of zeros has codes of zero
        return halves.float().mul_(factors[:, None]).round_().to(torch.int8).numpy()

    def decoded(self, codes: np.ndarray, first: int, out: Tensor) -> Tensor:
        import torch

        start = first // self.shape[-1]
        scales = torch.from_numpy(self.scales[start : start + len(codes)])
        write(torch.from_numpy(codes), scales, out.view(codes.shape))
        return out

    def _refuse(self, first: int, flat: Tensor) -> None:
        wrong = int((~flat.to(dtype=flat.dtype).half().isfinite()).nonzero()[0])
        value, at = flat[wrong].item(), tuple(int(i) for i in np.unravel_index(first + wrong, self.shape))
        if math.isfinite(value):
            raise BaseModelError(
                f"{self.name} holds {value:g} at {at}; quant.type int8 goes through fp16, whose largest number is "
                f"{FP16_MAX:g}.",
                fix="--set quant.type=nf4, or keep this module in 16 bits with quant.skip_modules",
            )
        raise BaseModelError(
            f"{self.name} holds {value} at {at}; a weight that is not finite cannot be quantised.",
            fix="download the checkpoint again, or use another revision: this one is broken",
        )

    def code_bytes(self, first: int) -> int:
        return first

    def parts(self) -> dict[str, Tensor]:
        import torch

        return {"SCB": torch.from_numpy(self.scales), "weight_format": torch.tensor(0, dtype=torch.uint8)}


def activation_threshold(quant: Quant) -> float:
    """What a layer of bitsandbytes is told as its threshold."""
    return EVERY_COLUMN if quant.llm_int8_threshold is None else quant.llm_int8_threshold


def write(codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Dequantise into `out`: one product in fp32 for each weight, rounded once to out's dtype.

    Args:
        codes: (O, D) int8. scales: (O,) fp32. out: (O, D) contiguous, of any float dtype.
    """
    import torch

    factors = scales.mul(1.0 / LARGEST)[:, None]  # as upstream has it, so that its training gives the same bits
    values: Tensor | None = None
    for part in _pieces(codes, _PIECE):
        some = codes[part]
        values = torch.empty(some.shape, dtype=torch.float32, device=codes.device) if values is None else values
        out[part].copy_(values[: len(some)].copy_(some).mul_(factors[part]))
    return out


def rounded(x: Tensor, threshold: float) -> Tensor:
    """Each row of x (..., D) as LLM.int8 multiplies with it: numbers of at least `threshold` as they are, the others
    rounded to whole multiples of a 127th of the largest of them. With a threshold of 0 all are rounded."""
    import torch
    from torch.nn.functional import hardshrink

    below = float(np.nextafter(np.float32(threshold), np.float32(0)))  # what is larger is an outlier
    flat = x.detach().reshape(-1, x.shape[-1])
    out = torch.empty_like(flat)
    for part in _pieces(flat, _PIECE // 2):
        small = flat[part].to(torch.float32, copy=True)
        outliers = hardshrink(small, below) if threshold > 0 else None
        if outliers is not None:
            small -= outliers
        step = small.abs().amax(-1, keepdim=True).div_(LARGEST).clamp_min_(_SMALLEST_STEP)
        small.div_(step).round_().mul_(step)
        out[part] = small if outliers is None else small.add_(outliers)
    return out.view(x.shape)


def _pieces(matrix: Tensor, numbers: int) -> Iterator[slice]:
    """Rows of a matrix in pieces of about so many numbers for each thread; on a card in large ones."""
    import torch

    workers = torch.get_num_threads() if matrix.device.type == "cpu" else 256
    at_once = max(1, numbers * workers // max(1, matrix.shape[-1]))
    yield from (slice(first, first + at_once) for first in range(0, len(matrix), at_once))


@cache
def _layer_class() -> type[nn.Module]:
    import bitsandbytes as bnb

    from halfbyte.quant.dequantise import frozen_product

    int8 = RowWise8("int8")

    class Linear8bitLt(bnb.nn.Linear8bitLt):
        """bitsandbytes' 8-bit layer, named alike since PEFT looks for the name; dequantises in training and out."""

        def forward(self, x: Tensor) -> Tensor:
            if not int8.holds(self):  # not quantised yet, or whole again
                return super().forward(x)
            return frozen_product(x, self, int8)

    return Linear8bitLt
