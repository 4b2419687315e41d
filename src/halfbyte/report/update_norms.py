"""What an adapter changed: the norm of each layer's update, by layer and by kind of layer.

Source: LoRA's update of a weight is scale x B A (arXiv:2106.09685); |BA|_F^2 = trace((B^T B)(A A^T)), which needs no
matrix of the weight's size. scale is alpha / r, or alpha / sqrt(r) with rsLoRA.
Cost: one read of the adapter, a pair of matrices at a time, and r x r products; no torch, which takes a second.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from halfbyte.recipe.adapter_folder import ADAPTER_FILES
from halfbyte.runs.folder import read_json
from halfbyte.system import limits
from halfbyte.types import Document

Matrix = NDArray[np.float64]
# Of a safetensors file: a number's dtype, as numpy has it; bf16 as the upper half of an fp32.
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
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
    norms, others = dict[str, float](), list[tuple[str, str]]()
    with file.open("rb") as stream:
        tensors = json.loads(stream.read(min(int.from_bytes(stream.read(8), "little"), limits.MAX_JSON_BYTES)))
        for name in sorted(tensors.keys() - {"__metadata__"}):
            b_name = name.replace(".lora_A.", ".lora_B.")
            if name.endswith(".lora_A.weight") and b_name in tensors:
                module = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
                a, b = (_matrix(stream, tensors[each]) for each in (name, b_name))
                norms[module] = abs(scale(config, module, a.shape[0])) * product_norm(a, b)
            elif ".lora_A." not in name and ".lora_B." not in name:
                shape = " x ".join(map(str, tensors[name]["shape"]))
                others.append((name.removeprefix("base_model.model."), shape))
    return by_layer(norms, others)


def _matrix(stream: BinaryIO, entry: Document) -> Matrix:
    """A tensor of a safetensors file, by its entry in the header: (first dimension, all others)."""
    begin, end = entry["data_offsets"]
    stream.seek(0)
    stream.seek(8 + int.from_bytes(stream.read(8), "little") + begin)
    numbers = np.frombuffer(stream.read(end - begin), DTYPES[entry["dtype"]])
    if entry["dtype"] == "BF16":
        numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.reshape(entry["shape"][0], -1).astype(np.float64)


def product_norm(a: Matrix, b: Matrix) -> float:
    """|BA|_F; a: (R, D), b: (O, R)."""
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
