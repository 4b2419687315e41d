"""What a user wants scored: metrics by name, rows, sides; refused at once where it cannot be. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

from halfbyte.errors import RecipeError
from halfbyte.recipe.evaluation import LOSSES, Eval
from halfbyte.scoring import intervals, metrics


def need_harness() -> None:
    """Raise a RecipeError where lm-evaluation-harness is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(
            "tasks are run by lm-evaluation-harness (lm_eval), which is not installed.",
            fix="pip install 'halfbyte[harness]'",
        )


@dataclass(frozen=True)
class Wanted:
    """What is scored, and how. `names`: metrics beside loss and perplexity; None: exact match where rows ask.

    `sure`: with intervals and tests, which scipy computes; None: where it is installed.
    """

    settings: Eval
    names: tuple[str, ...] | None = None
    limit: int | None = None
    with_base: bool = False
    sure: bool | None = None

    @classmethod
    def of(
        cls, settings: Eval, asked: Sequence[str] = (), *, limit: int | None = None, with_base: bool = False,
        sure: bool | None = None,
    ) -> Wanted:  # fmt: skip
        """As a recipe says, or as `asked` on the command line. Raises RecipeError for what can be told at once."""
        names = tuple(dict.fromkeys(n for n in asked if n not in LOSSES)) if asked else settings.metrics
        metrics.check(settings, names or ())
        if sure:
            intervals.need()
        return cls(settings, names, limit, with_base, sure)
