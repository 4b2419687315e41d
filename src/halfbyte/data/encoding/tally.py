"""Counts taken while rows become tokens: rows kept, cut and left out, each token, what the labels lack.

Why: the gates judge all rows, and a second look at two million of them would take minutes. Stored with the tokens.
Cost: under a microsecond a token; only counts and the first 20 names of each kind are kept.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import Self

import numpy as np

from halfbyte.data.encoding.examples import TokenizedRow
from halfbyte.data.reading.problems import Problems
from halfbyte.errors import DataError
from halfbyte.recipe.data import Data
from halfbyte.types import Document


@dataclass
class Tally:
    """Counts of rows and tokens. Kept rows: those that are trained on."""

    seen: int = 0  # rows that were to be encoded
    kept: int = 0
    texts: int = 0  # rows that are plain text
    different: Counter[str] = field(default_factory=Counter)
    """Hashes of the first two different rows of each chunk, as text: more than one where not all rows are the same."""
    weighed: int = 0  # rows of which parts are masked, or count for more or less than others
    truncated: int = 0
    longest: int = 0  # tokens of the longest row that is over `data.max_length`; 0 if there is none
    refused: Problems = field(default_factory=Problems)
    long: Problems = field(default_factory=Problems)
    skipped: Problems = field(default_factory=Problems)
    endless: Problems = field(default_factory=Problems)  # kept rows without an end token among their labels
    empty: Problems = field(default_factory=Problems)  # kept rows whose labels are all special tokens: an empty answer
    lost_thoughts: Problems = field(default_factory=Problems)
    """Trained messages whose thoughts the chat template does not write."""
    open_thoughts: Problems = field(default_factory=Problems)
    """Messages with <think> and no </think>, or the other way round."""
    empty_thoughts: Problems = field(default_factory=Problems)
    notices: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)  # kept rows of each file, in the order of the rows
    used: Counter[int] = field(default_factory=Counter)  # token id -> how often the kept rows hold it

    def keep(self, rows: Iterable[TokenizedRow], ends: frozenset[int], special: frozenset[int]) -> None:
        """Count rows that are trained on. `ends` end a turn or a text; tokens that are `special` are no words."""
        rows = list(rows)
        self.kept += len(rows)
        for row in rows:
            if not any(token in ends for a, b in reversed(row.spans) for token in reversed(row.ids[a:b])):
                self.endless.add(row.where)
            if all(token in special for a, b in row.spans for token in row.ids[a:b]):
                self.empty.add(row.where)
        counts = np.bincount(np.fromiter(chain.from_iterable(r.ids for r in rows), np.int64))
        ids = np.flatnonzero(counts)
        self.used.update(dict(zip(ids.tolist(), counts[ids].tolist(), strict=True)))

    def merge(self, later: Self) -> None:
        """Take in what was seen of the rows after these."""
        for name, value in vars(later).items():
            count = getattr(self, name)
            if not isinstance(count, int):
                count.update(value)
            else:
                setattr(self, name, max(count, value) if name == "longest" else count + value)

    def check(self, data: Data) -> None:
        """Raise a DataError if rows cannot be encoded, or if no row is left."""
        if self.refused:
            raise DataError(self.refused.listing(f"{self.refused.count:,} of {self.seen:,} rows cannot be encoded"))
        if not self.kept:
            raise DataError(
                f"no row is left: all {self.seen:,} have more than data.max_length {data.max_length:,} tokens, "
                f"{'and are skipped' if data.overlong == 'skip' else 'and no label among the first'}.",
                fix=f"data.max_length: {self.longest}",
            )

    def check_length(self, data: Data) -> None:
        """Raise a DataError if rows are too long, and `data.overlong` is error."""
        if self.long:
            head = f"{self.long.count:,} of {self.seen:,} rows are longer than data.max_length {data.max_length:,}"
            raise DataError(
                self.long.listing(f"{head}; the longest has {self.longest:,} tokens"), fix=self.length_fix()
            )

    def length_fix(self) -> str:
        blocks = ", or data.packing: stream (in blocks)" if self.texts else ""
        return f"data.max_length: {self.longest}, or data.overlong: truncate (cut the end off) or skip{blocks}"

    def messages(self) -> list[str]:
        """What the user should know of the rows, each with its count."""
        return [f"{n:,} {'row' if n == 1 else 'rows'}: {what}" for what, n in self.notices.items() if n]

    def to_json(self) -> Document:
        """All of it; `from_json` makes the same tally of it."""
        return {k: vars(v) if isinstance(v, Problems) else v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, values: Document) -> Self:
        tally = cls(**values)
        for name, empty in vars(cls()).items():
            if not isinstance(empty, int):
                setattr(tally, name, Problems(**values[name]) if isinstance(empty, Problems) else Counter(values[name]))
        tally.used = Counter({int(token): n for token, n in values["used"].items()})
        return tally
