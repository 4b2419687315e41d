"""Line plots and heat maps as SVG: titles, units, ticks, legends; curves differ by stroke as well as by colour.

Why: a page that opens anywhere can load no library. Colours (light, dark, print) are in `web/style.css`.
Cost: some kB a curve, whatever its length (`series.thin`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from halfbyte.report.series import Series, thin

# Pixels around the plot, and the height of a row of the legend.
LEFT, RIGHT = 54, 12
TOP, BOTTOM = 26, 34
LEGEND = 16
LOG_FROM = 20.0  # the axis is logarithmic if the largest value is so many times the median
CROSS = 8.0  # pixels from one mark of a missing number to the next
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


def short(value: float) -> str:
    """A number of at most five characters or so: 0.0002, 1.5, 12k, 3.2M."""
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if name == 'k' else unit):.4g}{name}"
    if 0 < size < 1e-3:
        mantissa, _, power = f"{value:.3g}".partition("e")
        return f"{mantissa}e{int(power)}" if power else mantissa
    return f"{value:.4g}"


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
        edge = (high - low) * 0.06 or abs(high) * 0.05
        low = 0.0 if chart.from_zero or 0 <= low < 0.15 * high or low == high == 0 else low - edge
        high = high + edge or 1.0
    left, right = float(xs.min()), float(xs.max())
    if left == right:
        left, right = left - 0.5, right + 0.5
    return (
        Axis(left, right, LEFT, width - RIGHT, whole=chart.x_unit == "step"),
        Axis(low, high, height - BOTTOM, TOP + LEGEND * legend_rows(chart, width), log),
    )


def svg(chart: Chart, *, width: int = 420, height: int = 250) -> Markup:
    """The chart, to be scaled to the width of its place; one without a point says so."""
    height += LEGEND * (legend_rows(chart, width) - 1)
    box = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}"').format(width, height, chart.title)
    if (both := axes(chart, width, height)) is None:
        return box + Markup(">{}{}</svg>").format(
            _text("title", 8, 15, chart.title), _text("tick", 8, 40, "no numbers yet")
        )
    x, y = both
    unnamed = [curve for curve in chart.curves if len(curve.points)] if not _legend_entries(chart, width) else []
    alone = "".join(f"  {ends(curve)}" for curve in unnamed)
    scale = " (logarithmic)" if y.log else ""
    unit = Markup('<tspan class="unit">  {}{}{}</tspan>').format(chart.unit, scale, alone)
    about = " ".join(f'data-{k}="{v}"' for k, v in axis_data(x, y, chart.x_unit).items())
    attributes = Markup(f" {about}>")  # numbers, and a unit that is escaped  # nosec B704
    head = _text("title", 8, 15, escape(chart.title) + unit)
    parts = [box, attributes, head, _grid(x, y, chart.x_unit), _events(chart, x, y)]
    parts += [_curve(curve, x, y) for curve in chart.curves]
    parts += [_levels(chart, x, y), _legend(chart, width), Markup("</svg>")]
    return Markup("").join(parts)


def axis_data(x: Axis, y: Axis, unit: str) -> dict[str, object]:
    """What the page's script needs to say which value is under the pointer."""
    numbers = {"xl": x.low, "xh": x.high, "xs": x.start, "xe": x.end, "yl": y.low, "yh": y.high, "ys": y.start,
               "ye": y.end}  # fmt: skip
    return {**{k: f"{v:.7g}" for k, v in numbers.items()}, "log": int(y.log), "unit": escape(unit)}


def _text(kind: str, x: object, y: object, words: str) -> Markup:
    return Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, x, y, words)


def _path(kind: str, drawing: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(kind, drawing)


def _grid(x: Axis, y: Axis, unit: str) -> Markup:
    parts = []
    for tick in y.ticks(5):
        at = y.at(tick)
        parts.append(_path("grid", f"M{x.start:.0f} {at:.1f}H{x.end:.0f}"))
        parts.append(_text("tick end", f"{x.start - 5:.0f}", f"{at + 3.5:.1f}", short(tick)))
    for tick in x.ticks(max(3, round((x.end - x.start) / 80))):
        at = x.at(tick)
        parts.append(_path("grid", f"M{at:.1f} {y.start:.0f}v4"))
        parts.append(_text("tick mid", f"{at:.1f}", f"{y.start + 15:.0f}", short(tick)))
    parts.append(_path("axis", f"M{x.start:.0f} {y.start:.0f}H{x.end:.0f}"))
    parts.append(_text("tick end", f"{x.end:.0f}", f"{y.start + 28:.0f}", unit))
    return Markup("").join(parts)


def _levels(chart: Chart, x: Axis, y: Axis) -> Markup:
    """Dashed lines with their names, the highest above its line and the others below, or where no curve crosses it."""
    parts, highest = [], max((value for _, value in chart.levels), default=0.0)
    for name, value in chart.levels:
        at, label = y.at(value), f"{name} {short(value)}"
        feet = (at - 4, at + 13) if value == highest else (at + 13, at - 4)
        foot = min(feet, key=lambda foot: _crossed(chart, x, y, x.end - 2 - 6 * len(label), foot))
        parts.append(_path("line plan", f"M{x.start:.0f} {at:.1f}H{x.end:.0f}"))
        parts.append(_text("tick end level", f"{x.end - 2:.0f}", f"{foot:.1f}", label))
    return Markup("").join(parts)


def _crossed(chart: Chart, x: Axis, y: Axis, start: float, foot: float) -> int:
    """How many pixels of the curves lie behind words that stand on `foot` from `start` to the axis' end."""
    across, crossed = np.arange(start, x.end), 0
    for curve in chart.curves:
        known = thin(curve.points).known
        if len(known):
            heights = np.interp(across, [x.at(v) for v in known.x], [y.at(v) for v in known.y])
            crossed += int(np.sum((heights >= foot - 10) & (heights <= foot + 2)))
    return crossed


def _events(chart: Chart, x: Axis, y: Axis) -> Markup:
    parts = []
    for step, word in dict.fromkeys(chart.events):  # several at one step are one
        if x.low <= step <= x.high:
            at = x.at(step)
            anchor, offset = ("end", -3) if at > (x.start + x.end) / 2 else ("start", 3)
            parts.append(_path("event", f"M{at:.1f} {y.start:.1f}V{y.end:.1f}"))
            parts.append(_text(f"tick {anchor}", f"{at + offset:.1f}", f"{y.end + 9:.1f}", word))
    return Markup("").join(parts)


def _curve(curve: Curve, x: Axis, y: Axis) -> Markup:
    """A path that is broken at each gap. A lone point is a dot; a cross on the axis is a number that is missing."""
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
    shapes = Markup('<path class="line {}" data-name="{}" d="{}"/>').format(curve.kind, curve.name, "".join(path))
    if dots and len(points.known) <= MAX_DOTS and curve.kind not in ("smooth", "plan"):
        shapes += _path(f"dots {curve.kind}", "".join(dots))
    if crosses:
        shapes += Markup('<path class="missing" d="{}"><title>no number</title></path>').format("".join(crosses))
    return shapes


def _legend_entries(chart: Chart, width: int) -> list[tuple[str, str, int, int]]:
    """Entries of the legend with their place: (name, kind, x, row); none for a single curve."""
    drawn = [curve for curve in chart.curves if len(curve.points)]
    names = [(f"{_cut(curve.name)} {ends(curve)}", curve.kind) for curve in drawn]
    if any(len(curve.points.known) < len(curve.points) for curve in chart.curves):
        names.append(("× no number", ""))
    entries: list[tuple[str, str, int, int]] = []
    at, row = 8, 0
    for name, kind in names if len(names) > 1 else []:
        entry_width = (26 if kind else 0) + 6 * len(name) + 12
        if at + entry_width > width and at > 8:
            at, row = 8, row + 1
        entries.append((name, kind, at, row))
        at += entry_width
    return entries


def _cut(name: str) -> str:
    return name if len(name) <= 40 else name[:39] + "…"


def legend_rows(chart: Chart, width: int) -> int:
    return max((row + 1 for *_, row in _legend_entries(chart, width)), default=1)


def _legend(chart: Chart, width: int) -> Markup:
    parts = []
    for name, kind, at, row in _legend_entries(chart, width):
        foot = TOP + 6 + LEGEND * row
        if kind:
            parts.append(_path(f"line {kind}", f"M{at} {foot - 4}h20"))
            if kind not in ("raw", "smooth", "plan"):
                parts.append(_path(f"dots {kind}", f"M{at + 10} {foot - 4}h0"))
        parts.append(_text("tick", at + (25 if kind else 0), foot, name))
    return Markup("").join(parts)


def heat_map(title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]]) -> Markup:
    """A table of numbers, each cell the darker the larger; NaN is an empty cell. values: (rows, columns)."""
    largest = max((v for row in values for v in row if math.isfinite(v)), default=0.0) or 1.0
    left = 8 + 6 * max(map(len, rows), default=0) + 6
    cell_width, cell_height = 58, 17
    width, height = left + cell_width * len(columns) + 8, 58 + cell_height * len(rows)
    box = '<svg class="chart heat" viewBox="0 0 {0} {1}" style="max-width:{2}px" role="img" aria-label="{3}">'
    parts = [Markup(box).format(width, height, max(420, round(1.15 * width)), title), _text("title", 8, 15, title)]
    for j, name in enumerate(columns):
        shown = escape(name if len(name) <= 10 else name[:9] + "…") + Markup("<title>{}</title>").format(name)
        parts.append(_text("tick mid", left + cell_width * j + cell_width // 2, 42, shown))
    for i, name in enumerate(rows):
        y = 48 + cell_height * i
        parts.append(_text("tick end", left - 5, y + 12, name))
        for j, value in enumerate(values[i]):
            if math.isfinite(value):
                x, shade = left + cell_width * j, 0.75 * max(0.0, value) / largest
                parts.append(
                    Markup('<rect class="cell" x="{}" y="{}" width="{}" height="{}" fill-opacity="{:.2f}"/>').format(
                        x, y, cell_width - 1, cell_height - 1, shade
                    )
                )
                parts.append(_text("tick mid", x + cell_width // 2, y + 12, f"{value:.3g}"))
    return Markup("").join([*parts, Markup("</svg>")])
