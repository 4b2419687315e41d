"""Line plots and heat maps as SVG: titles, units, ticks, legends; each line told by its stroke as well as its colour.

Why: a page that opens anywhere can load no library. The looks (light, dark, print) are in `web/style.css`.
Cost: some kB a line, whatever its length (`series.thinned`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from halfbyte.report.series import Series, thinned

LEFT, RIGHT, TOP, LEGEND, BOTTOM = 54, 12, 26, 16, 34
LOG_FROM = 20.0  # a largest value so many times the median is drawn on a logarithmic axis
CROSS = 8.0  # pixels from one mark of a missing number to the next
MARKED = 40  # a line of at most so many points shows each of them


@dataclass(frozen=True)
class Line:
    """`kind` is its looks in `web/style.css`: raw, smooth, eval, plan, or run0 to run7."""

    name: str
    points: Series
    kind: str = "raw"


@dataclass(frozen=True)
class Chart:
    """`levels` are horizontal lines (name, height); `events` vertical ones (x, a word). Heights are in `unit`."""

    title: str
    unit: str
    x_unit: str
    lines: Sequence[Line]
    levels: Sequence[tuple[str, float]] = ()
    events: Sequence[tuple[float, str]] = ()
    may_be_log: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Axis:
    """From data to pixels; `low` and `high` are in the data's unit."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        value = math.log10(max(value, 1e-300)) if self.log else value
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        if self.log:
            low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            every = max(1, math.ceil((high - low) / most))
            found = [10.0**i for i in range(low, high + 1, every)]
            if high - low <= 2:
                found = sorted(found + [m * 10.0**i for i in range(low, high + 1) for m in (2, 5)])
            return [t for t in found if self.low <= t * (1 + 1e-9) and t <= self.high * (1 + 1e-9)]
        step = nice((self.high - self.low) / max(1, most))
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def nice(value: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below `value`."""
    if not value > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= value * (1 - 1e-9))


def short(value: float) -> str:
    """A number of at most five signs or so: 0.0002, 1.5, 12k, 3.2M."""
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    if 0 < size < 1e-3:
        mantissa, _, power = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(power)}" if power else mantissa
    return f"{value:.4g}"


def axes(chart: Chart, width: int, height: int) -> tuple[Axis, Axis] | None:
    """The x and the y axis of a chart; None where it has no point."""
    known = [line.points.known for line in chart.lines if len(line.points.known)]
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
        edge = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
        low = 0.0 if chart.from_zero or 0 <= low < 0.15 * high else low - edge
        high += edge
    left, right = float(xs.min()), float(xs.max())
    if left == right:
        left, right = left - 0.5, right + 0.5
    return (
        Axis(left, right, LEFT, width - RIGHT),
        Axis(low, high, height - BOTTOM, TOP + LEGEND * legend_rows(chart, width), log),
    )


def svg(chart: Chart, *, width: int = 420, height: int = 250) -> Markup:
    """The chart, to be scaled to the width of its place; one that has no point says so."""
    height += LEGEND * (legend_rows(chart, width) - 1)
    made = axes(chart, width, height)
    head = Markup('<text class="title" x="{}" y="15">{}</text>').format(8, chart.title)
    box = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}"').format(width, height, chart.title)
    if made is None:
        return box + Markup('>{}<text class="tick" x="{}" y="{}">no numbers yet</text></svg>').format(head, 8, 40)
    x, y = made
    log = " (logarithmic)" if y.log else ""
    head = Markup('<text class="title" x="8" y="15">{}<tspan class="unit">  {}{}</tspan></text>').format(
        chart.title, chart.unit, log
    )
    about = " ".join(f'data-{k}="{v}"' for k, v in axis_data(x, y, chart.x_unit).items())
    attributes = Markup(f" {about}>")  # numbers, and a unit that is escaped  # nosec B704
    parts = [box, attributes, head, _grid(x, y, chart.x_unit), _events(chart, x, y)]
    parts += [_line(line, x, y) for line in chart.lines]
    parts += [_levels(chart, x, y), _legend(chart, width), Markup("</svg>")]
    return Markup("").join(parts)


def axis_data(x: Axis, y: Axis, unit: str) -> dict[str, object]:
    """What the page's script needs to say which value is under the pointer."""
    numbers = {"xl": x.low, "xh": x.high, "xs": x.start, "xe": x.end, "yl": y.low, "yh": y.high, "ys": y.start,
               "ye": y.end}  # fmt: skip
    return {**{k: f"{v:.7g}" for k, v in numbers.items()}, "log": int(y.log), "unit": escape(unit)}


def _grid(x: Axis, y: Axis, unit: str) -> Markup:
    parts = []
    for tick in y.ticks(5):
        at = y.at(tick)
        parts.append(Markup('<path class="grid" d="M{:.0f} {:.1f}H{:.0f}"/>').format(x.start, at, x.end))
        parts.append(
            Markup('<text class="tick end" x="{:.0f}" y="{:.1f}">{}</text>').format(x.start - 5, at + 3.5, short(tick))
        )
    for tick in x.ticks(max(3, round((x.end - x.start) / 80))):
        at = x.at(tick)
        parts.append(Markup('<path class="grid" d="M{:.1f} {:.0f}v4"/>').format(at, y.start))
        parts.append(
            Markup('<text class="tick mid" x="{:.1f}" y="{:.0f}">{}</text>').format(at, y.start + 15, short(tick))
        )
    parts.append(Markup('<path class="axis" d="M{:.0f} {:.0f}H{:.0f}"/>').format(x.start, y.start, x.end))
    parts.append(Markup('<text class="tick end" x="{:.0f}" y="{:.0f}">{}</text>').format(x.end, y.start + 28, unit))
    return Markup("").join(parts)


def _levels(chart: Chart, x: Axis, y: Axis) -> Markup:
    """Dashed lines with their names, the highest above its line and the others below, or where no curve crosses it."""
    parts, highest = [], max((value for _, value in chart.levels), default=0.0)
    for name, value in chart.levels:
        at, said = y.at(value), f"{name} {short(value)}"
        places = (at - 4, at + 13) if value == highest else (at + 13, at - 4)
        beside = min(places, key=lambda foot: _crossed(chart, x, y, x.end - 2 - 6 * len(said), foot))
        parts.append(Markup('<path class="line plan" d="M{:.0f} {:.1f}H{:.0f}"/>').format(x.start, at, x.end))
        parts.append(
            Markup('<text class="tick end level" x="{:.0f}" y="{:.1f}">{}</text>').format(x.end - 2, beside, said)
        )
    return Markup("").join(parts)


def _crossed(chart: Chart, x: Axis, y: Axis, start: float, foot: float) -> int:
    """How many pixels of the curves lie behind words that stand on `foot` from `start` to the axis' end."""
    across, crossed = np.arange(start, x.end), 0
    for line in chart.lines:
        known = thinned(line.points).known
        if len(known):
            heights = np.interp(across, [x.at(v) for v in known.x], [y.at(v) for v in known.y])
            crossed += int(np.sum((heights >= foot - 10) & (heights <= foot + 2)))
    return crossed


def _events(chart: Chart, x: Axis, y: Axis) -> Markup:
    parts = []
    for at, word in dict.fromkeys(chart.events):  # several at one step are one
        if x.low <= at <= x.high:
            place = x.at(at)
            anchor = "end" if place > (x.start + x.end) / 2 else "start"
            beside = place + (-3 if anchor == "end" else 3)
            parts.append(Markup('<path class="event" d="M{:.1f} {:.1f}V{:.1f}"/>').format(place, y.start, y.end))
            parts.append(
                Markup('<text class="tick {}" x="{:.1f}" y="{:.1f}">{}</text>').format(anchor, beside, y.end + 9, word)
            )
    return Markup("").join(parts)


def _line(line: Line, x: Axis, y: Axis) -> Markup:
    """A path that is broken at each gap. A lone point is a dot; a cross on the axis is a number that is missing."""
    points, drawn, pen, missing = thinned(line.points), list[str](), "M", list[str]()
    last = -math.inf
    marked = len(points.known) <= MARKED and line.kind not in ("smooth", "plan")
    dots = list[str]()
    for at, value in zip(points.x.tolist(), points.y.tolist(), strict=True):
        if not math.isfinite(at):
            continue
        if not math.isfinite(value):
            pen = "M"
            if x.at(at) - last < CROSS:
                continue
            last = x.at(at)
            missing.append(f"M{x.at(at) - 3:.1f} {y.start - 6:.1f}l6 6m0-6l-6 6")
            continue
        drawn.append(f"{pen}{x.at(at):.1f} {y.at(value):.1f}" + ("h0" if pen == "M" else ""))
        pen = "L"
        if marked:
            dots.append(f"M{x.at(at):.1f} {y.at(value):.1f}h0")
    shapes = Markup('<path class="line {}" data-name="{}" d="{}"/>').format(line.kind, line.name, "".join(drawn))
    if dots:
        shapes += Markup('<path class="dots {}" d="{}"/>').format(line.kind, "".join(dots))
    if missing:
        shapes += Markup('<path class="missing" d="{}"><title>no number</title></path>').format("".join(missing))
    return shapes


def _names(chart: Chart) -> list[tuple[str, str]]:
    named = [(line.name, line.kind) for line in chart.lines if len(line.points)]
    if any(len(line.points.known) < len(line.points) for line in chart.lines):
        named.append(("× no number", ""))
    return named if len(named) > 1 else []


def _placed(chart: Chart, width: int) -> list[tuple[str, str, int, int]]:
    """Entries of the legend with their place: (name, kind, x, row)."""
    placed, at, row = list[tuple[str, str, int, int]](), 8, 0
    for name, kind in _names(chart):
        name = name if len(name) <= 40 else name[:39] + "…"
        wide = (26 if kind else 0) + 6 * len(name) + 12
        if at + wide > width and at > 8:
            at, row = 8, row + 1
        placed.append((name, kind, at, row))
        at += wide
    return placed


def legend_rows(chart: Chart, width: int) -> int:
    return max((row + 1 for *_, row in _placed(chart, width)), default=1)


def _legend(chart: Chart, width: int) -> Markup:
    parts = []
    for name, kind, at, row in _placed(chart, width):
        line = TOP + 6 + LEGEND * row
        if kind:
            parts.append(Markup('<path class="line {0}" d="M{1} {2}h20"/>').format(kind, at, line - 4))
            if kind not in ("raw", "smooth", "plan"):
                parts.append(Markup('<path class="dots {0}" d="M{1} {2}h0"/>').format(kind, at + 10, line - 4))
        parts.append(Markup('<text class="tick" x="{}" y="{}">{}</text>').format(at + (25 if kind else 0), line, name))
    return Markup("").join(parts)


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> Markup:
    """A table of numbers, each cell the darker the larger; NaN is an empty cell. values: (rows, columns)."""
    known = [v for row in values for v in row if math.isfinite(v)]
    most = max(known, default=0.0) or 1.0
    left, cell, high = 8 + 6 * max(map(len, rows), default=0) + 6, 58, 17
    width, height = left + cell * len(columns) + 8, 58 + high * len(rows)
    parts = [
        Markup(
            '<svg class="chart heat" viewBox="0 0 {0} {1}" style="max-width:{2}px" role="img" aria-label="{3}">'
        ).format(width, height, max(420, round(1.15 * width)), title),
        Markup('<text class="title" x="8" y="15">{}</text>').format(title),
    ]
    for j, name in enumerate(columns):
        shown = name if len(name) <= 10 else name[:9] + "…"
        parts.append(
            Markup('<text class="tick mid" x="{}" y="42">{}<title>{}</title></text>').format(
                left + cell * j + cell // 2, shown, name
            )
        )
    for i, name in enumerate(rows):
        y = 48 + high * i
        parts.append(Markup('<text class="tick end" x="{}" y="{}">{}</text>').format(left - 5, y + 12, name))
        for j, value in enumerate(values[i]):
            if math.isfinite(value):
                parts.append(
                    Markup('<rect class="cell" x="{}" y="{}" width="{}" height="{}" fill-opacity="{:.2f}"/>'
                           '<text class="tick mid" x="{}" y="{}">{:.3g}</text>').format(
                        left + cell * j, y, cell - 1, high - 1, 0.75 * max(0.0, value) / most,
                        left + cell * j + cell // 2, y + 12, value,
                    )
                )  # fmt: skip
    return Markup("").join([*parts, Markup("</svg>")])
