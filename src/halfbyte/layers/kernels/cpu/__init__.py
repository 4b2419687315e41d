"""Passes over memory that torch makes in many: one read and one write each, on torch's own threads.

`available(x)` says whether a kernel may be used for a tensor; every caller has a path in plain torch beside it, which
is the reference in the tests. numba compiles a kernel when it is first used and keeps it in its cache.
"""

import logging
import os
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from halfbyte.system import device, kernel_cache, openmp

if TYPE_CHECKING:
    import torch

DTYPES = ("torch.bfloat16", "torch.float32")


@cache
def enabled(threads: int | None = None) -> bool:
    """Whether numba works here, seen on one kernel, and HALFBYTE_KERNELS is not 0. threads: None: as many as torch's,
    else torch is not needed."""
    if os.environ.get("HALFBYTE_KERNELS", "1") == "0":
        return False
    try:
        kernel_cache.find_place()
        from halfbyte.layers.kernels.cpu import parallel

        if threads is None:
            import torch

            openmp.watch(torch.get_num_threads(), device.core_share())  # a script's own process is not configured by us
        return parallel.works(threads)
    except Exception:  # of any kind: a broken numba must not stop a training, torch does the same more slowly
        return False


def available(*tensors: "torch.Tensor") -> bool:
    """Whether kernels take these tensors: on the CPU, bf16 or fp32, numba at hand."""
    return all(t.device.type == "cpu" and _takes(t.dtype) for t in tensors) and enabled()


@cache
def _takes(dtype: "torch.dtype") -> bool:
    return str(dtype) in DTYPES


def whole_attention(x: "torch.Tensor") -> bool:
    """Whether attention of x's dtype runs as one kernel here: bf16 on a processor with AVX512-BF16, fp32 on one with
    AVX2 and FMA."""
    if not available(x):
        return False
    from halfbyte.layers.kernels.cpu import tiles

    return tiles.available() if x.dtype.itemsize == 2 else tiles.available32()


# Above this rank a library's product is as fast as those of `lora/`.
LARGEST_RANK = 64


def lora_products(x: "torch.Tensor", a: "torch.Tensor") -> bool:
    """Whether LoRA's own products, dropout inside, run as kernels here: of rows x, and A (R, D), of one dtype."""
    rank, width = a.shape
    if width % 32 or not 0 < rank <= LARGEST_RANK or a.dtype != x.dtype or not x.is_contiguous():
        return False
    if x.dtype.itemsize == 2 and rank % 2:  # it multiplies pairs
        return False
    return whole_attention(x) and works("lora.bf16" if x.dtype.itemsize == 2 else "lora.fp32")


@cache
def works(name: str) -> bool:
    """Whether the products of a file of this room are right on this machine; told where they are not."""
    fault = import_module(f"{__name__}.{name}").fault()
    if fault is not None:
        logging.getLogger(__name__).warning("%s by our kernel on this machine, which is not used", fault)
    return fault is None
