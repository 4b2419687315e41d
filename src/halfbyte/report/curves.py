"""Which plots a run has: loss, evaluations, learning rate, gradient norm, speed, memory beside its plan."""

from __future__ import annotations

from halfbyte.report import series
from halfbyte.report.plots import Chart, Line
from halfbyte.report.record import Record
from halfbyte.report.series import Metrics, Series

# What an evaluation counts beside what it measures.
NOT_PLOTTED = frozenset(
    {"eval_loss", "eval_perplexity", "eval_labelled_tokens", "eval_tokens", "eval_rows", "eval_runtime", "eval_seconds"}
)
MOST_EVALS = 4
HOURS_FROM = 300.0  # minutes


def charts(record: Record) -> list[Chart]:
    """The loss first, which is drawn wide."""
    metrics, on = record.metrics, events(record)
    return [loss(metrics, on), *evaluations(metrics), *rates(metrics, on), speed(metrics), memory(record)]


def events(record: Record) -> list[tuple[float, str]]:
    """Where a run went on, stepped down, or was cut short."""
    found = [(float(step), "resumed") for step, _ in record.resumed]
    found += [(float(step), "stepped down") for step, _ in record.metrics.downs]
    if record.report.get("stopped_early"):
        found.append((float(record.metrics.last_step), "stopped early"))
    return found


def loss(metrics: Metrics, on: list[tuple[float, str]]) -> Chart:
    raw = metrics.column("loss")
    smooth = series.smoothed(raw)
    lines = [Line("each step", raw, "raw")]
    if len(smooth):
        lines.append(Line(f"smoothed over {series.span(len(raw.known))} steps", smooth, "smooth"))
    if (held := metrics.evals.get("eval_loss")) is not None:
        lines.append(Line("held-out rows", held, "eval"))
    return Chart("Loss", "nats a trained token", "step", lines, events=on, may_be_log=True)


def evaluations(metrics: Metrics) -> list[Chart]:
    """The losses of evaluations alone, which the training loss's range would flatten, and other scores."""
    found = []
    if (held := metrics.evals.get("eval_loss")) is not None and len(held) > 1:
        found.append(Chart("Evaluation: loss", "nats a trained token", "step", [Line("held-out rows", held, "eval")]))
    for name in [name for name in metrics.evals if name not in NOT_PLOTTED][:MOST_EVALS]:
        said = name.removeprefix("eval_").replace("_", " ")
        found.append(Chart(f"Evaluation: {said}", "", "step", [Line(said, metrics.evals[name], "eval")]))
    return found


def rates(metrics: Metrics, on: list[tuple[float, str]]) -> list[Chart]:
    norm = metrics.column("grad_norm")
    smooth = series.smoothed(norm)
    lines = [Line("each step", norm, "raw")] + ([Line("smoothed", smooth, "smooth")] if len(smooth) else [])
    rate = Line("learning rate", metrics.column("learning_rate"), "smooth")
    on = [(at, "") for at, _ in on]  # said once, over the loss
    return [
        Chart("Learning rate", "", "step", [rate], from_zero=True),
        Chart("Gradient norm", "before clipping", "step", lines, events=on, may_be_log=True),
    ]


def speed(metrics: Metrics) -> Chart:
    each = metrics.column("tokens_per_second")
    smooth = series.smoothed(each)
    lines = [Line("each step", each, "raw")] + ([Line("smoothed", smooth, "smooth")] if len(smooth) else [])
    return Chart("Speed", "tokens/s", "step", lines, from_zero=True)


def memory(record: Record) -> Chart:
    """Memory over the minutes of training; the plan's two levels: what is needed, and with pages of files."""
    steps, plan = record.metrics.steps, record.plan
    minutes = series.minutes(steps["seconds"])
    cards = bool(len(Series(minutes, steps["peak_device_bytes"]).known))
    name = "peak_device_bytes" if cards else "rss_bytes"
    hours = bool(len(minutes)) and minutes[-1] > HOURS_FROM
    line = Line(
        "peak on the cards" if cards else "resident",
        Series(minutes / (60 if hours else 1), steps[name] / 1e9),
        "smooth",
    )
    levels = [
        (said, plan[key] / 1e9)
        for said, key in (("planned, with pages of files", "peak_bytes"), ("planned, needed", "needed_bytes"))
        if isinstance(plan.get(key), int | float)
    ]
    levels = levels[1:] if len(levels) == 2 and abs(levels[0][1] - levels[1][1]) < 0.02 * levels[0][1] else levels
    return Chart(
        "Memory", "GB", f"{'hours' if hours else 'minutes'} of training", [line], levels=levels, from_zero=True
    )
