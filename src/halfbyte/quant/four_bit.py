"""NF4 and FP4, as bitsandbytes holds them: two codes a byte, and a scale for each block of 64.

Source: QLoRA, arXiv:2305.14314, NF4 in its appendix E; `bitsandbytes/functional.py`, `QuantState`.
Cost: 4.127 bits a weight with double quantisation, 4.5 without; encoding see `nf4_cpu.py`, decoding `dequantise.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.errors import BaseModelError
from halfbyte.quant import nf4_cpu
from halfbyte.quant.number_format import NumberFormat, Part

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

    from halfbyte.recipe.schema import Quant

# Double quantisation: one fp32 scale for 256 8-bit scales; code tables of 16 and 256 fp32 values.
NESTED_BLOCK = 256
CODE_BYTES, NESTED_CODE_BYTES, OFFSET_BYTES = 16 * 4, 256 * 4, 4
# The JSON of the quantiser's state.
_STATE_BYTES = 190


def nf4_bytes(numel: int, block_size: int, double_quant: bool) -> int:
    """Bytes of one matrix in 4 bits, as bitsandbytes holds it (NF4 and FP4 alike).

    Packed codes, two a byte, and one scale a block: fp32; or, with double quantisation, 8 bits, with one fp32 scale
    for 256 of them, their mean, and a table of 256 values. Each matrix has its own table of 16 values.
    """
    blocks = -(-numel // block_size)
    packed = -(-numel // 2)
    if not double_quant:
        return packed + 4 * blocks + CODE_BYTES
    return packed + blocks + 4 * -(-blocks // NESTED_BLOCK) + OFFSET_BYTES + NESTED_CODE_BYTES + CODE_BYTES


@dataclass(frozen=True)
class FourBit(NumberFormat):
    """`nf4` or `fp4`: they differ in the values of their 16 codes alone."""

    source: str = "quant.four_bit.nf4_bytes; QLoRA, arXiv:2305.14314"

    @property
    def state(self) -> str:
        """The suffix of the quantiser's state, whose length is known at the end only."""
        return f".quant_state.bitsandbytes__{self.name}"

    def nbytes(self, numel: int, quant: Quant) -> int:
        return nf4_bytes(numel, quant.block_size, quant.double_quant)

    def parts(self, numel: int, quant: Quant) -> tuple[Part, ...]:
        blocks, packed = -(-numel // quant.block_size), -(-numel // 2)
        scales: tuple[Part, ...] = (Part(".absmax", "F32", (blocks,), 4 * blocks),)
        if quant.double_quant:
            nested = -(-blocks // NESTED_BLOCK)
            scales = (
                Part(".absmax", "U8", (blocks,), blocks),
                Part(".nested_absmax", "F32", (nested,), 4 * nested),
                Part(".nested_quant_map", "F32", (256,), NESTED_CODE_BYTES),
            )
        return (
            Part("", "U8", (packed, 1), packed),
            *scales,
            Part(".quant_map", "F32", (16,), CODE_BYTES),
            Part(self.state, "U8", (0,), None, _STATE_BYTES),
        )

    def encoder(self, quant: Quant, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> FourBitEncoder:
        return FourBitEncoder(quant, shape, dtype, name)

    def load_config(
        self, quant: Quant, compute_dtype: torch.dtype, head_names: Iterable[str] = ()
    ) -> BitsAndBytesConfig:
        from transformers import BitsAndBytesConfig

        skip = [*quant.skip_modules, *quant.fp32_modules]
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.name,
            bnb_4bit_use_double_quant=quant.double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            llm_int8_skip_modules=[*head_names, *skip] if skip else None,
        )

    def holds(self, module: nn.Module) -> bool:
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        return state is not None and state.quant_type == self.name

    def weight(self, module: nn.Module) -> torch.Tensor:
        from halfbyte.quant.dequantise import dequantised

        return dequantised(module, reuse=True)

    def multiplies_in(self, module: nn.Module, dtype: torch.dtype) -> bool:
        return module.compute_dtype in (None, dtype) and bool(module.weight.quant_state.dtype == dtype)

    def upstream_is_right(self, module: nn.Module) -> bool:
        from halfbyte.quant.dequantise import upstream_is_wrong

        return not upstream_is_wrong(module.weight.quant_state)


class FourBitEncoder:
    """One matrix on its way into 4 bits, byte for byte as bitsandbytes makes it.

    Args:
        dtype: bf16, fp16 or fp32: that of the values, and what the weight is later dequantised to.
    """

    def __init__(self, quant: Quant, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
        self.quant, self.shape, self.dtype, self.name = quant, tuple(shape), dtype, name
        self.absmax = np.empty(-(-int(np.prod(shape)) // quant.block_size), np.float32)

    def codes(self, first: int, values: torch.Tensor, pool: Executor | None = None) -> np.ndarray:
        import torch

        block = self.quant.block_size
        flat = values.detach().reshape(-1)
        array = (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
        scales = self.absmax[first // block : -(-(first + len(array)) // block)]
        packed, _, bad = nf4_cpu.quantise(array, self.quant.type, block, absmax=scales, pool=pool)
        if bad >= 0:
            raise self._not_finite(flat[bad : bad + block], first + bad)
        return packed

    def code_bytes(self, first: int) -> int:
        return first // 2

    def parts(self) -> dict[str, torch.Tensor]:
        """The scales, tables and state that a checkpoint holds beside the codes."""
        import bitsandbytes.functional as bnb_f
        import torch

        absmax = torch.from_numpy(self.absmax)
        kept: dict[str, Any] = {
            "shape": torch.Size(self.shape),
            "dtype": self.dtype,
            "blocksize": self.quant.block_size,
            "code": bnb_f.get_4bit_type(self.quant.type, device="cpu"),
            "quant_type": self.quant.type,
        }
        if self.quant.double_quant:  # as `bitsandbytes.functional.quantize_4bit` does it
            offset = absmax.mean()
            absmax, nested = bnb_f.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
            kept |= {"offset": offset, "state2": nested}
        held = bnb_f.QuantState(absmax=absmax, **kept).as_dict(packed=True)
        return {f".{name}": value for name, value in held.items()}

    def _not_finite(self, block: torch.Tensor, start: int) -> BaseModelError:
        """The error that names the first NaN or Inf of a block, which begins at element `start` of the matrix."""
        where = int((~block.isfinite()).nonzero()[0])
        at = tuple(int(i) for i in np.unravel_index(start + where, self.shape))
        return BaseModelError(
            f"{self.name} holds {block[where].item()} at {at}; a weight that is not finite cannot be quantised.",
            fix="download the checkpoint again, or use another revision: this one is broken",
        )
