"""What the metadata of a GGUF file says of its model, and of its rotary positions in transformers' words.

Everything that is read is noted, so that what nobody has read can be refused.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from halfbyte.models.gguf.header import GgufHeader
from halfbyte.models.gguf.layouts import Refused
from halfbyte.models.gguf.weights import Weights
from halfbyte.types import ConfigFile, Document

if TYPE_CHECKING:
    import numpy as np


class Said:
    """What a file says, and what of it has been used."""

    def __init__(self, header: GgufHeader) -> None:
        self.header, self.used = header, {"block_count", "nextn_predict_layers"}
        self.tensors = {tensor.name: tensor for tensor in header.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        """A value below the architecture's name. One number for all layers where the file repeats it for each."""
        self.used.add(key)
        value = self.header.metadata.get(f"{self.header.architecture}.{key}", default)
        if isinstance(value, float):
            return _short(value)
        return value[0] if isinstance(value, list) and len(set(value)) == 1 else value

    def every_layer(self, key: str) -> list[Any]:
        """The value of each layer, repeated where the file says one for all."""
        value = self.get(key)
        values = value if isinstance(value, list) else [value] * self.layers
        if len(values) < self.layers:
            raise Refused(f"its {key} has {len(values)} values for {self.layers} layers")
        return values[: self.layers]

    def stated(self) -> list[str]:
        start = f"{self.header.architecture}."
        return [key.removeprefix(start) for key in self.header.metadata if key.startswith(start)]

    def has(self, tensor: str) -> bool:
        return tensor in self.tensors

    def table(self, tensor: str) -> np.ndarray | None:
        """The values of a small tensor, if the file has it."""
        return Weights(self.header).whole(tensor).reshape(-1) if self.has(tensor) else None

    @property
    def layers(self) -> int:
        count = self.get("block_count", 0)
        if not isinstance(count, int) or not 0 < count <= len(self.tensors):
            raise Refused(f"its block_count is {count!r}, and it holds {len(self.tensors)} tensors")
        return int(count - self.get("nextn_predict_layers", 0))


def _short(value: float) -> float:
    """The shortest number that a float32 of the file stands for: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def rope(said: Said, default: ConfigFile, values: ConfigFile) -> Document:
    """Base, share and scaling of rotary positions. `default` is the class's own."""
    params: Document = {"rope_type": "default", "rope_theta": said.get("rope.freq_base", 10000.0)}
    dims, heads = said.get("rope.dimension_count"), values.get("num_attention_heads") or 1
    size = values.get("head_dim") or values.get("hidden_size", 0) // heads
    if dims and size and (dims != size or "partial_rotary_factor" in default):
        params["partial_rotary_factor"] = dims / size
    return params | scaling(said, default, dims or size, params["rope_theta"])


def scaling(said: Said, default: ConfigFile, dims: int, theta: float) -> Document:
    kind, factor = said.get("rope.scaling.type", "none"), said.get("rope.scaling.factor", 1.0)
    original = said.get("rope.scaling.original_context_length")
    if (factors := said.table("rope_freqs.weight")) is not None:
        return _llama3(factors, dims, theta)
    if said.has("rope_factors_long.weight"):
        short, long = said.table("rope_factors_short.weight"), said.table("rope_factors_long.weight")
        if short is None or long is None or not original:
            raise Refused("its rope_factors_long has no rope_factors_short or original_context_length beside it")
        lists = {"short_factor": short.tolist(), "long_factor": long.tolist()}
        return {"rope_type": "longrope", "original_max_position_embeddings": original, **lists}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor != 1 else {}
    if kind == "yarn":
        own = {k: v for k, v in default.items() if k != "rope_theta"} if default.get("rope_type") == "yarn" else {}
        named = {
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
            "attention_factor": "yarn_attn_factor",
            "extrapolation_factor": "yarn_ext_factor",
        }
        more = {name: said.get(f"rope.scaling.{key}") for name, key in named.items()}
        if more.pop("extrapolation_factor") not in (None, 1.0, -1.0):
            raise Refused("it says rope.scaling.yarn_ext_factor, for which transformers has no place")
        params = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        return {**own, **params, **{name: value for name, value in more.items() if value is not None}}
    if kind not in ("none", ""):
        raise Refused(f"its rope.scaling.type is {kind!r}; allowed: none, linear, yarn, and tables of factors")
    return {}


def _llama3(factors: np.ndarray, dims: int, theta: float) -> Document:
    """Llama 3's scaling from the table that a converter made of it; the numbers behind it are found by trying."""
    import numpy as np

    if np.allclose(factors, 1):
        return {}
    wavelengths = 2 * math.pi * theta ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
    for original in (8192, 4096, 16384, 32768):
        factor, low, high = float(factors.max()), 1.0, 4.0
        smooth = (original / wavelengths - low) / (high - low)
        expected = 1 / ((1 - smooth) / factor + smooth)
        expected = np.where(
            wavelengths < original / high, 1.0, np.where(wavelengths > original / low, factor, expected)
        )
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4):
            return {
                "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }  # fmt: skip
    raise Refused("its rope_freqs.weight is not Llama 3's scaling, the only one of this form that is known")
