"""`report.json`: what a run did, measured, beside what its plan had said.

Why: a plan that is never compared with a measurement is a guess; and figures without versions and machine cannot be
compared with any others.
Source: the rows of `metrics.jsonl`, so a resumed run counts the steps of all its processes.
Cost: one read of the metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from halfbyte.errors import RunError

if TYPE_CHECKING:
    from halfbyte.types import Document


@dataclass(frozen=True)
class Loss:
    """Loss of the first and of the last optimiser step."""

    first: float
    last: float


@dataclass(frozen=True)
class Figures:
    """What can be both planned and measured. None: not planned, or nothing to measure (no card)."""

    tokens: int | None = None
    steps: int | None = None
    train_seconds: float | None = None
    peak_rss_bytes: int | None = None
    peak_device_bytes: int | None = None


@dataclass(frozen=True)
class Compared:
    """One line of the plan beside what was measured: bytes, or seconds."""

    name: str
    planned: float
    measured: float

    @property
    def error(self) -> float:
        """(planned - measured) / measured: below 0 the plan was too low."""
        return (self.planned - self.measured) / self.measured if self.measured else 0.0


@dataclass(frozen=True)
class Report:
    """A finished run. `tokens` are real ones, never padding; `notices` are the slow paths taken and why."""

    tokens: int
    train_seconds: float
    tokens_per_second: float
    steps: int
    loss: Loss
    eval_loss: float | None
    peak_rss_bytes: int
    peak_device_bytes: int | None
    planned: Figures
    measured: Figures
    errors: Mapping[str, float]
    lines: tuple[Compared, ...]
    versions: Mapping[str, str]
    machine: Mapping[str, object]
    data: Mapping[str, object]
    notices: tuple[str, ...] = field(default=())

    def to_json(self) -> Document:
        """Plain values for `RunFolder.write_report`."""
        lines = [{**asdict(line), "error": line.error} for line in self.lines]
        return {**asdict(self), "errors": dict(self.errors), "lines": lines, "notices": list(self.notices)}


def build(
    rows: Sequence[Document],
    *,
    planned: Figures,
    peak_rss_bytes: int,
    peak_device_bytes: int | None,
    versions: Mapping[str, str],
    machine: Mapping[str, object],
    notices: Iterable[str] = (),
    lines: Iterable[Compared] = (),
    data: Mapping[str, object] | None = None,
    adapter_step: int | None = None,
) -> Report:
    """The report of a run from its metrics.

    Args:
        rows: of `metrics.jsonl`. A step's row has `loss`, `tokens` and `seconds`, and may have `rss_bytes`; an
            evaluation's row has `eval_loss`.
        peak_rss_bytes: of this process; a resumed run's earlier ones are seen through their rows.
        peak_device_bytes: None without a card.
        data: rows, tokens and what the gates of the data found.
        lines: planned beside measured, for each line that can be measured alone.
        adapter_step: of the evaluation whose adapter was kept, and whose loss is reported; None for the last one.

    Raises:
        RunError: no step was made.
    """
    steps = [row for row in rows if "loss" in row]
    if not steps:
        raise RunError("the run made no step, so there is nothing to report.")
    tokens = sum(int(row["tokens"]) for row in steps)
    seconds = float(sum(row["seconds"] for row in steps))
    evals = {row["step"]: row["eval_loss"] for row in rows if row.get("eval_loss") is not None}
    kept = adapter_step if adapter_step in evals else max(evals, default=None)
    peak = max([peak_rss_bytes, *(int(row["rss_bytes"]) for row in rows if row.get("rss_bytes"))])
    measured = Figures(tokens, len(steps), seconds, peak, peak_device_bytes)
    return Report(
        tokens=tokens,
        train_seconds=seconds,
        tokens_per_second=tokens / seconds if seconds > 0 else 0.0,
        steps=len(steps),
        loss=Loss(first=steps[0]["loss"], last=steps[-1]["loss"]),
        eval_loss=evals.get(kept),
        peak_rss_bytes=peak,
        peak_device_bytes=peak_device_bytes,
        planned=planned,
        measured=measured,
        errors=errors(planned, measured),
        lines=tuple(lines),
        versions=dict(versions),
        machine=dict(machine),
        data=dict(data or {}),
        notices=tuple(notices),
    )


def errors(planned: Figures, measured: Figures) -> dict[str, float]:
    """(planned - measured) / measured of every figure that has both."""
    pairs = {name: (getattr(planned, name), getattr(measured, name)) for name in Figures.__dataclass_fields__}
    return {name: (a - b) / b for name, (a, b) in pairs.items() if a is not None and b}


def usual_seconds(rows: Sequence[Document]) -> float | None:
    """The median step's seconds, without the first one, which compiles and touches everything."""
    seconds = sorted([float(row["seconds"]) for row in rows if "loss" in row][1:])
    return seconds[len(seconds) // 2] if seconds else None
