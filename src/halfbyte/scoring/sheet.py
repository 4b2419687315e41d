"""The scores of an evaluation: base beside adapter, with every answer; as JSON, and as the files of a run folder.

Files: `scores.json` and `answers.jsonl`, in `RUN/eval/`; of other rows than the run's own in a subfolder by the file's
stem. A later evaluation of the same rows takes their place.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfbyte.recipe.evaluation import Eval
from halfbyte.scoring import intervals
from halfbyte.scoring.intervals import Interval, Rows
from halfbyte.scoring.metrics import Scores
from halfbyte.system import files
from halfbyte.types import Document

SCORES, ANSWERS, HARNESS = "scores.json", "answers.jsonl", "harness.json"


@dataclass(frozen=True)
class Answer:
    """What one side has written for a row, and its scores; `text` is empty where nothing was to be written."""

    text: str
    scores: Scores


@dataclass(frozen=True)
class Side:
    """One side of a comparison: of each row the summed loss and the labelled tokens; of each that asks, the answer."""

    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    answers: tuple[Answer, ...]

    def rows_of(self, name: str) -> Rows:
        """What the score `name` is made of."""
        if name in ("loss", "perplexity"):
            return Rows(
                np.array(self.losses, np.float64), np.array(self.tokens, np.float64), exponential=name == "perplexity"
            )
        return Rows.mean([answer.scores.get(name) for answer in self.answers])


@dataclass(frozen=True)
class Value:
    value: float
    interval: Interval | None = None


@dataclass(frozen=True)
class Score:
    """A score of the adapter, of the base, or of both. `of`: how many rows it is over; `yes_no`: they are 0 or 1."""

    name: str
    of: int
    yes_no: bool
    adapter: Value | None
    base: Value | None
    difference: Value | None = None
    p_value: float | None = None

    def to_json(self) -> Document:
        def shown(value: Value | None) -> Document | None:
            return None if value is None else {"value": value.value, "interval": value.interval}

        difference = shown(self.difference)
        return {
            "name": self.name,
            "rows": self.of,
            "adapter": shown(self.adapter),
            "base": shown(self.base),
            "difference": None if difference is None else {**difference, "p_value": self.p_value},
        }


@dataclass(frozen=True)
class Asked:
    """A row that asks for an answer."""

    where: str
    prompt: str
    expected: str


@dataclass(frozen=True)
class Sheet:
    """A whole evaluation. `sides`: `base`, `adapter` or both."""

    data: str
    rows: int
    seconds: float
    scores: tuple[Score, ...]
    asked: tuple[Asked, ...]
    sides: dict[str, Side]
    notes: tuple[str, ...] = ()

    def to_json(self) -> Document:
        """What `scores.json` holds."""
        return {
            "data": self.data,
            "rows": self.rows,
            "seconds": self.seconds,
            "metrics": [score.to_json() for score in self.scores],
            "notes": list(self.notes),
        }

    def answers(self) -> list[Document]:
        """The rows of `answers.jsonl`."""
        made = []
        for number, asked in enumerate(self.asked):
            each = {name: side.answers[number] for name, side in self.sides.items()}
            both = {n: {"text": each[n].text, "scores": each[n].scores} if n in each else None for n in _SIDES}
            made.append({"where": asked.where, "prompt": asked.prompt, "expected": asked.expected, **both})
        return made

    def keep(self, folder: Path) -> None:
        """Write both files; an OSError leaves the earlier ones."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(files.finite(row), ensure_ascii=False) + "\n" for row in self.answers())
        files.write(folder / ANSWERS, lines.encode())
        files.write(folder / SCORES, files.as_json(self.to_json()))


_SIDES = ("adapter", "base")


def scored(name: str, sides: dict[str, Side], settings: Eval, *, yes_no: bool, sure: bool) -> Score:
    """One score of the sides; `sure`: with intervals, and for yes/no scores of two sides an exact test."""
    rows = {side: value.rows_of(name) for side, value in sides.items()}
    drawn = {"resamples": settings.resamples, "seed": settings.seed}
    values = {side: Value(own.value, intervals.interval(own, **drawn) if sure else None) for side, own in rows.items()}
    adapter, base = values.get("adapter"), values.get("base")
    count = len(next(iter(rows.values())).above)
    if adapter is None or base is None:
        return Score(name, count, yes_no, adapter, base)
    apart = intervals.interval_of_difference(rows["adapter"], rows["base"], **drawn) if sure else None
    p = intervals.exact_test(rows["adapter"].above.tolist(), rows["base"].above.tolist()) if sure and yes_no else None
    return Score(name, count, yes_no, adapter, base, Value(adapter.value - base.value, apart), p)


def keep_harness(results: dict[str, Document], folder: Path | None) -> None:
    """Write what tasks of lm-evaluation-harness have given; an OSError leaves the earlier ones."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / HARNESS, files.as_json(results))


def folder_of(run: Path, data: Path | None) -> Path:
    """Where the files of an evaluation are: of the run's own rows, or of others."""
    return run / "eval" if data is None else run / "eval" / data.stem
