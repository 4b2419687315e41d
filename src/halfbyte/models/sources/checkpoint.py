"""What a source becomes, a local checkpoint; and halfbyte's own cache folder, with its lock.

A folder is checked before anything is loaded: a missing or cut shard otherwise shows minutes later, as a traceback from
deep inside a loader. Only headers are read.
"""

import fnmatch
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from halfbyte.errors import SourceError, typed
from halfbyte.models.sources.safetensors import INDEX, SINGLE, indexed_files, read_header
from halfbyte.system import files, limits
from halfbyte.types import Document

# Tokenizer, chat template and settings of generation.
DESCRIPTIONS = (
    "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
    "*.model", "*.tiktoken", "chat_template*",
)  # fmt: skip
# What lies beside the weights and makes the folder a model of its own.
BESIDE = (*DESCRIPTIONS, "preprocessor_config.json", "processor_config.json", "LICENSE*")


@dataclass(frozen=True)
class Checkpoint:
    """A model on this disk that `from_pretrained(path)` can open. `id` names it elsewhere: hub id, absolute path of
    folder or .gguf, packaged name. `revision` is the commit of a hub model. `pickle`: the weights are `.bin` files,
    which are read with `weights_only=True`. `blocks`: the GGUF files, where the weights stay in them: `path` then holds
    all but weights."""

    path: Path
    id: str
    revision: str | None
    kind: Literal["hub", "folder", "gguf", "packaged"]
    pickle: bool = False
    blocks: tuple[Path, ...] = ()


def beside_weights(folder: Path) -> list[Path]:
    """The files of a model folder that a store of its base copies as they are."""
    return sorted(p for p in folder.iterdir() if p.is_file() and any(fnmatch.fnmatch(p.name, b) for b in BESIDE))


def beside_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in beside_weights(folder))


def tokenizer_bytes(folder: Path) -> int | None:
    """Bytes of its tokenizer.json; None where it has none."""
    file = folder / "tokenizer.json"
    return file.stat().st_size if file.is_file() else None


def make_folder(folder: Path) -> None:
    """Create a folder of the cache, or say why that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, "made", error) from error


def _unusable(folder: Path, what: str, error: OSError) -> SourceError:
    return SourceError(
        f"the cache folder {folder} cannot be {what}: {error.strerror or error}",
        fix="name a folder that you can write: export HALFBYTE_CACHE=/path/with/space",
    )


def need_space(folder: Path, need_bytes: int, what: str) -> None:
    """Refuse before any work when the disk cannot hold the result."""
    if (free_bytes := files.free_bytes(folder)) < need_bytes:
        raise SourceError(
            f"no space left for {what}: it needs {need_bytes / 1e9:.2f} GB in {folder}, "
            f"and {free_bytes / 1e9:.2f} GB are free",
            fix="free some space, or name another folder: export HALFBYTE_CACHE=/path/with/space",
        )


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold an exclusive lock on `path`; the second process waits. Yields the descriptor. A child that inherits the
    descriptor keeps the lock alive, also when this process is killed."""
    make_folder(path.parent)
    try:
        file = path.open("a")
    except OSError as error:
        raise _unusable(path.parent, "written", error) from error
    # Closing releases the lock, unless a child still holds the same open file.
    with file:
        files.lock(file)
        yield file.fileno()


PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def check_folder(folder: Path, *, allow_pickle: bool, label: str | None = None) -> bool:
    """Check that `folder` holds a whole checkpoint; True when its weights are pickled `.bin` files. `allow_pickle`:
    accept `.bin` weights when there is no safetensors file. `label`: what the user calls it, when that is not the
    folder (a hub id). Raises SourceError: with every problem found."""
    name = label or str(folder)
    try:
        files = {entry.name for entry in os.scandir(folder)}
    except OSError as error:
        raise SourceError(f"the folder {folder} cannot be read: {error.strerror or error}") from error
    if "config.json" not in files:
        raise no_config(folder, name)

    content, problem = _read_json(folder / "config.json")
    if problem is None and not isinstance(content.get("model_type"), str):
        problem = "config.json has no model_type"
    problems, pickled = [problem] if problem else [], False
    if SINGLE in files:
        problems += _problems(folder, SINGLE)
    elif INDEX in files:
        problems += _problems(folder, INDEX)
    elif PICKLE in files or PICKLE_INDEX in files:
        if not allow_pickle:
            raise only_pickled(name)
        pickled = True
        problems += _problems(folder, PICKLE if PICKLE in files else PICKLE_INDEX)
    else:
        seen = sorted(f for f in files if f.endswith((".safetensors", ".gguf", ".bin", ".pt", ".pth", ".h5")))
        problems.append(
            f"no weights: expected {SINGLE} or {INDEX}" + (f", found {', '.join(seen[:5])}" if seen else "")
        )
    if problems:
        raise SourceError(
            f"{name} is not a whole checkpoint:\n" + "\n".join(f"  - {problem}" for problem in problems),
            fix="copy or download the files again",
        )
    return pickled


def only_pickled(name: str) -> SourceError:
    return SourceError(
        f"{name} has only pickled weights ({PICKLE}), and a pickle can run code when it is read; allowed: safetensors",
        fix="use a revision or a copy with safetensors, or, if you trust it, set allow_pickle: true",
    )


def _problems(folder: Path, weights: str) -> list[str]:
    """What is wrong with the weights: one file, or an index and all files that it names."""
    try:
        names = indexed_files(folder / weights) if weights.endswith(".json") else [weights]
    except SourceError as error:
        return [error.message.rstrip(".")]
    return [problem for name in names if (problem := _problem(folder / name))]


def _problem(file: Path) -> str | None:
    """What is wrong with one file, from its header and its size alone."""
    try:
        if file.suffix == ".safetensors":
            read_header(file, file.name)
        elif file.stat().st_size == 0:
            return f"{file.name} is empty"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror or error}"
    except SourceError as error:
        return error.message.rstrip(".")
    return None


def _read_json(path: Path) -> tuple[Document, str | None]:
    try:
        content = limits.read_config(path)
    except OSError as error:
        return {}, f"{path.name} cannot be read: {error.strerror or error}"
    except ValueError as error:
        return {}, f"{path.name} is not JSON that can be used: {error}"
    if not isinstance(content, dict):
        return {}, f"{path.name} is not a JSON object"
    return content, None


def no_config(folder: Path, name: str) -> SourceError:
    """The folder is not a model: say what it looks like instead."""
    files = {path.name for path in folder.glob("*")}
    if "adapter_config.json" in files:
        content, _ = _read_json(folder / "adapter_config.json")
        base = content.get("base_model_name_or_path") or "(not named in its adapter_config.json)"
        return SourceError(
            f"{name} is a PEFT adapter, not a model: it holds only what was added to its base, {base}",
            fix=f"give the base as the model: {base}",
        )
    ggufs = sorted(f for f in files if f.endswith(".gguf"))
    if ggufs:
        return SourceError(
            f"{name} has no config.json, but it has GGUF files: {', '.join(ggufs[:5])}",
            fix=f"give one file as the model: {typed(folder / ggufs[0])}",
        )
    # A run's own folder keeps its adapter one level down.
    if "recipe.yaml" in files and "adapter" in files:
        return SourceError(
            f"{name} is a run folder, not a model",
            fix=f'to use what it trained: halfbyte generate {typed(name)} --prompt "..."',
        )
    listed = ", ".join(sorted(files)[:5]) or "nothing"
    return SourceError(
        f"{name} is not a checkpoint: it has no config.json (found {listed})",
        fix=f"give a folder with config.json and {SINGLE} (or {INDEX} and its shards)",
    )
