"""What differs between the versions of bitsandbytes."""

from collections.abc import Callable
from functools import cache

from halfbyte.upstream.seam import Seam


@cache
def c_dequantise(kind: str, dtype: str) -> Callable[..., object] | None:
    """The C function behind `dequantize_4bit` on a CPU (nf4 or fp4, to bf16, fp16 or fp32), or None."""
    from bitsandbytes.cextension import lib

    function = getattr(lib, f"cdequantize_blockwise_cpu_{kind}_{dtype}", None)
    return function if hasattr(function, "argtypes") else None  # for what it lacks, `lib` gives a function that raises


def _steps_on_cpu() -> bool:
    import bitsandbytes as bnb
    import torch

    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    bnb.optim.AdamW8bit([parameter]).step()  # versions without it look for a card's tensors, and raise AttributeError
    return True


C_DEQUANTISE = Seam(
    "bitsandbytes", "C functions that dequantise on a CPU", "weights are dequantised by a table, more slowly",
    lambda: c_dequantise("nf4", "fp32") is not None,
)  # fmt: skip
CPU_OPTIMISERS = Seam(
    "bitsandbytes", "optimisers for a CPU", "the values of train.optim that are its own are refused without a card",
    _steps_on_cpu,
)  # fmt: skip
SEAMS = (C_DEQUANTISE, CPU_OPTIMISERS)
