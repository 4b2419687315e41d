"""Plots: where a value is drawn, what is broken at a gap, what may stand in a text."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from halfbyte.report import plots
from halfbyte.report.plots import Axis, Chart, Curve
from halfbyte.report.series import Series
from halfbyte.web import files as web

SPACE = "{http://www.w3.org/2000/svg}"


def chart(*lines: Curve, **more: object) -> Chart:
    return Chart("Title", "unit", "step", lines, **more)  # type: ignore[arg-type]


def line(values: list[float], name: str = "line", kind: str = "raw") -> Curve:
    return Curve(name, Series(np.arange(float(len(values))), np.array(values)), kind)


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(str(svg).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def drawn(svg: str, name: str = "line") -> list[tuple[float, float]]:
    """The points of a line, from pixels back to data by the numbers that the page's script uses."""
    root = parsed(svg)
    at = {k: float(root.attrib[f"data-{k}"]) for k in ("xl", "xh", "xs", "xe", "yl", "yh", "ys", "ye", "log")}
    (path,) = [p for p in root.iter(f"{SPACE}path") if p.get("data-name") == name]
    points = []
    for px, py in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", path.attrib["d"]):
        x = at["xl"] + (float(px) - at["xs"]) / (at["xe"] - at["xs"]) * (at["xh"] - at["xl"])
        low, high = (math.log10(at["yl"]), math.log10(at["yh"])) if at["log"] else (at["yl"], at["yh"])
        y = low + (float(py) - at["ys"]) / (at["ye"] - at["ys"]) * (high - low)
        points.append((x, 10**y if at["log"] else y))
    return points


@pytest.mark.parametrize("values", [[1.0, 3.0, 2.0, 2.5], [0.001, 5000.0, 0.01, 0.02], [7.0]])
def test_a_point_is_where_its_value_is(values: list[float]) -> None:
    """Pixels have one decimal: 0.05 of some 200 is far below 0.1% of the axis, on a logarithmic one 0.7% of a value."""
    points = drawn(plots.svg(chart(line(values), may_be_log=True)))
    np.testing.assert_allclose([y for _, y in points], values, rtol=0.01)
    np.testing.assert_allclose([x for x, _ in points], range(len(values)), atol=0.01)


def test_a_line_is_broken_at_a_gap_and_a_lone_point_is_drawn() -> None:
    svg = plots.svg(chart(line([1.0, 2.0, math.nan, 3.0, math.nan, 4.0, 5.0])))
    path = next(p for p in parsed(svg).iter(f"{SPACE}path") if p.get("data-name"))
    parts = path.attrib["d"].split("M")[1:]
    assert [part.count("L") for part in parts] == [1, 0, 1]
    assert all("h0" in part for part in parts)  # with round ends a path of no length is a dot
    assert "missing" in svg and "no number" in svg


@pytest.mark.parametrize("at_end", [1.05, 0.95])
def test_the_name_of_a_level_is_where_no_curve_crosses_it(at_end: float) -> None:
    svg = plots.svg(chart(line([0.2, 0.9] + [at_end] * 30), levels=[("planned", 1.0)], from_zero=True))
    root = parsed(svg)
    (name,) = [t for t in root.iter(f"{SPACE}text") if "level" in t.attrib["class"]]
    (path,) = [p for p in root.iter(f"{SPACE}path") if p.get("data-name")]
    curve = float(re.findall(r"L[-\d.]+ ([-\d.]+)", path.attrib["d"])[-1])
    foot = float(name.attrib["y"])
    assert not foot - 9 <= curve <= foot, "letters of 9 pixels stand on their foot"


def test_a_chart_without_a_number_says_so() -> None:
    for values in ([], [math.nan, math.nan]):
        assert "no numbers yet" in plots.svg(chart(line(values)))


def test_names_are_text_and_never_markup() -> None:
    bad = '"><script>alert(1)</script>'
    made = Chart(
        bad, bad, bad, [line([1.0, 2.0], bad), line([2.0, 1.0], "b")], levels=[(bad, 1.5)], events=[(1.0, bad)]
    )
    for svg in (plots.svg(made), plots.heat_map(bad, [bad], [bad], [[1.0]])):
        root = parsed(svg)
        assert not list(root.iter(f"{SPACE}script"))
        assert "<script" not in svg


def test_lines_differ_by_stroke_and_not_by_colour_alone() -> None:
    style = web.text("style.css")
    dashes = {f"run{i}": re.search(rf"\.line\.run{i}\{{stroke-dasharray:([\d ]+)\}}", style) for i in range(8)}
    strokes = {name: found[1] if found else "solid" for name, found in dashes.items()}
    assert len(set(strokes.values())) == 8


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (0.37, 0.41, False), (-3, 1e5, False), (1e-5, 3, True)]
)
def test_ticks_lie_inside_and_are_few(low: float, high: float, log: bool) -> None:
    ticks = Axis(low, high, 0, 100, log).ticks(5)
    assert 2 <= len(ticks) <= 12
    assert all(low - 1e-9 <= t <= high * (1 + 1e-6) for t in ticks)


NARROW = [
    (2e-4, 1.995e-4),
    (2e-4, 1.99999e-4),
    (0.512341, 0.512345),
    (2.30102, 2.30108),
    (123_456.0, 123_450.0),
    (-1.0, -1.00001),
]


@pytest.mark.parametrize("values", NARROW)
def test_each_tick_has_a_label_of_its_own_which_is_its_value(values: tuple[float, ...]) -> None:
    svg = parsed(plots.svg(chart(line(list(values)))))
    ticks = [t for t in svg.iter(f"{SPACE}text") if t.get("class") == "tick end" and t.text != "step"]
    labels = [str(t.text) for t in ticks]
    assert len(labels) > 2 and len({*labels}) == len(labels) and max(map(len, labels)) <= 9
    at = {k: float(svg.attrib[f"data-{k}"]) for k in ("yl", "yh", "ys", "ye")}
    for tick, label in zip(ticks, labels, strict=True):
        drawn = at["yl"] + (float(tick.attrib["y"]) - 3.5 - at["ys"]) / (at["ye"] - at["ys"]) * (at["yh"] - at["yl"])
        value = float(label.replace("k", "e3").replace("M", "e6"))
        assert value == pytest.approx(drawn, abs=(at["yh"] - at["yl"]) * 1e-3)  # a pixel has one decimal, of some 200


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0, "0"),
        (0.0002, "0.0002"),
        (2e-5, "2e-5"),
        (0.05, "0.05"),
        (1.5, "1.5"),
        (1234, "1234"),
        (20_000, "20k"),
        (3.2e6, "3.2M"),
        (4e9, "4G"),
    ],
)
def test_numbers_are_short(value: float, said: str) -> None:
    assert plots.short(value) == said


def test_the_largest_cell_is_the_darkest() -> None:
    svg = plots.heat_map("t", ["0", "1"], ["q", "v"], [[1.0, 4.0], [math.nan, 2.0]])
    cells = [float(c.attrib["fill-opacity"]) for c in parsed(svg).iter(f"{SPACE}rect")]
    assert cells == [0.19, 0.75, 0.38]


@pytest.mark.parametrize(
    ("values", "shown"), [([2.5, 2.0, 1.25], "2.5 → 1.25"), ([math.nan, 2.0, 1.5, math.nan], "2 → 1.5"), ([3.0], "3")]
)
def test_a_chart_says_its_first_and_last_value(values: list[float], shown: str) -> None:
    both = plots.svg(chart(line(values, "training"), line(values, "held out", "eval")))
    assert f">training {shown}</text>" in both and f">held out {shown}</text>" in both
    if not any(map(math.isnan, values)):  # gaps have a legend of their own
        assert f"unit  {shown}</tspan>" in plots.svg(chart(line(values)))


@pytest.mark.parametrize(
    ("x", "y", "steps", "values"),
    [
        ([1, 2, 3], [0.0, 0.0, 0.0], [1, 2, 3], [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),  # a rate of 0 goes down to no -1
        ([1, 2], [0.0, 0.5], [1, 2], [0.0, 0.2, 0.4]),
        ([4], [1.0], [4], [0.96, 0.98, 1.0, 1.02, 1.04]),
        ([0, 12], [1.0, 2.0], [0, 5, 10], [1.0, 1.25, 1.5, 1.75, 2.0]),
    ],
)
def test_steps_are_whole_and_zeros_begin_at_zero(
    x: list[float], y: list[float], steps: list[float], values: list[float]
) -> None:
    points = Series(np.array(x, float), np.array(y, float))
    both = plots.axes(Chart("", "", "step", [Curve("", points, "raw")]), 420, 250)
    assert both is not None and both[0].ticks(5) == steps and both[1].ticks(5) == pytest.approx(values)
