"""Counts of rows: the same however rows are divided among chunks, and after a turn through JSON."""

from __future__ import annotations

import json
from collections import Counter

from halfbyte.data.encoding.examples import TokenizedRow
from halfbyte.data.encoding.tally import Tally

END, SPECIAL = frozenset({2}), frozenset({1, 2})
# (ids, labelled spans): ends well; never ends; only its end is labelled, so the answer is empty
ROWS = [([1, 7, 7, 2], [(1, 4)]), ([1, 7, 8], [(1, 3)]), ([1, 9, 2], [(2, 3)])]


def tokens(*numbers: int) -> list[TokenizedRow]:
    return [TokenizedRow(*ROWS[n], f"t.jsonl:{n + 1}", [1], "") for n in numbers]


def tally(*numbers: int) -> Tally:
    made = Tally(seen=len(numbers))
    made.keep(tokens(*numbers), END, SPECIAL)
    return made


def test_what_the_labels_lack() -> None:
    counted = tally(0, 1, 2)
    assert (counted.seen, counted.kept) == (3, 3)
    assert (counted.endless.count, counted.endless.shown) == (1, ["t.jsonl:2"])
    assert (counted.empty.count, counted.empty.shown) == (1, ["t.jsonl:3"])
    assert counted.used == Counter({1: 3, 7: 3, 2: 2, 8: 1, 9: 1})


def test_chunks_add_up() -> None:
    whole, parts = tally(0, 1, 2), tally(0)
    parts.merge(tally(1, 2))
    assert parts == whole
    late = Tally(longest=9, truncated=2)
    late.notices["a notice"] += 1
    late.skipped.add("t.jsonl:4: too long")
    parts.merge(late)
    assert (parts.longest, parts.truncated, parts.skipped.count) == (9, 2, 1)
    assert parts.messages() == ["1 row: a notice"]


def test_json_and_back() -> None:
    counted = tally(0, 1, 2)
    counted.notices["a notice"] += 2
    again = Tally.from_json(json.loads(json.dumps(counted.to_json())))
    assert again == counted and again.used[7] == 3
    assert again.messages() == ["2 rows: a notice"]
