"""A mixture of experts that is larger in 16 bits than the memory it trains in: stored, and one step streamed from disk.

    python benchmarks/mixture.py                     # a Qwen3-MoE of 14 layers, 8.9 GB in 16 bits; minutes

The checkpoint is written from random numbers, an expert a tensor as Qwen3-MoE's are, and deleted afterwards. Memory is
the process's own resident set, private and file pages together, sampled every 20 ms. Speed: `experts.py`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file

from benchmarks.larger_than_ram import step
from benchmarks.measuring import arguments, cold, on_disk, say, verdict, watched
from halfbyte.adapters import lora as adapters
from halfbyte.adapters import targets
from halfbyte.base import load, stream
from halfbyte.base.config import open_config
from halfbyte.base.store import supply
from halfbyte.layers import fuse, loss, packing
from halfbyte.models import structure, tensors
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.recipe.schema import Lora, Quant
from halfbyte.system import device, usage

HIDDEN, INNER, EXPERTS, CHOSEN, HEADS, KEY_HEADS, HEAD_SIZE, VOCAB, LAYERS = 2048, 768, 64, 8, 16, 4, 128, 32000, 14
QUANT = Quant(compute_dtype="bf16")
LORA = {"r": 16, "target_modules": ("q_proj", "v_proj")}
MAX_SHARE = 0.25


def write(folder: Path, layers: int) -> int:
    """The checkpoint, a file for each layer. Returns its bytes."""
    from transformers import Qwen3MoeConfig

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    numbers = torch.randn(1 << 25).bfloat16()  # every matrix is a piece of these, from a place of its own
    index: dict[str, str] = {}

    def matrix(out: int, inputs: int) -> torch.Tensor:
        start = int(torch.randint(0, numbers.numel() - out * inputs, ()))
        return numbers[start : start + out * inputs].view(out, inputs) * inputs**-0.5

    def save(name: str, made: dict[str, torch.Tensor]) -> None:
        save_file(made, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(made, name))

    wide, narrow = HEADS * HEAD_SIZE, KEY_HEADS * HEAD_SIZE
    for n in range(layers):
        at = f"model.layers.{n}"
        made = {
            f"{at}.self_attn.q_proj.weight": matrix(wide, HIDDEN),
            f"{at}.self_attn.k_proj.weight": matrix(narrow, HIDDEN),
            f"{at}.self_attn.v_proj.weight": matrix(narrow, HIDDEN),
            f"{at}.self_attn.o_proj.weight": matrix(HIDDEN, wide),
            f"{at}.mlp.gate.weight": matrix(EXPERTS, HIDDEN),
            **{f"{at}.self_attn.{x}_norm.weight": torch.ones(HEAD_SIZE).bfloat16() for x in "qk"},
            **{f"{at}.{x}_layernorm.weight": torch.ones(HIDDEN).bfloat16() for x in ("input", "post_attention")},
        }  # fmt: skip
        for e in range(EXPERTS):
            for name, shape in (("gate", (INNER, HIDDEN)), ("up", (INNER, HIDDEN)), ("down", (HIDDEN, INNER))):
                made[f"{at}.mlp.experts.{e}.{name}_proj.weight"] = matrix(*shape)
        save(f"layer-{n:05d}.safetensors", made)
    ends = {
        "model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN).bfloat16(),
        "lm_head.weight": matrix(VOCAB // 2, HIDDEN),
    }
    ends["lm_head.weight"] = ends["lm_head.weight"].repeat(2, 1)
    save("ends.safetensors", {**ends, "model.norm.weight": torch.ones(HIDDEN).bfloat16()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, intermediate_size=4 * INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=HEAD_SIZE, vocab_size=VOCAB,
        num_experts=EXPERTS, num_experts_per_tok=CHOSEN, norm_topk_prob=True, dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def store_of(source: Path, out: Path) -> tuple[Path, float]:
    """The store, and the seconds that it took."""
    checkpoint = Checkpoint(path=source, id=source.name, revision=None, kind="folder")
    specs = tuple(tensors.read_checkpoint(source))
    began = time.perf_counter()
    wanted = load.store_spec(checkpoint, open_config(source), QUANT, device.detect(), specs)
    return supply.ensure(wanted, out=out), time.perf_counter() - began


def adapted(folder: Path) -> Any:
    """The base in its placement with LoRA, as a training has it."""
    checkpoint = Checkpoint(path=folder, id=folder.name, revision=None, kind="folder")
    model = load.open_base(checkpoint, QUANT, device.detect()).model
    lora = Lora(**LORA, init_lora_weights=False)
    model = adapters.add(model, lora, targets.resolve_targets(model, lora.target_modules), seed=0)
    packing.install(model)
    fuse.install(model)
    return model


def train_larger(folder: Path, tokens: int, layers: int) -> dict[str, Any]:
    size = write(folder / "source", layers)
    say(f"wrote {size / 1e9:.2f} GB in 16 bits, {layers} layers")
    usage.trim()
    with watched() as building:
        store, seconds = store_of(folder / "source", folder / "store")
    stored = sum(path.stat().st_size for path in store.glob("*.safetensors"))
    say(f"stored in {seconds:.0f} s: {stored / 1e9:.2f} GB, at most {building.anonymous / 1e9:.2f} GB private")
    shutil.rmtree(folder / "source")
    cold(store)
    usage.trim()
    with watched() as memory:
        model = adapted(store)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        placed = stream.place(model, "streamed")
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
        with structure.shallow(model):
            loss.head_of(model)
        value, step_s = step(model, optimizer, tokens)
        say(f"{placed}; step: loss {value:.3f}, {step_s:.1f} s")
    trained = [p for p in model.parameters() if p.requires_grad]
    alive = sum(1 for p in trained if p.grad is not None and bool(p.grad.abs().sum() > 0))
    return {
        "layers": layers, "tokens": tokens, "source_gb": size / 1e9, "store_gb": stored / 1e9, "store_s": seconds,
        "store_private_gb": building.anonymous / 1e9, "store_peak_gb": building.to_json()["peak_gb"],
        "loss": value, "step_s": step_s, "adapter_tensors": len(trained), "with_gradient": alive,
        "share": memory.to_json()["peak_gb"] / (size / 1e9), **memory.to_json(),
    }  # fmt: skip


def main() -> int:
    parser = arguments(__doc__, "/tmp/halfbyte-mixture")
    args = parser.parse_args()
    result = on_disk(args, lambda: train_larger(args.folder, args.tokens, args.layers or LAYERS))
    fine = [
        verdict(
            "private memory while it is stored", result["store_private_gb"], MAX_SHARE * result["source_gb"], " GB"
        ),
        verdict("peak resident set of the step, of the 16-bit size", result["share"], MAX_SHARE),
        result["with_gradient"] == result["adapter_tensors"],
    ]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
