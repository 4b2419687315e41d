"""Notes a step whose loss, or whose gradients' norm, is far from what the steps before it had.

What: more than half above the median of the last steps, and further than chance explains: `SIGMAS` robust standard
deviations (1.4826 times the median distance from the median). A note, no more: rows differ.
Source: Rousseeuw and Croux, "Alternatives to the median absolute deviation", 1993.
Cost: a sort of 32 numbers a step.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import fmean, median

from halfbyte.types import Document

LAST_STEPS, FEWEST_STEPS = 32, 8
SIGMAS = 8.0
ABOVE = {"loss": 1.5, "grad_norm": 5.0}  # times the median


class Spikes:
    """Looks at each step's row in turn. `earlier`: rows of the run's earlier processes."""

    def __init__(self, earlier: Iterable[Document] = ()) -> None:
        self._last = {name: deque[float](maxlen=LAST_STEPS) for name in ABOVE}
        for row in earlier:
            if "loss" in row:
                self.find(row)

    def find(self, row: Document) -> dict[str, float]:
        """What spikes in this step, each as a multiple of its median; empty in nearly all."""
        spikes = {}
        for name, times in ABOVE.items():
            last, value = self._last[name], row.get(name)
            if value is None or not math.isfinite(value):
                continue
            if len(last) >= FEWEST_STEPS:
                usual = median(last)
                spread = 1.4826 * median(abs(x - usual) for x in last)
                if value > times * usual and value > usual + SIGMAS * spread:
                    spikes[name] = value / usual if usual > 0 else math.inf
            last.append(float(value))
        return spikes


def notice(rows: Sequence[Document]) -> list[str]:
    """Lines for the report; none where no step spikes and nothing falls."""
    steps = [row["step"] for row in rows if row.get("spike")]
    if not steps:
        return falling(rows)
    some = f"{', '.join(map(str, steps[:8]))}{' ...' if len(steps) > 8 else ''}"
    return [
        f"{len(steps)} of {sum('loss' in row for row in rows)} steps spike in loss or gradient: {some}",
        *falling(rows),
    ]


def falling(rows: Sequence[Document]) -> list[str]:
    """A line for the report where a run of pairs makes its better answers less likely without end: in each quarter of
    its steps less than in the one before, and at the end half as fast as at first, or faster."""
    values = [row["chosen_reward"] for row in rows if row.get("chosen_reward") is not None]
    if len(values) < 2 * FEWEST_STEPS:
        return []
    first, second, third, last = (fmean(values[i * len(values) // 4 : (i + 1) * len(values) // 4]) for i in range(4))
    if not (first > second > third > last < 0 and 2 * (third - last) >= first - second):
        return []
    fix = "a lower train.learning_rate, a larger train.beta or train.rpo_alpha keep them up"
    return [f"the chosen answers became less likely without end (reward {first:.3f}, then {last:.3f}); {fix}"]
