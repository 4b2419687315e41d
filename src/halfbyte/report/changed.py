"""What an adapter changed: the norm of each layer's update, by layer and by kind of layer.

Source: LoRA's update of a weight is scale x B A (arXiv:2106.09685); |BA|_F^2 = trace((B^T B)(A A^T)), which needs no
matrix of the weight's size. scale is alpha / r, or alpha / sqrt(r) with rsLoRA.
Cost: one read of the adapter, r x r products; torch is imported here, where an adapter is there.
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
class Change:
    """Frobenius norms of an adapter's updates: `norms[i][j]` of layer `layers[i]` and kind `kinds[j]`, NaN for none.
    `others` are what it holds besides: (name, what it is)."""

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    norms: tuple[tuple[float, ...], ...]
    others: tuple[tuple[str, str], ...]

    @property
    def largest(self) -> tuple[str, str, float] | None:
        found = [
            (self.layers[i], self.kinds[j], value)
            for i, row in enumerate(self.norms)
            for j, value in enumerate(row)
            if math.isfinite(value)
        ]
        return max(found, key=lambda one: one[2], default=None)


def norms(adapter: Path) -> Change | None:
    """Of a PEFT folder; None where there is no adapter."""
    file, config = adapter / ADAPTER_FILES[0], read_json(adapter / ADAPTER_FILES[1])
    if not file.is_file() or not config:
        return None
    from safetensors import safe_open

    found, others = dict[str, float](), list[tuple[str, str]]()
    with safe_open(str(file), framework="pt") as tensors:
        names = set(tensors.keys())
        for name in sorted(names):
            if name.endswith(".lora_A.weight") and name.replace(".lora_A.", ".lora_B.") in names:
                module = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
                a, b = tensors.get_tensor(name), tensors.get_tensor(name.replace(".lora_A.", ".lora_B."))
                found[module] = abs(scale(config, module, a.shape[0])) * product_norm(a, b)
            elif ".lora_A." not in name and ".lora_B." not in name:
                shape = " x ".join(map(str, tensors.get_slice(name).get_shape()))
                others.append((name.removeprefix("base_model.model."), shape))
    return arranged(found, others)


def product_norm(a: Tensor, b: Tensor) -> float:
    """|BA|_F; a: (R, D), b: (O, R)."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def scale(config: Document, module: str, rank: int) -> float:
    """What the update of a module is multiplied by, with its own alpha where a pattern gives one."""
    pattern: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", module)), config.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def arranged(found: dict[str, float], others: list[tuple[str, str]]) -> Change:
    """By layer and kind; modules outside the layers have the layer "-"."""
    places, layers, kinds = dict[tuple[str, str], float](), dict[str, None](), dict[str, None]()
    for module, value in found.items():
        match = _LAYER.match(module)
        layer, kind = (match[2], match[3].rpartition(".")[2]) if match else ("-", module.rpartition(".")[2])
        places[layer, kind] = math.hypot(places.get((layer, kind), 0.0), value)  # of experts, all of a layer together
        layers[layer], kinds[kind] = None, None
    rows, columns = sorted(layers, key=lambda name: (name == "-", int(name) if name != "-" else 0)), list(kinds)
    norms = tuple(tuple(places.get((row, column), math.nan) for column in columns) for row in rows)
    return Change(tuple(rows), tuple(columns), norms, tuple(others))
