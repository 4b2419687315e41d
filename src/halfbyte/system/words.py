"""Figures in words, and words that are figures."""

import re

SPAN = "a time such as 30m, 1h30m or 90s"
_SPAN = re.compile(r"(?=.)(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s)?")


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours before them where there are some: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: float) -> str:
    """Bytes in the unit in which there are figures to see: 3.20 GB, 41.00 MB, 12.00 kB."""
    name, unit = next((pair for pair in (("GB", 1e9), ("MB", 1e6)) if count >= pair[1]), ("kB", 1e3))
    return f"{count / unit:.2f} {name}"


def seconds_of(text: str) -> float | None:
    """The seconds of a span of time such as 30m, 1h30m or 90s; None where it is none, or no time at all."""
    match = _SPAN.fullmatch(text.replace(" ", ""))
    if match is None:
        return None
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds or None
