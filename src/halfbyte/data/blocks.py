"""Plain texts end to end, cut into blocks of one length: `data.packing: stream`.

Why: texts of very different lengths fill micro-batches evenly, no text is too long, and each token is trained once.
What: texts follow each other in the order of their files, each with its end token (and the tokenizer's first token, if
it has one); the last block holds what is left. Attention does not cross from one text into the next: a block knows
where its texts begin. The first token of each piece has no label, since nothing precedes it. Blocks count as rows:
batch x accumulation is a number of blocks.
Cost: tokens are copied when their block is asked for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.encoding.encoder import Encoded
from halfbyte.data.encoding.examples import IGNORED, Example, Examples


def stream(texts: Encoded, block_tokens: int) -> Encoded:
    """The same tokens in blocks; the tally of the texts stays."""
    return Encoded(Blocks(texts.examples, block_tokens), texts.tally, texts=len(texts.examples))


class Blocks(Examples):
    """Blocks of `size` tokens over texts, each made when it is asked for; `batches` are those of the texts."""

    def __init__(self, texts: Examples, size: int) -> None:
        super().__init__(texts.batches)
        self._texts, self._size = texts, size
        self._starts = np.concatenate([[0], np.cumsum(texts.lengths())])  # of each text in the stream, and its end

    def __len__(self) -> int:
        return -(-int(self._starts[-1]) // self._size)

    def _made(self, index: int) -> Example:
        first, stop = self._bounds(index)
        ids: list[int] = []
        labels: list[int] = []
        starts: list[int] = []
        for text in range(*self._inside(index)):
            begins = int(self._starts[text])
            piece = self._texts.ids(text)[max(0, first - begins) : stop - begins].tolist()
            starts.append(len(ids))
            ids += piece
            labels += [IGNORED, *piece[1:]]
        return Example(tuple(ids), tuple(labels), self.where(index), (), "", tuple(starts))

    def lengths(self) -> NDArray[np.int64]:
        lengths = np.full(len(self), self._size, np.int64)
        lengths[-1] = int(self._starts[-1]) - (len(self) - 1) * self._size
        return lengths

    def labelled(self) -> NDArray[np.int64]:
        edges = np.minimum(np.arange(len(self) + 1) * self._size, self._starts[-1])
        first = np.searchsorted(self._starts, edges[:-1], side="right") - 1
        last = np.searchsorted(self._starts, edges[1:], side="left")
        pieces: NDArray[np.int64] = last - first
        return self.lengths() - pieces

    def where(self, index: int) -> str:
        """The names of its first and its last text."""
        first, stop = self._inside(index)
        names = [self._texts.where(first), self._texts.where(stop - 1)]
        return names[0] if names[0] == names[1] else f"{names[0]} to {names[1]}"

    def _bounds(self, index: int) -> tuple[int, int]:
        return index * self._size, min((index + 1) * self._size, int(self._starts[-1]))

    def _inside(self, index: int) -> tuple[int, int]:
        """The texts [first, stop) that have tokens in a block."""
        first, stop = self._bounds(index)
        begins = int(np.searchsorted(self._starts, first, side="right")) - 1
        return begins, int(np.searchsorted(self._starts, stop, side="left"))
