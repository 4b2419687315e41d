"""What a column holds, told from its name and its values: which one asks, which answers, which is a label.

Why: `id,text,label` read as plain text trains a model to write tickets, leaves out its labels, and nothing fails.
What: a column beside the text looks like what the text should be answered with
- by its name (`label`, `ticket_category`, `answer` ...), where it holds texts or whole numbers;
- by its values, whatever its name but for those that say where a text is from (`source`, `date`, `lang` ...): of at
  least `MIN_ROWS` rows each has one of 2 to `MAX_CLASSES` short words without digits, each of them several times.
Cost: the first rows of a file, parsed once more.
"""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path

from halfbyte.types import Document

# Common names of the column that asks and of the one that answers, the likeliest first; words in the names of columns
# that say where a text is from, or describe it.
_NAMES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
ASKING, ANSWERING, _ORIGIN = (tuple(_NAMES[which].split()) for which in ("asking", "answering", "origin"))
MIN_ROWS, MAX_CLASSES, MIN_REPEATS = 20, 20, 4
MAX_WORDS, MAX_CHARS = 3, 30


def likely(records: Sequence[Document]) -> tuple[str, str] | None:
    """The column that asks and the one that answers: by their names; else the longest texts, and what looks like their
    answer."""
    chars = {c: sum(len(r[c]) for r in records if isinstance(r.get(c), str)) for c in records[0]}
    named = {column.lower(): column for column in reversed(chars)}
    asking = next((named[n] for n in ASKING if n in named), max(chars, key=lambda c: chars[c], default=""))
    answers = [named[n] for n in ANSWERING if n in named and named[n] != asking] or [*answering(records, asking)]
    return (asking, answers[0]) if answers else None


def answering(records: Sequence[Document], text: str) -> dict[str, list[str]]:
    """The columns beside `text` that look like its answer, each with a few values, by the first `records` of a file."""
    columns = dict.fromkeys(key for record in records for key in record if key != text)
    values = {c: [r[c] for r in records if r.get(c) not in (None, "")] for c in columns}
    return {c: [*dict.fromkeys(map(str, v))][:4] for c, v in values.items() if v and _answers(c, v)}


def _answers(column: str, values: Sequence[object]) -> bool:
    words = re.findall(r"[a-z]+|[A-Z]+(?![a-z])|[A-Z][a-z]+", column)
    names = {word.lower() for word in words}
    if not all(isinstance(value, str | int) for value in values):
        return False
    if words and (words[-1].lower() in ANSWERING or column.lower() in ANSWERING):
        return True
    return names.isdisjoint(_ORIGIN) and _are_classes(
        [value for value in values if isinstance(value, str)], len(values)
    )


def _are_classes(values: Sequence[str], rows: int) -> bool:
    different = set(values)
    return (
        len(values) == rows >= MIN_ROWS
        and 2 <= len(different) <= min(MAX_CLASSES, rows // MIN_REPEATS)
        and all(len(v) <= MAX_CHARS and len(v.split()) <= MAX_WORDS and not re.search(r"\d", v) for v in different)
    )
