"""The folder of numba's compiled kernels: beside the kernels, in the user's cache, else in halfbyte's own, else in a
folder of this process alone.

Why: numba refuses to define a kernel that it cannot cache. So a user of a container without a home folder, beside a
package that root has installed, could compile nothing. And numba looks at the file of a kernel, not at those of the
parts that it is compiled of: after an update (`git pull`) of such a part it would take the old kernel.
Source: `numba/core/caching.py`: its places in their order; NUMBA_CACHE_DIR names another one before them. In a place
that is not beside the kernels the folder's name is that of theirs and a hash of its path.
Cost: looks at some folders and forty files, once.
"""

import contextlib
import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from functools import cache
from pathlib import Path

from halfbyte.system import files

VARIABLE = "NUMBA_CACHE_DIR"
_IMPORT = re.compile(r"^[ \t]*(?:from|import) [^\n(]*(?:\([^)]*\))?", re.MULTILINE)
_KERNELS = Path(__file__).parents[1] / "layers" / "kernels" / "cpu"


def places(env: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """Where compiled kernels may lie: in the folder that is set, else beside them and in the user's."""
    if named := env.get(VARIABLE):
        return (Path(named),)
    beside = _KERNELS / "__pycache__"
    try:
        return beside, Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "numba"
    except RuntimeError:  # there is no home folder
        return (beside,)


@cache
def find_place() -> None:
    """Give numba a folder if it would find none. Called before kernels are imported."""
    env: MutableMapping[str, str] = os.environ
    forget_older(env)
    if env.get(VARIABLE) or any(not files.why_unwritable(place) for place in places(env)):
        return
    ours = files.cache_dir() / "numba"
    chosen = str(ours) if not files.why_unwritable(ours) else tempfile.mkdtemp(prefix="halfbyte-numba-")
    env[VARIABLE] = chosen
    if "numba" in sys.modules:  # it has read the variable
        from numba.core import config

        config.reload_config()


def forget_older(env: Mapping[str, str] = os.environ) -> None:
    """Remove numba's files of each kernel that was compiled before a file that it is compiled of was last changed."""
    changed = {file: file.stat().st_mtime for file in _KERNELS.rglob("*.py")}
    newest = max(changed.values())
    if newest > time.time():  # the clock is wrong: what is compiled now would be older again
        return
    known: dict[str, float] = {}  # by the name of a kernel's file, when it or a part of it was last changed
    for index in _files(env, "*.nb[ic]"):
        with contextlib.suppress(OSError):  # another process was first, or it may not be written
            at, stem = index.stat().st_mtime, index.name.partition(".")[0]
            if at < newest and stem not in known:
                known[stem] = max((changed[file] for file in _parts(stem, changed)), default=newest)
            if at < newest and at < known[stem]:
                index.unlink()


def _parts(stem: str, sources: Iterable[Path]) -> set[Path]:
    """The files of this name, those of the names that they import, and so on: rather too many than too few."""
    parts, waiting = set[Path](), frozenset({stem})
    while new := {file for file in sources if file.stem in waiting} - parts:
        parts |= new
        waiting = frozenset().union(*map(_words_of_imports, new))
    return parts


@cache
def _words_of_imports(file: Path) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", " ".join(_IMPORT.findall(file.read_text(encoding="utf-8")))))


def _files(env: Mapping[str, str], pattern: str) -> Iterator[Path]:
    """numba's files of our kernels, in each of its places: an index (`nbi`) of each kernel, and its code (`nbc`) for
    each dtype."""
    for folder in {file.parent for file in _KERNELS.rglob("*.py")}:
        name = f"{folder.name}_{hashlib.sha1(str(folder).encode(), usedforsecurity=False).hexdigest()}"
        beside = folder / "__pycache__"
        for place in places(env):
            yield from (beside if place == _KERNELS / "__pycache__" else place / name).glob(pattern)


# Of recurrent layers: their files, and how many kernels each has in one dtype.
RECURRENT = {"conv": 1, "delta_rule": 2, "state_space": 2}


INTERPRETERS = ("decoding", "decoding_with_states", "decoding_with_blocks", "decoding_with_blocks_states")


def decoding(*, blocks: bool, states: bool) -> str:
    """The interpreter of a token that computes on a GGUF file's own blocks, and on recurrent layers: it has that name
    and its dtype's in the cache."""
    parts = ["blocks"] * blocks + ["states"] * states
    return "_".join(["decoding", *["with"] * bool(parts), *parts])


def uncompiled(
    dtype: str, *, attention: bool, integers: bool, interpreter: str = "", recurrent: Collection[str] = (),
    env: Mapping[str, str] = os.environ,
) -> tuple[str, ...]:  # fmt: skip
    """Of `fp32` (in which the proofs run), `bf16`, `integers`, the interpreter and `recurrent`: the kernels of `dtype`
    that numba's cache does not have. Older ones than the code are forgotten first.

    Args:
        attention: it is a kernel in this dtype on this processor, of this model. integers: frozen products are too.
        interpreter: what answers are written by, as `decoding` names it; "" where none are.
        recurrent: kinds of its recurrent layers, of `RECURRENT`.
    """
    forget_older(env)
    # the loss has a kernel on each machine, the first of them in fp32
    kernels = [path.name for path in _files(env, "*.nbc")]
    losses = sum(name.startswith("entropy.") for name in kernels)

    def lacks(number: int, of: str) -> bool:
        return losses < number or (attention and not any(name.startswith(f"{of}._backward") for name in kernels))

    missing = {
        "fp32": lacks(1, "fp32"),
        "bf16": dtype == "bf16" and lacks(2, "bf16"),
        "integers": integers and not any("weights.decode" in name for name in kernels),
    }
    if interpreter:
        missing[interpreter] = not any(name.startswith(f"interpreter.{interpreter}_{dtype}-") for name in kernels)
    for kind in recurrent:
        missing[kind] = sum(name.startswith(f"{kind}._") for name in kernels) < len({"fp32", dtype}) * RECURRENT[kind]
    return tuple(name for name, is_missing in missing.items() if is_missing)
