"""The named tables: fields of LoraConfig and TrainingArguments that a recipe refuses, and why (in `fields.toml`); the
words that it takes.

Why: a flag that is accepted and never read is the worst kind of bug; one that is silently dropped is the second worst.
A test compares tables and `schema` with the installed peft and transformers, both ways; `docs/` is generated from them.
Source: `peft/tuners/lora/config.py`, `transformers/training_args.py`.
"""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

# `fields.toml`: what is refused, with the reason; names of other tools, with what to write instead; what is taken, with
# the names that it takes.
_TABLES = {
    table: {name: words for names, words in rows.items() for name in names.split()}
    for table, rows in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")).items()
}
# Said of each in the file.
OURS, MAY_CHANGE, REWARDED, GOES_ON, NOT_FOR_TRAINER, HARMLESS = (
    frozenset(names.split()) for names in _TABLES["names"].values()
)
INIT_SHOWN = {section: tuple(names.split()) for section, names in _TABLES["init_shown"].items()}
UNREAD, MUST_BE = _TABLES["unread"], _TABLES["must_be"]
LORA_REFUSED, TRAIN_REFUSED = _TABLES["lora"], _TABLES["train"]
INIT_REFUSED, SCHEDULES_REFUSED = _TABLES["init"], _TABLES["schedules_refused"]
ELSEWHERE, NOT_NEEDED = _TABLES["elsewhere"], _TABLES["not_needed"]
OPTIMIZERS, SCHEDULES, SCHEDULES_NEED, INTEGRATIONS = (
    {name: tuple(takes) for name, takes in _TABLES[table].items()}
    for table in ("optimizers", "schedules_take", "schedules_need", "integrations")
)
INIT_NAMES = ("gaussian", "orthogonal", "residual")
OURS_OF_INIT = frozenset({"residual"})  # PEFT does not know these


def excluded_by_residual(init: bool | str, use_dora: bool, adapter: str | None, *, quantises: bool) -> Iterator[str]:
    """What a start from what quantising has lost cannot be together with: sentences."""
    name = "lora.init_lora_weights residual"
    if init == "residual" and not quantises:
        yield f"{name} is what quantising has lost, and with quant.type none or gguf, which auto may choose, nothing is"
    if init == "residual" and use_dora:
        yield f"{name} and lora.use_dora: DoRA's magnitudes would be those of the base without it; use one of them"
    if init == "residual" and adapter is not None:
        yield f"{name} and lora.adapter {adapter} are two starts; give one of them"


def unread(name: str, owner: str, takes: tuple[str, ...], given: set[str]) -> Iterator[str]:
    """What is given and not taken, in a sentence."""
    if unknown := ", ".join(sorted(given - set(takes))):
        yield f"train.{name}: train.{owner} takes {', '.join(takes) or 'nothing'}, got {unknown}"


def shown(value: object) -> str:
    """A value as YAML writes it, in one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list | tuple) else str(value)
