"""What a recipe begins with where nobody wrote one: `halfbyte train MODEL ROWS`, `plan MODEL`, the recipe of `init`;
and of `init --for NAME`, a file each in `presets/`.

Why: the fields' own defaults are the classic script's, and a recipe that leaves one of them out keeps it. Who writes
none wants the best adapter after the minutes that he waits; what that takes is measured.
Source: docs/log/2026-11.md, "Defaults that are measured": each has won on two models, most in one seed so far.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import yaml

from halfbyte.errors import RecipeError
from halfbyte.recipe.number_formats import AUTO, UNSET

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class StartValue:
    """A value and why it is that. It gives way to its field, and to `others`, where they are given."""

    value: object
    why: str
    others: frozenset[str] = frozenset()


_OF_TYPE = frozenset({"lora.adapter", "lora.init_lora_weights", *(f"quant.{name}" for name in UNSET)})
_OF_RATE = frozenset({"train.optim", "train.loraplus_lr_ratio", "train.method"})
START: Mapping[str, StartValue] = MappingProxyType(
    {
        "quant.type": StartValue(AUTO, "the most exact base that fits and costs no time", _OF_TYPE),
        "quant.compute": StartValue(AUTO, "8-bit products where they pay and are proven", frozenset({"task"})),
        "lora.target_modules": StartValue("all-linear", "learns more in a minute than attention alone"),
        "train.gradient_accumulation_steps": StartValue(1, "steps of few rows learn more of each row"),
        "train.learning_rate": StartValue(AUTO, "", _OF_RATE),
    }
)


@dataclass(frozen=True)
class Preset:
    """A start for one kind of task. `rows`: columns that it reads. `measured`: time and score, with the packaged model.
    `values`: by dotted name, stronger than `START`."""

    what: str
    rows: str
    measured: str
    values: Mapping[str, object]


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def preset(name: str) -> Preset:
    """The preset of this name. Raises RecipeError: there is none."""
    if name not in presets():
        raise RecipeError(f"--for {name}: there is no such preset; allowed: {', '.join(presets())}.")
    return Preset(**yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8")))
