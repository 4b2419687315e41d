"""gpt-oss's own experts, which are in MXFP4 already: decoded, to be held in the format that a recipe asks for.

What: a 4-bit float (sign, 2 bits of exponent, 1 of mantissa) a weight, and a power of two for each 32 along the input.
A checkpoint has `X_blocks` (experts, out, blocks, 16), two codes a byte, the earlier in its lower half, and `X_scales`
(experts, out, blocks), exponents of 2 with a bias of 127; the model has X (experts, in, out).
Source: OCP Microscaling Formats 1.0, section 5; `transformers/integrations/mxfp4.py`, `convert_moe_packed_tensors`.
Cost: an expert at a time in memory; what a second rounding costs stands in docs/log.
"""

from dataclasses import replace

import numpy as np
import torch

from halfbyte.base.store.reading import SourceTensor
from halfbyte.errors import BaseModelError

DTYPE = "MXFP4"
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
BLOCK, BIAS = 32, 127
Halves = dict[str, tuple[SourceTensor, SourceTensor]]


def joined(tensors: dict[str, SourceTensor]) -> tuple[dict[str, SourceTensor], Halves]:
    """A checkpoint's tensors with blocks and scales as one tensor of the dtype `MXFP4`; and by its name what it is of.
    Raises BaseModelError: blocks without the scales that belong to them."""
    halves: Halves = {}
    for name, blocks in tensors.items():
        if name.endswith("_blocks") and blocks.dtype == "U8" and len(blocks.shape) == 4 and blocks.shape[3] == 16:
            whole = name.removesuffix("_blocks")
            scales = tensors.get(f"{whole}_scales")
            if scales is None or scales.shape != blocks.shape[:3] or scales.dtype != "U8":
                raise BaseModelError(f"{name} {blocks.shape} is MXFP4, and there is no {whole}_scales for it.")
            halves[whole] = blocks, scales
    if not halves:
        return tensors, halves
    parts = {half.name for pair in halves.values() for half in pair}
    joint = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for name, (blocks, scales) in halves.items():
        count, rows, per_row, _ = blocks.shape
        shape = (count, per_row * BLOCK, rows)
        joint[name] = replace(blocks, name=name, dtype=DTYPE, shape=shape, nbytes=blocks.nbytes + scales.nbytes)
    return joint, halves


def decoded(blocks: np.ndarray, scales: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """One expert, (in, out) flat. `blocks`: (out, n, 16) uint8. `scales`: (out, n) uint8."""
    codes = torch.from_numpy(blocks)
    table = torch.tensor(VALUES, dtype=dtype)
    values = torch.empty(*blocks.shape[:2], BLOCK, dtype=dtype)
    values[..., 0::2] = table[(codes & 15).int()]
    values[..., 1::2] = table[(codes >> 4).int()]
    values *= torch.exp2(torch.from_numpy(scales).float() - BIAS).to(dtype)[..., None]  # exact: powers of two
    return values.view(blocks.shape[0], -1).T.contiguous().view(-1)
