"""How much of some addresses is in this process now, for tests of what comes and goes."""

from __future__ import annotations

from collections.abc import Iterable

from halfbyte.system import pages


def present_bytes(spans: Iterable[pages.Span]) -> int:
    """The resident set of these addresses, from `/proc/self/pagemap`."""
    return sum(int(((pages._entries(span) & pages._PRESENT) != 0).sum()) * pages.PAGE for span in spans)
