"""Runs side by side: their curves over each other, their recipes as a diff, their scores with intervals.

Cost: one pass over each run's metrics; no torch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import RunError
from halfbyte.report import page, plots, record, series
from halfbyte.report.plots import Chart, Line
from halfbyte.report.record import Record
from halfbyte.system import files
from halfbyte.types import Document

MOST_RUNS = 8  # told apart by stroke and colour
NOT_COMPARED = frozenset({"output"})


@dataclass(frozen=True)
class Comparison:
    """`figures` and `scores` are rows (name, a text for each run); `recipe` only fields in which the runs differ."""

    runs: tuple[Record, ...]
    names: tuple[str, ...]
    figures: tuple[tuple[str, tuple[str, ...]], ...]
    recipe: tuple[tuple[str, tuple[str, ...]], ...]
    scores: tuple[tuple[str, tuple[str, ...]], ...]
    notes: tuple[str, ...]

    def to_json(self) -> Document:
        return {
            "runs": [str(run.run.path) for run in self.runs],
            "figures": {name: dict(zip(self.names, values, strict=True)) for name, values in self.figures},
            "recipe": {name: dict(zip(self.names, values, strict=True)) for name, values in self.recipe},
            "scores": {
                run_name: run.scores.get("metrics") for run_name, run in zip(self.names, self.runs, strict=True)
            },
            "notes": list(self.notes),
        }


def compare(paths: Sequence[Path]) -> Comparison:
    """The comparison of two to eight runs.

    Raises:
        RunError: too few or too many, or one of them is no run.
    """
    if not 2 <= len(paths) <= MOST_RUNS:
        raise RunError(
            f"{len(paths)} runs are given; 2 to {MOST_RUNS} can be compared.", fix="halfbyte compare RUN RUN"
        )
    runs = tuple(record.read(path) for path in paths)
    names = unique([run.name for run in runs], paths)
    figures = [dict(page.facts(run)) for run in runs]
    rows = list(dict.fromkeys(name for own in figures for name in own))
    shown = [("state", tuple(run.state.name for run in runs)), ("model", tuple(run.model for run in runs))]
    shown += [(name, tuple(own.get(name, "") for own in figures)) for name in rows]
    return Comparison(runs, names, tuple(shown), differences(runs), scores(runs), notes(runs, names))


def unique(names: list[str], paths: Sequence[Path]) -> tuple[str, ...]:
    """Names that tell the runs apart: those of their folders; whole paths where two are alike."""
    return tuple(names) if len(set(names)) == len(names) else tuple(str(path) for path in paths)


def differences(runs: Sequence[Record]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Each field of the recipe whose values are not all the same: (name, a text for each run)."""
    if all(run.started.get("values") for run in runs):
        values = [{name: page.shown(row["value"]) for name, row in run.values.items()} for run in runs]
    else:  # a run from before `started.json` has its recipe alone, where null is left out
        values = [{name: page.shown(value) for name, value in record.flat(run.recipe)} for run in runs]
    names = dict.fromkeys(name for own in values for name in own)
    return tuple(
        (name, tuple(own.get(name, "-") for own in values))
        for name in names
        if name not in NOT_COMPARED and len({own.get(name, "-") for own in values}) > 1
    )


def scores(runs: Sequence[Record]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Each score of the adapters, with its interval; the base's too where a run has it."""
    own = [{str(m.get("name")): m for m in run.scores.get("metrics") or []} for run in runs]
    names, rows = dict.fromkeys(name for of_run in own for name in of_run), list[tuple[str, tuple[str, ...]]]()
    for name in names:
        for side in ("adapter", "base"):
            cells = tuple(interval((of_run.get(name) or {}).get(side)) for of_run in own)
            if any(cells):
                rows.append((name + (" of the base" if side == "base" else ""), cells))
    return tuple(rows)


def interval(score: Document | None) -> str:
    """A score as text: `0.958 [0.88, 1]`."""
    if not score:
        return ""
    between = score.get("interval")
    return page.number(score["value"]) + (f" [{page.number(between[0])}, {page.number(between[1])}]" if between else "")


def notes(runs: Sequence[Record], names: Sequence[str]) -> tuple[str, ...]:
    """What makes a comparison unfair."""
    said = list[str]()
    if len({run.model for run in runs}) > 1:
        said.append("The runs have different models: their losses are not of the same tokens.")
    known = [run.started["data"] for run in runs if run.started.get("data")]
    held = {(own.get("eval") or {}).get("tokens") for own in known}
    if len(held) > 1:
        said.append("Their held-out rows are not the same: their evaluations cannot be compared.")
    scored = {str(run.scores["data"]) + f" ({run.scores.get('rows')} rows)" for run in runs if run.scores.get("data")}
    if len(scored) > 1:
        said.append(f"They were scored on different rows: {', '.join(sorted(scored))}.")
    said += [f"{name} is not finished: {run.state.name}." for name, run in zip(names, runs, strict=True)
             if run.state.name not in ("finished", "diverged")]  # fmt: skip
    return tuple(said)


def charts(value: Comparison) -> list[Chart]:
    """Loss by step and by minutes, evaluations, gradient norm; a line for each run."""

    def lines(of: str, *, by: str = "step") -> list[Line]:
        found = []
        for i, (name, run) in enumerate(zip(value.names, value.runs, strict=True)):
            column = run.metrics.column(of)
            if by == "minutes":
                column = series.Series(series.minutes(run.metrics.steps["seconds"]), run.metrics.steps[of])
            smooth = series.smoothed(column)
            found.append(Line(name, smooth if len(smooth) else column, f"run{i}"))
        return found

    held = [
        Line(name, run.metrics.evals["eval_loss"], f"run{i}")
        for i, (name, run) in enumerate(zip(value.names, value.runs, strict=True))
        if "eval_loss" in run.metrics.evals
    ]
    nats = "nats a trained token"
    return [
        Chart("Loss, smoothed", nats, "step", lines("loss"), may_be_log=True),
        *([Chart("Held-out rows: loss", nats, "step", held)] if held else []),
        Chart("Loss over time", nats, "minutes of training", lines("loss", by="minutes"), may_be_log=True),
        Chart("Gradient norm, smoothed", "before clipping", "step", lines("grad_norm"), may_be_log=True),
        Chart("Speed, smoothed", "tokens/s", "step", lines("tokens_per_second"), from_zero=True),
    ]


def write(value: Comparison, to: Path) -> Path:
    """The page of a comparison; returns its file."""
    drawn = charts(value)
    text = page.render(
        "compare.html",
        live=False,
        value=value,
        wide=plots.svg(drawn[0], width=900, height=320),
        charts=[plots.svg(chart) for chart in drawn],
        made=time.strftime("%Y-%m-%d %H:%M"),
    )
    files.write(to, text.encode())
    return to
