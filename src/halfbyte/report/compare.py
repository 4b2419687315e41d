"""Runs side by side: their curves over each other, what differs in their recipes, their scores with intervals.

Cost: one pass over each run's metrics; no torch.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import RunError
from halfbyte.recipe.fields import shown
from halfbyte.report import curves, page, record
from halfbyte.system import files
from halfbyte.types import Document

MAX_RUNS = 8  # so many curves differ by stroke and colour
NOT_COMPARED = frozenset({"output"})
PATHS = frozenset({"model", "data.train", "data.eval"})
SETS = ("lora.", "quant.")  # lists there mean the same in any order
Table = tuple[tuple[str, tuple[str, ...]], ...]
"""Rows of a name and a text for each run."""


@dataclass(frozen=True)
class RunComparison:
    """Runs side by side; `recipe` has only the fields in which they differ."""

    runs: tuple[record.Record, ...]
    names: tuple[str, ...]
    figures: Table
    recipe: Table
    scores: Table
    notes: tuple[str, ...]

    def to_json(self) -> Document:
        return {
            "runs": [str(run.run.path) for run in self.runs],
            "figures": {name: dict(zip(self.names, values, strict=True)) for name, values in self.figures},
            "recipe": {name: dict(zip(self.names, values, strict=True)) for name, values in self.recipe},
            "scores": {name: run.scores.get("metrics") for name, run in zip(self.names, self.runs, strict=True)},
            "notes": list(self.notes),
        }


def compare(paths: Sequence[Path]) -> RunComparison:
    """The comparison of two to eight runs. Raises RunError: too few or too many, or one of them is no run."""
    if not 2 <= len(paths) <= MAX_RUNS:
        raise RunError(
            f"{len(paths)} {'run is' if len(paths) == 1 else 'runs are'} given; 2 to {MAX_RUNS} can be compared.",
            fix="halfbyte compare RUN RUN",
        )
    runs = tuple(record.read(path) for path in paths)
    names = unique([run.name for run in runs], paths)
    figures = (
        ("state", tuple(run.state.name for run in runs)),
        ("beside the base", tuple(run.verdict.get("name", "") for run in runs)),
        ("model", tuple(run.model for run in runs)),
        *side_by_side([dict(page.facts(run)) for run in runs], missing=""),
    )
    return RunComparison(runs, names, figures, differences(runs), scores(runs), notes(runs, names))


def unique(names: list[str], paths: Sequence[Path]) -> tuple[str, ...]:
    """A name for each run: its folder's, or its whole path where two folders have the same name."""
    return tuple(names) if len(set(names)) == len(names) else tuple(str(path) for path in paths)


def side_by_side(columns: Sequence[dict[str, str]], *, missing: str) -> Table:
    """A row for each name in any of the columns."""
    names = dict.fromkeys(name for column in columns for name in column)
    return tuple((name, tuple(column.get(name, missing) for column in columns)) for name in names)


def differences(runs: Sequence[record.Record]) -> Table:
    """Each field of the recipe whose values are not all the same."""
    if all(run.started.get("values") for run in runs):
        values = [{name: text_of(name, row["value"]) for name, row in run.values.items()} for run in runs]
    else:  # a run from before `started.json` has its recipe alone, where null is left out
        values = [{name: text_of(name, value) for name, value in record.flat(run.recipe)} for run in runs]
    rows = side_by_side(values, missing="-")
    return tuple((name, cells) for name, cells in rows if name not in NOT_COMPARED and len(set(cells)) > 1)


def text_of(name: str, value: object) -> str:
    if name in PATHS and isinstance(value, str):  # as it was typed, and as the run has it when it goes on
        value = os.path.normpath(value)
    return shown(sorted(value, key=str) if name.startswith(SETS) and isinstance(value, list) else value)


def scores(runs: Sequence[record.Record]) -> Table:
    """Each score of the adapters, with its interval; the base's too where a run has it."""
    columns = [
        {
            f"{metric.get('name')}{suffix}": interval(metric.get(side), run.scored_adapter if side == "adapter" else "")
            for metric in run.scores.get("metrics") or []
            for side, suffix in (("adapter", ""), ("base", " of the base"))
        }
        for run in runs
    ]
    return tuple((name, cells) for name, cells in side_by_side(columns, missing="") if any(cells))


def interval(score: Document | None, adapter: str = "") -> str:
    """A score as text: `0.958 [0.88, 1]`. `adapter`: which one it is of, where it is not the run's."""
    if not score:
        return ""
    between = score.get("interval")
    limits = f" [{page.number(between[0])}, {page.number(between[1])}]" if between else ""
    return page.number(score["value"]) + limits + (f" of {adapter}" if adapter else "")


def notes(runs: Sequence[record.Record], names: Sequence[str]) -> tuple[str, ...]:
    """What makes a comparison unfair."""
    sentences = list[str]()
    if len({run.model for run in runs}) > 1:
        sentences.append("The runs have different models: their losses are not of the same tokens.")
    if len(learned := dict.fromkeys(run.learns for run in runs)) > 1:
        sentences.append(f"They learn different things ({', '.join(learned)}): their losses cannot be compared.")
    held_out = [(run.started.get("data") or {}).get("eval") or {} for run in runs]
    if len({rows["tokens"] for rows in held_out if rows.get("tokens")}) > 1:  # of those that hold any out
        sentences.append("Their held-out rows are not the same: their evaluations cannot be compared.")
    scored = {str(run.scores["data"]) + f" ({run.scores.get('rows')} rows)" for run in runs if run.scores.get("data")}
    if len(scored) > 1:
        sentences.append(f"They were scored on different rows: {', '.join(sorted(scored))}.")
    sentences += [f"The scores of {name} are of {run.scored_adapter}, not of the one that the run has now."
             for name, run in zip(names, runs, strict=True) if run.scored_adapter]  # fmt: skip
    sentences += [f"{name} is not finished: {run.state.name}." for name, run in zip(names, runs, strict=True)
             if run.state.name not in ("finished", "worse", "diverged")]  # fmt: skip
    return tuple(sentences)


def write(value: RunComparison, path: Path) -> Path:
    charts = curves.of_runs(zip(value.names, value.runs, strict=True))
    files.write(path, page.render("compare.html", charts, live=False, value=value).encode())
    return path
