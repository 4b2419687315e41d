"""A `.gguf` file -> a safetensors checkpoint in halfbyte's cache, made once.

Everything after this room reads safetensors by name, shape and mapping; GGUF blocks are another quantiser's.
Cost: 2 bytes of disk per parameter; the conversion itself runs in a child process (gguf_convert.py).
"""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from halfbyte.errors import SourceError
from halfbyte.models.sources.checkpoint import locked, need_space
from halfbyte.models.sources.folder import check_folder
from halfbyte.models.sources.gguf_header import GgufHeader, read_header
from halfbyte.system import files
from halfbyte.system.files import cache_dir

log = logging.getLogger("halfbyte")
# Raised when what is written changes, so that older conversions are not found again.
FORMAT_VERSION = 1
BF16_BYTES = 2
# Tokenizer, config and chat template beside the weights; 262,144 tokens take 33 MB.
TOKENIZER_BYTES = 100_000_000
# Measured on a 135M model: 3.6 bytes per parameter over what the imports take.
CONVERSION_BYTES_PER_PARAMETER = 4
NOTE = "halfbyte.json"


def checkpoint_of(file: Path) -> Path:
    """The converted checkpoint of a GGUF file; converted now if it is not in the cache yet."""
    file = file.absolute()
    try:
        stat = file.stat()
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror or error}") from error
    identity = f"{file}\0{stat.st_size}\0{stat.st_mtime_ns}\0{FORMAT_VERSION}"
    stem = re.sub(r"[^\w.-]+", "_", file.stem)[:60]
    target = converted_path(f"{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}")
    if not target.is_dir():
        convert_into(target, file)
    return target


def converted_path(key: str) -> Path:
    return cache_dir() / "gguf" / key


def convert_into(target: Path, file: Path) -> None:
    """Convert `file` and rename the finished folder to `target`, so that a half conversion is never seen."""
    header = read_header(file)
    with locked(target.with_name(target.name + ".lock")) as lock:
        # Another process may have finished while this one waited.
        if target.is_dir():
            return
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        need_space(target.parent, header.numel * BF16_BYTES + TOKENIZER_BYTES, f"the conversion of {file.name}")
        try:
            partial.mkdir()
            _run_child(file, partial, header, lock)
            check_folder(partial, allow_pickle=False, label=str(file))
            note = {"source": str(file), "source_bytes": file.stat().st_size, "format": FORMAT_VERSION}
            (partial / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
            files.put(partial, target)
        except OSError as error:
            raise SourceError(f"the conversion of {file} failed: {error.strerror or error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _run_child(file: Path, partial: Path, header: GgufHeader, lock: int) -> None:
    """Run gguf_convert.py on `file`, and turn what it says into one error."""
    with tempfile.TemporaryDirectory(prefix="halfbyte-gguf-") as alone:
        # Under a link of its own nothing else lies beside the file.
        link = Path(alone, "model.gguf")
        link.symlink_to(file)
        # -P: a module in the user's folder must not stand in for one of ours.
        command = [sys.executable, "-P", "-m", "halfbyte.models.sources.gguf_convert", str(link), str(partial)]
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        log.info("converting %s to safetensors, once: half a minute, and more for a larger model", file.name)
        # The child holds the lock too: if this process is killed, the next one waits for it.
        with (
            tempfile.TemporaryFile("w+", errors="replace") as said,
            subprocess.Popen(
                command, env={**os.environ, **quiet}, stdout=subprocess.PIPE, stderr=said, text=True, pass_fds=(lock,)
            ) as child,
        ):
            try:
                for stage in child.stdout or ():
                    log.info("converting %s: %s", file.name, stage.rstrip())
                code = child.wait()
            except BaseException:
                child.kill()
                raise
            said.seek(0)
            lines = [line.strip() for line in said if line.strip()]
    if code == 0:
        return
    if code < 0:
        need_bytes = header.numel * CONVERSION_BYTES_PER_PARAMETER + 500_000_000
        raise SourceError(
            f"the conversion of {file} was ended by signal {-code}; it needs about {need_bytes / 1e9:.1f} GB of memory",
            fix="free memory, or use a safetensors checkpoint of the model, which needs no conversion",
        )
    last = lines[-1] if lines else f"exit code {code}"
    if last.startswith("REFUSED "):
        raise SourceError(f"{file} cannot be used: {last.removeprefix('REFUSED ')}")
    raise SourceError(
        f"the conversion of {file} failed: {last}",
        fix="try another quantisation of the model (Q4_K_M, Q8_0, F16), or its safetensors checkpoint",
    )
