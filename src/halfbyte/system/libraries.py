"""The libraries that halfbyte stands on: their installed versions, told without importing them; and their import by the
command line, quick and quiet.

Cost of importing all: three thousand modules, three seconds of a core.
"""

import atexit
import gc
import hashlib
import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from halfbyte.system import files
from halfbyte.system.platforms import calls
from halfbyte.types import Document

LIBRARIES = (
    "halfbyte", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors", "tokenizers",
    "huggingface_hub", "numpy",
)  # fmt: skip

# Of the environment: which kernels are compiled, and how.
KERNEL_VARIABLES = ("HALFBYTE_KERNELS", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_OPT")


def version(library: str) -> str:
    """The installed version; empty if it is not installed."""
    try:
        return _installed(library)
    except ModuleNotFoundError:
        return ""


@cache
def _installed(library: str) -> str:
    """Looked up once: it takes a millisecond or two, and a start asks 64 times."""
    from importlib import metadata

    return metadata.version(library)


def versions() -> dict[str, str]:
    """The version of Python and of each installed library that a result depends on."""
    return {"python": platform.python_version(), **{name: number for name in LIBRARIES if (number := version(name))}}


def surroundings(threads: int, root: Path = Path("/")) -> Document:
    """What a proof depends on beside its inputs, in a process of so many threads: halfbyte's code, the libraries, what
    the processor says of itself, its flags among it. `root` holds `proc`."""
    package = Path(__file__).parents[1]
    code = [(str(file.relative_to(package)), files.sha256(file)) for file in sorted(package.rglob("*.py"))]
    told = calls.text(root / "proc/cpuinfo").partition("\n\n")[0].splitlines()
    core = told or [platform.machine(), platform.processor()]
    return {
        **versions(),
        **{name: version(name) for name in ("numba", "llvmlite", "jinja2")},
        "halfbyte's code": hashlib.sha256(repr(code).encode()).hexdigest(),
        "processor": hashlib.sha256(repr([x for x in core if "MHz" not in x]).encode()).hexdigest(),
        "threads": threads,
        "variables": {name: os.environ.get(name) for name in KERNEL_VARIABLES},
    }


def outside_ranges() -> dict[str, str]:
    """Requirement of halfbyte -> the installed version, where that is one it does not allow (pip only warns then), as
    `{"peft<0.22,>=0.21": "0.20.0"}`. Empty where halfbyte is not installed but found on the path."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in metadata.requires("halfbyte") or ()]
    except metadata.PackageNotFoundError:
        return {}
    needed = [each for each in wanted if each.marker is None]  # a marker names an extra
    return {
        str(each): number
        for each in needed
        if (number := version(each.name)) and not each.specifier.contains(number, prereleases=True)
    }


@contextmanager
def loading() -> Iterator[None]:
    """While they are imported. Python's collector rests: it would look through ever more objects, none of which can go,
    for a second in all; and afterwards it leaves those out.
    """
    gc.disable()
    try:
        _quiet()
        yield
    finally:
        gc.freeze()
        # or modules with a leak check of their own (triton's nanobind) say at the end that all of it leaked
        atexit.register(gc.unfreeze)
        gc.enable()


def _quiet() -> None:
    """No progress bars, warnings or advice between the lines of the command line. Called before they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # bitsandbytes wraps its fallback functions in torch.compile; off, they run as written and no compiler is imported
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")  # the plan says it
    from transformers.utils import logging as their

    their.set_verbosity_error()
    their.disable_progress_bar()
