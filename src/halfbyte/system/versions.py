"""Which versions of the libraries are installed. Nothing is imported to find out.

Why: a result, a cache and a calibration hold only for the libraries that made them.
Cost: a few file reads.
"""

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
    installed = {name: version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **{name: number for name, number in installed.items() if number}}
