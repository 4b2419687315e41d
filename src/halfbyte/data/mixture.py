"""Sources of rows mixed in exact shares: which row of which source every step takes.

What: `weight` and `replay` are shares of every step. The rows of a run are counted from its first one, and a pattern
says which source each of them is of: after any number of rows a source has had less than one row more or less than its
share. It is passed over again and again, each time in another order. `repeat` is a number in an epoch: a row is as
often among the rows of an epoch, which are shuffled together.
Why: only the seed and the number of a step decide, so a run goes on at any step, on any number of processes.
Source: Tijdeman, The chairman assignment problem, Discrete Mathematics 32 (1980), for the pattern.
Cost: some microseconds for each slot of the pattern, once; an epoch's order as `pack.Steps` has it.
"""

import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

import numpy as np
from numpy.typing import NDArray

from halfbyte.errors import DataError
from halfbyte.recipe.data import DataEntry

MOST_SLOTS = 100_000
MOST_ROWS = 100_000_000  # of an epoch; its order is kept in memory


@dataclass(frozen=True, eq=False)
class Mixture:
    names: tuple[str, ...]
    of_row: NDArray[np.int64]  # the source of each row: (rows,)
    streams: tuple[NDArray[np.int64], ...]
    """The rows that a pass takes: of each source that has a share of every step, or of all others together."""
    pattern: NDArray[np.uint16]  # the stream of each row of a run: (slots,), again and again
    epoch_rows: int

    @classmethod
    def of(cls, sources: Sequence[DataEntry], of_row: NDArray[np.int64], rows_per_step: int) -> Self:
        """`of_row`: the number of each row's source. Raises DataError: a source has no rows left, or the weights have
        too many digits."""
        rows = [np.flatnonzero(of_row == number) for number in range(len(sources))]
        if empty := [source for source, some in zip(sources, rows, strict=True) if not len(some)]:
            raise DataError(
                f"no row of the source {empty[0].name} ({empty[0].path}) is left to train on.",
                fix="a smaller data.eval, a larger data.max_length, or leave it out of data.train",
            )
        replays = [i for i, source in enumerate(sources) if source.replay is not None]
        shares = [Fraction(str(sources[i].replay)) for i in replays]
        groups = [[i] for i in range(len(sources)) if i not in replays]
        if (long := sum(len(rows[i]) * (sources[i].repeat or 1) for (i,) in groups)) > MOST_ROWS:
            raise DataError(
                f"an epoch of {long:,} rows is longer than the {MOST_ROWS:,} that one can have.",
                fix="a lower repeat in data.train; train.num_train_epochs repeats all rows",
            )
        parts = [Fraction(str(sources[i].weight or 1)) for (i,) in groups]
        if not any(source.weight for source in sources):
            groups, parts = [[i for (i,) in groups]], [Fraction(1)]
        streams = [np.concatenate([np.repeat(rows[i], sources[i].repeat or 1) for i in group]) for group in groups]
        portions = [(1 - sum(shares)) * part / sum(parts) for part in parts]
        # an epoch passes once over what lasts longest; a replay is not waited for
        steps = max(len(s) / p for s, p in zip(streams, portions, strict=True)) / rows_per_step
        alone = len(streams) == 1 and not replays
        epoch_rows = len(streams[0]) if alone else math.ceil(steps) * rows_per_step
        streams += [rows[i] for i in replays]
        return cls(tuple(str(s.name) for s in sources), of_row, tuple(streams), _pattern(portions + shares), epoch_rows)

    def order(self, epoch: int, seed: int) -> NDArray[np.uint32]:
        """The rows of an epoch in their order: (epoch_rows,)."""
        first, slots = epoch * self.epoch_rows, len(self.pattern)
        streams = self.pattern[np.arange(first, first + self.epoch_rows) % slots]
        order = np.empty(self.epoch_rows, np.uint32)
        for number, rows in enumerate(self.streams):
            places, slot = np.flatnonzero(streams == number), self.pattern == number
            start = first // slots * int(slot.sum()) + int(slot[: first % slots].sum())
            passes = range(start // len(rows), -(-(start + len(places)) // len(rows)))
            keys = (f"{seed}/{again}" + f"/{number}" * (number > 0) for again in passes)
            taken = [rows[:0], *(rows[shuffled(len(rows), key)] for key in keys)]
            order[places] = np.concatenate(taken)[start % len(rows) :][: len(places)]
        return order

    def note(self, seed: int) -> str:
        """What an epoch has of each source, in words."""
        counts = np.bincount(self.of_row[self.order(0, seed)], minlength=len(self.names))
        listed = ", ".join(f"{name} {count:,}" for name, count in zip(self.names, counts, strict=True))
        by_step = "every step has the same shares, to the nearest row" if len(self.pattern) > 1 else "shuffled together"
        return f"an epoch of {self.epoch_rows:,} rows has of {listed}; {by_step}"

    @property
    def content(self) -> bytes:
        """What the order of rows depends on, beside the rows and the seed."""
        return b"".join([self.pattern.tobytes(), *(s.tobytes() for s in self.streams), str(self.epoch_rows).encode()])


def shuffled(count: int, key: str) -> NDArray[np.uint32]:
    """The numbers below `count` in the order of a key: (count,); the same anywhere."""
    order = array("I", range(count))
    random.Random(key).shuffle(order)
    return np.frombuffer(order, dtype=np.uint32)


def _pattern(shares: Sequence[Fraction]) -> NDArray[np.uint16]:
    """The stream of each slot, as often in all as its share says, and as evenly as whole numbers can be."""
    slots, many = math.lcm(*(share.denominator for share in shares)), 2 * len(shares) - 2
    if slots > MOST_SLOTS:
        raise DataError(
            f"the weights in data.train are met exactly only after {slots:,} rows; at most {MOST_SLOTS:,} are allowed.",
            fix="weights of fewer digits",
        )
    weights, counts = [int(share * slots) for share in shares], [0] * len(shares)
    pattern = np.zeros(slots, np.uint16)
    for slot in range(slots if many else 0):
        behind = [weight * (slot + 1) - count * slots for weight, count in zip(weights, counts, strict=True)]
        due = [i for i, size in enumerate(behind) if size * many >= slots]
        pattern[slot] = min(due, key=lambda i: Fraction(slots * (many - 1) - behind[i] * many, weights[i]))
        counts[pattern[slot]] += 1
    return pattern
