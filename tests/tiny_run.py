"""A whole training run at toy size: a tiny random checkpoint with a tokenizer, seeded rows, and a recipe for them.

Use: `from tests import tiny_run`. A run of a few steps takes well under a second once torch is imported.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.schema import Loaded
from tests import small_models, tiny

VOCAB = 320
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")  # 0, 1, 2 as in tiny's configs
_WORDS = ["red", "green", "blue", "round", "square", "small", "large", "old", "new", "cup", "box", "tree", "road"]


@cache
def tokenizer(special: tuple[str, ...] = _SPECIAL, eos: str = "<|im_end|>", chat_template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer of VOCAB tokens with a ChatML template; any text comes back exactly."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([" ".join(_WORDS), "user assistant system\n"] * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token=eos, pad_token="<pad>", chat_template=chat_template
    )


def checkpoint(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Path:
    """A checkpoint folder with config, weights and tokenizer; returns it."""
    tiny.save(folder, name, dtype, seed=seed, vocab_size=VOCAB)
    tokenizer().save_pretrained(folder)
    return folder


def hybrid(folder: Path, kind: str) -> Path:
    """The same of a small model with recurrent layers, one of `small_models.HYBRIDS`; rows are whole blocks, since what
    bitsandbytes itself dequantises is wrong in others."""
    torch.manual_seed(0)
    model = small_models.build(kind, vocab_size=VOCAB, intermediate_size=128, **small_models.HYBRIDS[kind])
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def rows(path: Path, n: int = 16, seed: int = 0) -> Path:
    """Write `n` prompt/completion rows of a few words each; returns the path."""
    draw = random.Random(seed)
    lines = []
    for _ in range(n):
        words = draw.sample(_WORDS, draw.randint(2, 5))
        lines.append(json.dumps({"prompt": " ".join(words), "completion": " ".join(reversed(words))}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe(folder: Path, **overrides: Any) -> Loaded:
    """A recipe for `folder`, which holds (or is given here) `model/` and `train.jsonl`: 4 steps of 4 rows in fp32.

    Overrides are dotted names with `__` for the dot, as in `lora__r=8`; None takes a value away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model").exists():
        checkpoint(folder / "model")
    if not (folder / "train.jsonl").exists():
        rows(folder / "train.jsonl")
    values: dict[str, Any] = {
        "model": str(folder / "model"),
        "quant": {"compute_dtype": "fp32"},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 128},
        "train": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "save_strategy": "no",
            "gradient_checkpointing": False,
        },
        "output": str(folder / "run"),
    }
    for name, value in overrides.items():
        _put(values, name.split("__"), value)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return load_recipe(path)


def _put(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
    if value is None:
        values.pop(keys[-1], None)
    else:
        values[keys[-1]] = _plain(value)


def _plain(value: Any) -> Any:
    """Tuples and paths as YAML can hold them."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
