"""Plan every optimiser step of a run: which rows, in which order, arranged into which micro-batches.

Why: the item of the data set is one whole step, so the budget of a micro-batch may change, and a run may resume at any
step, without changing what a step learns from. Rows are grouped as transformers.Trainer groups them (the last step of
an epoch may be short); first-fit decreasing then puts them into micro-batches (at most 11/9 of the fewest possible,
plus one: Johnson 1973).
Where rows share their beginnings (`prefixes.py`) a family of them is packed as one, in parts where it is too long.
Cost: a few microseconds a row, some twenty where its tokens are looked at; an epoch's order, made with its first step,
a second for two million rows. No torch.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.mixture import Mixture, shuffled
from halfbyte.data.prefixes import IdsOf, Tree, computed

MicroBatch = tuple[int, ...]
"""Numbers of the rows that share a forward pass."""
Sizes = Sequence[int] | NDArray[np.int64]
"""Tokens of each row."""
Weights = NDArray[np.int64] | NDArray[np.float64]
"""What each row counts for in the mean of its step."""

# Rows of an evaluation are packed in windows: first-fit looks at every open micro-batch, which is quadratic.
EVAL_WINDOW_ROWS = 512
# At most so many steps, those with the most tokens, are searched for the longest micro-batch of a run.
LOOKED_AT_STEPS = 4096
LOOKED_AT_ROWS = 200_000  # a tenth of a second
LOOKED_AT_TREES = 512  # of these steps, where rows share their beginnings: a quarter of a second


@dataclass(frozen=True)
class Step:
    """One optimiser step: how its rows share forward passes."""

    index: int
    micro_batches: tuple[MicroBatch, ...]
    labelled_tokens: int
    tokens: int
    weight: float  # what the sum of its rows' losses is divided by
    computed: int  # of its tokens those that are computed, by all processes; all, where rows share no beginnings


@dataclass(eq=False)
class Steps:
    """Every step of a run, each made when it is asked for.

    Epoch e takes the rows (of `neighbours` whole steps) in the order of `random.Random(f"{seed}/{e}").shuffle`, which
    does not depend on the machine, on torch or on earlier epochs. The same arguments give the same steps anywhere.
    """

    lengths: NDArray[np.int64]  # tokens of each row
    labelled: NDArray[np.int64]  # labelled tokens of each row
    rows_per_step: int
    total: int  # how many steps there are, as `count_steps` counts them
    seed: int
    max_tokens_per_micro_batch: int  # a row longer than this is a micro-batch of its own
    examples_per_micro_batch: int | None  # None for as many as fit, 1 where packing is not proven
    rank: int = 0
    """Of several processes this one: a step's micro-batches are those of its rows alone, its tokens those of all."""
    ranks: int = 1
    weights: Weights | None = None  # what each row counts for; None: as many as it has labelled tokens
    ids: IdsOf | None = None  # the tokens of a row, where rows share their beginnings
    padded: bool = False  # rows are padded to the longest of their micro-batch
    mixture: Mixture | None = None  # how sources are mixed; None: every row once in an epoch
    neighbours: NDArray[np.uint32] | None = None
    """The rows in the order of their tokens, where those that begin alike stand in the same step."""
    _orders: dict[int, NDArray[np.uint32]] = field(default_factory=dict, init=False)

    @property
    def epoch_rows(self) -> int:
        return len(self.lengths) if self.mixture is None else self.mixture.epoch_rows

    @property
    def per_epoch(self) -> int:
        return -(-self.epoch_rows // self.rows_per_step)

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Step]:
        return map(self.__getitem__, range(self.total))

    def __getitem__(self, index: int) -> Step:
        if not 0 <= index < self.total:
            raise IndexError(f"step {index} of {self.total}")
        rows = self.rows(index)
        shares = share(rows, self.lengths, self.ranks, self.ids) if self.ranks > 1 else [rows]
        limits = self.max_tokens_per_micro_batch, self.examples_per_micro_batch, self.ids
        tokens = int(self.lengths[rows].sum())
        looked_at = shares if self.ids else shares[self.rank :][:1]
        parts = [arrange(part, self.lengths, *limits, padded=self.padded) for part in looked_at]
        return Step(
            index=index,
            micro_batches=parts[self.rank if self.ids else 0],
            labelled_tokens=int(self.labelled[rows].sum()),
            tokens=tokens,
            weight=(self.labelled if self.weights is None else self.weights)[rows].sum().item(),
            computed=sum(computed(m, self.lengths, self.ids) for part in parts for m in part) if self.ids else tokens,
        )

    def passes(self, step: int) -> float:
        """How often the data has been passed over after so many steps: 1.5 is all rows once, and half of them again."""
        whole, steps = divmod(step, self.per_epoch)
        return whole + steps * self.rows_per_step / self.epoch_rows

    @property
    def tokens(self) -> int:
        """Tokens of all steps together."""
        epochs, steps = divmod(self.total, self.per_epoch)
        if self.mixture is None:
            whole = epochs * int(self.lengths.sum())
        else:  # no two epochs need have the same rows
            whole = sum(int(self.lengths[self._order(epoch)].sum()) for epoch in range(epochs))
        return whole + int(self.lengths[self._order(epochs)[: steps * self.rows_per_step]].sum()) if steps else whole

    def never_reached(self) -> NDArray[np.int64]:
        """The rows that no step has: those of a run that is shorter than an epoch."""
        if self.total >= self.per_epoch:
            return np.empty(0, np.int64)
        return np.setdiff1d(np.arange(len(self.lengths)), self._order(0)[: self.total * self.rows_per_step])

    def longest_micro_batch(self) -> MicroBatch:
        """The rows of the micro-batch with the most tokens, of the first epoch's steps with the most tokens."""
        looked_at: Sequence[int] = range(min(self.total, self.per_epoch))
        most = LOOKED_AT_TREES if self.ids else LOOKED_AT_STEPS
        if len(looked_at) > most:
            lengths, sums = self.lengths[self._order(0)], self.sums(0)
            fullest = np.argpartition(sums, -most)[-most:]
            with_longest = int(np.argmax(lengths[: self.total * self.rows_per_step])) // self.rows_per_step
            looked_at = [*fullest.tolist(), with_longest]
        micro_batches = (rows for i in looked_at for rows in self[i].micro_batches)
        size = partial(tokens_of, lengths=self.lengths, ids=self.ids, padded=self.padded)
        return max(micro_batches, key=size, default=())

    def most_tokens(self) -> int:
        """Tokens of the largest step of the first epochs: as many as have `LOOKED_AT_ROWS` rows together, or one."""
        epochs = min(-(-self.total // self.per_epoch), max(1, LOOKED_AT_ROWS // self.epoch_rows))
        return int(max(self.sums(epoch).max() for epoch in range(epochs)))

    def rows(self, index: int) -> list[int]:
        """The rows of a step, in their order."""
        epoch, place = divmod(index, self.per_epoch)
        return self._order(epoch)[place * self.rows_per_step : (place + 1) * self.rows_per_step].tolist()

    def tree(self, index: int) -> Tree:
        """What the rows of a step have in common."""
        if self.ids is None:
            raise ValueError("rows share nothing")
        return Tree.of([self.ids(row) for row in self.rows(index)])

    def trees(self, most: int) -> list[Tree]:
        """The same of so many steps of the first epoch, at even distances."""
        count = min(self.total, self.per_epoch)
        return [self.tree(int(i)) for i in np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))]

    def sums(self, epoch: int) -> NDArray[np.int64]:
        """Tokens of each step of an epoch, as far as the run goes: (steps,) int64."""
        steps = min(self.per_epoch, self.total - epoch * self.per_epoch)
        lengths = self.lengths[self._order(epoch)[: steps * self.rows_per_step]]
        return np.add.reduceat(lengths, np.arange(0, len(lengths), self.rows_per_step))

    def _order(self, epoch: int) -> NDArray[np.uint32]:
        """The rows of one epoch in their order: (rows,) uint32; the last epoch asked for is kept."""
        if epoch not in self._orders:
            mixed, key = self.mixture, f"{self.seed}/{epoch}"
            if self.neighbours is not None:
                order = families(self.neighbours, self.rows_per_step, key)
            else:
                order = shuffled(len(self.lengths), key) if mixed is None else mixed.order(epoch, self.seed)
            self._orders = {epoch: order}
        return self._orders[epoch]


def families(neighbours: NDArray[np.uint32], rows_per_step: int, key: str) -> NDArray[np.uint32]:
    """An epoch of steps whose rows are neighbours, (rows,): cut at another place for another key, and then shuffled.
    The last step may be short, as it is of any epoch."""
    turned = np.roll(neighbours, -random.Random(key).randrange(rows_per_step))
    steps = len(turned) // rows_per_step
    whole, rest = np.split(turned, [steps * rows_per_step])
    return np.concatenate([whole.reshape(steps, rows_per_step)[shuffled(steps, key)].ravel(), rest])


def share(rows: Sequence[int], lengths: Sizes, ranks: int, ids: IdsOf | None = None) -> list[list[int]]:
    """Rows over processes, about as many tokens to each: the longest first, to whoever has least (at most 4/3 of the
    best possible, Graham 1969). In the order of `rows` for each; some may get none. `ids`: rows that share a beginning
    go to one process, but for families that are too long for it."""
    parts: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    groups = [([position], int(lengths[row])) for position, row in enumerate(rows)]
    if ids is not None and rows:
        tree = Tree.of([*map(ids, rows)])
        low, high = max(-(-tree.tokens // ranks), *tree.lengths) - 1, tree.tokens
        while high - low > 1:  # the least limit by which neighbours go into as many parts as there are processes
            limit = (low + high) // 2
            low, high = (low, limit) if _fits(tree, limit, ranks) else (limit, high)
        groups = tree.groups(high, len(rows))
    for positions, size in sorted(groups, key=lambda group: -group[1]):
        least = min(range(ranks), key=lambda rank: (tokens[rank], rank))
        parts[least] += positions
        tokens[least] += size
    return [[rows[p] for p in sorted(part)] for part in parts]


def _fits(tree: Tree, limit: int, parts: int) -> bool:
    """Whether neighbours go into so many parts of at most `limit` tokens, and families of no more stay whole."""
    left = 0
    for _, size in tree.groups(limit, len(tree.order)):
        parts, left = (parts, left - size) if size <= left else (parts - 1, limit - size)
    return parts >= 0


def count_steps(rows: int, *, rows_per_step: int, epochs: float, max_steps: int) -> int:
    return max_steps if max_steps > 0 else math.ceil(epochs * math.ceil(rows / rows_per_step))


def eval_micro_batches(
    lengths: Sizes, budget: int, examples_per_micro_batch: int | None, ids: IdsOf | None = None, *, padded: bool = False
) -> list[MicroBatch]:
    """All rows once, in micro-batches of at most `budget` tokens and `examples_per_micro_batch` rows."""
    rows = range(len(lengths))
    windows = (rows[start : start + EVAL_WINDOW_ROWS] for start in rows[::EVAL_WINDOW_ROWS])
    limits = budget, examples_per_micro_batch, ids
    return [rows for window in windows for rows in arrange(window, lengths, *limits, padded=padded)]


def tokens_of(rows: Sequence[int], lengths: Sizes, ids: IdsOf | None, *, padded: bool) -> int:
    """Tokens that a micro-batch of these rows computes."""
    return len(rows) * max(int(lengths[r]) for r in rows) if padded else computed(rows, lengths, ids)


def arrange(
    rows: Sequence[int], lengths: Sizes, max_tokens_per_micro_batch: int, examples_per_micro_batch: int | None,
    ids: IdsOf | None = None, *, padded: bool = False,
) -> tuple[MicroBatch, ...]:  # fmt: skip
    """Rows into few micro-batches, first-fit decreasing; within one, and among equals, in the order of `rows`. No rows,
    as a process may have of a step, are no micro-batches. `ids`: rows that share a beginning stay together where they
    fit, and its tokens count once. `padded`: neighbours in length together, and what is padded counts."""
    max_rows = max(1, len(rows)) if examples_per_micro_batch is None else examples_per_micro_batch
    if max_tokens_per_micro_batch < 1 or max_rows < 1:
        raise ValueError(
            "a micro-batch must hold a token and a row, got "
            f"{max_tokens_per_micro_batch} and {examples_per_micro_batch}"
        )
    if max_rows == 1:
        return tuple((r,) for r in rows)
    bins: list[list[int]] = []
    free: list[int] = []
    groups = [([position], int(lengths[row])) for position, row in enumerate(rows)]
    if ids is not None:
        groups = Tree.of([*map(ids, rows)]).groups(max_tokens_per_micro_batch, max_rows)
    for positions, need in sorted(groups, key=lambda group: -group[1]):
        for number in range(max(0, len(bins) - 1) if padded else 0, len(bins)):
            more = int(lengths[rows[bins[number][0]]]) if padded else need  # the first one is the longest
            if more <= free[number] and len(bins[number]) + len(positions) <= max_rows:
                bins[number] += positions
                free[number] -= more
                break
        else:
            bins.append(positions)
            free.append(max_tokens_per_micro_batch - need)
    return tuple(tuple(rows[p] for p in sorted(positions)) for positions in bins)
