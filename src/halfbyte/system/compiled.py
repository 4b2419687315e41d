"""Where numba keeps what it compiled, also where it would find no place: beside the kernels, in the user's cache, else
in halfbyte's own, else in a folder of this process alone.

Why: numba refuses to define a kernel that it cannot cache. So a user of a container without a home folder, beside a
package that root has installed, could compile nothing.
Source: `numba/core/caching.py`: its places in their order; NUMBA_CACHE_DIR names another one before them.
Cost: three looks at folders, once.
"""

import os
import sys
import tempfile
from collections.abc import Mapping, MutableMapping
from functools import cache
from pathlib import Path

from halfbyte.system import files

VARIABLE = "NUMBA_CACHE_DIR"
_KERNELS = Path(__file__).parents[1] / "layers" / "kernels" / "cpu"


def user_folder(env: Mapping[str, str] = os.environ) -> Path | None:
    """numba's place for a user; None where there is no home folder."""
    try:
        return Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "numba"
    except RuntimeError:
        return None


def places(env: Mapping[str, str] = os.environ) -> tuple[Path, ...]:
    """Where compiled kernels may lie: in the folder that is set, else beside them and in the user's."""
    if named := env.get(VARIABLE):
        return (Path(named),)
    user = user_folder(env)
    return (_KERNELS / "__pycache__", *([user] if user is not None else []))


@cache
def find_place() -> None:
    """Give numba a folder if it would find none. Called before kernels are imported."""
    env: MutableMapping[str, str] = os.environ
    if env.get(VARIABLE) or any(not files.why_unwritable(place) for place in places(env)):
        return
    own = files.cache_dir() / "numba"
    chosen = str(own) if not files.why_unwritable(own) else tempfile.mkdtemp(prefix="halfbyte-numba-")
    env[VARIABLE] = chosen
    if "numba" in sys.modules:  # it has read the variable
        from numba.core import config

        config.reload_config()


def are_there(env: Mapping[str, str] = os.environ) -> bool:
    """Whether numba's cache has the kernels of a training. The loss has one on each machine and in each dtype;
    attention has none for bf16 where the processor lacks it."""
    return any(next(place.rglob("entropy.*.nbi"), None) is not None for place in places(env))
