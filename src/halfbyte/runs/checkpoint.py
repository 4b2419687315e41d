"""Checkpoints that are whole or absent: adapter, optimiser, schedule, random state and position, nothing pickled.

Why: upstream writes files one by one into the final folder, as pickles, and resumes with a *fresh* optimiser, silently,
when `optimizer.pt` is missing (`transformers/trainer.py`, `_load_optimizer_and_scheduler`).
Here everything is written under a temporary name, synced, listed in `manifest.json` with sizes and sha256, and renamed.
Format: safetensors for tensors, JSON for the rest; `adapter_*` files are PEFT's, `trainer_state.json` is transformers'.
Cost: one write of the adapter and of its optimiser state (8 bytes a trained parameter for AdamW).
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from halfbyte.errors import RunError, TrainError
from halfbyte.system import files

if TYPE_CHECKING:
    from halfbyte.types import Document

NESTED = "/"  # between a state's name and a name inside it
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
OPTIMIZER_TENSORS, OPTIMIZER_JSON, RNG_TENSORS = "optimizer.safetensors", "optimizer.json", "rng.safetensors"
_NAME = re.compile(r"step-(\d{6,})$")


def save(
    folder: Path,
    step: int,
    *,
    write_adapter: Callable[[Path], None],
    write_trainer_state: Callable[[Path], None],
    optimizer: Optimizer,
    scheduler: LRScheduler,
) -> Path:
    """Write `folder/step-NNNNNN` whole or not at all.

    Args:
        folder: the run's `checkpoints/`.
        write_adapter: writes PEFT's two adapter files into the folder it is given.
        write_trainer_state: writes `trainer_state.json` to the path it is given.

    Raises:
        TrainError: the disk is full or refuses; the temporary folder is removed and earlier checkpoints are untouched.
    """
    final = folder / f"step-{step:06d}"
    if is_whole(final):
        return final
    with whole_or_absent(f"checkpoint {final}", final) as temporary:
        write_adapter(temporary)
        write_trainer_state(temporary / "trainer_state.json")
        tensors, rest = _flatten(optimizer.state_dict())
        save_file(tensors, temporary / OPTIMIZER_TENSORS)
        state = {"optimizer": rest, "scheduler": _plain(scheduler.state_dict()), "python_random": random.getstate()}
        (temporary / OPTIMIZER_JSON).write_text(json.dumps(state))
        save_file(_rng_state(), temporary / RNG_TENSORS)
        listed = {p.name: {"bytes": p.stat().st_size, "sha256": files.sha256(p)} for p in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT_VERSION, "step": step, "files": listed}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    return final


@contextmanager
def whole_or_absent(what: str, folder: Path) -> Iterator[Path]:
    """`files.new_folder`, of which a disk that refuses makes one error.

    Raises:
        TrainError: with the reason of the system.
    """
    try:
        with files.new_folder(folder) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        raise TrainError(
            f"{what} could not be written: {getattr(error, 'strerror', None) or error}.",
            fix="free some disk space, then continue from the newest whole checkpoint with `halfbyte train --resume`",
        ) from error


def is_whole(path: Path, *, hashes: bool = False) -> bool:
    """Whether a checkpoint has every file of its manifest at its full size (and, if asked, with its sha256)."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        return manifest["format"] == FORMAT_VERSION and all(
            (path / name).stat().st_size == entry["bytes"]
            and (not hashes or files.sha256(path / name) == entry["sha256"])
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted((p for p in folder.glob("step-*") if _NAME.search(p.name) and is_whole(p)), key=step_of)


def newest(folder: Path) -> Path:
    """The newest checkpoint whose every hash is right.

    Raises:
        RunError: there is none, or only damaged ones.
    """
    for path in reversed(checkpoints(folder)):
        if is_whole(path, hashes=True):
            return path
    damaged = sorted(p.name for p in folder.glob("step-*"))
    there = f"found only damaged ones: {', '.join(damaged)}" if damaged else "it has none"
    raise RunError(
        f"no whole checkpoint to resume from in {folder}; {there}.",
        fix="start again with another `output:` (`--set output=runs/NAME`)",
    )


def step_of(path: Path) -> int:
    match = _NAME.search(path.name)
    if match is None:
        raise RunError(f"{path} is not a checkpoint folder; its name must be step-NNNNNN.")
    return int(match[1])


def prune(folder: Path, keep: int | None) -> list[Path]:
    """Remove the oldest whole checkpoints so that `keep` stay, and temporaries of dead writers. Returns what went."""
    gone = [p for p in folder.glob(".step-*") if not _alive(p.suffix.lstrip("."))]
    whole = checkpoints(folder)
    if keep is not None and len(whole) > keep:
        gone += whole[: len(whole) - keep]
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
    return gone


def load_optimizer(path: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Put the optimiser's and the schedule's state back.

    Raises:
        RunError: the state is of other parameters than these (another recipe).
    """
    state = json.loads((path / OPTIMIZER_JSON).read_text())
    saved = state["optimizer"]["param_groups"]
    own = optimizer.state_dict()["param_groups"]
    if [len(g["params"]) for g in saved] != [len(g["params"]) for g in own]:
        raise RunError(
            f"checkpoint {path} holds the optimiser state of {sum(len(g['params']) for g in saved)} tensors, this "
            f"recipe trains {sum(len(g['params']) for g in own)}.",
            fix="resume with the recipe in the run folder, unchanged",
        )
    optimizer.load_state_dict(_unflatten(load_file(path / OPTIMIZER_TENSORS), state["optimizer"]))
    scheduler.load_state_dict(state["scheduler"])


def load_rng(path: Path) -> None:
    """Put the random state of torch (CPU and cards), numpy and Python back."""
    tensors = load_file(path / RNG_TENSORS)
    torch.set_rng_state(tensors["torch"])
    if "cuda.0" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([tensors[f"cuda.{i}"] for i in range(torch.cuda.device_count())])
    position, has_gauss = (int(v) for v in tensors["numpy_position"])
    key = tensors["numpy_key"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, float(tensors["numpy_gauss"])))
    version, internal, gauss = json.loads((path / OPTIMIZER_JSON).read_text())["python_random"]
    random.setstate((version, tuple(internal), gauss))


def _rng_state() -> dict[str, torch.Tensor]:
    _, key, position, has_gauss, gauss = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy_key": torch.from_numpy(np.asarray(key).astype(np.int64)),
        "numpy_position": torch.tensor([int(position), int(has_gauss)]),
        "numpy_gauss": torch.tensor(float(gauss), dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def _flatten(state: Document) -> tuple[dict[str, torch.Tensor], Document]:
    """An optimiser's state dict as (tensors by `index.name`, JSON). Scalars of the state stay in the JSON."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Document] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                # clone: safetensors refuses tensors that share storage
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous().clone()
            elif isinstance(value, dict) and any(isinstance(inner, torch.Tensor) for inner in value.values()):
                # bitsandbytes keeps the 8-bit state and its scales in a dict of their own
                for inner_name, inner in value.items():
                    if isinstance(inner, torch.Tensor):
                        tensors[f"{index}.{name}{NESTED}{inner_name}"] = inner.detach().cpu().contiguous().clone()
                    else:
                        scalars.setdefault(str(index), {})[f"{name}{NESTED}{inner_name}"] = _plain(inner)
            else:
                scalars.setdefault(str(index), {})[name] = _plain(value)
    return tensors, {"scalars": scalars, "param_groups": _plain(state["param_groups"])}


def _unflatten(tensors: dict[str, torch.Tensor], rest: Document) -> Document:
    state: dict[int, Document] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    for index, values in rest["scalars"].items():
        state.setdefault(int(index), {}).update(values)
    for values in state.values():
        for key in [key for key in values if NESTED in key]:
            name, _, inner_name = key.partition(NESTED)
            values.setdefault(name, {})[inner_name] = values.pop(key)
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in rest["param_groups"]]
    return {"state": state, "param_groups": groups}


def _plain(value: object) -> object:
    """JSON-ready copy; a 0-d tensor becomes a number, an object without a JSON form is left out of its dict."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if _has_json(v)}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def _has_json(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, tuple, dict, torch.Tensor))


def _alive(pid: str) -> bool:
    return pid.isdigit() and Path(f"/proc/{pid}").exists()
