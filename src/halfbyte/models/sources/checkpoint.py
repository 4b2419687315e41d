"""What a source becomes, a local checkpoint; and halfbyte's own cache folder, with its lock."""

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from halfbyte.errors import SourceError
from halfbyte.system import files

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
