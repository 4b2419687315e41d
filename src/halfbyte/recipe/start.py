"""What a recipe begins with where nobody wrote one: `halfbyte train MODEL ROWS`, `plan MODEL`, the recipe of `init`.

Why: the fields' own defaults are the classic script's, and a recipe that leaves one of them out keeps it. Who writes
none wants the best adapter after the minutes that he waits; what that takes is measured.
Source: docs/log/2026-11.md, "Defaults that are measured": each has won on two models, in one seed so far.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from halfbyte.recipe.number_formats import AUTO, UNSET


@dataclass(frozen=True)
class StartValue:
    """A value and why it is that. It gives way to its field, and to `others`, where they are given."""

    value: object
    why: str
    others: frozenset[str] = frozenset()


START: Mapping[str, StartValue] = MappingProxyType(
    {
        "quant.type": StartValue(
            AUTO,
            "the most exact base that fits and costs no time",
            frozenset({"lora.adapter", "lora.init_lora_weights", *(f"quant.{name}" for name in UNSET)}),
        ),
        "lora.target_modules": StartValue("all-linear", "learns more in a minute than attention alone"),
        "train.gradient_accumulation_steps": StartValue(1, "steps of few rows learn more of each row"),
        "train.learning_rate": StartValue(
            AUTO, "", frozenset({"train.optim", "train.loraplus_lr_ratio", "train.method"})
        ),
    }
)
