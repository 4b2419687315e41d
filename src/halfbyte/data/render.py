"""Render rows to text by the tokenizer's own chat template, and mark exactly what the model itself must write.

Why: a label on the wrong side of a template's header teaches the model to write headers, and one end-of-turn token too
few teaches it never to stop. Few templates have `{% generation %}`, so the span is measured on renderings: it opens
where the generation prompt ends, and closes with the end-of-turn token after the assistant's text. That text is found
by rendering the row again with another text in its place: what differs is it, whatever the template strips, rewrites
or adds elsewhere.
Cost: two renderings a row; one more for a turn that the template does not copy verbatim, one or two for each earlier
turn under mask assistant.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from halfbyte.data.formats import Message, Row
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from halfbyte.recipe_data import Data

_HEADER_CHARS = 16  # so much of the generation prompt's end must stand before a turn, where the template rewrites
_PRIVATE_USE = range(0xE000, 0xF900)  # characters that no text has, and that no template strips


@dataclass(frozen=True)
class Rendered:
    """One row as text, with the spans of it that are labelled."""

    where: str
    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters [start, stop), ascending, apart."""
    prompt: str
    """What generation starts from; nearly always `text` up to the last assistant turn."""
    completion: str
    ends: bool
    """Whether an end of text must be appended: the text has no end-of-turn token of its own."""
    opens: bool = False
    """Whether the tokenizer's own first token (a BOS) belongs in front; a chat template writes its own."""


class Refused(Exception):
    """Why one row cannot be rendered; collected by the caller."""


class Renderer:
    """Rows to text and spans, by one chat template, or end to end where there is none.

    Raises:
        DataError: a chat template in the recipe that cannot be read.
    """

    def __init__(self, tokenizer: Any, data: Data) -> None:
        self._tokenizer = tokenizer
        self._mask = data.mask
        self._template = chat_template(tokenizer, data)
        self._tools: Any = None
        self._counts: Counter[str] = Counter()
        added = {t.content: t for t in tokenizer.added_tokens_decoder.values() if t.content.strip()}
        special = {c for c, t in added.items() if t.special} | set(tokenizer.all_special_tokens)
        # A token that takes in the white space on its right takes it into its span.
        self._endings = _any_of({c: c in added and added[c].rstrip for c in special | set(added)})
        self._special = _any_of(dict.fromkeys(special, False))
        self._has_prompt = self._template is not None and self._heeds_generation_prompt()

    def render(self, row: Row) -> Rendered:
        """
        Raises:
            Refused: the template cannot render this row, or not so that its assistant texts can be found.
            DataError: messages, and no chat template.
        """
        if row.messages is not None:
            if self._template is None:
                raise DataError(
                    "the rows are messages, and this tokenizer has no chat template.",
                    fix="data.chat_template: a file with one, or rows of prompt and completion",
                )
            return self._chat(row.where, row.messages, row.tools)
        if row.text is not None:
            self._count_special((row.text,))
            return Rendered(row.where, row.text, ((0, len(row.text)),), "", row.text, ends=True, opens=True)
        prompt, completion = row.prompt or "", row.completion or ""
        if self._template is not None:
            return self._chat(row.where, (Message("user", prompt), Message("assistant", completion)))
        self._count_special((prompt, completion))
        start, stop = len(prompt), len(prompt) + len(completion)
        span = (0 if self._mask == "all" else start, stop)
        return Rendered(row.where, prompt + completion, (span,), prompt, completion, ends=True, opens=True)

    def notices(self) -> list[str]:
        """What the user should know of the rows rendered so far, each with its count."""
        return [f"{n:,} {'row' if n == 1 else 'rows'}: {what}" for what, n in self._counts.items() if n]

    def _chat(self, where: str, messages: tuple[Message, ...], tools: tuple[Any, ...] | None = None) -> Rendered:
        self._tools = tools
        last = len(messages) - 1
        text = self._apply(messages)
        start, stop, prompt = self._turn(text, messages, last)
        ending = self._endings.search(text, stop)
        mark = text[stop : ending.end()] if ending else ""
        if not ending:  # no token ends the turn: what the template writes after it would keep the model from stopping
            text = text[:stop]
        spans: list[tuple[int, int]] = []
        if self._mask == "assistant":
            spans = [self._earlier(text, messages, i, mark) for i in range(last) if _is_trained(messages[i])]
        if self._mask == "all":
            spans = [(0, len(text))]
        elif messages[last].train:
            spans.append((start, stop + len(mark)))
        if any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
            raise Refused("the chat template does not write the messages in their order")
        self._count_special(m.content for m in messages)
        for role in {m.role for m in messages if m.role != "assistant" and m.content.strip() not in text}:
            self._counts[f"the chat template changes or leaves out the text of a {role} message"] += 1
        return Rendered(where, text, tuple(spans), prompt, messages[last].content, ends=not ending)

    def _earlier(self, text: str, messages: tuple[Message, ...], i: int, mark: str) -> tuple[int, int]:
        start, stop, _ = self._turn(text, messages, i)
        if mark and text.startswith(mark, stop):
            return start, stop + len(mark)
        self._counts["no end-of-turn token after an earlier assistant turn; only its text is labelled"] += 1
        return start, stop

    def _turn(self, text: str, messages: tuple[Message, ...], i: int) -> tuple[int, int, str]:
        """Of turn i: where what the model must write opens, where its text closes, and the prompt before it."""
        content = messages[i].content
        prompt = self._apply(messages[:i], prompt=True) if i else ""
        follows = bool(i) and text.startswith(prompt)
        if follows and self._has_prompt and text.startswith(content, len(prompt)):
            return len(prompt), len(prompt) + len(content), prompt

        other = next(c for c in map(chr, _PRIVATE_USE) if c not in content)
        changed = self._apply((*messages[:i], Message("assistant", other), *messages[i + 1 :]))
        start = common_length(text, changed)
        stop = len(text) - common_length(text[start:][::-1], changed[start:][::-1])
        if other not in changed or start >= stop:
            raise Refused(f"messages[{i}]: the chat template does not write the text of this assistant message")

        # Between prompt and text: white space, or an empty block of thoughts. The model writes that too, unless it is
        # the header of the turn in a template that knows no generation prompt.
        if follows and len(prompt) <= start and (self._has_prompt or not text[len(prompt) : start].strip()):
            return len(prompt), stop, prompt
        if not i:
            return start, stop, text[:start]
        if self._has_prompt and i == len(messages) - 1:
            self._counts["the generation prompt is not how the chat template begins the row"] += 1
        # What came before is rewritten; the prompt's end still tells which white space before the text is the model's.
        for opens in range(len(text[:start].rstrip()), start):
            if opens and prompt.endswith(text[max(0, opens - _HEADER_CHARS) : opens]):
                return opens, stop, prompt
        return start, stop, prompt if self._has_prompt else text[:start]

    def _apply(self, messages: Sequence[Message], *, prompt: bool = False) -> str:
        chat = [m.to_template() for m in messages]
        try:
            text: str = self._tokenizer.apply_chat_template(
                chat, tools=self._tools, chat_template=self._template, tokenize=False, add_generation_prompt=prompt
            )
        except TemplateSyntaxError as error:
            raise DataError(
                f"the chat template cannot be read: {error.message} (line {error.lineno}).",
                fix="data.chat_template: a file with a template that can",
            ) from None
        except (TemplateError, TypeError, ValueError) as error:
            raise Refused(f"the chat template refuses it: {error}") from None
        return text

    def _heeds_generation_prompt(self) -> bool:
        """Some templates need none: nothing but white space stands between a user's turn and the assistant's text."""
        asked = (Message("user", "a"),)
        try:
            return self._apply(asked) != self._apply(asked, prompt=True)
        except Refused:
            return True

    def _count_special(self, texts: Iterable[str]) -> None:
        if any(self._special.search(t) for t in texts):
            self._counts["the text holds a special token of this tokenizer, and is read as that token"] += 1


def common_length(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items two sequences have in common at their start."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _is_trained(message: Message) -> bool:
    return message.role == "assistant" and message.train


def _any_of(words: dict[str, bool]) -> re.Pattern[str]:
    """Any of these words, the longest first; with the white space after it where the value is True."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(re.escape(w) + (r"\s*" if words[w] else "") for w in longest_first) or r"(?!)")


def chat_template(tokenizer: Any, data: Data) -> str | None:
    """The chat template as Jinja text: the recipe's (text, or a file of it), else the tokenizer's own, else None."""
    asked = data.chat_template
    if asked is None:
        if not tokenizer.chat_template:
            return None
        try:
            own: str = tokenizer.get_chat_template()
        except ValueError as error:
            raise DataError(
                f"the tokenizer has several chat templates and no default one: {error}",
                fix="data.chat_template: a file with the one to use",
            ) from None
        return own
    if "{" in asked:
        return asked
    try:
        return Path(asked).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.chat_template {asked!r} is neither Jinja text nor a file that can be read ({error}).",
            fix="data.chat_template: chat.jinja",
        ) from None
