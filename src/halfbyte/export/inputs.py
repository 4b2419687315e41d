"""What an export is asked for, as far as it can be refused before a library is loaded: a format of GGUF, the adapter, a
folder that is free. No torch."""

from collections.abc import Collection, Sequence
from pathlib import Path

from halfbyte.data.reading import read
from halfbyte.errors import RecipeError, RunError, typed
from halfbyte.inference import target
from halfbyte.recipe.task import CAUSAL_LM
from halfbyte.system import files

# What the gguf package encodes; the rest goes through llama.cpp's quantiser (`llama_cpp.py`).
OWN_FORMATS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_QUANTS = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
FLOATS = ("F32", "F16", "BF16")


def gguf_format(kind: str, *, repair: bool = False) -> str:
    """The format of this name. Raises RecipeError: there is none, or none that is rounded."""
    kind = kind.upper()
    if kind not in (every := (*OWN_FORMATS, *K_QUANTS)):
        raise RecipeError(f"--gguf {kind}: no such format.", fix=f"one of {', '.join(every)}")
    if repair and kind in FLOATS:
        raise RecipeError(f"--repair: {kind} rounds too little to be repaired.", fix="leave --repair out")
    return kind


def adapter_of(path: Path, overrides: Sequence[str], tasks: Collection[str] = (CAUSAL_LM,)) -> target.Target:
    """The run or adapter, on this machine. Raises RunError: a base alone."""
    run = target.find(path, overrides, tasks)
    if run.adapter is None:
        fix = f"halfbyte train {typed(path)} ROWS.jsonl"
        raise RunError(f"{path} is a base without an adapter: there is nothing to ship.", fix=fix)
    return run


def check_rows(run: target.Target, data: Path | None) -> None:
    """Raises DataError: what is to be compared on cannot be read."""
    if data is not None:
        read.look(data, run.recipe.data)


def out_folder(run: Path, out: Path | None, name: str) -> Path:
    """Where the export goes; None takes a folder in the run. Raises RecipeError: something is there already, or nothing
    can be written there."""
    out = out or (run / name if (run / "recipe.yaml").is_file() else Path(f"{run}-{name}"))
    if out.exists() or out.is_symlink():
        raise RecipeError(f"{out} exists already, and nothing is overwritten.", fix="name another one: --out DIR")
    if why := files.why_unwritable(out.absolute()):
        raise RecipeError(f"{out} cannot be written: {why}.", fix="name another one: --out DIR")
    return out
