"""Plan every optimiser step of a run: which rows, in which order, arranged into which passes.

Why: the item of the data set is one whole step, so the budget of a pass may change, and a run may resume at any step,
without changing what a step learns from. Rows are grouped as transformers.Trainer groups them (the last step of an
epoch may be short); first-fit decreasing then puts them into passes (at most 11/9 of the fewest possible, plus one:
Johnson 1973).
Cost: pure Python, a few microseconds a row; no torch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Passes = tuple[tuple[int, ...], ...]

# Rows of an evaluation are packed window by window: first-fit looks at every open pass, which is quadratic.
EVAL_WINDOW_ROWS = 512


@dataclass(frozen=True)
class Step:
    """One optimiser step: every row of it, and how they share forward passes."""

    index: int
    passes: Passes
    """Row numbers of each pass."""
    labelled_tokens: int
    tokens: int


def plan_steps(
    lengths: Sequence[int],
    labelled: Sequence[int],
    *,
    rows_per_step: int,
    epochs: float,
    max_steps: int,
    seed: int,
    max_tokens_per_pass: int,
    examples_per_pass: int | None,
) -> list[Step]:
    """Every step of the run, each at the position of its index; the same arguments give the same steps anywhere.

    Epoch e takes the rows in the order of `random.Random(f"{seed}/{e}").shuffle`, which does not depend on the machine,
    on torch or on earlier epochs.

    Args:
        lengths: tokens of each row.
        labelled: labelled tokens of each row.
        rows_per_step: batch size x accumulation (x processes).
        epochs: may be a fraction; the number of steps is rounded up, as the Trainer does.
        max_steps: above 0 it decides the number of steps, over as many epochs as they take.
        max_tokens_per_pass: a row longer than this is a pass of its own.
        examples_per_pass: at most so many rows a pass; None for as many as fit, 1 where packing is not proven.
    """
    if not lengths or len(lengths) != len(labelled):
        raise ValueError(
            f"lengths and labelled must be of one size, at least 1, got {len(lengths)} and {len(labelled)}"
        )
    if rows_per_step < 1:
        raise ValueError(f"rows_per_step must be >= 1, got {rows_per_step}")
    total = count_steps(len(lengths), rows_per_step=rows_per_step, epochs=epochs, max_steps=max_steps)
    steps: list[Step] = []
    for rows in _groups(len(lengths), rows_per_step, seed):
        if len(steps) == total:
            break
        steps.append(
            Step(
                index=len(steps),
                passes=arrange(rows, lengths, max_tokens_per_pass, examples_per_pass),
                labelled_tokens=sum(labelled[r] for r in rows),
                tokens=sum(lengths[r] for r in rows),
            )
        )
    return steps


def count_steps(rows: int, *, rows_per_step: int, epochs: float, max_steps: int) -> int:
    """How many optimiser steps a run takes."""
    return max_steps if max_steps > 0 else math.ceil(epochs * math.ceil(rows / rows_per_step))


def eval_passes(lengths: Sequence[int], budget: int, examples_per_pass: int | None) -> list[tuple[int, ...]]:
    """All rows once, in passes of at most `budget` tokens and `examples_per_pass` rows."""
    passes: list[tuple[int, ...]] = []
    for start in range(0, len(lengths), EVAL_WINDOW_ROWS):
        window = range(start, min(start + EVAL_WINDOW_ROWS, len(lengths)))
        passes.extend(arrange(window, lengths, budget, examples_per_pass))
    return passes


def arrange(
    rows: Sequence[int], lengths: Sequence[int], max_tokens_per_pass: int, examples_per_pass: int | None
) -> Passes:
    """Rows into few passes, first-fit decreasing; within a pass, and among equals, they keep the order of `rows`."""
    most = len(rows) if examples_per_pass is None else examples_per_pass
    if max_tokens_per_pass < 1 or most < 1:
        raise ValueError(f"a pass must hold a token and a row, got {max_tokens_per_pass} and {examples_per_pass}")
    if most == 1:
        return tuple((r,) for r in rows)
    bins: list[list[int]] = []
    free: list[int] = []
    for position in sorted(range(len(rows)), key=lambda p: -lengths[rows[p]]):
        need = lengths[rows[position]]
        for number, room in enumerate(free):
            if need <= room and len(bins[number]) < most:
                bins[number].append(position)
                free[number] -= need
                break
        else:
            bins.append([position])
            free.append(max_tokens_per_pass - need)
    return tuple(tuple(rows[p] for p in sorted(positions)) for positions in bins)


def _groups(rows: int, rows_per_step: int, seed: int) -> Iterator[list[int]]:
    """The rows of one step after another, for ever."""
    epoch = 0
    while True:
        order = list(range(rows))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for start in range(0, rows, rows_per_step):
            yield order[start : start + rows_per_step]
        epoch += 1
