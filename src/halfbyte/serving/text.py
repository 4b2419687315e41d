"""One text that is being written: its tokens, how the next one is chosen, and what of it may be sent.

A part of a letter, and what may be the beginning of a text that ends the answer, is kept back until it is clear.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from tokenizers.decoders import DecodeStream

from halfbyte.serving.grammar import Grammar

if TYPE_CHECKING:
    from torch import Tensor

    from halfbyte.serving.models import Named
    from halfbyte.types import Tokenizer

Finish = Literal["stop", "length"]
_FIRST_LOOK = 512  # of the most likely tokens, for top_p; all are sorted only where these are not enough


@dataclass(frozen=True)
class Wish:
    """How a text is to be written. `logprobs`: how many likely tokens are told beside each; None: none, nor its own."""

    most: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Told:
    """A token with the logarithm of its probability, and the likeliest ones beside it."""

    token: int
    logprob: float
    likely: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What is new of text `index` of an ask."""

    index: int
    text: str
    tokens: int
    told: tuple[Told, ...] = ()
    finish: Finish | None = None

    def with_next(self, after: Piece) -> Piece:
        """This one and the one after it, as one."""
        return Piece(self.index, self.text + after.text, after.tokens, self.told + after.told, after.finish)


class Words:
    """Tokens to text, as it grows; at its end the same as all tokens decoded at once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.ids, self.sent = tokenizer, list[int](), ""
        self.stream = DecodeStream(skip_special_tokens=True) if tokenizer.is_fast else None

    def add(self, token: int) -> str:
        self.ids.append(token)
        if self.stream is not None:
            new = self.stream.step(self.tokenizer.backend_tokenizer, token) or ""
        else:
            whole = self._whole()
            new = "" if whole.endswith("\ufffd") else whole[len(self.sent) :]
        self.sent += new
        return new

    def rest(self) -> str:
        """What was kept back of a letter that was never whole."""
        whole = self._whole()
        return whole[len(self.sent) :] if whole.startswith(self.sent) else ""

    def _whole(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))


@dataclass(eq=False)
class Text:
    """Args: index: of an ask's texts. last: the token that the next step reads."""

    model: Named
    wish: Wish
    index: int
    words: Words
    grammar: Grammar | None = None
    last: int = 0
    held: str = ""
    told: list[Told] = field(default_factory=list)
    draw: torch.Generator | None = None
    whole: bool = False  # what the grammar asks for

    @classmethod
    def begun(cls, model: Named, wish: Wish, index: int, grammar: Grammar | None) -> Text:
        made = cls(model, wish, index, Words(model.tokenizer), grammar)
        if wish.temperature > 0:
            made.draw = torch.Generator()
            made.draw.manual_seed(wish.seed + index) if wish.seed is not None else made.draw.seed()
        return made

    @classmethod
    def of_probe(cls, model: Named) -> Text:
        return cls(model, Wish(1, logprobs=0), 0, Words(model.tokenizer))

    @property
    def greedy(self) -> bool:
        """Whether the largest of the logits is all that it looks at."""
        return self.wish.temperature <= 0 and self.grammar is None and self.wish.logprobs is None

    def take(self, logits: Tensor) -> Piece | None:
        """Choose the next token from logits (V,), and say what is new; None if nothing may be sent yet.

        Raises:
            FloatingPointError: the logits are no numbers.
        """
        chosen = self._choose(logits)
        if not math.isfinite(float(logits[chosen])):
            raise FloatingPointError("the model's logits are not finite")
        if self.wish.logprobs is not None:
            self.told.append(_told(logits, chosen, self.wish.logprobs))
        self.last = chosen
        if self.grammar is not None and chosen not in self.model.stops:
            self.whole = self.grammar.take(chosen)
        self.held += self.words.add(chosen)
        return self._piece()

    def _choose(self, logits: Tensor) -> int:
        if self.grammar is not None:
            logits = logits.masked_fill(~self.grammar.allowed(len(logits)), -torch.inf)
        if self.wish.temperature <= 0:
            return int(logits.numpy().argmax())  # numpy's is nine times as fast
        scores = logits.double() / self.wish.temperature
        chances = torch.softmax(scores, -1)
        if self.wish.top_p < 1:
            chances = _nucleus(chances, self.wish.top_p)
        return int(torch.multinomial(chances, 1, generator=self.draw))

    def _piece(self) -> Piece | None:
        """What may be sent now, with the reason why the text ends here, if it does."""
        finish: Finish | None = None
        if self.last in self.model.stops or self.whole:
            finish = "stop"
        elif len(self.words.ids) >= self.wish.most:
            finish = "length"
        if finish is not None:
            self.held += self.words.rest()
        ends = [at for stop in self.wish.stops if (at := self.held.find(stop)) >= 0]
        if ends:
            finish, self.held = "stop", self.held[: min(ends)]
        back = 0 if finish is not None else _beginning(self.held, self.wish.stops)
        ready, self.held = self.held[: len(self.held) - back], self.held[len(self.held) - back :]
        if not ready and finish is None:
            return None
        told, self.told = tuple(self.told), []
        return Piece(self.index, ready, len(self.words.ids), told, finish)


def _beginning(text: str, stops: tuple[str, ...]) -> int:
    """Characters at the end of a text that may be the beginning of one of `stops`."""
    longest = 0
    for stop in stops:
        for n in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:n]):
                longest = n
                break
    return longest


def _nucleus(chances: Tensor, top_p: float) -> Tensor:
    """Only the likeliest tokens (V,) whose chances together reach top_p, the one that reaches it included."""
    for count in (min(_FIRST_LOOK, len(chances)), len(chances)):
        most, order = torch.topk(chances, count)
        before = most.cumsum(-1) - most
        if float(before[-1] + most[-1]) >= top_p or count == len(chances):
            kept = order[before < top_p]
            return torch.zeros_like(chances).index_copy_(0, kept, chances[kept])
    raise AssertionError


def _told(logits: Tensor, chosen: int, likely: int) -> Told:
    all_of_them = torch.log_softmax(logits.double(), -1)
    best, which = torch.topk(all_of_them, likely)
    pairs = zip(which.tolist(), best.tolist(), strict=True)
    return Told(chosen, float(all_of_them[chosen]), tuple(pairs))
