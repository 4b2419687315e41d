"""A `.gguf` file -> a safetensors checkpoint in halfbyte's cache, made once.

Everything after this room reads safetensors by name, shape and mapping; GGUF blocks are another quantiser's.
Cost: 2 bytes of disk per parameter; the conversion itself runs in a child process (models/gguf/convert.py).
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
from halfbyte.models.gguf.header import GgufHeader, parts_of, read_header
from halfbyte.models.sources.checkpoint import check_folder, locked, need_space
from halfbyte.system import files
from halfbyte.system.platforms import calls

log = logging.getLogger("halfbyte")
# Raised when what is written changes, so that older conversions are not found again.
FORMAT_VERSION = 3
BF16_BYTES = 2
# Tokenizer, config and chat template beside the weights; 262,144 tokens take 33 MB.
TOKENIZER_BYTES = 100_000_000
# What torch, transformers and a tokenizer's vocabulary take, and the pieces in hand, whatever the model's size.
CONVERSION_BYTES = 800_000_000
NOTE = "halfbyte.json"


def checkpoint_of(file: Path, *, in_blocks: bool = False) -> Path:
    """The converted checkpoint of a GGUF file; converted now if it is not in the cache yet. `in_blocks`: one without
    weights, which stay in the file (`models/gguf/blocks.py`)."""
    target = converted(file.absolute(), in_blocks=in_blocks)
    if not target.is_dir():
        convert_into(target, file.absolute(), in_blocks=in_blocks)
    return target


def converted(file: Path, *, in_blocks: bool = False) -> Path:
    """Where the conversion of a GGUF file lies, or would lie."""
    try:
        stats = [(part, part.stat()) for part in parts_of(file)]
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror or error}") from error
    parts = [f"{part}\0{stat.st_size}\0{stat.st_mtime_ns}" for part, stat in stats]
    identity = "\0".join([*parts, str(FORMAT_VERSION)])
    stem = re.sub(r"[^\w.-]+", "_", stats[0][0].stem if stats else file.stem)[:60]
    return converted_path(f"{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}", in_blocks=in_blocks)


def converted_path(key: str, *, in_blocks: bool) -> Path:
    return files.cache_dir() / "gguf" / (f"{key}-blocks" if in_blocks else key)


def convert_into(target: Path, file: Path, *, in_blocks: bool = False) -> None:
    """Convert `file` and rename the finished folder to `target`, so that a half conversion is never seen."""
    header = read_header(file)
    with locked(target.with_name(target.name + ".lock")) as lock:
        # Another process may have finished while this one waited.
        if target.is_dir():
            return
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        weights = 0 if in_blocks else header.numel * BF16_BYTES
        need_space(target.parent, weights + TOKENIZER_BYTES, f"the conversion of {file.name}")
        try:
            partial.mkdir()
            _run_child(file, partial, header, lock, in_blocks=in_blocks)
            if not in_blocks:
                check_folder(partial, allow_pickle=False, label=str(file))
            note = {
                "source": str(file),
                "type": header.quantised_as,
                "source_bytes": sum(part.stat().st_size for part in header.files),
                "format": FORMAT_VERSION,
            }
            (partial / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
            files.put(partial, target)
        except OSError as error:
            raise SourceError(f"the conversion of {file} failed: {error.strerror or error}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _run_child(file: Path, partial: Path, header: GgufHeader, lock: int, *, in_blocks: bool) -> None:
    """Run models/gguf/convert.py on `file`, and turn what it says into one error."""
    with tempfile.TemporaryDirectory(prefix="halfbyte-gguf-") as alone:
        # Under links of their own nothing else lies beside the files.
        links = [Path(alone, part.name if len(header.files) > 1 else "model.gguf") for part in header.files]
        for link, part in zip(links, header.files, strict=True):
            calls.alias(link, part)
        # -P: a module in the user's folder must not stand in for one of ours.
        command = [sys.executable, "-P", "-m", "halfbyte.models.gguf.convert", str(links[0]), str(partial)]
        command += ["--in-blocks"] if in_blocks else []
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        if not in_blocks:
            log.info("converting %s to safetensors, once: half a minute, and more for a larger model", file.name)
        # The child holds the lock too: if this process is killed, the next one waits for it.
        with (
            tempfile.TemporaryFile("w+", errors="replace") as messages,
            subprocess.Popen(
                command,
                env={**os.environ, **quiet},
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                pass_fds=calls.handed_on(lock),
            ) as child,
        ):
            try:
                for stage in child.stdout or ():
                    log.info("%s %s: %s", "opening" if in_blocks else "converting", file.name, stage.rstrip())
                code = child.wait()
            except BaseException:
                child.kill()
                raise
            messages.seek(0)
            lines = [line.strip() for line in messages if line.strip()]
    if code == 0:
        return
    if code < 0:
        raise SourceError(
            f"the conversion of {file} was ended by signal {-code}; "
            f"it needs about {CONVERSION_BYTES / 1e9:.1f} GB of memory",
            fix="free memory, or use a safetensors checkpoint of the model, which needs no conversion",
        )
    last = lines[-1] if lines else f"exit code {code}"
    if last.startswith("REFUSED "):
        raise SourceError(f"{file} cannot be used: {last.removeprefix('REFUSED ')}")
    raise SourceError(
        f"the conversion of {file} failed: {last}",
        fix="try another quantisation of the model (Q4_K_M, Q8_0, F16), or its safetensors checkpoint",
    )
