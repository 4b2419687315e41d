"""Opening a tiny model through its store and without one, and every tensor that is then held, to be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from halfbyte.base import load
from halfbyte.base.config import open_config
from halfbyte.base.load import Base, open_base
from halfbyte.base.store import shelf, supply
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.recipe.schema import Quant
from halfbyte.system import device


def checkpoint(folder: Path, **values: Any) -> Checkpoint:
    return Checkpoint(**{"path": folder, "id": "org/name", "revision": None, "kind": "folder", **values})


def opened(folder: Path, *, use_store: bool = True, tell: supply.Tell | None = None, **quant: Any) -> Base:
    found = checkpoint(folder, pickle=(folder / "pytorch_model.bin").is_file())
    machine = device.detect()
    return open_base(found, Quant(**quant), machine, use_store=use_store, tell=tell)


def wanted(folder: Path, **quant: Any) -> shelf.StoreSpec:
    """The store that belongs to a folder and settings."""
    from halfbyte.models import tensors

    config = open_config(folder)
    specs = tuple(tensors.read_checkpoint(folder))
    return load.store_spec(
        checkpoint(folder), config, Quant(**{"compute_dtype": "bf16", **quant}), device.detect(), specs
    )


def held(model: Any) -> dict[str, Any]:
    """Every parameter and buffer by name, and of 4-bit weights each part of the state beside the packed codes."""
    found: dict[str, Any] = {name: value.data for name, value in model.named_parameters()}
    found |= dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        state, prefix = getattr(parameter, "quant_state", None), name
        while state is not None:
            for part in ("absmax", "code", "offset", "dtype", "shape", "blocksize", "quant_type"):
                found[f"{prefix}.{part}"] = getattr(state, part)
            state, prefix = state.state2, f"{prefix}.state2"
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def differing(a: Any, b: Any) -> list[str]:
    """Names whose tensors are not bit for bit the same in two models."""
    x, y = held(a), held(b)
    return sorted(set(x) ^ set(y)) + [name for name in x if name in y and not same(x[name], y[name])]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 23)[None]).logits[0].float()


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
