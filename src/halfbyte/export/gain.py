"""How much of what a run has won is left in what was exported: held-out losses of the source model, of the run's own
base, of the run and of the export, all on the same rows.

Why: a run has won over the model that it came from, not over its quantised base, which has lost something first; an
adapter mends a part of that, and a rounding of the merged weights loses more than it.
What: gain kept = (source - export) / (source - run), each a sum over the labelled tokens of the rows, as each program's
own logits have them. It has an interval by the rows; it is said only where the run's gain is measured itself.
Cost: arithmetic on sums of rows that the proof has asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfbyte.proofs.programs import LOSSES
from halfbyte.scoring.intervals import Interval, RowSums, interval, interval_of_difference
from halfbyte.types import Document

RESAMPLES, SEED = 2000, 0
WARN_BELOW = 0.9
HELP = "more keep --repair, the adapter beside its base (halfbyte export RUN --gguf-lora) and wider formats (Q8_0)"


@dataclass(frozen=True)
class HeldOut:
    """Held-out losses of an export beside the run's. `source`: the model as it came, without an adapter; None where it
    was not asked. `base`: what the run was trained on, without its adapter."""

    export: RowSums
    run: RowSums
    base: RowSums
    source: RowSums | None

    @classmethod
    def read(cls, export: Path, run: Path, source: Path | None) -> HeldOut:
        """From the folders of an export's answers, of the run's, and of the run's on 16-bit weights."""
        alone = None if source is None else _sums(source / f"base-{LOSSES}")
        return cls(_sums(export / LOSSES), _sums(run / LOSSES), _sums(run / f"base-{LOSSES}"), alone)

    @property
    def won(self) -> Interval | None:
        """The interval of what the run has won over its source model; None where the model was not asked."""
        return None if self.source is None else difference(self.source, self.run)

    @property
    def kept(self) -> tuple[float, Interval] | None:
        """The share of that gain, and its interval; None where no gain is measured."""
        if self.source is None or self.won is None or self.won[0] <= 0:
            return None
        left, won = (self.source.numerators - each.numerators for each in (self.export, self.run))
        share = RowSums(left, won)
        limits = interval(share, resamples=RESAMPLES, seed=SEED)
        return None if limits is None else (share.value, limits)

    @property
    def text(self) -> str:
        """What was measured, in a line; and what would help, where little is left."""
        rows = f"on {len(self.run.numerators)} held-out rows"
        losses = f"loss {self.export.value:.4f}; the run {self.run.value:.4f}, its base alone {self.base.value:.4f}"
        if self.source is None:
            return f"{losses}, {rows}"
        losses = f"{losses}, the source model {self.source.value:.4f}, {rows}"
        if self.kept is None:
            worse = self.won is not None and self.won[1] < 0
            return f"{losses}: the run is {'worse' if worse else 'not measurably better'} than its source model"
        share, (low, high) = self.kept
        return f"gain kept {share:.0%} ({low:.0%} to {high:.0%}): {losses}"

    @property
    def advice(self) -> str:
        """What would help, where little is left; else empty."""
        if self.kept is None or self.kept[0] >= WARN_BELOW:
            return ""
        return f"{self.kept[0]:.0%} of the run's gain is left; {HELP}"

    def to_json(self) -> Document:
        """Losses a token; `kept` and `interval` are shares."""
        losses = {name: sums and sums.value for name, sums in vars(self).items()}
        share, limits = self.kept or (None, None)
        return {"rows": len(self.run.numerators), "loss": losses, "kept": share, "interval": limits, "text": self.text,
                "advice": self.advice}  # fmt: skip


def difference(one: RowSums, other: RowSums) -> Interval | None:
    """The interval of what `one` loses more than `other`, of the same rows."""
    return interval_of_difference(one, other, resamples=RESAMPLES, seed=SEED)


def _sums(path: Path) -> RowSums:
    losses, tokens = np.load(path).T
    return RowSums(losses, tokens)
