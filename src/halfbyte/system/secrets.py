"""Tokens and keys, taken out of a text that may be shown or kept: a traceback, a command, a library's own words."""

from __future__ import annotations

import os
import re

_NAMED = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)S?$", re.IGNORECASE)
_LOOKS = re.compile(r"\b(hf_|sk-|ghp_|github_pat_|AKIA|xox[bp]-)[A-Za-z0-9_-]{12,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
HIDDEN, SHORTEST = "***", 8


def hidden(text: str) -> str:
    """The text without what looks like a token, and without the values of variables that are named like one."""
    values = (value for name, value in os.environ.items() if _NAMED.search(name) and len(value) >= SHORTEST)
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _LOOKS.sub(lambda match: (match[1] or "") + HIDDEN, text)
