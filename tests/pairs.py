"""Rows of which answer is better: as files, and as examples of tokens.

Use: `pairs.rows(path)`, `pairs.examples(...)`, beside `tests.tiny_run`.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from halfbyte.data.encoding.examples import IGNORED, Example

WORDS = ["red", "green", "blue", "round", "square", "small", "large", "old", "new", "cup", "box", "tree", "road"]


def rows(path: Path, n: int = 12, seed: int = 0, *, verdicts: bool = False, other: bool = False) -> Path:
    """Write `n` pairs behind prompts of some words; with `verdicts` one answer of each, and whether it is good.

    `other`: with another answer or verdict in a column of that name.
    """
    draw, lines = random.Random(seed), []
    for i in range(n):
        prompt = " ".join(draw.choices(WORDS, k=draw.randint(8, 12)))
        a, b = (" ".join(draw.sample(WORDS, draw.randint(2, 5))) for _ in range(2))
        row = {"prompt": prompt, "completion": a, "label": i % 3 > 0} if verdicts else None
        row = row or {"prompt": prompt, "chosen": a, "rejected": b}
        more = {"other": i % 3 == 0 if verdicts else "a longer text in its place"} if other else {}
        lines.append(json.dumps({**row, **more}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def examples(n: int = 5, seed: int = 0, vocabulary: int = 256, *, verdicts: bool = False) -> list[Example]:
    """Pairs of tokens: prompts of 20 to 30, answers of 2 to 9, which begin alike in one of them."""
    draw, made = random.Random(seed), []

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(count)]

    for i in range(n):
        prompt, a, b = ids(draw.randint(20, 30)), ids(draw.randint(2, 9)), ids(draw.randint(2, 9))
        if i == 1:
            a, b = [*prompt[:4], *a], [*prompt[:4], *b]
        labels = [*[IGNORED] * len(prompt), *a, *[IGNORED] * len(prompt), *b]
        every, start = (*prompt, *a, *prompt, *b), len(prompt) + len(a)
        verdict = i % 3 > 0 if verdicts else None
        made.append(Example(every, tuple(labels), f"row {i}", tuple(prompt), "", (0, start), verdict))
    return made
