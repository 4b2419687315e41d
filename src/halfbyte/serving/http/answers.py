"""What goes back: OpenAI's chat and completion objects, whole and in chunks."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from halfbyte.serving.engine import Ask
from halfbyte.serving.http.refusal import Refusal
from halfbyte.serving.tools import AnswerPart, CallForm, CallReader
from halfbyte.types import Document
from halfbyte.writing.sampling import TokenLogprob
from halfbyte.writing.text import Detokenizer, TextChunk, token_bytes


@dataclass
class CalledTool:
    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


@dataclass
class Choice:
    """One text as it comes in. form: of calls in it; None: none are looked for. detokenizer: where it is asked at
    which character each token begins."""

    form: CallForm | None = None
    detokenizer: Detokenizer | None = None
    text: str = ""
    tokens: int = 0
    calls: list[CalledTool] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish: str | None = None

    def __post_init__(self) -> None:
        self._reader = None if self.form is None else CallReader(self.form)

    def add(self, chunk: TextChunk) -> list[AnswerPart]:
        self.tokens = chunk.tokens
        self.logprobs += chunk.logprobs
        if (letters := self.detokenizer) is not None:
            for one in chunk.logprobs:
                self.offsets.append(len(letters.sent))
                letters.add(one.token)
        self.finish = chunk.finish or self.finish
        if self._reader is not None:
            parts = self._reader.add(chunk.text, ended=chunk.finish is not None)
        else:
            parts = [AnswerPart(chunk.text)] if chunk.text else []
        for part in parts:
            self.text += part.text
            if part.name:
                self.calls.append(CalledTool(part.name))
            elif part.arguments:
                self.calls[part.number].arguments += part.arguments
        if self.calls and self.finish == "stop":
            self.finish = "tool_calls"
        return parts


class Reply(Protocol):
    """An answer in the words of one API, as it grows."""

    def begin(self) -> list[Document]:
        """What is sent before its first text."""

    def add(self, number: int, chunk: TextChunk) -> list[Document]:
        """What is new of text `number`."""

    def end(self) -> list[Document]:
        """What is sent when all texts have ended."""

    def whole(self) -> Document:
        """All of it at once."""

    def failed(self, refusal: Refusal) -> Document:
        """Instead of what would have come."""


@dataclass
class OpenAIReply:
    """Args: chat: messages, or plain texts. likely: tokens reported beside each; None: none. usage: a last chunk."""

    asks: Sequence[Ask]
    chat: bool
    likely: int | None = None
    form: CallForm | None = None
    usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.model = self.asks[0].model
        tells = not self.chat and self.likely is not None
        self.choices = [
            Choice(self.form, Detokenizer(self.model.tokenizer) if tells else None)
            for ask in self.asks for _ in range(ask.n)
        ]  # fmt: skip

    def begin(self) -> list[Document]:
        empty = {"role": "assistant", "content": ""}
        return [self._chunk(index, empty) for index in range(len(self.choices))] if self.chat else []

    def add(self, number: int, chunk: TextChunk) -> list[Document]:
        choice = self.choices[number]
        parts = choice.add(chunk)
        if not self.chat:
            return [self._chunk(number, chunk.text, chunk.logprobs, chunk.finish)] if chunk.tokens else []
        chunks = [self._chunk(number, _delta(part, choice)) for part in parts]
        if chunk.logprobs and chunks:
            chunks[0]["choices"][0]["logprobs"] = self._logprobs(number, chunk.logprobs)
        elif chunk.logprobs and self.likely is not None:  # of tokens whose text is held back
            chunks = [self._chunk(number, {}, chunk.logprobs)]
        return [*chunks, self._chunk(number, {}, (), choice.finish)] if choice.finish is not None else chunks

    def end(self) -> list[Document]:
        """The chunk with the usage, which has no choice."""
        return [self._head(".chunk") | {"choices": [], "usage": self._usage()}] if self.usage else []

    def failed(self, refusal: Refusal) -> Document:
        return refusal.body

    def whole(self) -> Document:
        choices = [self._choice(i, choice) for i, choice in enumerate(self.choices)]
        return self._head() | {"choices": choices, "usage": self._usage()}

    def _head(self, kind: str = "") -> Document:
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"
        kind = f"chat.completion{kind}" if self.chat else "text_completion"
        return {"id": name, "object": kind, "created": self.created, "model": self.model.name}

    def _choice(self, index: int, choice: Choice) -> Document:
        logprobs = self._logprobs(index, choice.logprobs) if self.likely is not None else None
        if not self.chat:
            return {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish}
        message: Document = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message |= {"content": choice.text or None, "tool_calls": [_call(call) for call in choice.calls]}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish}

    def _chunk(
        self, index: int, delta: Document | str, logprobs: Sequence[TokenLogprob] = (), finish: str | None = None
    ) -> Document:
        """delta: of a message, or the new text."""
        reported = self._logprobs(index, logprobs) if self.likely is not None and logprobs else None
        content = {"delta": delta} if self.chat else {"text": delta}
        return self._head(".chunk") | {
            "choices": [{"index": index, **content, "logprobs": reported, "finish_reason": finish}]
        }

    def _usage(self) -> Document:
        return usage(sum(len(ask.prompt) for ask in self.asks), sum(choice.tokens for choice in self.choices))

    def _logprobs(self, number: int, logprobs: Sequence[TokenLogprob]) -> Document:
        """The last ones of text `number`."""
        if self.chat:
            return {
                "content": [
                    self._token(one.token, one.logprob) | {"top_logprobs": [self._token(*pair) for pair in one.likely]}
                    for one in logprobs
                ],
                "refusal": None,
            }
        choice = self.choices[number]
        return {
            "tokens": [self._name(one.token) for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [self._by_name(one) for one in logprobs] if self.likely else None,
            "text_offset": choice.offsets[len(choice.offsets) - len(logprobs) :],
        }

    def _by_name(self, one: TokenLogprob) -> dict[str, float]:
        """The token that was taken and the likeliest ones, each by a name of its own."""
        named: dict[str, float] = {}
        for token, value in ({one.token: one.logprob} | dict(one.likely)).items():
            name = self._name(token)
            named[self._spelled(token) if name in named else name] = value
        return named

    def _name(self, token: int) -> str:
        """Its text; of a part of a letter, which has none, its bytes."""
        text = str(self.model.tokenizer.decode([token]))
        return self._spelled(token) if "\ufffd" in text else text

    def _spelled(self, token: int) -> str:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token_bytes(self.model.tokenizer, token))

    def _token(self, token: int, logprob: float) -> Document:
        text = str(self.model.tokenizer.decode([token]))
        spelled = token_bytes(self.model.tokenizer, token) if "\ufffd" in text else text.encode()
        return {"token": text, "logprob": logprob, "bytes": list(spelled)}


def usage(prompt: int, written: int) -> Document:
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def _call(call: CalledTool) -> Document:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _delta(part: AnswerPart, choice: Choice) -> Document:
    """Of a call its name comes first, with no arguments yet; then pieces of them."""
    if part.text:
        return {"content": part.text}
    new: Document = {"function": {"arguments": part.arguments}}
    if part.name:
        new = _call(CalledTool(part.name, id=choice.calls[part.number].id))
    return {"tool_calls": [{"index": part.number, **new}]}
