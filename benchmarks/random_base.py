"""Write a 4-bit base of a known shape directly, from random layers: a standard pre-quantised bitsandbytes checkpoint,
one decoder layer a file, without ever holding the model. For measuring bases that are too large to make the usual way.

The numbers are random but of a sane size, so that activations neither vanish nor overflow: uniform NF4 codes, scales
around 1.8 / sqrt(inputs), norms of 1. Every layer's bytes are its own: nothing is linked or copied.
Cost: the disk's write rate; memory of one layer.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

# model -> config fields of a LlamaConfig
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama-2-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "tinyllama-1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}  # fmt: skip
VOCAB = 32000
BLOCK, NESTED_BLOCK = 64, 256


@dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int

    @classmethod
    def of(cls, model: str, layers: int | None = None) -> Shape:
        s = SHAPES[model]
        return cls(
            s["hidden_size"],
            s["intermediate_size"],
            layers or s["num_hidden_layers"],
            s["num_attention_heads"],
            s["num_key_value_heads"],
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (out, in) of a layer's 4-bit matrices."""
        d, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d), "mlp.gate_proj": (self.inner, d), "mlp.up_proj": (self.inner, d),
            "mlp.down_proj": (d, self.inner),
        }  # fmt: skip

    @property
    def layer_weights(self) -> int:
        return sum(o * i for o, i in self.linears().values())

    @property
    def disk_bytes(self) -> int:
        packed = self.layer_weights * (0.5 + 1 / BLOCK + 4 / BLOCK / NESTED_BLOCK)
        return int(self.layers * (packed + 4 * self.hidden) + 2 * VOCAB * self.hidden * 2)


def write(
    folder: Path, model: str, *, layers: int | None = None, tell: Callable[[str], None] = lambda text: None
) -> int:
    """Write the checkpoint and return its bytes. Refuses, loudly, where the disk has no room for it."""
    shape = Shape.of(model, layers)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < shape.disk_bytes * 1.1 + 2e9:
        sys.exit(f"SKIPPED: {shape.disk_bytes / 1e9:.1f} GB are needed in {folder}, {free / 1e9:.1f} GB are free")
    began, index = time.perf_counter(), {}
    rng = np.random.default_rng(0)
    for number in range(shape.layers):
        tensors = _layer(shape, f"model.layers.{number}.", rng)
        name = f"layer-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))
    ends = {
        "model.embed_tokens.weight": torch.randn(VOCAB, shape.hidden, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(shape.hidden, dtype=torch.bfloat16),
        "lm_head.weight": torch.randn(VOCAB, shape.hidden, dtype=torch.bfloat16) / shape.hidden**0.5,
    }
    for key, tensor in ends.items():
        name = f"{key.split('.')[-2]}.safetensors"
        save_file({key: tensor}, folder / name, metadata={"format": "pt"})
        index[key] = name
    total = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps(_config(model, shape.layers)))
    seconds = time.perf_counter() - began
    tell(f"wrote {total / 1e9:.2f} GB, {shape.layers} layers, in {seconds:.0f} s ({total / 1e9 / seconds:.2f} GB/s)")
    return total


def _layer(shape: Shape, prefix: str, rng: Any) -> dict[str, torch.Tensor]:
    tensors = {
        f"{prefix}{norm}.weight": torch.ones(shape.hidden, dtype=torch.bfloat16)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    for name, (out, inputs) in shape.linears().items():
        tensors.update(_packed(f"{prefix}{name}.weight", out, inputs, rng))
    return tensors


def _packed(name: str, out: int, inputs: int, rng: Any) -> dict[str, torch.Tensor]:
    """The tensors of one double-quantised NF4 matrix, as `bitsandbytes` writes them."""
    import bitsandbytes.functional as bnb_f

    blocks = out * inputs // BLOCK
    scale = 1.8 / inputs**0.5
    nested = bnb_f.QuantState(
        absmax=torch.full((-(-blocks // NESTED_BLOCK),), scale / 4, dtype=torch.float32),
        blocksize=NESTED_BLOCK,
        code=bnb_f.create_dynamic_map().float(),
        dtype=torch.float32,
    )
    state = bnb_f.QuantState(
        absmax=_random(blocks, rng),
        shape=torch.Size((out, inputs)),
        dtype=torch.bfloat16,
        blocksize=BLOCK,
        code=bnb_f.get_4bit_type("nf4", device="cpu"),
        quant_type="nf4",
        offset=torch.tensor(scale),
        state2=nested,
    )
    packed = {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {name: _random(out * inputs // 2, rng).view(-1, 1), **packed}


def _random(count: int, rng: Any) -> torch.Tensor:
    words = rng.integers(0, 2**64, -(-count // 8), dtype=np.uint64)
    return torch.from_numpy(words.view(np.uint8)[:count])


def _config(model: str, layers: int) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig, LlamaConfig

    config = LlamaConfig(
        **{**SHAPES[model], "num_hidden_layers": layers},
        vocab_size=VOCAB,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).to_dict()
    config["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ).to_dict()
    return {k: v for k, v in config.items() if v is not None}
