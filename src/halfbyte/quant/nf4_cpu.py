"""The 4-bit quantiser for CPUs: NF4 and FP4, byte for byte as bitsandbytes makes them.

Why: bitsandbytes has no CPU kernel for it; its fallback in plain torch makes half a dozen passes over fp32 copies.
Source: QLoRA, arXiv:2305.14314, appendix E; `bitsandbytes/backends/default/ops.py`, whose arithmetic is repeated here
step by step (fp32 midpoints, a product with 1 / max(absmax, 1e-38) in whole blocks, a quotient in the ragged last one).
Cost: one read of the weight, half a byte and a scale written; see docs/log.md. numba compiles when first used, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# The values of each 4-bit code, in the order of the codes.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)
# numpy knows no bf16: it travels as uint16.
_KINDS = {"uint16": "bf16", "float16": "fp16", "float32": "fp32"}
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
    packed: np.ndarray | None = None,
    absmax: np.ndarray | None = None,
    pool: Executor | None = None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Quantise a flat array.

    Args:
        values: (n,), contiguous: float32, float16, or uint16 for bf16.
        packed: where to write the codes, ceil(n / 2) bytes of uint8; made if None. The same for `absmax`.
        pool: threads to divide the work over; the calling thread alone if None.

    Returns:
        packed: (ceil(n / 2),) uint8, the earlier of two codes in the upper half; an odd n ends with the code of 0.
        absmax: (ceil(n / block_size),) float32.
        first_bad: position of a block that holds NaN or Inf (its codes mean nothing), or -1.
    """
    kernel = _kernel(_KINDS[values.dtype.name])
    bounds, deltas = tables(quant_type)
    bits = values if values.dtype == np.uint16 else values.view(f"u{values.dtype.itemsize}")
    if packed is None:
        packed = np.empty(-(-len(values) // 2), np.uint8)
    if absmax is None:
        absmax = np.empty(-(-len(values) // block_size), np.float32)

    def part(first: int) -> int:
        last = min(len(bits), first + PART_ELEMENTS)
        return int(kernel(bits, packed, absmax, bounds, deltas, block_size, first, last))

    starts = range(0, len(bits), PART_ELEMENTS)
    found = list(map(part, starts) if pool is None or len(starts) < 2 else pool.map(part, starts))
    return packed, absmax, min((bad for bad in found if bad >= 0), default=-1)


@contextmanager
def threads(count: int) -> Iterator[Executor | None]:
    """A pool for `quantise`; the compiled loop holds no lock of Python's. None for one thread."""
    if count < 2:
        yield None
        return
    with ThreadPoolExecutor(count, thread_name_prefix="quantise") as pool:
        yield pool


@cache
def _level() -> Callable[..., Any]:
    """The compiled search for a number's code, inlined into the loop."""
    from numba import njit

    from halfbyte.quant.nf4_cpu_scalar import step

    i32 = np.int32

    @njit(inline="always")
    def level(v, bounds, deltas):  # type: ignore[no-untyped-def]
        """The code of v in [-1, 1]: the first one, and what each bound below v adds to it."""
        c = step(i32(deltas[0]), v, bounds[0], deltas[1])
        c = step(c, v, bounds[1], deltas[2])
        c = step(c, v, bounds[2], deltas[3])
        c = step(c, v, bounds[3], deltas[4])
        c = step(c, v, bounds[4], deltas[5])
        c = step(c, v, bounds[5], deltas[6])
        c = step(c, v, bounds[6], deltas[7])
        c = step(c, v, bounds[7], deltas[8])
        c = step(c, v, bounds[8], deltas[9])
        c = step(c, v, bounds[9], deltas[10])
        c = step(c, v, bounds[10], deltas[11])
        c = step(c, v, bounds[11], deltas[12])
        c = step(c, v, bounds[12], deltas[13])
        c = step(c, v, bounds[13], deltas[14])
        return step(c, v, bounds[14], deltas[15])

    return level


@cache
def _kernel(kind: str) -> Callable[..., int]:
    """The compiled loop for one floating type; importing numba and compiling happen here."""
    from numba import njit

    from halfbyte.quant import nf4_cpu_scalar as scalar

    load: Any = scalar.LOAD[kind]
    larger, join = scalar.larger, scalar.join
    limit = scalar.FINITE_BELOW[kind]
    f32 = np.float32
    level = _level()

    # No fastmath: each operation rounds as bitsandbytes' does. Values beyond 1 by rounding are beyond the last bound
    # anyway, so its clamp changes nothing.
    @njit(nogil=True, cache=True, error_model="numpy")
    def run(bits, packed, absmax, bounds_, deltas_, block, begin, end):  # type: ignore[no-untyped-def]
        bounds = (
            bounds_[0], bounds_[1], bounds_[2], bounds_[3], bounds_[4], bounds_[5], bounds_[6], bounds_[7],
            bounds_[8], bounds_[9], bounds_[10], bounds_[11], bounds_[12], bounds_[13], bounds_[14],
        )  # fmt: skip
        deltas = (
            deltas_[0], deltas_[1], deltas_[2], deltas_[3], deltas_[4], deltas_[5], deltas_[6], deltas_[7],
            deltas_[8], deltas_[9], deltas_[10], deltas_[11], deltas_[12], deltas_[13], deltas_[14], deltas_[15],
        )  # fmt: skip
        bad = -1
        for first in range(begin, end, block):
            n = min(block, end - first)
            x, out = bits[first : first + n], packed[first // 2 : (first + n + 1) // 2]
            most = x[0]
            most = larger(most, most)
            for i in range(n):
                most = larger(most, x[i])
            if most >= limit and bad < 0:
                bad = first
            top = load(most)
            held = max(top, f32(1e-38))
            if n == block:
                absmax[first // block] = top
                scale = f32(1.0) / held
                for j in range(n // 2):
                    a = level(load(x[2 * j]) * scale, bounds, deltas)
                    b = level(load(x[2 * j + 1]) * scale, bounds, deltas)
                    out[j] = join(a, b)
            else:
                absmax[first // block] = held
                for j in range(len(out)):
                    a = level(load(x[2 * j]) / held, bounds, deltas)
                    v = load(x[2 * j + 1]) / held if 2 * j + 1 < n else f32(0.0)
                    out[j] = join(a, level(v, bounds, deltas))
        return bad

    return run
