"""The best adapter of a run so far: that of the evaluation with the lowest metric, in `checkpoints/best/`.

Cost: one write of the adapter for each evaluation that is better than all before it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.runs import checkpoint
from halfbyte.system import files

if TYPE_CHECKING:
    from halfbyte.recipe.schema import Recipe
    from halfbyte.runs.folder import RunFolder

BEST_JSON = "best.json"


@dataclass
class Best:
    """An adapter in `folder` with its `value` of `metric` and its `step`; both are None before the first evaluation."""

    metric: str
    folder: Path
    value: float | None = None
    step: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, run: RunFolder) -> Best:
        """The best of a run so far, also of an earlier process, which may have been killed between two renames."""
        name = recipe.train.metric_for_best_model or "loss"
        best = cls(name if name.startswith("eval_") else f"eval_{name}", run.checkpoints / "best")
        older = files.aside(best.folder)
        if not best.folder.exists() and older.exists():
            os.replace(older, best.folder)
        path = best.folder / BEST_JSON
        row = json.loads(path.read_text()) if path.is_file() else {}
        if row.get("metric") == best.metric:
            best.value, best.step = row["value"], row["step"]
        return best

    def is_better(self, value: float) -> bool:
        return self.value is None or value < self.value

    def keep(self, value: float, step: int, write_adapter: Callable[[Path], None]) -> None:
        """Put the adapter of this step in the place of the one before, whole or not at all.

        Raises:
            TrainError: the disk refuses; the one before is still there.
        """
        with checkpoint.whole_or_absent(f"the best adapter {self.folder}", self.folder) as temporary:
            write_adapter(temporary)
            (temporary / BEST_JSON).write_text(json.dumps({"metric": self.metric, "value": value, "step": step}))
        self.value, self.step = value, step
