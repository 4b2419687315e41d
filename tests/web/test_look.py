"""The stylesheet of all pages: its colours stand out from each other, light and dark."""

from __future__ import annotations

import re

import pytest

from halfbyte.web import files as web


def luminance(colour: str) -> float:
    """WCAG 2.2, "relative luminance", of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("front", "back"),
    [("dim", "bg"), ("dim", "soft"), ("fg", "soft"), ("fg", "on"), ("bad", "bg"), ("online", "bg"), ("bg", "focus"),
     ("smooth", "bg")],
)  # fmt: skip
def test_words_stand_out_from_what_is_behind_them(scheme: str, front: str, back: str) -> None:
    """WCAG 2.2, 1.4.3: at least 4.5 to 1. A placeholder has the colour `dim`, whole."""
    style = web.text("style.css")
    assert re.search(r"::placeholder\{color:var\(--dim\);opacity:1\}", style)
    roots = [dict(re.findall(r"--(\w+):(#\w+)", root)) for root in re.findall(r":root\{(.*?)\}", style, re.DOTALL)]
    colours = roots[0] if scheme == "light" else {**roots[0], **roots[1]}
    low, high = sorted((luminance(colours[front]), luminance(colours[back])))
    assert (high + 0.05) / (low + 0.05) >= 4.5


def test_what_is_focused_is_seen_and_nothing_is_fetched() -> None:
    style = web.text("style.css")
    assert ":focus-visible{outline:2px" in style and "url(" not in style and "@import" not in style
