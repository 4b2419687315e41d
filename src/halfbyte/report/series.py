"""The rows of `metrics.jsonl` as columns, and the curves drawn of them: smoothed, thinned without losing an extreme.

Why: a run of 200,000 steps must still be a page of some kB, and its one spike must be on it.
Cost: a few microseconds a row; no torch.
"""

import io
import json
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfbyte.types import Document

Values = NDArray[np.float64]

STEP_COLUMNS = ("step", "loss", "learning_rate", "grad_norm", "tokens", "seconds", "tokens_per_second", "rss_bytes",
                "peak_device_bytes", "accuracy", "margin", "kl", "chosen_logp", "rejected_logp", "reward",
                "entropy", "answer_tokens")  # fmt: skip
BUCKETS = 300  # of a curve; each keeps its first, lowest, highest and last point, and its first gap


@dataclass(frozen=True)
class Series:
    """The points of a curve; a NaN in `y` is a gap."""

    x: Values
    y: Values

    @property
    def known(self) -> "Series":
        """Without the gaps."""
        keep = np.isfinite(self.y) & np.isfinite(self.x)
        return Series(self.x[keep], self.y[keep])

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Metrics:
    """What a run measured. `steps`: a column of (rows,) for each of `STEP_COLUMNS`; `evals`: a series for each number
    of its evaluations; `step_downs`: (step, what was changed) where memory ran short; `samples`: answers that the first
    and the last step learned from; `unread`: unreadable lines."""

    steps: Mapping[str, Values]
    evals: Mapping[str, Series]
    step_downs: tuple[tuple[int, str], ...] = ()
    samples: tuple[Document, ...] = ()
    unread: int = 0

    def column(self, name: str) -> Series:
        """A column by step, with gaps where rows are missing."""
        return with_gaps(Series(self.steps["step"], self.steps[name]))

    @property
    def last_step(self) -> int:
        known = self.steps["step"][np.isfinite(self.steps["step"])]
        return int(known[-1]) if len(known) else 0


def read(path: Path) -> Metrics:
    """Every row that can be read; a line that is torn or of another kind is counted and skipped."""
    columns = {name: array("d") for name in STEP_COLUMNS}
    evals: dict[str, list[tuple[float, float]]] = {}
    step_downs, unread = list[tuple[int, str]](), 0
    samples = list[Document]()
    with path.open("rb") if path.is_file() else io.BytesIO() as lines:
        for line in lines:
            try:
                row = json.loads(line)
                step = number(row["step"])
            except (ValueError, TypeError, KeyError, RecursionError):
                unread += bool(line.strip())
                continue
            if "loss" in row:
                for name, column in columns.items():
                    column.append(number(row.get(name)))
                if isinstance(row.get("stepped_down"), list) and math.isfinite(step):
                    step_downs += [(int(step), str(change)) for change in row["stepped_down"]]
                if isinstance(row.get("sample"), dict):
                    samples = [*samples[:1], {"step": int(step), **row["sample"]}]
            else:
                for name, value in row.items():
                    if name.startswith("eval_"):
                        evals.setdefault(name, []).append((step, number(value)))
    every = {name: Series(*np.array(points).T) for name, points in evals.items()}
    steps = {name: np.frombuffer(column, dtype=np.float64) for name, column in columns.items()}
    evaluations = {name: s for name, s in every.items() if len(s.known)}
    return Metrics(steps, evaluations, tuple(step_downs), tuple(samples), unread)


def number(value: object) -> float:
    """A finite number, else NaN; text, null and what JSON has no name for are gaps."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def with_gaps(line: Series) -> Series:
    """The points with a gap where rows are missing: a stride more than three times the usual one."""
    if len(line) < 3:
        return line
    strides = np.diff(line.x)
    usual = float(np.nanmedian(strides)) if np.isfinite(strides).any() else 0.0
    holes = np.flatnonzero(strides > 3 * usual) + 1 if usual > 0 else np.array([], dtype=int)
    return Series(np.insert(line.x, holes, line.x[holes]), np.insert(line.y, holes, np.nan)) if len(holes) else line


def minutes(seconds: Values) -> Values:
    """Minutes of training at the end of each step, gaps counted as nothing."""
    return np.cumsum(np.nan_to_num(seconds)) / 60.0


def span(points: int) -> int:
    """The window, in points, over which so many points are smoothed; 0 where they are too few."""
    return 0 if points < 8 else max(3, min(1000, points // 25))


def smooth(line: Series) -> Series:
    """An exponential mean of `span` points, unbiased at its beginning (Adam's correction), which passes over gaps."""
    width = span(len(line.known))
    if not width:
        return Series(line.x[:0], line.y[:0])
    keep = 1.0 - 2.0 / (width + 1)
    out: list[float] = []
    mean = weight = 0.0
    for value in line.y.tolist():
        if math.isfinite(value):
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
            out.append(mean / weight)
        else:
            out.append(math.nan)
    return Series(line.x, np.array(out))


def thin(line: Series) -> Series:
    """At most 5 points a bucket: its first, lowest, highest and last, and its first gap."""
    if len(line) <= 4 * BUCKETS:
        return line
    chosen: set[int] = set()
    for start, end in pairwise(np.linspace(0, len(line), BUCKETS + 1).astype(int).tolist()):
        part = line.y[start:end]
        finite = np.flatnonzero(np.isfinite(part))
        if len(finite):
            values = part[finite]
            chosen |= {int(start + finite[i]) for i in (0, int(values.argmin()), int(values.argmax()), -1)}
        if len(finite) < len(part):
            chosen.add(int(start + np.flatnonzero(~np.isfinite(part))[0]))
    order = np.array(sorted(chosen))
    return Series(line.x[order], line.y[order])
