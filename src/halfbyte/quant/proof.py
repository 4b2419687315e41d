"""The proof at start that this machine dequantises as the format is defined: one matrix of each shape, against numpy.

What: blocks spread over the matrix, its first and last among them, computed again from codes and scales in fp64. Where
a number is further away than rounding explains, the C function is not used again in this process; the table of codes,
which is slower, takes its place, and it is said.
Why: with wrong scales a base still loads and trains, as another model (`dequantise.py` names a case).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from halfbyte.errors import BaseModelError
from halfbyte.quant import dequantise, nf4_cpu
from halfbyte.quant.bnb import linears_4bit

_SAMPLED_BLOCKS = 4096
# Relative: half a unit in the last place, and a few roundings in fp32 (scale, code, product).
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
_FP32_ROUNDINGS = 4 * 2.0**-24


@dataclass(frozen=True)
class DequantProof:
    """`ok`: the fast functions are right for every shape. `reason` says in words what was seen and is done."""

    ok: bool
    reason: str


def prove_dequantised(model: nn.Module) -> DequantProof:
    """Compare one quantised matrix of each shape with the definition; what is wrong is not used again.

    Raises:
        BaseModelError: the slow path is wrong too, so the weights cannot be read at all.
    """
    one_of_each: dict[tuple[object, ...], nn.Module] = {}
    for _, module in linears_4bit(model):
        state = module.weight.quant_state
        if state is not None and module.weight.device.type != "meta":
            one_of_each.setdefault((*state.shape, state.quant_type, state.blocksize, state.nested, state.dtype), module)
    wrong = [module for module in one_of_each.values() if not _is_right(module)]
    if not wrong:
        return DequantProof(True, f"{len(one_of_each)} shapes of matrices as the format defines them")
    shapes = ", ".join(str(tuple(module.weight.quant_state.shape)) for module in wrong[:3])
    for module in wrong:
        dequantise.distrust(module.weight.quant_state)
    if not all(_is_right(module) for module in wrong):
        raise BaseModelError(
            f"the weights of shape {shapes} cannot be dequantised: neither bitsandbytes nor its table of codes gives "
            "what the format defines.",
            fix="build the base anew (halfbyte quantize MODEL), and check the versions with halfbyte doctor",
        )
    return DequantProof(
        False, f"bitsandbytes dequantises {shapes} wrongly on this machine; the table of codes is used, which is slower"
    )


def _is_right(module: nn.Module) -> bool:
    weight: Any = module.weight
    state = weight.quant_state
    total = -(-state.shape.numel() // state.blocksize)
    blocks = np.unique(np.linspace(0, total - 1, min(total, _SAMPLED_BLOCKS)).astype(np.int64))
    at = (blocks[:, None] * state.blocksize + np.arange(state.blocksize)).reshape(-1)
    at = at[at < state.shape.numel()]
    got = dequantise.dequantised(module, reuse=True).view(-1)[torch.from_numpy(at).to(weight.device)]
    wanted = _by_definition(weight.data, state, at)
    smallest = float(torch.finfo(got.dtype).smallest_normal)
    allowed = np.abs(wanted) * (_ROUNDING[got.dtype] + _FP32_ROUNDINGS) + smallest
    return bool((np.abs(got.cpu().double().numpy() - wanted) <= allowed).all())  # NaN is not


def _by_definition(packed: torch.Tensor, state: Any, at: np.ndarray) -> np.ndarray:
    """The numbers at these positions of the flat weight, in fp64."""
    codes = packed.reshape(-1).view(torch.uint8)[torch.from_numpy(at // 2).to(packed.device)].cpu().numpy()
    codes = np.where(at % 2 == 0, codes >> 4, codes & 15)
    block = at // state.blocksize
    scales = state.absmax.cpu().numpy()[block].astype(np.float64)
    if state.nested:
        outer = state.state2
        table = outer.code.cpu().numpy().astype(np.float64)
        scales = table[scales.astype(np.int64)] * outer.absmax.cpu().numpy()[block // outer.blocksize]
        scales = scales + float(state.offset)
    return nf4_cpu.code(state.quant_type).astype(np.float64)[codes] * scales
