"""A thing of a library that a fast path stands on, and that some version may lack: then the path is off, and says so.

Why: halfbyte takes every minor version up to the next major one. What all of them have is pinned by `tests/seams/`;
what only some have is asked for here, by its name and never by a version number.
Cost: each is looked for once a process.
"""

import ast
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from halfbyte.system.libraries import version


@dataclass(frozen=True)
class Seam:
    """Args:
    library: its name. thing: what is looked for. without: what is done where it lacks.
    look: whether it is there; any exception says that it is not.
    """

    library: str
    thing: str
    without: str
    look: Callable[[], bool]

    @property
    def there(self) -> bool:
        return _is_there(self)

    @property
    def reason(self) -> str:
        """Why it cannot be stood on; empty if it can."""
        return "" if self.there else f"{self.library} {version(self.library)} has no {self.thing}"


@cache
def _is_there(seam: Seam) -> bool:
    try:
        return seam.look()
    except Exception:  # of any kind: whatever it is, it cannot be stood on
        return False


def source_of(module: str) -> str:
    """The text of a module, which is not imported; empty where it is not installed."""
    library, *inner = module.split(".")
    spec = importlib.util.find_spec(library)
    path = Path(((spec and spec.submodule_search_locations) or [""])[0], *inner).with_suffix(".py")
    return path.read_text(encoding="utf-8") if path.is_file() else ""


@cache
def fields_of(module: str, name: str) -> frozenset[str]:
    """The fields of a dataclass, and the arguments of its `__init__`, read off its source: nothing is imported.
    `module`: dotted; one that is not installed has no fields."""
    classes = [node for node in ast.parse(source_of(module)).body if isinstance(node, ast.ClassDef)]
    body = [node for cls in classes if cls.name == name for node in cls.body]
    named = [node.target.id for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    inits = [node.args for node in body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    return frozenset(named).union(*([each.arg for each in (*args.args[1:], *args.kwonlyargs)] for args in inits))
