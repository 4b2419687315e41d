"""Kernels compiled before they are needed, several at once: numba compiles one after the other, on one core.

Cost: a process of 0.5 GB for each core, as far as memory reaches, and some 19 CPU seconds a dtype (docs/log).
"""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Collection
from importlib import import_module

import numpy as np

from halfbyte.system import kernel_cache
from halfbyte.system.children import child
from halfbyte.system.device import ram_available

PROCESS_BYTES = 500_000_000
_BESIDE = ("recurrent.gated_norm", "recurrent.conv")
_CODES = "halfbyte.quant.four_bit_cpu"
_PASSES = ("entropy", _CODES, "norm", "gate", "scores")
_ROOM = "halfbyte.layers.kernels.cpu"
# What needs them, as `kernel_cache.uncompiled` names it -> files of this folder, the longest first; or one of a file.
FILES = {
    "bf16": ("attention.bf16", "lora.bf16", *_PASSES),
    "fp32": ("attention.fp32", "lora.fp32", "product", *_PASSES),
    "integers": ("integer.rounding", "integer.sums", "integer.weights", "integer.block_weights"),
    **{name: (f"decoding.interpreter/{name.replace('decoding', 'compiled')}",) for name in kernel_cache.INTERPRETERS},
    "state_space": ("recurrent.state_space", *_BESIDE),
    "delta_rule": ("recurrent.delta_rule", *_BESIDE),
    "conv": ("recurrent.conv",),
}
# What most runs never use: attention that keeps its scores, masks of rows.
_LEFT_OUT = {"_softmax_kernel", "_dots_kernel", "_mask_rows_kernel"}


def begin(needed: Collection[str], cores: int, dtype: str) -> Callable[[], None]:
    """Begin to compile what is needed, as `FILES` names it, on so many cores. `dtype`: bf16 or fp32, of integers and
    decoding. What cannot be compiled so is compiled where it is used. Returns what waits for the end."""
    kinds = {name: files for name, files in FILES.items() if name in needed}
    ranked = sorted((at, name, file) for name, files in kinds.items() for at, file in enumerate(files))
    tasks = [f"{file}:{of}" for _, name, file in ranked for of in _dtypes(name, file, dtype)]
    at_once = max(1, min(cores, len(tasks), ram_available() // PROCESS_BYTES))
    words = [[sys.executable, "-P", "-m", __name__, *tasks[i::at_once]] for i in range(at_once)]
    begun: list[subprocess.Popen[bytes]] = []
    with contextlib.suppress(OSError):
        begun += [subprocess.Popen(each, stderr=subprocess.DEVNULL) for each in words if tasks]

    def wait() -> None:
        for process in begun:
            process.wait()

    return wait


def _dtypes(name: str, file: str, dtype: str) -> Collection[str]:
    """Those that a file is compiled in; recurrent layers are proven in fp32 before they train."""
    if file.startswith("recurrent."):
        return sorted({"fp32", dtype})
    return (name if name in ("bf16", "fp32") else dtype,)


def _compile(file: str, dtype: str) -> None:
    file, _, one = file.partition("/")
    with contextlib.suppress(ImportError):  # the processor lacks its instructions
        for name, thing in vars(import_module(file if file == _CODES else f"{_ROOM}.{file}")).copy().items():
            wanted = name == one if one else name not in _LEFT_OUT
            if wanted and getattr(thing, "per_dtype", None) is True:  # a module may have such a name
                thing(np.dtype(np.uint16 if dtype == "bf16" else np.float32))


if __name__ == "__main__":
    with child():
        kernel_cache.find_place()
        for task in sys.argv[1:]:
            _compile(*task.split(":"))
