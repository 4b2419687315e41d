"""One text that is being written: its tokens, what ends it, and what of it may be sent.

A part of a letter, and what may be the beginning of a stop string, is held back until it is clear.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from tokenizers.decoders import DecodeStream

from halfbyte.types import Tokenizer
from halfbyte.upstream.transformers import byte_letters
from halfbyte.writing.sampling import Constraint, Sampler, SamplingParams, TokenLogprob, logprob_of

if TYPE_CHECKING:
    from torch import Tensor

    from halfbyte.data.encoding.examples import Example

Finish = Literal["stop", "length"]


class Detokenizer:
    """Tokens to characters as a text grows; at its end the same as all tokens decoded at once."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skips = tokenizer, skip_special_tokens
        self.ids: list[int] = []
        self.sent = ""
        self.stream = DecodeStream(skip_special_tokens=skip_special_tokens) if tokenizer.is_fast else None

    def add(self, token: int) -> str:
        """What is new; nothing as long as a letter is incomplete."""
        self.ids.append(token)
        new = ""
        if self.stream is not None:
            try:
                new = self.stream.step(self.tokenizer.backend_tokenizer, token) or ""
            except Exception:  # of tokenizers: a byte that is no letter changes what was sent of the bytes before it
                self.stream = None
        if self.stream is None:
            text = self._decoded()
            new = "" if text.endswith("\ufffd") else text[len(self.sent) :]
        self.sent += new
        return new

    def rest(self) -> str:
        """What was held back of a letter that never was complete."""
        text = self._decoded()
        return text[len(self.sent) :] if self.stream is None or text.startswith(self.sent) else ""

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=self.skips))


@dataclass(frozen=True)
class TextChunk:
    """What is new of text `index` after a prompt. tokens: those written so far."""

    index: int
    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None

    def joined(self, after: TextChunk) -> TextChunk:
        """This one and the one after it, as one."""
        logprobs = self.logprobs + after.logprobs
        return TextChunk(self.index, self.text + after.text, after.tokens, logprobs, after.finish)


@dataclass(eq=False)
class Text:
    """A prompt and what is written after it.

    Args:
        stop_ids: tokens that end it. adapter: by which it is written, where there are several; None: the base, or what
            is active. index: of texts after the same prompt, which are inserted one after another.
        detokenizer: where pieces are asked for, or there are stop strings. row: begins with the prompt; its loss is
            wanted, and what it expects is a draft of the answer.
    """

    prompt: Sequence[int]
    params: SamplingParams
    stop_ids: Collection[int]
    _: KW_ONLY
    adapter: str | None = None
    index: int = 0
    detokenizer: Detokenizer | None = None
    constraint: InitVar[Constraint | None] = None
    row: Example | None = None

    def __post_init__(self, constraint: Constraint | None) -> None:
        self.sampler = Sampler(self.params, self.index, constraint)
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self.error: Exception | None = None
        self.loss: float | None = None
        self._pending = ""
        self._logprobs: list[TokenLogprob] = []

    @property
    def last(self) -> int:
        """The token that the next step reads."""
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.error is not None

    def take(self, logits: Tensor) -> None:
        """Choose the next token from logits (V,), torch's or numpy's. One that cannot be chosen is an `error`, which
        ends the text."""
        try:
            if isinstance(logits, np.ndarray) and not self.sampler.greedy:
                import torch

                logits = torch.from_numpy(logits)
            if self.sampler.greedy and (isinstance(logits, np.ndarray) or logits.device.type != "cpu"):
                token = int(logits.argmax())
            else:
                logits = logits.float().cpu()
                token = self.sampler.choose(logits, self.prompt, self.tokens)
            if not math.isfinite(float(logits[token])):
                raise FloatingPointError("the model's logits are not finite")
            if self.params.logprobs is not None:
                self._logprobs.append(logprob_of(logits, token, self.params.logprobs))
            self.add(token)
        except (FloatingPointError, RuntimeError) as error:
            self.error = error

    def add(self, token: int) -> None:
        """The next token, whoever has chosen it."""
        self.tokens.append(token)
        constraint = self.sampler.constraint
        complete = constraint is not None and token not in self.stop_ids and constraint.take(token)
        if token in self.stop_ids or complete:
            self.finish = "stop"
        elif len(self.tokens) >= self.params.max_tokens:
            self.finish = "length"
        if self.detokenizer is not None:
            self._pending += self.detokenizer.add(token)
            if self.finish is not None:
                self._pending += self.detokenizer.rest()
            text = before_stop(self._pending, self.params.stop)
            if len(text) < len(self._pending):
                self.finish, self._pending = "stop", text

    def end(self) -> None:
        """End it here, as it is."""
        if self.finish is None:
            self.finish = "stop"
            self._pending += "" if self.detokenizer is None else self.detokenizer.rest()

    def chunk(self) -> TextChunk | None:
        """What may be sent now, with the reason why the text ends here, if it does; None where there is nothing."""
        back = 0 if self.finish is not None else _stop_begun(self._pending, self.params.stop)
        ready, self._pending = self._pending[: len(self._pending) - back], self._pending[len(self._pending) - back :]
        if not ready and self.finish is None:
            return None
        logprobs, self._logprobs = tuple(self._logprobs), []
        return TextChunk(self.index, ready, len(self.tokens), logprobs, self.finish)


class TextWriter(ABC):
    """Writes texts side by side."""

    @abstractmethod
    def insert(self, texts: Sequence[Text], *, packed: bool = False) -> None:
        """Read the prompts of texts, of one adapter; texts after the same prompt follow each other. `packed`: read
        prompts together where that is faster; rounding may then change what is written."""

    @abstractmethod
    def next_logits(self) -> list[tuple[Text, Tensor]]:
        """Each text with the logits (V,) after its last token; to be used before the next call."""

    @abstractmethod
    def remove(self, text: Text) -> None:
        """A text leaves, if it is here."""

    def step(self) -> list[Text]:
        """Give each text its next token; one that ends leaves."""
        texts = []
        for text, logits in self.next_logits():
            text.take(logits)
            texts.append(text)
            if text.ended:
                self.remove(text)
        return texts


@dataclass
class Session:
    """A conversation's writer, which keeps what it has read, by one adapter, from one answer to the next. `exact`: no
    text's bits depend on what was read before it."""

    writer: TextWriter | None = None
    exact: bool = False


def by_prompt(texts: Iterable[Text]) -> list[list[Text]]:
    """Texts after the same prompt together."""
    groups: list[list[Text]] = []
    for text in texts:
        if text.index == 0 or not groups:
            groups.append([])
        groups[-1].append(text)
    return groups


def same_beginning(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def sender(emit: Callable[[str], None] | None, each: Callable[[], bool] | None) -> Callable[[Sequence[Text]], bool]:
    """Called after each token: sends what is new of the first text. `each`: called after each token; True ends all."""

    def after_step(texts: Sequence[Text]) -> bool:
        ends = each is not None and each()
        if emit is not None:
            if ends:
                texts[0].end()
            if (chunk := texts[0].chunk()) is not None and chunk.text:
                emit(chunk.text)
        return ends

    return after_step


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the strings that end it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _stop_begun(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of a text that may be the beginning of one of `stops`."""
    longest = (range(min(len(stop) - 1, len(text)), 0, -1) for stop in stops)
    beginnings = (next((n for n in ns if text.endswith(stop[:n])), 0) for stop, ns in zip(stops, longest, strict=True))
    return max(beginnings, default=0)


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """What a token stands for, which may be a part of a letter."""
    piece, text = str(tokenizer.convert_ids_to_tokens(token)), str(tokenizer.decode([token]))
    if piece.startswith("<0x") and len(piece) == 6:
        return bytes.fromhex(piece[3:5])
    letters = byte_letters()
    if all(letter in letters for letter in piece):  # also a word of a tokenizer that is not of bytes
        spelled = bytes(letters[letter] for letter in piece)
        if "\ufffd" in text or spelled.decode(errors="replace") == text:
            return spelled
    return piece.replace("\u2581", " ").encode()
