"""Places for up to 16 texts: their caches and states, which adapter each uses, and what was read into each before.

Why: a step reads the base once for all texts, so it takes the smallest tape that holds those that there are; and what
a prompt begins with that was read for another is not read again.
What: one set of caches, with a tape for 1, 2, 4, 8 and 16 texts on it, written when it is first needed. Texts move to
the first places when a smaller tape is enough. A recurrent layer's state is of all tokens that a place has read: a
beginning of them is there only where it was marked, by a copy of the state there.
Cost: a tape is a few tens of ms to write; caches take memory as texts are put there, a mark as much as a state.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from halfbyte.layers.decoding import llama
from halfbyte.layers.decoding.decoder import Decoder
from halfbyte.layers.decoding.linears import Unsupported
from halfbyte.layers.decoding.tape import MAX_VECTORS, TextAdapters
from halfbyte.types import Model
from halfbyte.writing.text import Text, same_beginning

MAX_TEXTS = MAX_VECTORS
SIZES = (1, 2, 4, 8, 16)
MIN_SHARED = 4  # tokens; fewer are read again rather than copied


class FastPathUnavailable(Exception):
    """Why texts are left to the model's own forward."""


class CachePlaces:
    """Raises FastPathUnavailable where the model cannot be written as a tape.

    Args:
        count: most texts at once. max_length: tokens of a text, its prompt included. adapters: PEFT's names, one of
            which each text uses; None: all use what is active. rough: the head may be used in 8 bits.
    """

    def __init__(
        self, lm: Model, count: int, max_length: int, adapters: Sequence[str] | None = None, *, rough: bool = True
    ) -> None:
        self.lm, self.rough = lm, rough
        self.adapters = None
        if adapters is not None:
            self.adapters = TextAdapters(tuple(adapters), torch.zeros(len(adapters), count))
        self.texts: list[Text | None] = [None] * count
        self.lengths = [-1] * count
        """Tokens in each cache before the one that the next step reads; -1 of a place without a text."""
        self.contents: list[tuple[str | None, list[int], bool]] = [("", [], False)] * count
        """By which adapter what was read, and whether by a tape."""
        self.marks: list[tuple[int, list[Tensor]]] = [(0, [])] * count
        """After how many of these tokens each place's states were copied, and the copies."""
        self._open(max_length)

    def _open(self, max_length: int) -> None:
        self.max_length = max_length
        self.decoders: dict[int, Decoder] = {}
        self.caches = self.decoder(len(self.texts))
        self.recurrent = bool(self.caches.states)

    def decoder(self, count: int) -> Decoder:
        """The smallest tape for so many texts."""
        most = len(self.texts)
        size = next((n for n in SIZES if count <= n < most), most)
        if size not in self.decoders:
            try:
                self.decoders[size] = llama.decoder(
                    self.lm, size, self.max_length, adapters=self.adapters, largest=self.rough,
                    beside=None if size == most else self.caches,
                )  # fmt: skip
            except Unsupported as why:
                raise FastPathUnavailable(str(why)) from why
        return self.decoders[size]

    @property
    def active(self) -> list[int]:
        return [m for m, text in enumerate(self.texts) if text is not None]

    def take(self, text: Text) -> int:
        """Give a text the first free place."""
        m = self.texts.index(None)
        self.texts[m], self.lengths[m] = text, len(text.prompt) - 1
        self.contents[m] = "", [], False  # until its prompt has been read
        if self.adapters is not None:
            self.adapters.use(m, text.adapter)
        return m

    def leave(self, m: int) -> None:
        """What place m holds may still be used by others."""
        text, (adapter, tokens, by_tape) = self.texts[m], self.contents[m]
        assert text is not None
        self.contents[m] = adapter, [*tokens, *text.tokens][: self.lengths[m]] if tokens else [], by_tape
        self.texts[m], self.lengths[m] = None, -1

    def mark(self, m: int, n: int) -> None:
        """The states of place m are those after its first n tokens: keep a copy."""
        self.marks[m] = n, [state[m].clone() for state in self.caches.states]

    @contextmanager
    def kept_states(self) -> Iterator[None]:
        """Afterwards the states are what they were: of a step that will be computed again."""
        active = self.active
        copies = [state[active] for state in self.caches.states]
        try:
            yield
        finally:
            for state, copy in zip(self.caches.states, copies, strict=True):
                state[active] = copy

    def find(self, adapter: str | None, prompt: Sequence[int], *, any_reader: bool = False) -> tuple[int, int]:
        """The place where most first tokens of a prompt were read by this adapter, and how many; 0: too few.
        `any_reader`: also what the model's own forward has read, whose bits are others than a tape's."""
        lengths = [0] * len(self.texts)
        for m, same in enumerate(self.same(adapter, prompt, any_reader=any_reader)):
            at, marked = len(self.contents[m][1]) if self.texts[m] is None else self.lengths[m], self.marks[m][0]
            lengths[m] = same if same == at or not self.recurrent else marked if marked <= same else 0
        n = max(lengths)
        return lengths.index(n), n if n >= MIN_SHARED else 0

    def same(self, adapter: str | None, prompt: Sequence[int], *, any_reader: bool = False) -> list[int]:
        """How many first tokens of a prompt each place has read by this adapter, whether they can be used or not."""
        counts = [0] * len(self.texts)
        for m, (reader, tokens, by_tape) in enumerate(self.contents):
            if reader == adapter and (by_tape or any_reader):
                there = len(tokens) if self.texts[m] is None else min(len(tokens), self.lengths[m])
                counts[m] = same_beginning(tokens[:there], prompt)
        return counts

    def copy(self, source: int, target: int, n: int) -> None:
        """The first n tokens that a place has read, to another place, with the states at its mark or as they are."""
        at, states = self.marks[source]
        self.marks[target] = (at, states) if at <= n else (0, [])
        if at != n or not states:
            states = [state[source] for state in self.caches.states]
        for state, there in zip(self.caches.states, states, strict=True):
            state[target] = there
        if n and source != target:
            for cache in (*self.caches.keys, *self.caches.values):
                cache[target, :, :n] = cache[source, :, :n]

    def compact(self) -> None:
        """Move texts to the first places where that makes a smaller tape enough."""
        active = self.active
        size = self.decoder(len(active)).tape.m
        for m in active:
            if m >= size:
                target = self.texts.index(None)
                self.copy(m, target, self.lengths[m])
                self.contents[target], self.contents[m] = self.contents[m], ("", [], False)
                self.lengths[target], self.lengths[m] = self.lengths[m], -1
                self.texts[target], self.texts[m] = self.texts[m], None
                if self.adapters is not None:
                    self.adapters.uses[:, target] = self.adapters.uses[:, m]

    def grow(self, max_length: int) -> None:
        """Longer texts, without losing what was read."""
        old = self.caches
        self._open(max_length)
        for new, before in zip((*self.caches.keys, *self.caches.values), (*old.keys, *old.values), strict=True):
            for m, (_, tokens, _) in enumerate(self.contents):
                n = max(len(tokens), self.lengths[m], 0)
                new[m, :, :n] = before[m, :, :n]
        for state, before in zip(self.caches.states, old.states, strict=True):
            state.copy_(before)
