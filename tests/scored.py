"""An evaluation in one call, for tests of other things."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.inference.evaluate import Progress, evaluate
from halfbyte.inference.load import Opened, open_run
from halfbyte.recipe.evaluation import Eval
from halfbyte.scoring.sheet import EvalOptions, Sheet


def scored(
    opened: Opened,
    *,
    data: Path | None = None,
    limit: int | None = None,
    with_base: bool = False,
    progress: Progress = lambda what, done, of: None,
    **settings: Any,
) -> Sheet:
    """Without intervals; `settings` as under `eval:`."""
    wanted = EvalOptions.of(Eval(**{"max_new_tokens": 2, **settings}), limit=limit, with_base=with_base, sure=False)
    return evaluate(opened, wanted, data=data, progress=progress)


def evaluated(run: Path, *, sure: bool = False, with_base: bool = False) -> Sheet:
    """As `halfbyte eval RUN` does."""
    opened = open_run(run)
    return evaluate(opened, EvalOptions.of(opened.recipe.eval, sure=sure, with_base=with_base))


def loss(sheet: Sheet, side: str = "adapter") -> float:
    return sheet.sides[side].rows_of("loss").value


def texts(sheet: Sheet, side: str = "adapter") -> list[str]:
    return [answer.text for answer in sheet.sides[side].answers]
