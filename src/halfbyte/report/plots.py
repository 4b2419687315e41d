"""Line plots and heat maps as SVG: titles, units, ticks, legends; curves differ by stroke as well as by colour.

Why: a page that opens anywhere can load no library. What is drawn is in `web/chart.svg` and `heat.svg`, colours (light,
dark, print) in `web/style.css`; where it is drawn is decided here.
Cost: some kB a curve, whatever its length (`series.thin`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from jinja2 import Environment
from markupsafe import Markup

from halfbyte.report.series import Series, thin
from halfbyte.web import files as web

# Pixels around the plot, and the height of a row of the legend.
LEFT, RIGHT = 54, 12
TOP, BOTTOM = 26, 34
LEGEND = 16
LOG_FROM = 20.0  # the axis is logarithmic if the largest value is so many times the median
CROSS = 8.0  # pixels from one mark of a missing number to the next
WEB = Path(__file__).parent / "web"
MAX_DOTS = 40  # a curve of at most so many points shows each of them


@dataclass(frozen=True)
class Curve:
    """`kind` is its class in `web/style.css`: raw, smooth, eval, plan, or run0 to run7."""

    name: str
    points: Series
    kind: str = "raw"


@dataclass(frozen=True)
class Chart:
    """`levels` are horizontal lines (name, height); `events` vertical ones (x, a word). Heights are in `unit`."""

    title: str
    unit: str
    x_unit: str
    curves: Sequence[Curve]
    levels: Sequence[tuple[str, float]] = ()
    events: Sequence[tuple[float, str]] = ()
    may_be_log: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Axis:
    """From data to pixels; `low` and `high` are in the data's unit; `whole`: it has no fractions."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False

    def at(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        value = math.log10(max(value, 1e-300)) if self.log else value
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self, max_count: int) -> list[float]:
        if self.log:
            low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            every = max(1, math.ceil((high - low) / max_count))
            ticks = [10.0**i for i in range(low, high + 1, every)]
            if high - low <= 2:
                ticks = sorted(ticks + [m * 10.0**i for i in range(low, high + 1) for m in (2, 5)])
            return [t for t in ticks if self.low <= t * (1 + 1e-9) and t <= self.high * (1 + 1e-9)]
        step = nice((self.high - self.low) / max(1, max_count))
        while self.whole and step % 1:
            step = nice(1.01 * step)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice(value: float) -> float:
    """The smallest number of the form (1, 2, 2.5 or 5) x 10^n that is not below `value`."""
    if not value > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= value * (1 - 1e-9))


def short(value: float, span: float = 0.0) -> str:
    """A number of at most five characters or so: 0.0002, 1.5, 12k, 3.2M. More of a tick on an axis as long as `span`,
    where its neighbours would be called the same."""
    size = abs(value)
    digits = max(4, math.floor(math.log10(size)) - math.floor(math.log10(span)) + 4) if size and span else 4
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.{digits}g}{name}"
    mantissa, _, power = f"{value:.{digits - (0 < size < 1e-3)}g}".partition("e")
    return f"{mantissa}e{int(power)}" if power else mantissa


def ends(curve: Curve) -> str:
    """A curve's first and last value; its only one; nothing of a curve without any."""
    values = curve.points.known.y
    return " → ".join(short(float(value)) for value in (values if len(values) < 2 else values[[0, -1]]))


def axes(chart: Chart, width: int, height: int) -> tuple[Axis, Axis] | None:
    """The x and the y axis of a chart; None where it has no point."""
    known = [curve.points.known for curve in chart.curves if len(curve.points.known)]
    if not known:
        return None
    xs, ys = np.concatenate([k.x for k in known]), np.concatenate([k.y for k in known])
    low, high = float(ys.min()), float(ys.max())
    log = chart.may_be_log and low > 0 and high > LOG_FROM * float(np.median(ys))
    for _, value in chart.levels:
        low, high = min(low, value), max(high, value)
    if log:
        low, high = low / 1.15, high * 1.15
    else:
        edge = max((high - low) * 0.06, abs(high) * (0.05 if low == high else 0.005))
        low = 0.0 if chart.from_zero or 0 <= low < 0.15 * high or low == high == 0 else low - edge
        high = high + edge or 1.0
    left, right = float(xs.min()), float(xs.max())
    if left == right:
        left, right = left - 0.5, right + 0.5
    return (
        Axis(left, right, LEFT, width - RIGHT, whole=chart.x_unit == "step"),
        Axis(low, high, height - BOTTOM, TOP + LEGEND * legend_rows(chart, width), log),
    )


@cache
def templates() -> Environment:
    """Those of `web/`, which escape all that they show."""
    jinja = web.templates(WEB)
    jinja.filters |= {"short": short, "px": "{:.1f}".format, "digits": "{:.7g}".format}
    return jinja


def svg(chart: Chart, *, width: int = 420, height: int = 250) -> Markup:
    """The chart, to be scaled to the width of its place; one without a point says so."""
    legend = _legend(chart, width)
    height += LEGEND * (legend_rows(chart, width) - 1)
    x, y = axes(chart, width, height) or (None, None)
    values: dict[str, object] = {}
    if x is not None and y is not None:
        events = [(step, word) for step, word in dict.fromkeys(chart.events) if x.low <= step <= x.high]
        unnamed = [curve for curve in chart.curves if len(curve.points)] if not legend else []
        values = {
            "alone": "".join(f"  {ends(curve)}" for curve in unnamed),
            "columns": max(3, round((x.end - x.start) / 80)),
            "events": events,  # several at one step are one
            "curves": [(curve, *_drawing(curve, x, y)) for curve in chart.curves],
            "levels": _levels(chart, x, y),
            "legend": legend,
        }
    template = templates().get_template("chart.svg")
    return Markup(template.render(chart=chart, width=width, height=height, x=x, y=y, **values))  # nosec B704


def _levels(chart: Chart, x: Axis, y: Axis) -> list[tuple[str, float, float]]:
    """Each level's label, its height, and the foot of its words: the highest has them above its line and the others
    below, or where no curve crosses them."""
    levels, highest = [], max((value for _, value in chart.levels), default=0.0)
    for name, value in chart.levels:
        at, label = y.at(value), f"{name} {short(value)}"
        feet = (at - 4, at + 13) if value == highest else (at + 13, at - 4)
        first, other = (_crossed(chart, x, y, x.end - 2 - 6 * len(label), foot) for foot in feet)
        levels.append((label, at, feet[other < first]))
    return levels


def _crossed(chart: Chart, x: Axis, y: Axis, start: float, foot: float) -> int:
    """How many pixels of the curves lie behind words that stand on `foot` from `start` to the axis' end."""
    across, crossed = np.arange(start, x.end), 0
    for curve in chart.curves:
        known = thin(curve.points).known
        if len(known):
            heights = np.interp(across, [x.at(v) for v in known.x], [y.at(v) for v in known.y])
            crossed += int(np.sum((heights >= foot - 10) & (heights <= foot + 2)))
    return crossed


def _drawing(curve: Curve, x: Axis, y: Axis) -> tuple[str, str, str]:
    """A path that is broken at each gap; dots where there are few points, or a lone one; crosses on the axis for
    numbers that are missing."""
    path, dots, crosses = list[str](), list[str](), list[str]()
    pen, last_cross = "M", -math.inf
    points = thin(curve.points)
    for step, value in zip(points.x.tolist(), points.y.tolist(), strict=True):
        if not math.isfinite(step):
            continue
        at = x.at(step)
        if math.isfinite(value):
            path.append(f"{pen}{at:.1f} {y.at(value):.1f}" + ("h0" if pen == "M" else ""))
            dots.append(f"M{at:.1f} {y.at(value):.1f}h0")
            pen = "L"
            continue
        pen = "M"
        if at - last_cross >= CROSS:
            last_cross = at
            crosses.append(f"M{at - 3:.1f} {y.start - 6:.1f}l6 6m0-6l-6 6")
    few = len(points.known) <= MAX_DOTS and curve.kind not in ("smooth", "plan")
    return "".join(path), "".join(dots) if few else "", "".join(crosses)


def _legend(chart: Chart, width: int) -> list[tuple[str, str, int, int]]:
    """Entries of the legend with their place: (name, kind, x, foot); none for a single curve."""
    drawn = [curve for curve in chart.curves if len(curve.points)]
    cut = [curve.name if len(curve.name) <= 40 else curve.name[:39] + "…" for curve in drawn]
    names = [(f"{name} {ends(curve)}", curve.kind) for name, curve in zip(cut, drawn, strict=True)]
    if any(len(curve.points.known) < len(curve.points) for curve in chart.curves):
        names.append(("× no number", ""))
    entries: list[tuple[str, str, int, int]] = []
    at, foot = 8, TOP + 6
    for name, kind in names if len(names) > 1 else []:
        entry_width = (26 if kind else 0) + 6 * len(name) + 12
        if at + entry_width > width and at > 8:
            at, foot = 8, foot + LEGEND
        entries.append((name, kind, at, foot))
        at += entry_width
    return entries


def legend_rows(chart: Chart, width: int) -> int:
    return len({foot for *_, foot in _legend(chart, width)}) or 1


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> Markup:
    """A table of numbers, each cell the darker the larger; NaN is an empty cell. values: (rows, columns)."""
    largest = max((v for row in values for v in row if math.isfinite(v)), default=0.0) or 1.0
    shades = [[(v, 0.75 * max(0.0, v) / largest if math.isfinite(v) else None) for v in row] for row in values]
    left, cell = 14 + 6 * max(map(len, rows), default=0), 58
    sizes = {"left": left, "cell": cell, "width": left + cell * len(columns) + 8, "height": 58 + 17 * len(rows)}
    shown = {"title": title, "columns": columns, "rows": list(zip(rows, shades, strict=True)), **sizes}
    return Markup(templates().get_template("heat.svg").render(shown))  # nosec B704
