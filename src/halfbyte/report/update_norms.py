"""What an adapter changed: the norm of each layer's update, by layer and by kind of layer.

Source: LoRA's update of a weight is scale x B A (arXiv:2106.09685); |BA|_F^2 = trace((B^T B)(A A^T)), which needs no
matrix of the weight's size. scale is alpha / r, or alpha / sqrt(r) with rsLoRA.
Cost: one read of the adapter, whose pages are let go again, and r x r products; torch is imported here, where an
adapter is there.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.recipe.adapter import ADAPTER_FILES
from halfbyte.runs.folder import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from halfbyte.types import Document

_LAYER = re.compile(r"^(.*?\.)(\d+)\.(.+)$")


@dataclass(frozen=True)
class UpdateNorms:
    """Frobenius norms of an adapter's updates: `norms[i][j]` of layer `layers[i]` and kind `kinds[j]`, NaN for none.
    `others`: the adapter's other tensors (name, shape)."""

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    norms: tuple[tuple[float, ...], ...]
    others: tuple[tuple[str, str], ...]

    @property
    def largest(self) -> tuple[str, str, float] | None:
        """Layer, kind and norm of the largest update."""
        cells = [
            (layer, kind, value)
            for layer, row in zip(self.layers, self.norms, strict=True)
            for kind, value in zip(self.kinds, row, strict=True)
            if math.isfinite(value)
        ]
        return max(cells, key=lambda cell: cell[2], default=None)


def read(adapter: Path) -> UpdateNorms | None:
    """The norms of a PEFT folder; None where there is no adapter."""
    file, config = adapter / ADAPTER_FILES[0], read_json(adapter / ADAPTER_FILES[1])
    if not file.is_file() or not config:
        return None
    from safetensors import safe_open

    from halfbyte.system import pages

    norms, others = dict[str, float](), list[tuple[str, str]]()
    with safe_open(str(file), framework="pt") as tensors:
        names, maps = set(tensors.keys()), None
        for name in sorted(names):
            if name.endswith(".lora_A.weight") and name.replace(".lora_A.", ".lora_B.") in names:
                module = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
                a, b = tensors.get_tensor(name), tensors.get_tensor(name.replace(".lora_A.", ".lora_B."))
                norms[module] = abs(scale(config, module, a.shape[0])) * product_norm(a, b)
                maps = maps or pages.FileMaps.read()
                pages.let_go((a, b), maps)
            elif ".lora_A." not in name and ".lora_B." not in name:
                shape = " x ".join(map(str, tensors.get_slice(name).get_shape()))
                others.append((name.removeprefix("base_model.model."), shape))
    return by_layer(norms, others)


def product_norm(a: Tensor, b: Tensor) -> float:
    """|BA|_F; a: (R, D), b: (O, R)."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def scale(config: Document, module: str, rank: int) -> float:
    """The factor of a module's update, with the module's own alpha where a pattern gives one."""
    pattern: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module)), config.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def by_layer(norms: dict[str, float], others: list[tuple[str, str]]) -> UpdateNorms:
    """Norms by layer and kind of layer; modules outside the layers have the layer "-"."""
    cells = dict[tuple[str, str], float]()
    for module, value in norms.items():
        match = _LAYER.match(module)
        cell = (match[2], match[3].rpartition(".")[2]) if match else ("-", module.rpartition(".")[2])
        cells[cell] = math.hypot(cells.get(cell, 0.0), value)  # all experts of a layer together
    layers = sorted({layer for layer, _ in cells}, key=lambda name: (name == "-", int(name) if name != "-" else 0))
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    table = tuple(tuple(cells.get((layer, kind), math.nan) for kind in kinds) for layer in layers)
    return UpdateNorms(tuple(layers), tuple(kinds), table, tuple(others))
