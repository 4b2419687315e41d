"""A tiny model with two adapters and itself, opened once; plain transformers and PEFT beside it.

Use: `from tests.serving import served`.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from halfbyte.serving import models, names
from tests import tiny, tiny_run
from tests.export import runs

ADAPTERS = {
    "first": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "second": {"target_modules": ["k_proj", "gate_proj", "v_proj"]},
}
BASE = "model"
QUESTIONS = ["red", "green cup", "a large round box of old trees", "blue road?", "new", "small square tree and a cup"]


def folder(
    name: str = "llama", adapters: dict[str, dict[str, Any]] = ADAPTERS, positions: int = tiny.POSITIONS
) -> Path:
    """A checkpoint, and an adapter in a folder of its own for each name; kept until the process ends."""
    made = tempfile.TemporaryDirectory(prefix="halfbyte-serving-")
    _KEPT.append(made)
    where = Path(made.name)
    tiny_run.checkpoint(where / BASE, name)
    if positions != tiny.POSITIONS:
        config = json.loads((where / BASE / "config.json").read_text())
        (where / BASE / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    for seed, (adapter, settings) in enumerate(adapters.items()):
        plain = AutoModelForCausalLM.from_pretrained(where / BASE, dtype=torch.float32)
        runs.adapter(plain, where / adapter, settings, seed)
    return where


_KEPT: list[Any] = []
FP32 = ("quant.compute_dtype=fp32", "quant.type=none")


def opened(
    where: Path, adapters: tuple[str, ...] = tuple(ADAPTERS), overrides: tuple[str, ...] = FP32, **sizes: Any
) -> models.Models:
    """Unquantised in fp32, so that plain PEFT computes the same but for the order of sums."""
    words = [str(where / name) for name in adapters] or [str(where / BASE)]
    return models.open_all(names.find(words, overrides), **{"max_length": 128, "places": 8} | sizes)


@cache
def two() -> models.Models:
    return opened(folder())


@cache
def plain(where: Path, adapter: str | None) -> Any:
    """By plain transformers and PEFT."""
    model = AutoModelForCausalLM.from_pretrained(where / BASE, dtype=torch.float32).eval()
    return model if adapter is None else peft.PeftModel.from_pretrained(model, where / adapter).eval()


def where(made: models.Models) -> Path:
    return made.opened.run.parent


def prompt(question: str) -> list[int]:
    tokenizer = tiny_run.tokenizer()
    talk = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
    return list(ids)


def greedy(model: Any, ids: list[int], most: int) -> list[int]:
    """transformers' own loop."""
    stops = [tiny_run.tokenizer().convert_tokens_to_ids("<|im_end|>"), 2]
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor([ids]), max_new_tokens=most, do_sample=False, eos_token_id=stops, pad_token_id=0
        )
    return list(out[0, len(ids) :].tolist())


def words(tokens: list[int]) -> str:
    return str(tiny_run.tokenizer().decode(tokens, skip_special_tokens=True))


POSITIONS = 4096
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather", "description": "The weather of a town.",
        "parameters": {
            "type": "object", "additionalProperties": False, "required": ["town", "days"],
            "properties": {
                "town": {"enum": ["Oslo", "Bergen"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
        },
    },
}  # fmt: skip
PAINT: Any = {
    "type": "function",
    "function": {
        "name": "paint",
        "parameters": {
            "type": "object", "additionalProperties": False, "required": ["colour"],
            "properties": {"colour": {"enum": ["red", "blue"]}},
        },
    },
}  # fmt: skip


@cache
def talkative() -> models.Models:
    """One adapter on a base that reads long prompts, as tools need them; its template has none, but knows ChatML."""
    where = folder(adapters={"first": ADAPTERS["first"]}, positions=POSITIONS)
    return opened(where, ("first",), max_length=POSITIONS, places=4)


NAMED: Any = {"type": "function", "function": {"name": "weather"}}
