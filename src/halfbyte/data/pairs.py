"""The gates of rows that say which answer is better.

Why: a pair of two same answers teaches nothing; where the better answer is nearly always the longer one, a run learns
to write long; and a prompt that trains and is held out flatters its evaluation.
Source: length bias of preference data: arXiv:2310.03716 (Singhal and others), arXiv:2404.04475.
Cost: a look at some columns; a hash of each prompt where rows are held out.
"""

import hashlib
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.encoding.examples import Examples
from halfbyte.data.reading.problems import some

Level = Literal["ok", "warning", "refused"]
Verdict = tuple[Level, str, str | None]  # level, what was found, fix
BIASED = 0.6  # of the pairs; or 1 - it


def verdicts(train: Examples, held_out: Examples | None) -> dict[str, Verdict]:
    """By name. Of rows of two texts."""
    gates = {"prompts": _prompts(train, held_out)}
    first, rows = train.seconds(), len(train)
    desirable = train.desirable()
    if first is None or not rows:
        return gates
    if (desirable >= 0).all():
        share = desirable.mean()
        text = f"{share:.0%} of {rows:,} answers are good ones"
        fix = "train.desirable_weight and train.undesirable_weight make up for it" if not 0.2 <= share <= 0.8 else None
        return {**gates, "verdicts": ("warning" if fix else "ok", text, fix)}
    second = train.lengths() - first
    same = np.flatnonzero((first == second) & (train.alike() == first))
    text = f"{len(same):,} of {rows:,} pairs have the same answer twice ({named(train, same)})"
    none: Verdict = ("ok", f"chosen and rejected differ in each of {rows:,} pairs", None)
    gates["same answers"] = ("warning", text, "take them out: nothing is learned of them") if len(same) else none
    longer = float((first > second)[first != second].mean()) if (first != second).any() else 0.5
    text = f"of pairs of two lengths the chosen answer is the longer one in {longer:.0%}"
    if 1 - BIASED < longer < BIASED:
        return {**gates, "length bias": ("ok", text, None)}
    text += f": a rule that looks at nothing else would be right in {max(longer, 1 - longer):.0%}"
    return {
        **gates,
        "length bias": ("warning", text, "train.ld_alpha, train.loss_type sigmoid_norm or train.method simpo"),
    }


def _prompts(train: Examples, held_out: Examples | None) -> Verdict:
    if held_out is None:
        return "ok", "no rows are held out (data.eval)", None
    trained = {_hash(train, i) for i in range(len(train))}
    both = np.array([i for i in range(len(held_out)) if _hash(held_out, i) in trained], np.int64)
    if not len(both):
        return "ok", f"none of {len(held_out):,} held-out prompts is trained on", None
    text = (
        f"{len(both):,} of {len(held_out):,} held-out rows have a prompt that is trained on ({named(held_out, both)})"
    )
    return "warning", text, "data.eval: a file of other prompts"


def _hash(rows: Examples, index: int) -> bytes:
    return hashlib.blake2b(rows.prompt(index).tobytes(), digest_size=16).digest()


def named(rows: Examples, numbers: NDArray[np.int64]) -> str:
    return some([rows.where(int(number)) for number in numbers[:3]], len(numbers))
