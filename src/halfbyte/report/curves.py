"""Which charts a page has: of a run its loss, evaluations, learning rate, gradient norm, speed and memory beside its
plan; of several runs their curves over each other."""

import re
from collections.abc import Iterable

from halfbyte.report import series
from halfbyte.report.plots import Chart, Curve
from halfbyte.report.record import Record
from halfbyte.report.series import Metrics, Series

# What an evaluation counts beside what it measures.
NOT_PLOTTED = frozenset(
    {"eval_loss", "eval_perplexity", "eval_labelled_tokens", "eval_tokens", "eval_rows", "eval_runtime", "eval_seconds"}
)
MAX_EVALS, MAX_LINES = 4, 8
HOURS_FROM = 300.0  # minutes
NATS = "nats a trained token"


def of_run(record: Record) -> list[Chart]:
    """The charts of a run; the first, the loss, is drawn wide."""
    metrics, events = record.metrics, events_of(record)
    loss = _raw_and_smooth(metrics.column("loss"), over=True)
    if (held_out := metrics.evals.get("eval_loss")) is not None:
        loss.append(Curve("held-out rows", held_out, "eval"))
    rate = [Curve("learning rate", metrics.column("learning_rate"), "smooth")]
    norm = _raw_and_smooth(metrics.column("grad_norm"))
    unnamed = [(step, "") for step, _ in events]  # named once, over the loss
    speed = _raw_and_smooth(metrics.column("tokens_per_second"))
    words = {"reward": "Reward of a step's answers", "answer_tokens": "Tokens of an answer", "entropy": "Entropy"}
    written = {words[name]: _raw_and_smooth(metrics.column(name)) for name in words if len(metrics.column(name).known)}
    return [
        Chart("Loss", NATS, "step", loss, events=events, may_be_log=True),
        *(Chart(title, "", "step", curve) for title, curve in written.items()),
        *evaluations(metrics),
        *watched(metrics),
        Chart("Learning rate", "", "step", rate, from_zero=True),
        Chart("Gradient norm", "before clipping", "step", norm, events=unnamed, may_be_log=True),
        Chart("Speed", "tokens/s", "step", speed, from_zero=True),
        memory(record),
    ]


def of_runs(runs: Iterable[tuple[str, Record]]) -> list[Chart]:
    """The charts of several runs by their names, a curve for each run; the first, the loss, is drawn wide."""
    columns = [(name, run.metrics, f"run{i}") for i, (name, run) in enumerate(runs)]

    def smooth(column: str) -> list[Curve]:
        return [Curve(name, _smooth_or_raw(metrics.column(column)), kind) for name, metrics, kind in columns]

    by_time = [
        Curve(name, _smooth_or_raw(Series(series.minutes(metrics.steps["seconds"]), metrics.steps["loss"])), kind)
        for name, metrics, kind in columns
    ]
    held_out = [
        Curve(name, metrics.evals["eval_loss"], kind) for name, metrics, kind in columns if "eval_loss" in metrics.evals
    ]
    margins = smooth("margin")
    return [
        Chart("Loss, smoothed", NATS, "step", smooth("loss"), may_be_log=True),
        *([Chart("Held-out rows: loss", NATS, "step", held_out)] if held_out else []),
        Chart("Loss over time", NATS, "minutes of training", by_time, may_be_log=True),
        *([Chart("Margin, smoothed", "", "step", margins)] if any(len(c.points.known) for c in margins) else []),
        Chart("Gradient norm, smoothed", "before clipping", "step", smooth("grad_norm"), may_be_log=True),
        Chart("Speed, smoothed", "tokens/s", "step", smooth("tokens_per_second"), from_zero=True),
    ]


def _raw_and_smooth(column: Series, *, over: bool = False) -> list[Curve]:
    """Each step's value and, where there are enough of them, their mean; `over`: its name says over how many steps."""
    smooth = series.smooth(column)
    name = f"smoothed over {series.span(len(column.known))} steps" if over else "smoothed"
    return [Curve("each step", column, "raw"), *([Curve(name, smooth, "smooth")] if len(smooth) else [])]


def _smooth_or_raw(column: Series) -> Series:
    smooth = series.smooth(column)
    return smooth if len(smooth) else column


def events_of(record: Record) -> list[tuple[float, str]]:
    """Where a run was resumed, stepped down, or stopped early: (step, a word)."""
    events = [(float(step), "resumed") for step, _ in record.resumed]
    events += [(float(step), "stepped down") for step, _ in record.metrics.step_downs]
    if record.report.get("stopped_early"):
        events.append((float(record.metrics.last_step), "stopped early"))
    return events


def evaluations(metrics: Metrics) -> list[Chart]:
    """The losses of evaluations alone, which the training loss's range would flatten, and other scores."""
    charts = []
    if (held_out := metrics.evals.get("eval_loss")) is not None and len(held_out) > 1:
        charts.append(Chart("Evaluation: loss", NATS, "step", [Curve("held-out rows", held_out, "eval")]))
    sources = by_source(metrics)
    if sources:
        lines = [Curve(name, line, f"run{i}") for i, (name, line) in enumerate([*sources.items()][:MAX_LINES])]
        charts.append(Chart("Evaluation: loss by source", NATS, "step", lines))
    plotted = {*NOT_PLOTTED, *(f"eval_{name}_loss" for name in sources)}
    for name in [name for name in metrics.evals if name not in plotted][:MAX_EVALS]:
        words = name.removeprefix("eval_").replace("_", " ")
        charts.append(Chart(f"Evaluation: {words}", "", "step", [Curve(words, metrics.evals[name], "eval")]))
    return charts


def by_source(metrics: Metrics) -> dict[str, Series]:
    """The held-out losses of each source of a mixture, and on the text of the base's kind beside them."""
    named = {m[1]: line for name, line in metrics.evals.items() if (m := re.fullmatch("eval_(.+)_loss", name))}
    return named if named.keys() - {"base_text"} else {}


def watched(metrics: Metrics) -> list[Chart]:
    """What a run of pairs shows step by step; nothing of others."""
    kinds = ("chosen", "smooth"), ("rejected", "eval")
    both = [Curve(name, _smooth_or_raw(metrics.column(f"{name}_logp")), kind) for name, kind in kinds]
    every = [(name, _raw_and_smooth(metrics.column(name))) for name in ("accuracy", "margin", "kl")]
    charts = [Chart(name.capitalize(), "", "step", curves) for name, curves in every]
    charts.append(Chart("Log p of an answer", "nats", "step", both))
    return [chart for chart in charts if any(len(curve.points.known) for curve in chart.curves)]


def memory(record: Record) -> Chart:
    """Memory over the minutes of training, below the plan's upper figure."""
    steps = record.metrics.steps
    minutes = series.minutes(steps["seconds"])
    cards = bool(len(Series(minutes, steps["peak_device_bytes"]).known))
    name, column = ("peak on the cards", "peak_device_bytes") if cards else ("resident", "rss_bytes")
    unit, scale = ("hours", 60) if len(minutes) and minutes[-1] > HOURS_FROM else ("minutes", 1)
    planned = record.plan.get("peak_bytes")
    levels = [("planned, at most", planned / 1e9)] if isinstance(planned, int | float) else []
    curve = Curve(name, Series(minutes / scale, steps[column] / 1e9), "smooth")
    return Chart("Memory", "GB", f"{unit} of training", [curve], levels=levels, from_zero=True)
