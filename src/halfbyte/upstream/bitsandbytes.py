"""What differs between the versions of bitsandbytes."""

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

from halfbyte.upstream.seam import Seam


@cache
def c_dequantise(kind: str, dtype: str) -> Callable[..., object] | None:
    """The C function behind `dequantize_4bit` on a CPU (nf4 or fp4, to bf16, fp16 or fp32), or, of no kind, behind
    `dequantize_blockwise`, which scales of scales go through; None where it is not there."""
    from bitsandbytes.cextension import lib

    function = getattr(lib, "_".join(["cdequantize_blockwise_cpu", *filter(None, [kind]), dtype]), None)
    return function if hasattr(function, "argtypes") else None  # for what it lacks, `lib` gives a function that raises


def _steps_on_cpu() -> bool:
    """By its source, as a plan asks too, which imports nothing. Versions without it look for a card's tensors."""
    spec = importlib.util.find_spec("bitsandbytes")
    (folder,) = (spec and spec.submodule_search_locations) or [""]
    operations = Path(folder, "backends", "cpu", "ops.py").read_text(encoding="utf-8")
    return "optimizer_update_8bit_blockwise" in operations and "optimizer_update_32bit" in operations


C_DEQUANTISE = Seam(
    "bitsandbytes", "C functions that dequantise on a CPU", "weights are dequantised by a table, more slowly",
    lambda: c_dequantise("nf4", "fp32") is not None,
)  # fmt: skip
CPU_OPTIMISERS = Seam(
    "bitsandbytes", "optimisers for a CPU", "the values of train.optim that are its own are refused without a card",
    _steps_on_cpu,
)  # fmt: skip
SEAMS = (C_DEQUANTISE, CPU_OPTIMISERS)
