"""Which versions of the libraries are installed, without importing them: what they made holds only for them."""

import platform
from functools import cache
from importlib import metadata, util
from pathlib import Path

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


@cache
def torch_has_cards() -> bool:
    """Whether the installed torch is a build for CUDA or ROCm cards: on a machine without one its libraries are loaded
    all the same."""
    spec = util.find_spec("torch")
    folder = Path(spec.origin).parent / "lib" if spec is not None and spec.origin else Path()
    return any(folder.glob("*torch_cuda.*")) or any(folder.glob("*torch_hip.*"))
