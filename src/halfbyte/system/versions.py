"""Which versions of the libraries are installed, without importing them: what they made holds only for them."""

import platform
from functools import cache
from importlib import metadata, util
from pathlib import Path

from packaging.requirements import Requirement

LIBRARIES = (
    "halfbyte", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "safetensors", "tokenizers",
    "huggingface_hub", "numpy",
)  # fmt: skip


def version(library: str) -> str:
    """The installed version; empty if it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """The version of Python and of each installed library that a result depends on."""
    return {"python": platform.python_version(), **{name: number for name in LIBRARIES if (number := version(name))}}


def outside_ranges() -> dict[str, str]:
    """Requirement of halfbyte -> the installed version, where that is one it does not allow (pip only warns then), as
    `{"peft<0.22,>=0.21": "0.20.0"}`. Empty where halfbyte is not installed but found on the path."""
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


@cache
def torch_has_cards() -> bool:
    """Whether the installed torch is a build for CUDA or ROCm cards: on a machine without one its libraries are loaded
    all the same."""
    spec = util.find_spec("torch")
    folder = Path(spec.origin).parent / "lib" if spec is not None and spec.origin else Path()
    return any(folder.glob("*torch_cuda.*")) or any(folder.glob("*torch_hip.*"))
