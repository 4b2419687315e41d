"""What texts have in common at their beginnings: computed once, as a tree of segments.

Why: a system prompt, a list of tools, a conversation that branches: each row of a step would compute it again, forward
and backward. A token's hidden state depends on nothing but the tokens before it, so rows that begin alike share it.
What: rows in the order of their tokens; of two neighbours the common beginning is computed once, without its last token
at least, since that one predicts other tokens in each. So each row has a segment of its own, and every label in what is
shared is the same token; it counts as often as rows have it (`collate_tree`).
Source: Prefix Grouper (arXiv:2506.05433), identical outputs and gradients for groups; a prefix tree of sorted strings.
Cost: a sort of the rows and one look at each token. No torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.encoding.examples import in_order

Tokens = NDArray[np.uint32]
IdsOf = Callable[[int], Tokens]
"""The tokens of a row, by its number."""

LEAST = 16  # tokens that are worth a segment: of a micro-batch's rows so many are filled up anyway
EVEN = 2  # shared tokens are a multiple: attention in 16 bits multiplies pairs of them
_GOLDEN, _MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # splitmix64


def common(a: Tokens, b: Tokens) -> int:
    """How many tokens of their beginning two rows share."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return worth(int(differ.argmax()) if differ.any() else n)


def worth(alike: int) -> int:
    """How many of the tokens that two rows begin with alike are computed once."""
    shared = (alike - 1) // EVEN * EVEN
    return shared if shared >= LEAST else 0


@dataclass(frozen=True)
class Tree:
    """Rows in the order of their tokens. `order`: their places among those that were given; `lengths`: tokens of each;
    `shared`: how many of them each has from the row before it."""

    order: tuple[int, ...]
    lengths: tuple[int, ...]
    shared: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Tokens]) -> "Tree":
        order = in_order(rows)
        shared = [common(rows[a], rows[b]) for a, b in pairwise(order)]
        return cls(tuple(order), tuple(len(rows[place]) for place in order), (0, *shared)[: len(rows)])

    @property
    def tokens(self) -> int:
        """That are computed."""
        return sum(self.lengths) - sum(self.shared)

    def alike(self) -> list[int]:
        """The places of the rows that have the most in common: two, and one beside them."""
        most = max(range(len(self.shared)), key=self.shared.__getitem__)
        near = [place for place in (most - 1, most, most + 1, most - 2) if 0 <= place < len(self.order)]
        return [self.order[place] for place in near[:3]]

    def groups(self, budget: float, most: int) -> list[tuple[list[int], int]]:
        """Families, each one's rows (their places) and computed tokens; one of more than `budget` tokens or `most` rows
        in parts, of neighbours. A longer row is a part of its own."""
        parts: list[tuple[list[int], int]] = []
        for place, length, shared in zip(self.order, self.lengths, self.shared, strict=True):
            rows, tokens = parts[-1] if parts else ([], 0)
            if shared and rows and len(rows) < most and tokens + length - shared <= budget:
                parts[-1] = ([*rows, place], tokens + length - shared)
            else:
                parts.append(([place], length))
        return parts

    def segments(self) -> list[tuple[int, int, int, int]]:
        """(which row of the order, its tokens from, to, level) of each, one before those that follow it."""
        parts, above = [], list[int]()
        for i, (length, shared) in enumerate(zip(self.lengths, self.shared, strict=True)):
            while above and above[-1] > shared:
                above.pop()
            cuts: list[int] = []  # where later rows leave this one, from its end on
            for other in self.shared[i + 1 :]:
                if other <= shared:
                    break
                if not cuts or other < cuts[-1]:
                    cuts.append(other)
            start = shared
            for stop in reversed(cuts):
                parts.append((i, start, stop, len(above)))
                above.append(stop)
                start = stop
            parts.append((i, start, length, len(above)))
        return parts


def computed(rows: Sequence[int], lengths: Sequence[int] | NDArray[np.int64], ids: IdsOf | None) -> int:
    """Tokens that one micro-batch of these rows computes."""
    return sum(int(lengths[row]) for row in rows) if ids is None or len(rows) < 2 else Tree.of([*map(ids, rows)]).tokens


def beginnings(ids: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """A hash of each token's text up to it, (T,): equal where the beginnings are. Texts end to end, positions from 0 in
    each. A sum of hashes of (token, position)."""
    with np.errstate(over="ignore"):
        z = mix(mix(positions.astype(np.uint64)) + ids.astype(np.uint64))
        sums = np.cumsum(z, dtype=np.uint64)
        starts = np.flatnonzero(positions == 0)
        before = (sums - z)[starts]
        return (sums - np.repeat(before, np.diff([*starts, len(ids)]))).view(np.int64)


def mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 of each number."""
    with np.errstate(over="ignore"):
        z = (z + np.uint64(1)) * np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX[0])
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX[1])
        return z ^ (z >> np.uint64(31))
