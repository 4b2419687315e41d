"""The 4-bit quantiser for CPUs: NF4 and FP4, byte for byte as bitsandbytes makes them.

bitsandbytes has no CPU kernel for it; its fallback in plain torch makes half a dozen passes over fp32 copies.
Source: QLoRA, arXiv:2305.14314, appendix E; `bitsandbytes/backends/default/ops.py`, whose arithmetic is repeated here
step by step (fp32 midpoints, a product with 1 / max(absmax, 1e-38) in whole blocks, a quotient in the ragged last one).
"""

from concurrent.futures import Executor
from functools import cache

import numpy as np

from halfbyte.system import kernel_cache

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# The values of each 4-bit code, in the order of the codes.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)
# numpy knows no bf16: it travels as uint16.
_BITS = {"uint16": "uint16", "float16": "int16", "float32": "uint32"}
# Elements that one thread takes at a time: 2 MB of bf16, so that a few threads end together.
PART_ELEMENTS = 1 << 20


@cache
def code(quant_type: str) -> np.ndarray:
    """The 16 values of `nf4` or `fp4`, fp32, largest magnitude 1."""
    values = np.array({"nf4": _NF4, "fp4": _FP4}[quant_type], dtype=np.float32)
    return values / np.abs(values).max()


@cache
def tables(quant_type: str) -> tuple[np.ndarray, np.ndarray]:
    """The 15 midpoints between neighbouring values, and 16 steps: the code of the smallest value, then what is added to
    the code at each midpoint (always 1 for NF4, whose codes ascend; FP4's do not)."""
    values = code(quant_type)
    order = np.argsort(values, kind="stable")
    ascending = values[order]
    return (ascending[:-1] + ascending[1:]) / np.float32(2), np.diff(order, prepend=0).astype(np.int32)


def quantise(
    values: np.ndarray,
    quant_type: str,
    block_size: int,
    *,
    absmax: np.ndarray | None = None,
    pool: Executor | None = None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Quantise a flat array.

    Args:
        values: (n,), contiguous: float32, float16, or uint16 for bf16.
        absmax: where to write the scales; made if None.
        pool: threads to divide the work over; the calling thread alone if None.

    Returns:
        packed: (ceil(n / 2),) uint8, the earlier of two codes in the upper half; an odd n ends with the code of 0.
        absmax: (ceil(n / block_size),) float32.
        first_bad: position of a block that holds NaN or Inf (its codes mean nothing), or -1.
    """
    kernel_cache.find_place()
    from halfbyte.quant.kernels.nf4_cpu_kernel import run

    bits = values.view(_BITS[values.dtype.name])
    bounds, deltas = tables(quant_type)
    packed = np.empty(-(-len(values) // 2), np.uint8)
    if absmax is None:
        absmax = np.empty(-(-len(values) // block_size), np.float32)

    def part(first: int) -> int:
        last = min(len(bits), first + PART_ELEMENTS)
        return int(run(bits, packed, absmax, bounds, deltas, block_size, first, last))

    starts = range(0, len(bits), PART_ELEMENTS)
    firsts = list(map(part, starts) if pool is None or len(starts) < 2 else pool.map(part, starts))
    return packed, absmax, min((bad for bad in firsts if bad >= 0), default=-1)
