"""`report.json`: what a run did, measured, beside its plan.

Why: a plan that is never compared with a measurement is a guess.
Source: the rows of `metrics.jsonl`, so a resumed run counts the steps of all its processes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from halfbyte.errors import RunError
from halfbyte.types import Document

WORSE = 1.2


@dataclass(frozen=True)
class MeasuredLine:
    """One line of the plan beside what was measured: bytes, or seconds."""

    name: str
    planned: float
    measured: float

    @property
    def error(self) -> float:
        """(planned - measured) / measured: below 0 the plan was too low."""
        return (self.planned - self.measured) / self.measured if self.measured else 0.0


def build(
    rows: Sequence[Document],
    *,
    planned: Document,
    seconds: float,
    peak_rss_bytes: int,
    peak_device_bytes: int | None,
    lines: Iterable[MeasuredLine] = (),
    adapter_step: int | None = None,
) -> Document:
    """The figures of a run from its metrics, as `report.json` has them; `tokens` are real ones, never padding.

    Args:
        rows: of `metrics.jsonl`. A step's row has `loss`, `tokens` and `seconds`, and may have `rss_bytes`; an
            evaluation's row has `eval_loss`.
        seconds: of this process, from the plan on.
        planned: each figure under `measured` as the plan had it; None where it had none.
        peak_rss_bytes: of this process; a resumed run's earlier ones are seen through their rows.
        peak_device_bytes: None without a card.
        adapter_step: of the evaluation whose adapter was kept, and whose loss is reported; None for the last one.

    Raises:
        RunError: no step was made.
    """
    steps = [row for row in rows if "loss" in row]
    if not steps:
        raise RunError("the run made no step, so there is nothing to report.")
    tokens = sum(int(row["tokens"]) for row in steps)
    train_seconds = float(sum(row["seconds"] for row in steps))
    peak = max([peak_rss_bytes, *(int(row["rss_bytes"]) for row in rows if row.get("rss_bytes"))])
    measured = {
        "tokens": tokens,
        "steps": len(steps),
        "train_seconds": train_seconds,
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "peak_device_bytes": peak_device_bytes,
    }
    known = [name for name, real in measured.items() if planned[name] is not None and real]
    return {
        **measured,
        "tokens_per_second": tokens / train_seconds if train_seconds > 0 else 0.0,
        "loss": {"first": steps[0]["loss"], "last": steps[-1]["loss"]},
        "eval_loss": reached(rows, adapter_step)["eval_loss"],
        "planned": planned,
        "measured": measured,
        "errors": {name: MeasuredLine(name, planned[name], measured[name] or 0).error for name in known},
        "lines": [{**asdict(line), "error": line.error} for line in lines],
    }


def reached(rows: Sequence[Document], adapter_step: int | None) -> Document:
    """How far the adapter got: its `steps`, and `eval_loss` of the evaluation that it was kept for (`adapter_step`), or
    of the last one."""
    losses = [row["loss"] for row in rows if "loss" in row]
    evals = {row["step"]: row["eval_loss"] for row in rows if row.get("eval_loss") is not None}
    step = adapter_step if adapter_step in evals else max(evals, default=None)
    return {"steps": len(losses) if adapter_step is None else adapter_step, "eval_loss": evals.get(step)}


def before_training(rows: Sequence[Document]) -> float | None:
    """The loss that a run began with: of an evaluation before the first step, else the first step's own."""
    known = [row["eval_loss"] for row in rows if row["step"] == 0 and "eval_loss" in row]
    return next(iter([*known, *(row["loss"] for row in rows if "loss" in row)]), None)


def above_start(rows: Sequence[Document], eval_loss: float) -> float | None:
    """The loss that a run began with, where this one of held-out rows is above it; None where it is not, or where that
    is not known: the first step's rows are others, so only a far higher loss is above theirs."""
    before = before_training(rows)
    held_out = any(row["step"] == 0 and "eval_loss" in row for row in rows)
    return before if before is not None and eval_loss > before * (1.0 if held_out else WORSE) else None


def got_worse(rows: Sequence[Document]) -> tuple[str, bool]:
    """What to say of a run that ended above where it began, and whether it diverged; ("", False) of any other.

    The end is the last tenth of the steps. A run has diverged if all of them are a fifth above the first, or its last
    evaluation is: single steps differ by what rows they have.
    """
    losses = [row["loss"] for row in rows if "loss" in row]
    every = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]
    evals = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None and row["step"] > 0]
    first, end = losses[0], losses[-max(1, len(losses) // 10) :]
    before = before_training(rows) or first
    far = min(end) > WORSE * first or bool(evals and not evals[-1] <= WORSE * before)
    gained = len(every) > 1 and every[-1] < every[0]  # of the same rows, as the steps' losses are not
    if far or (sum(end) / len(end) > first and not gained):
        held_out = f", {evals[-1]:.4f} on the held-out rows" if evals else ""
        ending = f"the loss rose from {first:.4f} to {losses[-1]:.4f}{held_out}"
        return f"{ending}: {'this run diverged' if far else 'nothing was gained'}; lower train.learning_rate", far
    return "", False


def usual_seconds(rows: Sequence[Document]) -> float | None:
    """The median step's seconds, without the first one, which compiles and touches everything."""
    seconds = sorted([float(row["seconds"]) for row in rows if "loss" in row][1:])
    return seconds[len(seconds) // 2] if seconds else None
