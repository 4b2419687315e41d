"""bitsandbytes' word about a kernel on a hub, which it looks for when it is imported and seldom finds.

Why: nothing of ours would use that kernel, and to a user it reads like a fault. Where halfbyte is imported first it is
not told; else it has been told already, and a script's first step explains it.
Source: `bitsandbytes/backends/cpu/ops.py`, behind `has_avx512bf16()`.
"""

import logging
import sys

MODULE = "bitsandbytes.backends.cpu.ops"
TOLD = getattr(sys.modules.get(MODULE), "gemm_4bit_forward_kernel", "not looked for") is None


def silence() -> None:
    """From now on that word is not told."""
    logging.getLogger(MODULE).addFilter(lambda record: "kernels-community" not in str(record.msg))
