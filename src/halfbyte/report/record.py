"""Everything in a run's folder that its page shows, read once. What is missing or torn is empty, never an error.

Cost: one pass over the metrics; the adapter's weights are read only for `update_norms`.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from halfbyte.recipe.adapter_folder import read_passport
from halfbyte.report import series, update_norms
from halfbyte.runs import crash, listing
from halfbyte.runs.folder import EXPORT, RunFolder, json_rows, read_json
from halfbyte.scoring.sheet import other_adapter
from halfbyte.tuning import results
from halfbyte.types import Document

MAX_ANSWERS = 6  # shown, chosen from so many:
MAX_ANSWERS_READ = 2_000
CRASH_LINES = 12


@dataclass(frozen=True)
class Record:
    """A run as its folder describes it. `scores` and a few `answers` are from `halfbyte eval`, first answers whose
    scores differ between base and adapter."""

    run: RunFolder
    state: listing.State
    metrics: series.Metrics
    recipe: Document
    plan: Document
    report: Document
    started: Document
    scores: Document
    answers: tuple[Document, ...]
    crash: str

    @property
    def name(self) -> str:
        return self.run.path.resolve().name

    @property
    def model(self) -> str:
        name = str((self.started.get("model") or {}).get("id") or listing.model_of(self.run))
        return Path(name).name if name.startswith("/") else name

    @cached_property
    def update_norms(self) -> update_norms.UpdateNorms | None:
        try:
            return update_norms.read(self.run.adapter)
        except Exception:  # of torn weights
            return None

    @cached_property
    def adapter_step(self) -> int | None:
        try:
            passport = read_passport(self.run.adapter) if self.run.adapter.is_dir() else None
        except Exception:  # a page does without it; `halfbyte verify` says what is wrong
            return None
        return None if passport is None else (passport.get("reached") or {}).get("steps")

    @cached_property
    def scored_adapter(self) -> str:
        """Which adapter the scores and answers are of, in words, where it is not the run's; else empty."""
        return other_adapter(self.scores, self.run.adapter)

    @cached_property
    def within(self) -> Document:
        """What was tried for a run in a given time, or by a search; empty for other runs."""
        return self.report.get("within") or results.document(self.run)

    @cached_property
    def verdict(self) -> Document:
        """The run's verdict, where it is on the adapter that the run has; else empty."""
        return listing.verdict(self.run, self.report)

    @cached_property
    def exports(self) -> list[Document]:
        """What `merge` and `export` have added to the folder, by name; `of`: of which adapter each is, in words, where
        that is not the run's."""
        every = [read_json(path) for path in sorted(self.run.path.glob(f"*/{EXPORT}"))]
        return [each | {"of": other_adapter(each, self.run.adapter)} for each in every if each.get("kind")]

    @property
    def resumed(self) -> list[tuple[int, float]]:
        """Each time that the run was resumed: (step, seconds since 1970)."""
        return [(int(p["step"]), float(p["time"])) for p in self.started.get("processes", []) if p.get("step")]

    @property
    def values(self) -> dict[str, Document]:
        """Every field of the recipe with value, origin and why; an older run has no origins."""
        known: dict[str, Document] = self.started.get("values") or {}
        return known or {name: {"value": v, "from": "", "why": ""} for name, v in flat(self.recipe)}


def read(path: Path, *, ours: bool = False) -> Record:
    """The record of a run folder, finished or not; `ours`: as `listing.state` has it. Raises RunError: it is none."""
    run = RunFolder.open(path, need_adapter=False)
    return Record(
        run,
        listing.state(run, ours=ours),
        series.read(run.metrics),
        listing.recipe_of(run),
        read_json(run.plan),
        read_json(run.report),
        read_json(run.started),
        read_json(path / "eval" / "scores.json"),
        answers(path / "eval" / "answers.jsonl"),
        _crash(run),
    )


def _crash(run: RunFolder) -> str:
    """The end of `crash.txt`, of a run that crashed."""
    try:
        lines = (run.path / crash.NAME).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    begin = next((i for i, line in enumerate(lines) if line.startswith("== traceback")), 0)
    return "\n".join(lines[begin + 1 :][-CRASH_LINES:])


def answers(path: Path) -> tuple[Document, ...]:
    """A few rows of `answers.jsonl`, first those whose scores differ between base and adapter."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            first_rows = json_rows(islice(lines, MAX_ANSWERS_READ))
            rows = [row for row in first_rows if isinstance(row.get("adapter"), dict)]
    except OSError:
        return ()
    differ = [row for row in rows if row.get("base") and row["base"].get("scores") != row["adapter"].get("scores")]
    same = [row for row in rows if not any(row is one for one in differ)]
    first = differ[: MAX_ANSWERS - 1] if same else differ
    return tuple([*first, *same][:MAX_ANSWERS])


def flat(values: Document, prefix: str = "") -> list[tuple[str, object]]:
    """Every leaf of nested mappings with its dotted name."""
    pairs = list[tuple[str, object]]()
    for name, value in values.items():
        pairs += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return pairs
