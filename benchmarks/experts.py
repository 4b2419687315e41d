"""Tokens a second of a training step of a mixture: transformers and PEFT with 16-bit experts, beside ours, in turns.

    python benchmarks/experts.py                     # two layers of Qwen3-MoE's kind; LoRA on attention, and on experts
    python benchmarks/experts.py --tokens 512 --rounds 7

The plain stack computes its experts by `grouped_mm`, transformers' default, with bf16 weights, and PEFT adds LoRA on
experts to the weights. Ours computes the same model with experts in bf16, and with experts in NF4. A step is forward
and backward of one micro-batch of two examples; a ratio is taken round by round, the median stands with the spread.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import peft
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import halfbyte
from halfbyte.data.collate import collate
from halfbyte.data.encoding.examples import Example
from halfbyte.layers import loss, packing
from halfbyte.layers.experts.layout import experts_of, stacks_of
from halfbyte.quant import formats
from halfbyte.recipe.schema import Quant

CONFIG = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 32000,
    "max_position_embeddings": 8192,
}  # fmt: skip
TARGETS = {"attention": [], "attention and experts": ["gate_up_proj", "down_proj"]}


def built(layers: int) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**CONFIG, num_hidden_layers=layers), dtype=torch.bfloat16)
    return model.requires_grad_(False)


def quantised(model: Any) -> Any:
    """All experts in NF4, in place."""
    for _, module in experts_of(model):
        for name in stacks_of(module):
            weight, quant = getattr(module, name).detach(), Quant()
            encoder = formats.of(quant).encoder(quant, tuple(weight.shape), weight.dtype, name)
            codes = torch.from_numpy(encoder.codes(0, weight.reshape(-1)))
            parts = {"": codes, **encoder.parts()}
            setattr(module, name, formats.of(quant).stack(parts, tuple(weight.shape), quant, weight.dtype))
    return model


def adapted(model: Any, get_peft_model: Callable[..., Any], parameters: list[str]) -> Any:
    config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"], target_parameters=parameters or None,
                        task_type="CAUSAL_LM")  # fmt: skip
    torch.manual_seed(1)
    return get_peft_model(model, config).train()


def steps(base: Any, tokens: int, parameters: list[str]) -> dict[str, Callable[[], float]]:
    """Name of a stack -> one step of it, which returns its loss."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(0, CONFIG["vocab_size"], (2, tokens // 2), generator=draw)
    batch = collate([Example(tuple(row), tuple(row), "", prompt_ids=(), completion="") for row in ids.tolist()])
    plain = adapted(copy.deepcopy(base), peft.get_peft_model, parameters)

    def plainly() -> float:
        lost = plain(input_ids=ids, labels=ids, use_cache=False).loss
        lost.backward()
        return float(lost.detach())

    made: dict[str, Callable[[], float]] = {"transformers and PEFT, bf16": plainly}
    for name, model in (("halfbyte, bf16", copy.deepcopy(base)), ("halfbyte, NF4", quantised(copy.deepcopy(base)))):
        ours = adapted(model, halfbyte.get_peft_model, parameters)
        packing.install(ours)

        def fast(ours: Any = ours) -> float:
            lost = loss.micro_batch_loss(ours, batch) / (ids.numel() - len(ids))
            lost.backward()
            return float(lost.detach())

        made[name] = fast
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    base = built(asked.layers)
    for case, parameters in TARGETS.items():
        stacks = steps(base, asked.tokens, parameters)
        seconds: dict[str, list[float]] = {name: [] for name in stacks}
        losses = {name: step() for name, step in stacks.items()}  # warms up
        for _ in range(asked.rounds):
            for name, step in stacks.items():
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
        first = next(iter(stacks))
        for name, taken in seconds.items():
            ratios = sorted(a / b for a, b in zip(seconds[first], taken, strict=True))
            spread = [round(x, 2) for x in (statistics.median(ratios), ratios[0], ratios[-1])]
            rate = round(asked.tokens / statistics.median(taken), 1)
            row = {"LoRA": case, "stack": name, "loss": round(losses[name], 4), "tokens_per_second": rate}
            print(json.dumps(row | {"times_plain": spread}), flush=True)
        del stacks


if __name__ == "__main__":
    main()
