"""An evaluation: its options, and its scores, base beside adapter, with every answer; as JSON, and as files of a run.

Files: `scores.json` and `answers.jsonl`, in `RUN/eval/`; for other rows than the run's own in a subfolder named after
their file. A later evaluation of the same rows replaces them. No torch.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import RecipeError
from halfbyte.recipe.adapter_folder import ADAPTER_FILES, read_passport
from halfbyte.recipe.evaluation import LOSSES, OF_PAIRS, Eval
from halfbyte.scoring import intervals, metrics
from halfbyte.scoring.verdict import SourceLoss, beside_source
from halfbyte.system import files
from halfbyte.types import Document

SCORES = "scores.json"
ANSWERS = "answers.jsonl"
HARNESS = "harness.json"
SIDES = ("adapter", "base")
BASE_TEXT = "base_text_loss"  # on a text of the base's own kind


@dataclass(frozen=True)
class EvalOptions:
    """`names`: metrics beside loss and perplexity; None: exact match where rows ask for an answer."""

    settings: Eval
    names: tuple[str, ...] | None = None
    limit: int | None = None  # only so many rows
    with_base: bool = False  # score the base alone too
    sure: bool = True  # with intervals and tests

    @classmethod
    def of(
        cls, settings: Eval, names: Sequence[str] = (), *, limit: int | None = None, with_base: bool = False,
        sure: bool = True,
    ) -> EvalOptions:  # fmt: skip
        """The recipe's metrics, or those named. Raises RecipeError: an unknown one, or one whose setting is missing."""
        chosen = tuple(dict.fromkeys(n for n in names if n not in LOSSES)) if names else settings.metrics
        metrics.check(settings, chosen or ())
        return cls(settings, chosen, limit, with_base, sure)


@dataclass(frozen=True)
class Answer:
    """What one side wrote for a row, its scores, and its choice where the metric `choice` is asked for; `text` is empty
    where no metric reads answers."""

    text: str
    scores: metrics.Scores
    choice: str | None = None


@dataclass(frozen=True)
class Side:
    """One side of a comparison: each row's summed loss, what its labelled tokens count for, and the answers to the rows
    that ask."""

    losses: tuple[float, ...]
    tokens: tuple[float, ...]
    answers: tuple[Answer, ...]

    @property
    def sums(self) -> NDArray[np.float64]:
        """(rows, 2): each row's loss and tokens."""
        return np.array([self.losses, self.tokens], np.float64).T

    def take(self, rows: Sequence[int], asking: Sequence[int]) -> Side:
        """Of some rows alone. `asking`: the rows that `answers` are of."""
        chosen = set(rows)
        answers = tuple(a for row, a in zip(asking, self.answers, strict=False) if row in chosen)
        return Side(tuple(self.losses[r] for r in rows), tuple(self.tokens[r] for r in rows), answers)

    def rows_of(self, name: str) -> intervals.RowSums:
        """The score `name` as sums over rows."""
        if name in (*LOSSES, BASE_TEXT):
            losses, tokens = np.array(self.losses, np.float64), np.array(self.tokens, np.float64)
            return intervals.RowSums(losses, tokens, exponential=name == "perplexity")
        rows = intervals.RowSums.mean([answer.scores.get(name) for answer in self.answers])
        return replace(rows, bounded=False) if name in OF_PAIRS else rows


@dataclass(frozen=True)
class Value:
    value: float
    interval: intervals.Interval | None = None


@dataclass(frozen=True)
class Score:
    """A score of the adapter, of the base, or of both, over so many rows; `yes_no`: each row's value is 0 or 1.
    `source`: of the model as it came, of which losses alone are known."""

    name: str
    rows: int
    yes_no: bool
    adapter: Value | None
    base: Value | None
    difference: Value | None = None
    p_value: float | None = None
    source: Value | None = None

    def to_json(self) -> Document:
        values = asdict(self)
        del values["yes_no"], values["p_value"]
        return values | ({"difference": values["difference"] | {"p_value": self.p_value}} if self.difference else {})


@dataclass(frozen=True)
class Question:
    """A row that asks for an answer."""

    where: str
    prompt: str
    expected: str


@dataclass(frozen=True)
class Sheet:
    """A whole evaluation. `sides`: `base`, `adapter` or both. `adapter`: which one, as `adapter_of` has it. `source`:
    the model as it came, without answers; None where it was not asked, and `why` then."""

    data: str
    rows: int
    seconds: float
    scores: tuple[Score, ...]
    questions: tuple[Question, ...]
    sides: dict[str, Side]
    adapter: Document | None = None
    source: Side | None = None
    why: str = ""

    @property
    def beside_source(self) -> SourceLoss | None:
        """What quantising costs, and what the adapter has won over the source model."""
        rows = [None if s is None else s.sums for s in (self.source, self.sides.get("base"), self.sides.get("adapter"))]
        return None if rows[1] is None else beside_source(rows[0], rows[1], rows[2])

    def to_json(self) -> Document:
        """What `scores.json` holds."""
        beside = self.beside_source
        return {
            "source": self.why or None if beside is None else beside.to_json(),
            "data": self.data,
            "adapter": self.adapter,
            "rows": self.rows,
            "seconds": self.seconds,
            "metrics": [score.to_json() for score in self.scores],
        }

    def answers(self) -> list[Document]:
        """The rows of `answers.jsonl`."""
        rows = []
        for number, question in enumerate(self.questions):
            each = {name: asdict(side.answers[number]) for name, side in self.sides.items()}
            rows.append({**asdict(question), **{name: each.get(name) for name in SIDES}})
        return rows

    def write(self, folder: Path) -> None:
        """Write both files; an OSError leaves the earlier ones."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(files.finite(row), ensure_ascii=False) + "\n" for row in self.answers())
        files.write_together({folder / ANSWERS: lines.encode(), folder / SCORES: files.as_json(self.to_json())})


def score(
    name: str, sides: dict[str, Side], settings: Eval, *, yes_no: bool, sure: bool, source: Side | None = None
) -> Score:
    """One score of the sides; `sure`: with intervals, and for yes/no scores of two sides an exact test. `source`: also
    of this one, where it is of losses."""
    every = sides if source is None or name not in (*LOSSES, BASE_TEXT) else {**sides, "source": source}
    rows = {side: value.rows_of(name) for side, value in every.items()}
    bootstrap = {"resamples": settings.resamples, "seed": settings.seed}
    values = {side: Value(r.value, intervals.interval(r, **bootstrap) if sure else None) for side, r in rows.items()}
    adapter, base = values.get("adapter"), values.get("base")
    count = len(next(iter(rows.values())).numerators)
    if adapter is None or base is None:
        return Score(name, count, yes_no, adapter, base, source=values.get("source"))
    one, other = rows["adapter"], rows["base"]
    interval = intervals.interval_of_difference(one, other, **bootstrap) if sure else None
    p = intervals.exact_test(one.numerators.tolist(), other.numerators.tolist()) if sure and yes_no else None
    difference = Value(adapter.value - base.value, interval)
    return Score(name, count, yes_no, adapter, base, difference, p, values.get("source"))


def adapter_of(folder: Path) -> Document:
    """Which adapter lies in a folder: the hash of its weights, and its step where its passport says it."""
    reached = (read_passport(folder) or {}).get("reached") or {}
    return {"sha256": files.sha256(folder / ADAPTER_FILES[0]), "step": reached.get("steps")}


def other_adapter(scores: Document, folder: Path) -> str:
    """Which adapter gave the scores of a `scores.json`, in words, where it is not that of `folder`; else empty."""
    adapter, weights = scores.get("adapter"), folder / ADAPTER_FILES[0]
    if not isinstance(adapter, dict):
        return "an adapter that is not known" if scores.get("metrics") else ""
    if weights.is_file() and adapter.get("sha256") == files.sha256(weights):
        return ""
    step = adapter.get("step")
    return "an earlier adapter" + (f" (step {step:,})" if isinstance(step, int) else "")


def need_harness() -> None:
    """Raise a RecipeError where lm-evaluation-harness is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(
            "tasks are run by lm-evaluation-harness (lm_eval), which is not installed.",
            fix="pip install 'halfbyte[harness]'",
        )


def write_harness(results: dict[str, Document], folder: Path | None) -> None:
    """Write the results of tasks of lm-evaluation-harness; an OSError leaves the earlier ones."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / HARNESS, files.as_json(results))


def folder_of(run: Path, data: Path | None) -> Path:
    """Where an evaluation's files are: of the run's own rows, or of others."""
    return run / "eval" if data is None else run / "eval" / data.stem
