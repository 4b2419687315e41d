"""The proof at start that this machine dequantises as the format is defined: one matrix of each shape, against numpy.

What: blocks spread over the matrix, its first and last among them, computed again from codes and scales in fp64. Where
a number is further away than rounding explains, the fast function is not used again in this process; a slower one takes
its place where there is one (`dequantise.py`), and it is said.
Why: with wrong scales a base still loads and trains, as another model (`dequantise.py` names a case).
"""

import numpy as np
import torch
from torch import nn

from halfbyte.errors import BaseModelError
from halfbyte.proofs.setting import StartProof
from halfbyte.quant import formats

_SAMPLED_BLOCKS, _BLOCK = 4096, 64
# Relative: half a unit in the last place, and a few roundings in fp32 (scale, code, product).
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 0.0}
_FP32_ROUNDINGS = 4 * 2.0**-24


def prove_dequantised(model: nn.Module) -> StartProof:
    """Compare one quantised matrix of each shape with the definition; what is wrong is not used again. Raises
    BaseModelError: the slow path is wrong too, so the weights cannot be read at all."""
    dtype, one_of_each = _dtype(model), _one_of_each(model)
    wrong = {kind: module for kind, module in one_of_each.items() if not _is_right(module, dtype)}
    if not wrong:
        return StartProof(True, f"{len(one_of_each)} shapes of matrices as the format defines them")
    shapes = ", ".join(str(kind[0]) for kind in list(wrong)[:3])
    for module in wrong.values():
        formats.of_module(module).distrust(module)
    if not all(_is_right(module, dtype) for module in wrong.values()):
        raise BaseModelError(
            f"the weights of shape {shapes} cannot be dequantised: no function here gives what the format defines.",
            fix="build the base anew (halfbyte quantize MODEL), and check the versions with halfbyte doctor",
        )
    return StartProof(
        False, f"{shapes} are dequantised wrongly on this machine; the table of codes is used, which is slower"
    )


def wrong_shapes(model: nn.Module) -> list[str]:
    """The shapes that are dequantised wrongly now, by the functions that `prove_dequantised` has left in use."""
    dtype = _dtype(model)
    return [str(kind[0]) for kind, module in _one_of_each(model).items() if not _is_right(module, dtype)]


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _one_of_each(model: nn.Module) -> dict[tuple[object, ...], nn.Module]:
    """The first quantised module of each kind (shape, format, ...)."""
    first: dict[tuple[object, ...], nn.Module] = {}
    for module in model.modules():
        if formats.is_quantised(module) and module.weight.device.type != "meta":
            first.setdefault(formats.of_module(module).kind_of(module), module)
    return first


def _is_right(module: nn.Module, dtype: torch.dtype) -> bool:
    number_format = formats.of_module(module)
    weight = number_format.weight(module, dtype).view(-1)
    total = -(-weight.numel() // _BLOCK)
    blocks = np.unique(np.linspace(0, total - 1, min(total, _SAMPLED_BLOCKS)).astype(np.int64))
    places = (blocks[:, None] * _BLOCK + np.arange(_BLOCK)).reshape(-1)
    places = places[places < weight.numel()]
    sample = weight[torch.from_numpy(places).to(weight.device)]
    expected = number_format.definition(module, places)
    smallest = float(torch.finfo(sample.dtype).smallest_normal)
    allowed = np.abs(expected) * (_ROUNDING[sample.dtype] + _FP32_ROUNDINGS) + smallest
    return bool((np.abs(sample.cpu().double().numpy() - expected) <= allowed).all())  # NaN is not
