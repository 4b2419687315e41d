"""Plain texts end to end, cut into blocks of one length: `data.packing: stream`.

Why: texts of very different lengths fill micro-batches evenly, no text is too long, and each token is trained once.
What: texts follow each other in the order of their files, each with its end token (and the tokenizer's first token, if
it has one); the last block holds what is left. Attention does not cross from one text into the next, and the first
token of each piece has no label. Blocks count as rows: batch x accumulation is a number of blocks.
"""

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.encoding.examples import IGNORED, Example, Examples


def stream(texts: EncodedRows, block_tokens: int) -> EncodedRows:
    """The same tokens in blocks; the tally of the texts stays."""
    return EncodedRows(Blocks(texts.examples, block_tokens), texts.tally, texts=len(texts.examples))


class Blocks(Examples):
    """Blocks of `size` tokens over texts, each made when it is asked for; `batches` are those of the texts."""

    def __init__(self, texts: Examples, size: int) -> None:
        super().__init__(texts.batches)
        self._texts = texts
        self._starts = np.concatenate([[0], np.cumsum(texts.lengths())])  # of each text in the stream, and its end
        self._edges = np.append(np.arange(0, self._starts[-1], size), self._starts[-1])  # of the blocks in the stream
        # the texts [first, stop) that have tokens in a block
        self._first = np.searchsorted(self._starts, self._edges[:-1], side="right") - 1
        self._stop = np.searchsorted(self._starts, self._edges[1:], side="left")

    def __len__(self) -> int:
        return len(self._first)

    def _example(self, index: int) -> Example:
        first, stop = self._edges[index : index + 2].tolist()
        ids: list[int] = []
        labels: list[int] = []
        starts: list[int] = []
        for text in range(self._first[index], self._stop[index]):
            begins = int(self._starts[text])
            piece = self._texts.ids(text)[max(0, first - begins) : stop - begins].tolist()
            starts.append(len(ids))
            ids += piece
            labels += [IGNORED, *piece[1:]]
        return Example(tuple(ids), tuple(labels), self.where(index), (), "", tuple(starts))

    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self._edges)

    def labelled(self) -> NDArray[np.int64]:
        return self.lengths() - (self._stop - self._first)

    def label_weights(self) -> None:
        return None

    def where(self, index: int) -> str:
        """The names of its first and its last text."""
        names = [self._texts.where(int(text)) for text in (self._first[index], self._stop[index] - 1)]
        return names[0] if names[0] == names[1] else f"{names[0]} to {names[1]}"
