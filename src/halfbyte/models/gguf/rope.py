"""A GGUF file's rotary positions as transformers' `rope_parameters`."""

import math

import numpy as np

from halfbyte.models.gguf.reader import GgufError, GgufReader
from halfbyte.types import ConfigFile, Document


def rope(file: GgufReader, default: ConfigFile, values: ConfigFile) -> Document:
    """Base, share and scaling of rotary positions. `default` is the class's own."""
    params: Document = {"rope_type": "default", "rope_theta": file.get("rope.freq_base", 10000.0)}
    dims, heads = file.get("rope.dimension_count"), values.get("num_attention_heads") or 1
    size = values.get("head_dim") or values.get("hidden_size", 0) // heads
    if dims and size and (dims != size or "partial_rotary_factor" in default):
        params["partial_rotary_factor"] = dims / size
    return params | scaling(file, default, dims or size, params["rope_theta"])


def scaling(file: GgufReader, default: ConfigFile, dims: int, theta: float) -> Document:
    kind, factor = file.get("rope.scaling.type", "none"), file.get("rope.scaling.factor", 1.0)
    original = file.get("rope.scaling.original_context_length")
    if (factors := file.table("rope_freqs.weight")) is not None:
        return _llama3(factors, dims, theta)
    if file.has("rope_factors_long.weight"):
        short, long = file.table("rope_factors_short.weight"), file.table("rope_factors_long.weight")
        if short is None or long is None or not original:
            raise GgufError("its rope_factors_long has no rope_factors_short or original_context_length beside it")
        lists = {"short_factor": short.tolist(), "long_factor": long.tolist()}
        return {"rope_type": "longrope", "original_max_position_embeddings": original, **lists}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor} if factor != 1 else {}
    if kind == "yarn":
        ours = {k: v for k, v in default.items() if k != "rope_theta"} if default.get("rope_type") == "yarn" else {}
        named = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
        stated = {name: file.get(f"rope.scaling.{key}") for name, key in named.items()}
        if file.get("rope.scaling.yarn_ext_factor") not in (None, 1.0, -1.0):
            raise GgufError("it says rope.scaling.yarn_ext_factor, for which transformers has no place")
        params = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        return {**ours, **params, **{name: value for name, value in stated.items() if value is not None}}
    if kind not in ("none", ""):
        raise GgufError(f"its rope.scaling.type is {kind!r}; allowed: none, linear, yarn, and tables of factors")
    return {}


def _llama3(factors: np.ndarray, dims: int, theta: float) -> Document:
    """Llama 3's scaling from the table that a converter made of it; the numbers behind it are found by trying."""
    if np.allclose(factors, 1):
        return {}
    for original in (8192, 4096, 16384, 32768):
        params = {
            "rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }  # fmt: skip
        expected = llama3_factors(params, theta, dims)
        if factors.shape == expected.shape and np.allclose(factors, expected, rtol=1e-4):
            return params
    raise GgufError("its rope_freqs.weight is not Llama 3's scaling, the only one of this form that is known")


def llama3_factors(params: Document, theta: float, dims: int) -> np.ndarray:
    """The divisor of each frequency: transformers, `modeling_rope_utils.py`, `_compute_llama3_parameters`."""
    wave = 2 * math.pi * theta ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
    factor, low, high = params["factor"], params["low_freq_factor"], params["high_freq_factor"]
    original = params["original_max_position_embeddings"]
    smooth = (original / wave - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wave < original / high, 1.0, np.where(wave > original / low, factor, between))
