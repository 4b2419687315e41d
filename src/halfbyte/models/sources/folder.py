"""A local checkpoint folder, checked before anything is loaded.

Why: a missing or cut shard otherwise shows minutes later, as a traceback from deep inside a loader.
Source: the safetensors format (8 bytes of header length, JSON header, data). Cost: headers only, never the weights.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from halfbyte.errors import SourceError

SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
# The format's own limit on its JSON header.
MAX_HEADER_BYTES = 100_000_000


def check_folder(folder: Path, *, allow_pickle: bool, label: str | None = None) -> bool:
    """Check that `folder` holds a whole checkpoint; True when its weights are pickled `.bin` files.

    Args:
        folder: an existing folder.
        allow_pickle: accept `.bin` weights when there is no safetensors file.
        label: what the user calls it, when that is not the folder (a hub id).

    Raises:
        SourceError: with every problem found.
    """
    name = label or str(folder)
    try:
        files = {entry.name for entry in os.scandir(folder)}
    except OSError as error:
        raise SourceError(f"the folder {folder} cannot be read: {error.strerror or error}") from error
    if "config.json" not in files:
        raise _no_config(folder, files, name)

    problems = [problem for problem in [_config_problem(folder / "config.json")] if problem]
    pickled = False
    if SAFETENSORS in files:
        problems += _safetensors_problems(folder, [SAFETENSORS])
    elif SAFETENSORS_INDEX in files:
        shards, bad = indexed_shards(folder / SAFETENSORS_INDEX)
        problems += bad + _safetensors_problems(folder, shards)
    elif PICKLE in files or PICKLE_INDEX in files:
        if not allow_pickle:
            raise SourceError(
                f"{name} has only pickled weights ({PICKLE}), and a pickle can run code when it is read; "
                "allowed: safetensors",
                fix="use a revision or a copy with safetensors, or, if you trust it, set allow_pickle: true",
            )
        pickled = True
        problems += _pickle_problems(folder, files)
    else:
        seen = sorted(f for f in files if f.endswith((".safetensors", ".gguf", ".bin", ".pt", ".pth", ".h5")))
        problems.append(
            f"no weights: expected {SAFETENSORS} or {SAFETENSORS_INDEX}"
            + (f", found {', '.join(seen[:5])}" if seen else "")
        )
    if problems:
        raise SourceError(
            f"{name} is not a whole checkpoint:\n" + "\n".join(f"  - {problem}" for problem in problems),
            fix="copy or download the files again",
        )
    return pickled


def indexed_shards(index: Path) -> tuple[list[str], list[str]]:
    """The shard files that an index names, and what is wrong with the index."""
    content, problem = _read_json(index)
    if problem:
        return [], [problem]
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        return [], [f"{index.name} has no weight_map"]
    shards = sorted({str(shard) for shard in weight_map.values()})
    # A shard is a file beside its index: a path could point anywhere on this disk.
    outside = [shard for shard in shards if Path(shard).name != shard]
    return [s for s in shards if s not in outside], [f"{index.name} names a path, not a file: {s}" for s in outside]


def safetensors_problem(path: Path) -> str | None:
    """What is wrong with one safetensors file, from its header and its size alone."""
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
                return f"{path.name} is not a safetensors file ({size_bytes:,} bytes)"
            header_bytes = file.read(length)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror or error}"
    if len(header_bytes) < length:
        return f"{path.name} is cut short inside its header: {size_bytes:,} bytes of at least {8 + length:,}"
    try:
        header = json.loads(header_bytes)
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        data_bytes = int(max(ends, default=0))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return f"{path.name} is not a safetensors file: its header cannot be read"
    expected_bytes = 8 + length + data_bytes
    if size_bytes < expected_bytes:
        return f"{path.name} is cut short: {size_bytes:,} bytes of {expected_bytes:,}"
    if size_bytes > expected_bytes:
        return f"{path.name} has {size_bytes - expected_bytes:,} bytes more than its header says"
    return None


def _safetensors_problems(folder: Path, shards: list[str]) -> list[str]:
    return [problem for shard in shards if (problem := safetensors_problem(folder / shard))]


def _pickle_problems(folder: Path, files: set[str]) -> list[str]:
    bad: list[str] = []
    shards = [PICKLE]
    if PICKLE not in files:
        shards, bad = indexed_shards(folder / PICKLE_INDEX)
    for shard in shards:
        if not (folder / shard).is_file():
            bad.append(f"{shard} is missing")
        elif (folder / shard).stat().st_size == 0:
            bad.append(f"{shard} is empty")
    return bad


def _read_json(path: Path) -> tuple[dict[str, Any], str | None]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return {}, f"{path.name} cannot be read: {error.strerror or error}"
    except ValueError as error:
        return {}, f"{path.name} is not JSON: {error}"
    if not isinstance(content, dict):
        return {}, f"{path.name} is not a JSON object"
    return content, None


def _config_problem(path: Path) -> str | None:
    content, problem = _read_json(path)
    if problem is None and not isinstance(content.get("model_type"), str):
        return "config.json has no model_type"
    return problem


def _no_config(folder: Path, files: set[str], name: str) -> SourceError:
    """The folder is not a model: say what it looks like instead."""
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
            fix=f"give one file as the model: {folder / ggufs[0]}",
        )
    # A run's own folder keeps its adapter one level down.
    if "recipe.yaml" in files and "adapter" in files:
        return SourceError(
            f"{name} is a run folder, not a model", fix=f"to use what it trained: halfbyte generate {name}"
        )
    found = ", ".join(sorted(files)[:5]) or "nothing"
    return SourceError(
        f"{name} is not a checkpoint: it has no config.json (found {found})",
        fix=f"give a folder with config.json and {SAFETENSORS} (or {SAFETENSORS_INDEX} and its shards)",
    )
