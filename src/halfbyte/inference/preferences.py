"""Rows of which answer is better, scored: whether a model prefers the better answer, and by how much.

What: of each row what a training watches (`objectives/preference.py`), of the adapter and of the base alone. The
reference is that of the run: the base, or the adapter that it began with, of which the run has kept what it gives its
own held-out rows.
Cost: a forward of the rows for each side, and one for the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from halfbyte.data import collate
from halfbyte.errors import DataError
from halfbyte.inference.load import Opened
from halfbyte.objectives import objective as objectives
from halfbyte.objectives import preference
from halfbyte.runs.folder import RunFolder, read_json
from halfbyte.scoring import sheet


@dataclass(frozen=True)
class PreferenceScoring:
    """Rows with what their reference gives them, and the objective that they are scored by."""

    opened: Opened
    objective: preference.Preference
    batches: collate.Batches

    @classmethod
    def of(cls, opened: Opened, batches: collate.Batches) -> PreferenceScoring | None:
        """None where rows are not of which answer is better. Raises DataError: their reference is an adapter that is
        not open here, and they are others than the run held out."""
        objective, adapter = preference.of(opened.recipe.train), opened.recipe.lora.adapter
        if not isinstance(objective, preference.Preference):
            return None
        values: Sequence[Sequence[float]] = [()] * len(batches.examples)
        if objective.asks.referenced and adapter is None:
            with opened.using(base=True):
                values = _rows(opened, preference.LogLikelihoods(objective.asks), batches).tolist()
        elif objective.asks.referenced:
            values = read_json(RunFolder(opened.run).reference).get("eval") or []
        if len(values) != len(batches.examples):
            raise DataError(
                f"the reference is {adapter}, and what it gives is known of the run's own held-out rows alone.",
                fix="halfbyte eval RUN, without --data and --limit",
            )
        rows = [replace(e, reference=tuple(v)) for e, v in zip(batches.examples, values, strict=True)]
        return cls(opened, objective, replace(batches, examples=rows))

    @property
    def names(self) -> list[tuple[str, bool]]:
        """Each score's name, and whether its values are 0 and 1; a tie counts half."""
        return [(name, False) for name in self.objective.sum_names[2:]]

    def side(self, answers: Sequence[sheet.Answer]) -> sheet.Side:
        """The rows' losses and figures of the model as it is now, beside the scores of its answers."""
        rows = _rows(self.opened, self.objective, self.batches)
        figures = [dict(zip(self.objective.sum_names[2:], row[2:], strict=True)) for row in rows.tolist()]
        answers = answers or [sheet.Answer("", {})] * len(rows)
        scored = [replace(a, scores={**a.scores, **more}) for a, more in zip(answers, figures, strict=True)]
        return sheet.Side(tuple(rows[:, 0].tolist()), (1,) * len(rows), tuple(scored))


def _rows(opened: Opened, objective: preference.Preference, batches: collate.Batches) -> NDArray[np.float64]:
    """The sums of each row: (rows, names)."""
    texts = objectives.evaluate(objective, opened.model, replace(batches, lay_out=objective.collate))
    rows = np.zeros((len(batches.examples), texts.shape[1]))
    np.add.at(rows, batches.text_rows, texts)
    return rows
