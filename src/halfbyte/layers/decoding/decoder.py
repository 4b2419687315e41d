"""A model's tape with its buffers: a token's whole way from its embedding to logits.

The buffers are torch's where a model was written (`llama.py`), or numpy's where an image of that is run (`image.py`).

Letters: M texts, K key heads, T max_tokens of a cache, D in, V vocabulary, R rotary width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from halfbyte.layers.decoding.tape import Tape
    from halfbyte.layers.decoding.tape_run import TapeRun


class CannotKeep(Exception):
    """Why a tape is not kept for the next start."""


@dataclass
class Decoder:
    """A model's tape with its buffers.

    Args:
        hidden: (M, D) fp32, the embedding of the tokens, divided by `residual_multiplier`: Granite multiplies by it
            what is added, so here nothing is, and norms see the same but for eps.
        logits_divisor: what logits are divided by.
        logits: (M, V) fp32. positions: (M,) of the tokens.
        keys, values: of each layer (M, K, T, d). ends: the number of operations after each layer.
        ropes: cos and sin (T, R) with the buffers (M, R) that a token's row goes to.
    """

    tape: Tape | TapeRun
    hidden: Tensor
    logits: Tensor
    positions: Tensor
    final_cap: float
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    ropes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    places: Tensor | None = None  # (M,) int64: whose cache each vector reads and writes; None: its own
    normed: Tensor | None = None  # (M, D..) fp32, what the head reads; there after `body` operations
    body: int = 0
    entry: Tensor | None = None  # (M, D) fp32, what is normed on the way to `hidden`; None: it enters there
    places_of: Tensor | None = None  # (P, D), what is added to the embedding of each place of a text
    rough: range | None = None  # operations of the head in 8 bits; those after are the whole head
    array: Callable[[Sequence[int]], object] = np.array  # of numpy, or of torch, as the rest is

    def fill(self, layer: int, keys: Tensor, values: Tensor, lengths: list[int]) -> None:
        """Take over a layer's cache of the prompts: (M, K, L, d), padded on the left."""
        for m, length in enumerate(lengths):
            n = min(length, keys.shape[2])
            self.keys[layer][m, :, length - n : length] = keys[m, :, keys.shape[2] - n :]
            self.values[layer][m, :, length - n : length] = values[m, :, values.shape[2] - n :]

    def step(
        self, embedded: Tensor, before: list[int], enter: Callable[[int], None] | None = None, *, whole: bool = False
    ) -> Tensor:
        """Logits (M, V) after one more token of each text.

        Args:
            embedded: (M, D). before: tokens of each text before this one. enter: called before each layer, where a base
                is streamed. whole: all logits are wanted, also of a decoder for the largest.
        """
        self._enter(embedded, before)
        end = None if self.rough is None else self.rough.start if whole else self.rough.stop
        if enter is None:
            self.tape.run(0, end)
        else:
            for layer, (first, last) in enumerate(zip([0, *self.ends[:-1]], self.ends, strict=True)):
                enter(layer)
                self.tape.run(first, last)
            self.tape.run(self.ends[-1], end)
        return self.whole() if whole else self.capped()

    def read(self, embedded: Tensor, positions: Sequence[int], places: Sequence[int]) -> Tensor:
        """What the head would read (n, D) of n <= M tokens at these positions of the texts in these places: those of
        one text in their order, none of them left out. A view, to be used before the next call."""
        assert self.places is not None and self.normed is not None
        self.tape.used = len(positions)
        self.places[: len(places)] = self.array(places)
        self._enter(embedded, positions)
        self.tape.run(0, self.body)
        return self.normed[: len(positions), : self.hidden.shape[1]]

    def _enter(self, embedded: Tensor, positions: Sequence[int]) -> None:
        n = len(positions)
        hidden = self.hidden if self.entry is None else self.entry
        hidden[:n] = embedded
        if self.places_of is not None:
            hidden[:n] += self.places_of[list(positions)]
        if self.residual_multiplier != 1.0:
            self.hidden[:n] /= self.residual_multiplier
        self.positions[:n] = self.array(positions)
        for table, row in self.ropes:
            row[...] = table[self.positions]

    def whole(self) -> Tensor:
        """The logits (M, V) of the last step by the whole head; the largest is as it was."""
        if self.rough is not None:
            self.tape.run(self.rough.stop)
        return self.capped()

    def capped(self) -> Tensor:
        """The logits (M, V) as they are now."""
        logits = self.logits if self.logits_divisor == 1.0 else self.logits / self.logits_divisor
        return self.final_cap * (logits / self.final_cap).tanh() if self.final_cap else logits
