"""What was seen while rows became tokens: rows kept, cut and left out, each token's count, what the labels lack.

Why: the gates judge all rows, and looking at two million of them twice would take minutes. It is kept with the tokens.
Cost: under a microsecond a token; nothing is kept but counts and the first 20 of each kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from halfbyte.data.encoding.examples import Tokens
from halfbyte.data.reading.problems import Problems


@dataclass
class Tally:
    """Counts of rows and tokens. Kept rows: those that are trained on."""

    seen: int = 0
    """Rows that there were to encode."""
    kept: int = 0
    truncated: int = 0
    longest: int = 0
    """Tokens of the longest row that is over `data.max_length`; 0 if there is none."""
    refused: Problems = field(default_factory=Problems)
    long: Problems = field(default_factory=Problems)
    skipped: Problems = field(default_factory=Problems)
    endless: Problems = field(default_factory=Problems)
    """Kept rows without an end token among their labels."""
    empty: Problems = field(default_factory=Problems)
    """Kept rows of whose labels none is a word."""
    notices: Counter[str] = field(default_factory=Counter)
    used: Counter[int] = field(default_factory=Counter)
    """Token id -> how often the kept rows hold it."""

    def keep(self, rows: Iterable[Tokens], ends: frozenset[int], special: frozenset[int]) -> None:
        """Count rows that are trained on.

        Args:
            ends: tokens that end a turn or a text. special: tokens that are no words.
        """
        rows = list(rows)
        self.kept += len(rows)
        for row in rows:
            if not any(token in ends for a, b in reversed(row.spans) for token in reversed(row.ids[a:b])):
                self.endless.add(row.where)
            if all(token in special for a, b in row.spans for token in row.ids[a:b]):
                self.empty.add(row.where)
        counts = np.bincount(np.fromiter(chain.from_iterable(r.ids for r in rows), np.int64))
        found = np.flatnonzero(counts)
        self.used.update(dict(zip(found.tolist(), counts[found].tolist(), strict=True)))

    def merge(self, later: Tally) -> None:
        """Take in what was seen of the rows after these."""
        self.longest = max(self.longest, later.longest)
        for name in ("seen", "kept", "truncated"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        for name in ("refused", "long", "skipped", "endless", "empty"):
            getattr(self, name).merge(getattr(later, name))
        self.notices.update(later.notices)
        self.used.update(later.used)

    def messages(self) -> list[str]:
        """What the user should know of the rows, each with its count."""
        return [f"{n:,} {'row' if n == 1 else 'rows'}: {what}" for what, n in self.notices.items() if n]

    def to_json(self) -> dict[str, Any]:
        """All of it; `from_json` makes the same tally of it."""
        return {k: v.to_json() if isinstance(v, Problems) else v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Tally:
        made = cls()
        for name, value in values.items():
            default = getattr(made, name)
            if isinstance(default, Problems):
                value = Problems.from_json(value)
            elif isinstance(default, Counter):
                value = Counter({int(k) if name == "used" else k: n for k, n in value.items()})
            setattr(made, name, value)
        return made
