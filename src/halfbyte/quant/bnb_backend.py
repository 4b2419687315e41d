"""The CPU quantiser offered to every script on the machine, through bitsandbytes' own entry point for backends.

Why: `import bitsandbytes` calls each entry point of the group `bitsandbytes.backends`, and an exception there would
break that import everywhere; so nothing here may raise, and numba is imported when a weight is first quantised.
What: a kernel for `bitsandbytes::quantize_4bit` on the CPU. Whatever it does not take (other types, NaN, a numba that
does not work) goes to the kernel that was there before. HALFBYTE_BNB_KERNEL=0 leaves bitsandbytes as it is.
Source: `bitsandbytes/__init__.py`, `_import_backends`; `torch.library.get_kernel` for the kernel before.
Cost: at import a lookup; at use see quantise.py.
"""

from __future__ import annotations

import os
from typing import Any

OP = "quantize_4bit"
# What must live as long as the process: torch drops a registration with its Library.
_held: dict[str, Any] = {}


def register() -> None:
    """Called by bitsandbytes at the end of its import. Never raises; a second call changes nothing."""
    try:
        if os.environ.get("HALFBYTE_BNB_KERNEL", "1") == "0" or _held:
            return
        import torch

        _held["before"] = torch.library.get_kernel(f"bitsandbytes::{OP}", "CPU")
        library = torch.library.Library("bitsandbytes", "IMPL")
        # Refused by torch where bitsandbytes has a kernel for this already: theirs then stays.
        library.impl(OP, _quantise, "CPU", with_keyset=True)
        _held["library"] = library
    except Exception:
        _held["failed"] = True


def active() -> bool:
    """Whether the kernel is registered and has not failed."""
    return "library" in _held and "failed" not in _held


def _quantise(keys: Any, values: Any, block_size: int, quant_type: str, storage: Any) -> tuple[Any, Any]:
    """(packed (n / 2, 1) in the dtype `storage`, absmax (blocks,) fp32), as bitsandbytes gives them."""
    if "failed" not in _held:
        try:
            made = _with_numba(values, block_size, quant_type, storage)
            if made is not None:
                return made
        except Exception:  # of any kind: a script that quantised before must quantise now, more slowly
            _held["failed"] = True
    before: tuple[Any, Any] = _held["before"].call_boxed(keys, values, block_size, quant_type, storage)
    return before


def _with_numba(values: Any, block_size: int, quant_type: str, storage: Any) -> tuple[Any, Any] | None:
    """None where the values are not ours to quantise."""
    import torch

    from halfbyte.quant import nf4_cpu

    if values.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not values.numel():
        return None
    if quant_type not in ("nf4", "fp4") or block_size not in nf4_cpu.BLOCK_SIZES:
        return None
    flat = values.detach().reshape(-1)
    array = (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
    with nf4_cpu.threads(torch.get_num_threads()) as pool:
        packed, absmax, bad = nf4_cpu.quantise(array, quant_type, block_size, pool=pool)
    if bad >= 0:
        return None
    out = torch.from_numpy(packed).unsqueeze(1)
    if storage != torch.uint8:
        out = out.squeeze().view(storage).unsqueeze(1)
    return out, torch.from_numpy(absmax)
