"""Small 4-bit checkpoints on disk, as `transformers` maps them, for tests of what comes and goes.

Use: `from tests import mapped`. Wider than tiny's models, so that a layer is many pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from halfbyte.base import load
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.recipe.schema import Quant
from halfbyte.system import device
from tests import tiny

# config fields that make tiny's models wider, by architecture; a layer then has 0.3 MB and more
_WIDE = {
    "gpt2": {"n_embd": 256, "n_inner": 512},
    "bloom": {"hidden_size": 256},
    "opt": {"hidden_size": 256, "ffn_dim": 512, "word_embed_proj_dim": 256},
    "falcon": {"hidden_size": 256, "ffn_hidden_size": 512},
    "mpt": {"d_model": 256},
}
LAYERS = 4


def save(
    folder: Path, name: str, *, double_quant: bool = True, seed: int = 0, changes: Mapping[str, Any] | None = None
) -> Path:
    """Write a pre-quantised checkpoint of `LAYERS` layers in bf16 and NF4 and return its folder."""
    sizes: dict[str, Any] = dict(_WIDE.get(name, {"hidden_size": 256, "intermediate_size": 512}))
    sizes |= {"n_layer" if name in ("gpt2", "bloom") else "n_layers" if name == "mpt" else "num_hidden_layers": LAYERS}
    if name == "gemma3":
        sizes["layer_types"] = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    plain = folder / "plain"
    tiny.model(name, seed=seed, dtype=torch.bfloat16, changes={**sizes, **(changes or {})}).save_pretrained(plain)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(folder / "quantised")
    return folder / "quantised"


def open_model(folder: Path) -> Any:
    """Open it as halfbyte does, without a tokenizer, computing in bf16."""
    checkpoint = Checkpoint(path=folder, id=str(folder), revision=None, kind="folder")
    quant = Quant(compute_dtype="bf16")
    return load.open_base(checkpoint, quant, device.detect()).model
