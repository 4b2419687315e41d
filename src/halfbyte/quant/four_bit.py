"""NF4 and FP4, as bitsandbytes holds them: two codes a byte, and a scale for each block of 64.

Source: QLoRA, arXiv:2305.14314, NF4 in its appendix E; `bitsandbytes/functional.py`, `QuantState`.
Cost: 4.127 bits with double quantisation, 4.5 without; encoding `kernels/nf4_cpu.py`, decoding `dequantise.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from halfbyte.errors import BaseModelError
from halfbyte.quant.kernels import nf4_cpu
from halfbyte.quant.number_format import Codes, NumberFormat, StoredPart, own_weight
from halfbyte.recipe.schema import Quant
from halfbyte.types import Config, Document

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import BitsAndBytesConfig

    from halfbyte.quant.stack import ExpertStack

BLOCK = 64  # where a recipe says none
# Double quantisation: one fp32 scale for 256 8-bit scales.
NESTED_BLOCK = 256
_DTYPE_NAMES = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}
# In the quantiser's state: the mean of the scales, in memory a tensor; and all of it, as JSON.
_OFFSET_BYTES, _STATE_BYTES = 4, 190


@dataclass(frozen=True)
class FourBit(NumberFormat):
    """`nf4` or `fp4`: they differ in the values of their 16 codes alone."""

    source: str = "quant.four_bit; QLoRA, arXiv:2305.14314"

    def nbytes(self, shape: tuple[int, ...], quant: Quant) -> int:
        return sum(part.nbytes or 0 for part in self.parts(shape, quant)) + _OFFSET_BYTES * quant.double_quant

    def parts(self, shape: tuple[int, ...], quant: Quant) -> tuple[StoredPart, ...]:
        numel = math.prod(shape)
        blocks, packed = -(-numel // self.unit(shape, quant)), -(-numel // 2)
        scales: tuple[StoredPart, ...] = (StoredPart(".absmax", "F32", (blocks,), 4 * blocks),)
        if quant.double_quant:
            nested = -(-blocks // NESTED_BLOCK)
            scales = (
                StoredPart(".absmax", "U8", (blocks,), blocks),
                StoredPart(".nested_absmax", "F32", (nested,), 4 * nested),
                StoredPart(".nested_quant_map", "F32", (256,), 256 * 4),
            )
        return (
            StoredPart("", "U8", (packed, 1), packed),
            *scales,
            StoredPart(".quant_map", "F32", (16,), 16 * 4),
            StoredPart(f".quant_state.bitsandbytes__{self.name}", "U8", (0,), None, _STATE_BYTES),
        )

    def unit(self, shape: tuple[int, ...], quant: Quant) -> int:
        return quant.block_size or BLOCK

    def encoding_bytes(self, count: int, shape: tuple[int, ...], quant: Quant) -> int:
        scales = 4 * math.prod(shape) // self.unit(shape, quant)
        # codes; scales, and while they are quantised themselves, once more as differences from their mean
        return count // 2 + 2 * scales

    def encoder(self, quant: Quant, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> FourBitEncoder:
        return FourBitEncoder(quant, shape, dtype, name)

    def layer(self, parts: Mapping[str, Tensor], shape: tuple[int, int], quant: Quant, dtype: torch.dtype) -> nn.Module:
        import bitsandbytes as bnb

        layer = self.empty_layer(shape, quant, dtype)
        stats = {suffix.removeprefix("."): part for suffix, part in parts.items() if suffix}
        codes = parts[""]
        layer.weight = bnb.nn.Params4bit.from_prequantized(codes, stats, device=codes.device, module=layer)
        return layer

    def empty_layer(self, shape: tuple[int, int], quant: Quant, dtype: torch.dtype) -> nn.Module:
        layer = _layer_class()(shape[1], shape[0], False, dtype, quant.double_quant, self.name, device="meta")
        layer.support_avx512bf16_for_cpu, layer.compute_type_is_set = False, True  # see `bnb.py`
        return layer

    def stack(
        self, parts: Mapping[str, Tensor], shape: tuple[int, ...], quant: Quant, dtype: torch.dtype
    ) -> ExpertStack:
        import bitsandbytes.functional as bnb_f

        from halfbyte.quant.stack import ExpertStack

        codes = parts[""]
        state = bnb_f.QuantState.from_dict({f"weight{key}": part for key, part in parts.items() if key}, codes.device)
        if math.prod(state.shape[1:]) % state.blocksize:
            raise ValueError(f"experts of {tuple(state.shape[1:])} are not whole blocks of {state.blocksize}")
        return ExpertStack.of(self, codes.view(-1, 1), state.shape, state.dtype, quant_state=state)

    def expert(self, module: nn.Module, e: int, out: Tensor) -> Tensor:
        import torch

        from halfbyte.quant import dequantise

        state, numel = module.weight.quant_state, out.numel()
        codes = module.weight.data.view(-1).view(torch.uint8)[e * numel // 2 : (e + 1) * numel // 2]
        scales = dequantise.some_scales(state, e * numel // state.blocksize, (e + 1) * numel // state.blocksize)
        dequantise.write(codes, scales, out.view(-1), state.blocksize, state.quant_type)
        return out

    def divided(self, module: nn.Module) -> tuple[Tensor, ...]:
        return module.weight.data, module.weight.quant_state.absmax

    def load_config(self, quant: Quant, dtype: torch.dtype, head_names: Iterable[str] = ()) -> BitsAndBytesConfig:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.name,
            bnb_4bit_use_double_quant=quant.double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=[*head_names, *quant.exempt] or None,
        )

    def settings_of(self, config: Config) -> Document | None:
        if config.load_in_8bit or not config.load_in_4bit or config.bnb_4bit_quant_type != self.name:
            return None
        return {
            "type": self.name,
            "double_quant": bool(config.bnb_4bit_use_double_quant),
            "compute_dtype": _DTYPE_NAMES.get(str(config.bnb_4bit_compute_dtype), "auto"),
        }

    def settle(self, model: nn.Module) -> None:
        """Keep an eval forward from repacking weights in place; what an earlier one has repacked is unpacked by reading
        the layer's state dict once (bitsandbytes' own inverse, `Linear4bit._save_to_state_dict`). Raises
        BaseModelError: a layer, as a new head, that the checkpoint has no weights for, which nobody quantised."""
        if "bitsandbytes" not in sys.modules:  # seconds; who made such a layer has imported it
            return
        import bitsandbytes as bnb

        layers = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
        new = [name for name, layer in layers.items() if not hasattr(layer.weight, "quant_state")]
        if new:
            more = f" and {len(new) - 1} more" if len(new) > 1 else ""
            raise BaseModelError(
                f"the checkpoint has no weights of {new[0]}{more}, which was begun anew and is not in 4 bits.",
                fix=f"keep a new head in 16 bits, BitsAndBytesConfig(..., llm_int8_skip_modules={new[:1]})",
            )
        for module in layers.values():
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                module.state_dict()

    def holds(self, module: nn.Module) -> bool:
        state = getattr(own_weight(module), "quant_state", None)
        return state is not None and state.quant_type == self.name

    def weight(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        from halfbyte.quant.dequantise import dequantised

        return dequantised(module)

    def pieces(self, module: nn.Module, dtype: torch.dtype, rows: int) -> Iterator[Tensor]:
        from halfbyte.quant.dequantise import in_pieces

        return in_pieces(module, rows)

    def codes(self, module: nn.Module) -> Codes | None:
        from halfbyte.quant.dequantise import codes_of

        return codes_of(module)

    def multiplies_in(self, module: nn.Module, dtype: torch.dtype) -> bool:
        return module.compute_dtype in (None, dtype) and module.weight.quant_state.dtype == dtype

    def upstream_is_right(self, module: nn.Module) -> bool:
        from halfbyte.quant.dequantise import upstream_is_wrong

        return not upstream_is_wrong(module.weight.quant_state)

    def beside(self, module: nn.Module) -> Iterator[tuple[object, str]]:
        state = module.weight.quant_state
        while state is not None:
            yield from ((state, n) for n in ("absmax", "code", "offset") if getattr(state, n, None) is not None)
            state = state.state2 if state.nested else None

    def definition(self, module: nn.Module, positions: np.ndarray) -> np.ndarray:
        import torch

        packed, state = module.weight.data, module.weight.quant_state
        codes = packed.reshape(-1).view(torch.uint8)[torch.from_numpy(positions // 2).to(packed.device)].cpu().numpy()
        codes = np.where(positions % 2 == 0, codes >> 4, codes & 15)
        block = positions // state.blocksize
        scales = state.absmax.cpu().numpy()[block].astype(np.float64)
        if state.nested:
            outer = state.state2
            table = outer.code.cpu().numpy().astype(np.float64)
            scales = table[scales.astype(np.int64)] * outer.absmax.cpu().numpy()[block // outer.blocksize]
            scales = scales + float(state.offset)
        return nf4_cpu.code(state.quant_type).astype(np.float64)[codes] * scales

    def kind_of(self, module: nn.Module) -> tuple[object, ...]:
        state = module.weight.quant_state
        return (tuple(state.shape), state.quant_type, state.blocksize, state.nested, state.dtype)

    def distrust(self, module: nn.Module) -> None:
        from halfbyte.quant import dequantise

        dequantise.distrust(module.weight.quant_state)


class FourBitEncoder:
    """One matrix on its way into 4 bits, byte for byte as bitsandbytes makes it. `dtype`: bf16, fp16 or fp32: that of
    the values, and what the weight is later dequantised to."""

    def __init__(self, quant: Quant, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
        self.quant, self.dtype = quant, dtype
        self.shape, self.name = tuple(shape), name
        self.block = quant.block_size or BLOCK
        self.absmax = np.empty(-(-int(np.prod(shape)) // self.block), np.float32)

    def codes(self, first: int, values: Tensor) -> np.ndarray:
        import torch

        block = self.block
        flat = values.detach().reshape(-1)
        array = (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
        scales = self.absmax[first // block : -(-(first + len(array)) // block)]
        packed, _, bad = nf4_cpu.quantise(array, self.quant.type, block, absmax=scales)
        if bad >= 0:
            value, where = next((v.item(), bad + i) for i, v in enumerate(flat[bad:]) if not v.isfinite())
            at = tuple(int(i) for i in np.unravel_index(first + where, self.shape))
            raise BaseModelError(
                f"{self.name} holds {value} at {at}; a weight that is not finite cannot be quantised.",
                fix="download the checkpoint again, or use another revision: this one is broken",
            )
        return packed

    def decoded(self, codes: np.ndarray, first: int, out: Tensor) -> Tensor:
        import torch

        from halfbyte.quant import dequantise

        scales = torch.from_numpy(self.absmax[first // self.block :])
        dequantise.write(torch.from_numpy(codes), scales, out.view(-1), self.block, self.quant.type)
        return out

    def code_bytes(self, first: int) -> int:
        return first // 2

    def parts(self) -> dict[str, Tensor]:
        """The scales, tables and state that a checkpoint holds beside the codes."""
        import bitsandbytes.functional as bnb_f
        import torch

        absmax = torch.from_numpy(self.absmax)
        offset = nested = None
        if self.quant.double_quant:  # as `bitsandbytes.functional.quantize_4bit` does it
            offset = absmax.mean()
            absmax, nested = bnb_f.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        state = bnb_f.QuantState(
            absmax=absmax, shape=torch.Size(self.shape), dtype=self.dtype, blocksize=self.block,
            code=bnb_f.get_4bit_type(self.quant.type, device="cpu"), quant_type=self.quant.type, offset=offset,
            state2=nested,
        )  # fmt: skip
        return {f".{name}": value for name, value in state.as_dict(packed=True).items()}


@cache
def _layer_class() -> type[nn.Module]:
    import bitsandbytes as bnb

    from halfbyte.quant.dequantise import frozen_product

    class Linear4bit(bnb.nn.Linear4bit):
        """bitsandbytes' 4-bit layer, named alike since PEFT looks for the name; right for every width, and it keeps no
        weight alive for backward (`bitsandbytes/autograd/_functions.py` holds on to it outside `save_for_backward`)."""

        def forward(self, x: Tensor) -> Tensor:
            state = self.weight.quant_state
            if state is None:  # not quantised yet
                return super().forward(x)
            dtype = self.compute_dtype or x.dtype
            return frozen_product(x.to(dtype), self, FourBit(state.quant_type)).to(x.dtype)

    return Linear4bit
