"""Which versions of the libraries are installed, without importing them: what they made holds only for them."""

import platform
from importlib import metadata

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
