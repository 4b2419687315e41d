"""A model's tape with its buffers: a token's whole way from its embedding to logits; and its run on all threads.

The buffers are torch's where a model was written (`llama.py`), or numpy's where an image of that is run (`image.py`).

Letters: M texts, K key heads, T max_tokens of a cache, D in, V vocabulary, R rotary width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from halfbyte.layers.kernels.cpu.decoding import slots as s

if TYPE_CHECKING:
    from torch import Tensor


class CannotKeep(Exception):
    """Why a tape is not kept for the next start."""


class TapeRun:
    """Operations (n, WIDTH) in a row, for a kernel of `interpreter.py` and so many threads.

    Args:
        vectors: M. groups, scratch_bytes: what the largest operation needs. max_tokens: of a text.
    """

    def __init__(
        self, operations: np.ndarray, kernel: object, threads: int, *, vectors: int, groups: int, max_tokens: int,
        scratch_bytes: int,
    ) -> None:  # fmt: skip
        from halfbyte.layers.kernels.cpu.decoding.interpreter import LINE

        self.operations, self.kernel = operations, kernel
        self.threads, self.count = threads, len(operations) // s.WIDTH
        self.used = 1  # of the vectors, the first ones
        self._counters = np.zeros((threads + 1) * self.count * LINE, np.int64)
        self._arrived = np.zeros(LINE, np.int64)
        self._slots = np.zeros(s.WIDTH, np.int64)
        for slot, number in {
            s.TAPE_OPERATIONS: operations.ctypes.data, s.TAPE_COUNT: self.count,
            s.TAPE_COUNTERS: self._counters.ctypes.data, s.TAPE_GROUPS: groups, s.TAPE_MAX_TOKENS: max_tokens,
            s.TAPE_YIELD: _yield_address(), s.TAPE_THREADS: threads, s.TAPE_SCRATCH_BYTES: scratch_bytes,
            s.TAPE_ARRIVED: self._arrived.ctypes.data, s.TAPE_VECTORS: vectors,
        }.items():  # fmt: skip
            self._slots[slot] = number

    def run(self, first: int = 0, last: int | None = None) -> None:
        """Run operations first .. last; a token begins with the first one."""
        from halfbyte.layers.kernels.cpu import parallel

        if first == 0:
            self._counters.fill(0)
        self._arrived.fill(0)
        self._slots[s.TAPE_FIRST], self._slots[s.TAPE_LAST] = first, self.count if last is None else last
        self.operations[s.USED :: s.WIDTH] = self.used
        parallel.start(self.kernel, self._slots, self.threads)


@cache
def _yield_address() -> int:
    """Of `sched_yield`, which lets other threads have the core; 0 where there is none."""
    try:
        return ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
    except (OSError, AttributeError, TypeError):
        return 0


@dataclass
class Decoder:
    """A model's tape with its buffers.

    Args:
        hidden: (M, D) fp32, the embedding of the tokens, divided by `residual_multiplier`: Granite multiplies by it
            what is added, so here nothing is, and norms see the same but for eps.
        logits_divisor: what logits are divided by.
        logits: (M, V) fp32. positions: (M,) of the tokens.
        keys, values: of each layer with attention (M, K, T, d). states: of recurrent layers (M, ..) fp32, what a text's
            tokens have left. ends: the number of operations after each layer.
        ropes: cos and sin (T, R) with the buffers (M, R) that a token's row goes to.
    """

    tape: Any  # a `Tape`, or of an image a `TapeRun`
    hidden: Tensor
    logits: Tensor
    positions: Tensor
    final_cap: float
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
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

    def step(
        self, embedded: Tensor, before: list[int], enter: Callable[[int], None] | None = None, *, whole: bool = False
    ) -> Tensor:
        """Logits (M, V) after one more token of each text.

        Args:
            embedded: (M, D). before: tokens of each text before this one; -1: there is no text. enter: called before
                each layer, where a base is streamed. whole: all logits are wanted, also of a decoder for the largest.
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
