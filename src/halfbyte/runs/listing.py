"""What became of a run, from its folder alone: finished, running, stopped or crashed; and every run of a folder.

Cost: the last kB of each run's metrics and two small files; no torch.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from halfbyte.runs import crash
from halfbyte.runs.folder import RunFolder, read_json
from halfbyte.runs.points import step_of
from halfbyte.types import Document

Name = Literal["running", "finished", "diverged", "stopped", "crashed", "not begun"]
TAIL_BYTES = 8_192


@dataclass(frozen=True)
class State:
    """`step` of `steps`, 0 where it is not known; `why` in a few words. `by` is the process that writes the run."""

    name: Name
    step: int
    steps: int
    why: str = ""
    by: str | None = None


@dataclass(frozen=True)
class Entry:
    """One run in a list. `changed` is when its newest file was written (seconds since 1970)."""

    run: Path
    state: State
    model: str
    loss: float | None
    eval_loss: float | None
    changed: float

    def to_json(self) -> Document:
        return {
            "run": str(self.run), "state": self.state.name, "step": self.state.step, "steps": self.state.steps,
            "why": self.state.why, "model": self.model, "loss": self.loss, "eval_loss": self.eval_loss,
            "changed": self.changed,
        }  # fmt: skip


def state(run: RunFolder, *, ours: bool = False) -> State:
    """What became of a run.

    Args:
        ours: this process holds the run's lock, and is about to let it go.
    """
    last, steps = last_rows(run.metrics)[0], int(read_json(run.plan).get("steps") or 0)
    step = int(last.get("step") or 0)
    by = None if ours else run.writer()
    if by is not None:
        return State("running", step, steps, f"process {by}", by)
    report = read_json(run.report)
    if report and (run.adapter / "adapter_config.json").is_file():
        if report.get("diverged"):
            return State("diverged", step, steps, "it ended above where it began")
        early = bool(report.get("stopped_early"))
        return State("finished", step, steps, "stopped early: no better evaluation" if early else "")
    if (run.path / crash.NAME).is_file():
        return State("crashed", step, steps, f"see {crash.NAME}")
    names = [path for path in run.checkpoints.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    saved = max(map(step_of, names), default=0)
    if not step:
        return State("not begun", 0, steps, "it ended before its first step")
    if saved >= step:
        return State("stopped", step, steps, f"with a checkpoint at step {saved}")
    return State(
        "crashed", step, steps, f"killed after {f'the checkpoint at step {saved}' if saved else 'no checkpoint'}"
    )


def last_rows(metrics: Path) -> tuple[Document, Document]:
    """The last row of a step and the last of an evaluation; empty where there is none in the last kB."""
    step, evaluated = dict[str, object](), dict[str, object]()
    try:
        with metrics.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
            lines = stream.read(TAIL_BYTES).split(b"\n")[:-1]
    except OSError:
        return step, evaluated
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "loss" in row:
            step = row
        elif isinstance(row, dict) and "eval_loss" in row:
            evaluated = row
    return step, evaluated


def every(folder: Path) -> list[Entry]:
    """The runs below a folder (two levels), the newest first; or the one that the folder itself is."""
    found = {
        path.parent for pattern in ("recipe.yaml", "*/recipe.yaml", "*/*/recipe.yaml") for path in folder.glob(pattern)
    }
    return sorted((entry(path) for path in found if (path / "checkpoints").is_dir()), key=lambda e: -e.changed)


def entry(path: Path) -> Entry:
    run = RunFolder(path)
    last, evaluated = last_rows(run.metrics)
    report = read_json(run.report)
    eval_loss = report.get("eval_loss", evaluated.get("eval_loss"))
    names = (run.metrics, run.report, run.recipe)
    changed = max((file.stat().st_mtime for file in names if file.is_file()), default=0.0)
    return Entry(path, state(run), model_of(run), last.get("loss"), eval_loss, changed)


def model_of(run: RunFolder) -> str:
    """The model that a run's recipe names; of a path its last part."""
    try:
        name = str(yaml.safe_load(run.recipe.read_text())["model"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return "?"
    return Path(name).name if name.startswith((".", "/")) else name
