"""`report.json`: what a run did, measured, beside its plan.

Why: a plan that is never compared with a measurement is a guess.
Source: the rows of `metrics.jsonl`, so a resumed run counts the steps of all its processes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from halfbyte.errors import RunError
from halfbyte.types import Document


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
    rows: Sequence[Document], *, planned: Document, seconds: float, peak_rss_bytes: int, peak_device_bytes: int | None,
    lines: Iterable[MeasuredLine] = (), adapter_step: int | None = None,
) -> Document:  # fmt: skip
    """The figures of a run from its metrics, as `report.json` has them; `tokens` are real ones, never padding, and
    `computed_tokens` those of them that were computed, where rows share their beginnings.

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
        "computed_tokens": sum(int(row.get("computed_tokens") or row["tokens"]) for row in steps),
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
        **({"reward": value} if (value := rewards(rows, adapter_step)) else {}),
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


def rewards(rows: Sequence[Document], adapter_step: int | None) -> Document | None:
    """What answers to the held-out rows were worth in the first evaluation, and by the adapter that was kept, with
    their intervals; None where a run does not learn from rewards."""
    evals = {row["step"]: [row.get(f"eval_reward{end}") for end in ("", "_low", "_high")] for row in rows}
    evals = {step: values for step, values in evals.items() if values[0] is not None}
    if not evals:
        return None
    first, last = evals[min(evals)], evals[adapter_step if adapter_step in evals else max(evals)]
    return {"first": first[0], "best": last[0], "intervals": [first[1:], last[1:]]}


def usual_seconds(rows: Sequence[Document]) -> float | None:
    """The median step's seconds, without the first one, which compiles and touches everything."""
    seconds = sorted([float(row["seconds"]) for row in rows if "loss" in row][1:])
    return seconds[len(seconds) // 2] if seconds else None
