"""Modules to quantise, and a reference in numpy that takes the bytes of a quantised layer by the formats' definitions.

No code of the package is in here. Use: `from tests.base.modules import helpers`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

# in_features of 48: bitsandbytes' own CPU kernel dequantises such a matrix wrongly on AVX-512.
WIDTH, INNER, VOCAB = 48, 80, 70
# QLoRA, appendix E; and bitsandbytes' FP4: by code.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FP4 = [0.0, 0.0052083333, 0.6666667, 1.0, 0.3333333, 0.5, 0.1666667, 0.25]
CODES = {"nf4": np.array(NF4), "fp4": np.array([*FP4, *(-v for v in FP4)])}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(query=y, key=y, value=y, need_weights=False)[0]
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Plain torch: a tied output, nn.MultiheadAttention, parameters and buffers of its own. Its last child is the stack
    of layers."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.output = nn.Linear(WIDTH, VOCAB, bias=False)
        self.output.weight = self.embedding.weight
        self.position = nn.Parameter(torch.randn(1, 64, WIDTH) * 0.1)
        self.register_buffer("scale", torch.tensor(0.5))
        self.mixer = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) * self.scale + self.position[:, : ids.shape[1]]
        x = x + self.mixer(x)
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


def vit_config() -> Any:
    return ViTConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=3, num_attention_heads=4, image_size=16,
        patch_size=4, num_labels=5, attn_implementation="eager",
    )  # fmt: skip


def llama_config(**changes: Any) -> Any:
    values = {"tie_word_embeddings": False, "num_key_value_heads": 2, "initializer_range": 0.1, **changes}
    return LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=3, num_attention_heads=4, vocab_size=VOCAB,
        max_position_embeddings=64, attn_implementation="eager", **values,
    )  # fmt: skip


def whisper_config() -> Any:
    return WhisperConfig(
        d_model=WIDTH, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=INNER, decoder_ffn_dim=INNER, vocab_size=VOCAB, num_mel_bins=8, max_source_positions=16,
        max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        attn_implementation="eager",
    )  # fmt: skip


MAKE = {
    "encoder": Encoder,
    "vit": lambda: ViTForImageClassification(vit_config()),
    "llama": lambda: LlamaForCausalLM(llama_config()),
    "whisper": lambda: WhisperForConditionalGeneration(whisper_config()),
}
# What each is called with, a list of layers, and a module that is not a layer's own child alone.
LAYERS = {"encoder": "layers", "vit": "vit.layers", "llama": "model.layers", "whisper": "model.decoder.layers"}


def made(name: str, seed: int = 0) -> nn.Module:
    """A module with random weights in fp32, in evaluation."""
    torch.manual_seed(seed)
    module = MAKE[name]().eval()
    for parameter in module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    return module


def empty(name: str) -> nn.Module:
    with torch.device("meta"):
        return MAKE[name]().eval()


def inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 32, generator=generator), "decoder_input_ids": ids}
    return {"ids" if name == "encoder" else "input_ids": ids}


def output(module: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(name).items()}
    out = module(**given)
    return out if isinstance(out, Tensor) else out.logits


def save(module: nn.Module, folder: Path, *, files: int = 1) -> Path:
    """A folder as `save_pretrained` writes it; of a plain module one file, or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(module, "save_pretrained"):
        module.save_pretrained(folder, max_shard_size="40KB" if files > 1 else "5GB")
        return folder
    state = {name: t.contiguous() for name, t in module.state_dict().items() if name != "output.weight"}
    if files == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    import json

    names = list(state)
    where = {name: f"part-{n % files}.safetensors" for n, name in enumerate(names)}
    for file in sorted(set(where.values())):
        save_file({n: state[n] for n in names if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def quantised(module: nn.Module) -> dict[str, nn.Module]:
    """The quantised layers, by name: those whose state dict holds scales."""
    held = module.state_dict()
    return {
        path: child
        for path, child in module.named_modules()
        if any(f"{path}.{each}" in held for each in ("weight.absmax", "SCB"))
    }


def dequantised(layer: nn.Module) -> np.ndarray:
    """(out, in) in fp64, from the tensors of the layer's state dict alone."""
    held = {name: t.detach().cpu() for name, t in layer.state_dict().items()}
    if "SCB" in held:
        return held["weight"].double().numpy() * held["SCB"].double().numpy()[:, None] / 127
    packed = held["weight"].contiguous().view(torch.uint8).numpy().reshape(-1)
    kind = next(name.rsplit("__", 1)[1] for name in held if "quant_state" in name)
    settings = bytes(held[f"weight.quant_state.bitsandbytes__{kind}"].numpy()).decode()
    import json

    state = json.loads(settings)
    absmax = held["weight.absmax"].numpy()
    if "weight.nested_absmax" in held:
        table, outer = held["weight.nested_quant_map"].numpy(), held["weight.nested_absmax"].numpy()
        blocks = np.arange(len(absmax)) // state["nested_blocksize"]
        absmax = table[absmax].astype(np.float64) * outer[blocks] + state["nested_offset"]
    codes = np.stack([packed >> 4, packed & 15], 1).reshape(-1)[: int(np.prod(state["shape"]))]
    values = CODES[kind][codes] * absmax.astype(np.float64)[np.arange(len(codes)) // state["blocksize"]]
    return values.reshape(state["shape"])


def reference(original: nn.Module, held: nn.Module) -> nn.Module:
    """The original in fp32 with the numbers that `held` says it has: dequantised, or as they were cast."""
    module = copy.deepcopy(original)
    layers = quantised(held)
    for path, layer in layers.items():
        ours = module.get_submodule(path)
        values = torch.from_numpy(dequantised(layer)).float()
        ours.weight.data = values.T.contiguous() if type(ours).__name__ == "Conv1D" else values
    state = held.state_dict()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name.rpartition(".")[0] not in layers or name.endswith("bias"):
            tensor.data = state[name].detach().to(tensor.dtype) if name in state else tensor.data
    return module


def error_of(layer: nn.Module, weight: Tensor) -> float:
    """The largest error of a quantised layer, in shares of the largest number of its block (4 bits) or row (8 bits)."""
    wanted, got = weight.detach().double().numpy(), dequantised(layer)
    flat, size = np.abs(wanted - got).reshape(-1), 64 if "SCB" not in layer.state_dict() else wanted.shape[1]
    starts = np.arange(0, flat.size, size)
    largest = np.maximum.reduceat(np.abs(wanted).reshape(-1), starts)
    return float((np.maximum.reduceat(flat, starts) / largest).max())
