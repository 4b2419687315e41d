"""The CPU quantiser, and dequantising that is right for every width, offered to every script on the machine through
bitsandbytes' own entry point for backends.

What: kernels for `bitsandbytes::quantize_4bit` and `bitsandbytes::dequantize_4bit` on the CPU. What they do not take
(other types, NaN, a numba that does not work) goes to the kernels that were there before. HALFBYTE_BNB_KERNEL=0 leaves
bitsandbytes as it is.
Trap: `import bitsandbytes` calls this, and an exception would break that import everywhere; so nothing here may raise,
and numba is imported when a weight is first quantised.
Source: `bitsandbytes/__init__.py`, `_import_backends`; `torch.library`: `Library.impl` with `allow_override`, and
`get_kernel` for the kernel before.
"""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, dtype

QUANTISE, DEQUANTISE = "quantize_4bit", "dequantize_4bit"
# What must live as long as the process: torch drops a registration with its Library.
_held: dict[str, Any] = {}


def register() -> None:
    """Called by bitsandbytes at the end of its import. Never raises; a second call changes nothing."""
    try:
        if os.environ.get("HALFBYTE_BNB_KERNEL", "1") == "0" or _held:
            return
        import torch

        _held["library"] = library = torch.library.Library("bitsandbytes", "IMPL")
        for op, kernel, override in ((DEQUANTISE, _dequantise, True), (QUANTISE, _quantise, False)):
            _held[op] = torch.library.get_kernel(f"bitsandbytes::{op}", "CPU")
            with warnings.catch_warnings():  # torch warns of a kernel that is overridden, which is meant
                warnings.simplefilter("ignore", UserWarning)
                library.impl(op, kernel, "CPU", with_keyset=True, allow_override=override)
    except Exception:
        _held["failed"] = True


def active() -> bool:
    """Whether the kernels are registered and have not failed."""
    return "library" in _held and "failed" not in _held


def _quantise(keys: object, values: Tensor, block_size: int, quant_type: str, storage: dtype) -> tuple[Tensor, Tensor]:
    """(packed (n / 2, 1) in the dtype `storage`, absmax (blocks,) fp32), as bitsandbytes gives them."""
    if "failed" not in _held:
        try:
            result = _with_numba(values, block_size, quant_type, storage)
            if result is not None:
                return result
        except Exception:  # of any kind: a script that quantised before must quantise now, more slowly
            _held["failed"] = True
    return _held[QUANTISE].call_boxed(keys, values, block_size, quant_type, storage)


def _dequantise(
    keys: object, packed: Tensor, absmax: Tensor, block_size: int, quant_type: str, shape: list[int], kind: dtype
) -> Tensor:
    """The weight, in `shape` and the dtype `kind`; the kernel before is right where rows hold whole blocks."""
    from halfbyte.quant import dequantise

    whole = not shape[-1] % block_size and not dequantise.is_distrusted(quant_type, kind)
    if whole or quant_type not in ("nf4", "fp4"):
        return _held[DEQUANTISE].call_boxed(keys, packed, absmax, block_size, quant_type, shape, kind)
    import torch

    out = torch.empty(shape, dtype=kind)
    dequantise.write(packed, absmax.float(), out.view(-1), block_size, quant_type)
    return out


def _with_numba(values: Tensor, block_size: int, quant_type: str, storage: dtype) -> tuple[Tensor, Tensor] | None:
    """None where the values are not ours to quantise."""
    import torch

    from halfbyte.quant.kernels import nf4_cpu

    if values.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not values.numel():
        return None
    if quant_type not in ("nf4", "fp4") or block_size not in nf4_cpu.BLOCK_SIZES:
        return None
    flat = values.detach().reshape(-1)
    array = (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="quantise") as pool:
        packed, absmax, bad = nf4_cpu.quantise(array, quant_type, block_size, pool=pool)
    if bad >= 0:
        return None
    out = torch.from_numpy(packed).unsqueeze(1)
    if storage != torch.uint8:
        out = out.squeeze().view(storage).unsqueeze(1)
    return out, torch.from_numpy(absmax)
