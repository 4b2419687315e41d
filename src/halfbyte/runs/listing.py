"""What became of a run, read from its folder: finished, running, stopped or crashed; and the runs in a folder.

Cost: the last kB of each run's metrics, two small files, and a hash of its adapter (1 GB/s); no torch.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from halfbyte.recipe.adapter_folder import ADAPTER_FILES, is_run
from halfbyte.runs import crash
from halfbyte.runs.folder import RunFolder, json_rows, read_json
from halfbyte.system import files
from halfbyte.types import Document

Name = Literal["running", "finished", "worse", "diverged", "stopped", "crashed", "not begun"]
TAIL_BYTES = 8_192
SEARCH = "tuning.json"  # what short runs have found (`tuning/`)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a tenth of the time: a page that follows a run looks often


@dataclass(frozen=True)
class State:
    """`step` of `steps`, 0 where unknown; `why` in a few words. `writer`: the process that writes the run now.
    `verdict`: the name of a finished run's; `ended`: what ended it before its last step, if anything."""

    name: Name
    step: int
    steps: int
    why: str = ""
    writer: str | None = None
    verdict: str = ""
    ended: str = ""

    @property
    def short(self) -> str:
        """In a word or two."""
        at = f" at step {self.step:,}" if self.name in ("stopped", "crashed") and self.step else ""
        return f"{self.verdict or self.name}{at}" + (f", {self.ended}" if self.ended else "")


@dataclass(frozen=True)
class RunSummary:
    """A run in a list. `changed`: when its newest file was written, in seconds since 1970."""

    run: Path
    state: State
    model: str
    loss: float | None
    eval_loss: float | None
    changed: float

    def to_json(self) -> Document:
        state = self.state
        of_state = {"state": state.name, "step": state.step, "steps": state.steps, "why": state.why}
        return {**vars(self), "run": str(self.run), **of_state}


def state(run: RunFolder, *, ours: bool = False) -> State:
    """What became of a run; with `ours` this process holds its lock, and is about to release it."""
    last, steps = last_rows(run.metrics)[0], int(read_json(run.plan).get("steps") or 0)
    step = int(last.get("step") or 0)
    writer = None if ours else run.writer()
    if writer is not None:
        return State("running", step, steps, f"process {writer}", writer)
    report = read_json(run.report)
    step = step or int(report.get("steps") or 0)  # of a run whose metrics are lost
    if report and (run.adapter / "adapter_config.json").is_file():
        measured = verdict(run, report)
        name: Name = measured["name"] if measured.get("useless") else "finished"
        early, over = report.get("stopped_early"), "within" in report and step < steps
        why = ["stopped early: no better evaluation"] if early else ["train.within was over"] if over else []
        why += [measured["text"]] if measured else []
        ended = "stopped early" if early else "time over" if over else ""
        return State(name, step, steps, "; ".join(why), verdict=measured.get("name", ""), ended=ended)
    if "within" in report:
        return State("finished", 0, 0, "a search for settings")
    if (run.path / crash.NAME).is_file():
        return State("crashed", step, steps, f"see {crash.NAME}")
    if not step and (run.path / SEARCH).is_file():
        return State("stopped", 0, steps, "while settings were searched; finished probes are kept")
    if not step:
        return State("not begun", 0, steps, "it ended before its first step")
    saved = run.saved_step() or 0
    if saved >= step:
        return State("stopped", step, steps, f"with a checkpoint at step {saved}")
    last_saved = f"the checkpoint at step {saved}" if saved else "no checkpoint"
    return State("crashed", step, steps, f"killed after {last_saved}")


def verdict(run: RunFolder, report: Document) -> Document:
    """The verdict of a finished run (`scoring/verdict.py`), where it is on the adapter that lies there; else empty."""
    measured: Document = report.get("verdict") or {}
    weights = run.adapter / ADAPTER_FILES[0]
    ours = weights.is_file() and measured.get("adapter_sha256") == files.sha256(weights)
    return measured if ours else {}


def last_rows(metrics: Path) -> tuple[Document, Document]:
    """The last row of a step and the last of an evaluation; empty where the last kB hold none."""
    step, evaluation = dict[str, object](), dict[str, object]()
    try:
        with metrics.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - TAIL_BYTES))
            lines = stream.read(TAIL_BYTES).split(b"\n")[:-1]
    except OSError:
        return step, evaluation
    for row in json_rows(lines):
        if "loss" in row:
            step = row
        elif "eval_loss" in row:
            evaluation = row
    return step, evaluation


def runs_in(folder: Path) -> list[RunSummary]:
    """The runs in a folder (two levels deep), the newest first; or the one run that the folder itself is."""
    recipes = [path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}recipe.yaml")]
    paths = {path.parent for path in recipes if is_run(path.parent)}
    return sorted(map(summary, paths), key=lambda run: -run.changed)


def summary(path: Path) -> RunSummary:
    run = RunFolder(path)
    step, evaluation = last_rows(run.metrics)
    eval_loss = read_json(run.report).get("eval_loss", evaluation.get("eval_loss"))
    files = (run.metrics, run.report, run.recipe)
    changed = max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)
    return RunSummary(path, state(run), model_of(run), step.get("loss"), eval_loss, changed)


def recipe_of(run: RunFolder) -> Document:
    """A run's recipe as it stands in its file; empty where it is missing or cannot be read."""
    try:
        value = yaml.load(run.recipe.read_text(encoding="utf-8"), LOADER)  # a safe one  # nosec B506
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def model_of(run: RunFolder) -> str:
    """The model that a run's recipe names; for a path its last part."""
    name = str(recipe_of(run).get("model", "?"))
    return Path(name).name if name.startswith((".", "/")) else name
