"""What goes back: OpenAI's objects, whole and in chunks."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from starlette.responses import Response

from halfbyte.serving.http.wire import Refusal
from halfbyte.types import Document
from halfbyte.writing.sampling import TokenLogprob
from halfbyte.writing.text import TextChunk

if TYPE_CHECKING:
    from halfbyte.serving.models import ServedModel

CALL = "<tool_call>"
_CALLS = re.compile(r"<tool_call>\s*(\{.*?\})\s*(?:</tool_call>|\Z)", re.DOTALL)


class Json(Response):
    media_type = "application/json"

    def __init__(self, content: Document, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(json.dumps(content).encode(), status_code, headers)

    @classmethod
    def of(cls, refusal: Refusal, *, close: bool = False) -> Json:
        headers = {**refusal.headers, **({"Connection": "close"} if close else {})}
        return cls(refusal.body, refusal.status, headers)


@dataclass
class Choice:
    """One text as it comes in."""

    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: str | None = None

    def add(self, chunk: TextChunk) -> None:
        self.text += chunk.text
        self.tokens = chunk.tokens
        self.logprobs += chunk.logprobs
        self.finish = chunk.finish or self.finish


@dataclass(frozen=True)
class Form:
    """How the answers to one request look.

    Args:
        chat: messages, or plain texts. likely: tokens reported beside each; None: none. calls: whether to look for
            calls of tools.
    """

    model: ServedModel
    chat: bool
    likely: int | None = None
    calls: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], prompt_tokens: int) -> Document:
        return self._head("chat.completion" if self.chat else "text_completion") | {
            "choices": [self._choice(i, choice) for i, choice in enumerate(choices)],
            "usage": usage(prompt_tokens, sum(choice.tokens for choice in choices)),
        }

    def _head(self, kind: str) -> Document:
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model.name}

    def _choice(self, index: int, choice: Choice) -> Document:
        logprobs = self._logprobs(choice.logprobs) if self.likely is not None else None
        if not self.chat:
            return {"index": index, "text": choice.text, "logprobs": logprobs, "finish_reason": choice.finish}
        message: Document = {"role": "assistant", "content": choice.text, "refusal": None}
        finish = choice.finish
        if self.calls and (calls := tool_calls(choice.text)):
            message |= {"content": choice.text[: choice.text.find(CALL)].strip() or None, "tool_calls": calls}
            finish = "tool_calls"
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def chunk(
        self, index: int, delta: Document | str, logprobs: Sequence[TokenLogprob] = (), finish: str | None = None
    ) -> Document:
        """delta: of a message, or the new text."""
        reported = self._logprobs(logprobs) if self.likely is not None and logprobs else None
        content = {"delta": delta} if self.chat else {"text": delta}
        choice = {"index": index, **content, "logprobs": reported, "finish_reason": finish}
        return self._head("chat.completion.chunk" if self.chat else "text_completion") | {"choices": [choice]}

    def last(self, prompt_tokens: int, tokens: int) -> Document:
        """The chunk with the usage, which has no choice."""
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        return head | {"choices": [], "usage": usage(prompt_tokens, tokens)}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Document:
        if self.chat:
            return {
                "content": [
                    self._token(one.token, one.logprob) | {"top_logprobs": [self._token(*pair) for pair in one.likely]}
                    for one in logprobs
                ],
                "refusal": None,
            }
        names = [self._text(one.token) for one in logprobs]
        offsets = list(accumulate(map(len, names), initial=0))[:-1]
        likely = [{self._text(token): value for token, value in one.likely} for one in logprobs]
        return {
            "tokens": names,
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": likely if self.likely else None,
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return str(self.model.tokenizer.decode([token]))

    def _token(self, token: int, logprob: float) -> Document:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage(prompt: int, written: int) -> Document:
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def tool_calls(text: str) -> list[Document]:
    """Calls as Qwen, Hermes and SmolLM write them: JSON between <tool_call> marks. Empty if one is broken."""
    calls: list[Document] = []
    for match in _CALLS.finditer(text):
        try:
            call = json.loads(match[1])
            name, arguments = str(call["name"]), call.get("arguments", {})
        except (ValueError, KeyError, TypeError, AttributeError):
            return []
        function = {"name": name, "arguments": arguments if isinstance(arguments, str) else json.dumps(arguments)}
        calls.append({"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function})
    return calls
