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


def verdicts(train: Examples, first: NDArray[np.int64], held_out: Examples | None) -> dict[str, Verdict]:
    """By name. `first`: tokens of the first text of each row."""
    gates, desirable = {"prompts": _prompts(train, held_out)}, train.desirable()
    second, rows = train.lengths() - first, len(train)
    same, differ = np.flatnonzero((first == second) & (train.alike() == first)), first != second
    if (desirable >= 0).all():
        share, fix = float(desirable.mean()), "train.desirable_weight and train.undesirable_weight make up for it"
        gates["verdicts"] = _within(share, 0.2, f"{share:.0%} of {rows:,} answers are good ones", fix)
    else:
        longer = float((first > second)[differ].mean()) if differ.any() else 0.5
        text = (
            f"of pairs of two lengths the chosen answer is the longer one in {longer:.0%}, so a rule of length alone "
        )
        text += f"is right in {max(longer, 1 - longer):.0%}"
        fix = "train.ld_alpha, train.loss_type sigmoid_norm or train.method simpo"
        gates["length bias"] = _within(longer, 1 - BIASED, text, fix)
        text = f"{len(same):,} of {rows:,} pairs have the same answer twice ({named(train, same)})"
        fix = "take them out: nothing is learned of them"
        gates["same answers"] = ("warning", text, fix) if len(same) else ("ok", "none", None)
    return gates


def _within(share: float, least: float, text: str, fix: str) -> Verdict:
    return ("ok", text, None) if least < share < 1 - least else ("warning", text, fix)


def _prompts(train: Examples, held_out: Examples | None) -> Verdict:
    trained = {_hash(train, i) for i in range(len(train))} if held_out is not None else set()
    both = [i for i in range(len(held_out or ())) if held_out is not None and _hash(held_out, i) in trained]
    if held_out is None or not both:
        return "ok", "none of those that are held out is trained on", None
    text = f"{len(both):,} of {len(held_out):,} held-out rows have one that is trained on"
    return "warning", f"{text} ({named(held_out, np.array(both))})", "data.eval: a file of other prompts"


def _hash(rows: Examples, index: int) -> bytes:
    return hashlib.blake2b(rows.prompt(index).tobytes(), digest_size=16).digest()


def named(rows: Examples, numbers: NDArray[np.int64]) -> str:
    return some([rows.where(int(number)) for number in numbers[:3]], len(numbers))
