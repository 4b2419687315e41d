"""Render rows to text by the chat template, and mark exactly what the model itself must write.

Why: a label on the wrong side of a template's header teaches the model to write headers, and one end-of-turn token too
few teaches it never to stop. Few templates have `{% generation %}`, so spans are measured on renderings:
- a turn opens where the rendering of all before it, with the generation prompt, ends; where a longer conversation
  rewrites its beginning (Qwen3 and gpt-oss drop old thoughts), at the last generation prompt before its own text;
- its text closes where a rendering with another text in its place is the same again: whatever the template strips,
  rewrites or adds elsewhere;
- the end-of-turn token after it is always part of it;
- where the last turn begins with other marks of thoughts than generation does (DeepSeek V3.2 writes `</think>` and asks
  behind `<think></think>`), those of generation stand in the row.
Cost: two renderings a row; one more for a turn that the template does not copy verbatim, one to three for each earlier
turn under mask assistant, two more for one that calls tools.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jinja2 import TemplateSyntaxError
from numpy.typing import NDArray

from halfbyte.data.encoding import thoughts
from halfbyte.data.encoding.chatml import chat_template
from halfbyte.data.encoding.tally import Tally
from halfbyte.data.reading.formats import ChatMessage, Row
from halfbyte.data.reading.pairs import common_length
from halfbyte.errors import DataError, first_line
from halfbyte.recipe.data import Data
from halfbyte.system import limits
from halfbyte.types import Document, Tokenizer

_TAIL_CHARS = 8  # characters of a prompt's end that are searched for, where the template rewrites what came before
_PRIVATE_USE = range(0xE000, 0xF900)  # characters that no text holds and no template strips
_UNWRITTEN = "messages[{i}]: the chat template does not write the {what} of this {role} message"
_TOOLS_FIX = "data.chat_template: chatml-tools (or qwen-tools, llama3-tools)"
_QUESTION, _ANSWER = ChatMessage("user", "a"), ChatMessage("assistant", chr(_PRIVATE_USE[0]))


@dataclass(frozen=True)
class RenderedRow:
    """One row as text, with the spans of it that are labelled."""

    where: str
    text: str
    spans: tuple[tuple[int, int], ...]
    """Characters [start, stop), ascending, apart."""
    prompt: str
    """What generation starts from; nearly always `text` up to the last assistant turn."""
    completion: str
    """The reference answer; empty for plain text, which asks nothing."""
    ends: bool
    """Whether an end of text must be appended: the text has no end-of-turn token of its own."""
    opens: bool = False
    """Whether the tokenizer's own first token (a BOS) belongs in front; a chat template writes its own."""
    weights: NDArray[np.float64] | None = None
    """What each character counts for, and what is appended: (characters + 1,); None: all alike."""


class Refused(Exception):
    """Why one row cannot be rendered. The caller collects them."""


class Renderer:
    """Rows to text and spans, by one chat template, or end to end where there is none. Raises DataError: a chat
    template in the recipe that cannot be read."""

    def __init__(self, tokenizer: Tokenizer, data: Data) -> None:
        self._tokenizer = tokenizer
        self._mask = data.mask
        self._patterns = [(re.compile(pattern), weight) for pattern, weight in data.weights.items()]
        self._template, name = chat_template(tokenizer, data), data.chat_template or "the tokenizer's chat template"
        self._named = "data.chat_template" if "{" in name else name
        self._thoughts = data.thoughts
        self.seen = Tally()
        """Counts of what the user should know of the rows."""
        self._tools: tuple[Document, ...] | None = None
        added = {t.content: t for t in tokenizer.added_tokens_decoder.values() if t.content.strip()}
        special = {c for c, t in added.items() if t.special} | set(tokenizer.all_special_tokens)
        # A token that swallows the white space on its right has it in its span.
        self._endings = _any_of({c: c in added and added[c].rstrip for c in special})
        self._added = _any_of({c: added[c].rstrip for c in added})
        self._special = _any_of(dict.fromkeys(special, False))
        self._lead = ""
        self._header = self._generation_prompt() if self._template is not None else ""
        self._ends = self._end_marks() if self._template is not None else set()
        self._form = self._form_of_thoughts() if self._template is not None else "text"

    def render(self, row: Row) -> RenderedRow:
        """Raises Refused: the template cannot render this row, or not so that its assistant texts can be found.
        DataError: messages, and no chat template."""
        self._tools = row.tools
        if row.messages is not None:
            if self._template is None:
                raise DataError(
                    "the rows are messages, and this tokenizer has no chat template.",
                    fix="data.chat_template: a file with one, or rows of prompt and completion",
                )
            return self._chat(row.where, row.messages)
        prompt, words = (row.prompt or "", row.completion or "") if row.text is None else ("", row.text)
        if self._template is not None and row.text is None:
            return self._chat(row.where, (ChatMessage("user", prompt), ChatMessage("assistant", words)))
        self._count_special((prompt, words))
        text = prompt + words
        spans = ((0 if self._mask == "all" else len(prompt), len(text)),)
        weights, answer = self._weights(text, spans), words if row.text is None else ""
        return RenderedRow(row.where, text, spans, prompt, answer, ends=True, opens=True, weights=weights)

    def end_tokens(self) -> frozenset[int]:
        """Ids of the tokens that end an assistant's turn, or a text."""
        names = [*self._ends, *(t for t in [self._tokenizer.eos_token] if t is not None)]
        return frozenset(self._tokenizer.convert_tokens_to_ids(name) for name in names)

    def _chat(self, where: str, given: tuple[ChatMessage, ...]) -> RenderedRow:
        last, messages = len(given) - 1, self._thinking(where, given)
        text = self._apply(messages)
        for i in range(last):
            self._check_calls(text, messages, i)
        start, stop, prompt = self._turn(text, messages, last)
        if begins := self._other_marks(text, prompt):
            start = begins[1]
        elif self._header and (start < len(prompt) or not text.startswith(prompt)):
            self.seen.notices["the generation prompt is not how the chat template begins the row"] += 1
        ending = self._endings.search(text, stop) or self._added.search(text, stop)
        end, whole = ending.end() if ending else stop, text
        if not ending:  # no token ends the turn: what the template writes after it would keep the model from stopping
            text = text[:stop]
        answers = [i for i, m in enumerate(messages[:last]) if m.role == "assistant" and m.train]
        every = {i for i, m in enumerate(messages) if m.trains and m.role != "assistant"}
        every |= {*answers} if self._mask != "completion" else set()
        of = {i: (0, len(text)) for i in sorted(every)}
        if self._mask != "all":
            of = {i: self._earlier(whole, messages, i, ends=bool(ending)) for i in sorted(every)}
        if messages[last].train:
            of[last] = (0, len(text)) if self._mask == "all" else (start, end)
        self._check_thoughts(where, text, messages, of)
        spans = [(0, len(text))] if self._mask == "all" else [*of.values()]
        weights = self._weights(text, spans)
        if any(given[i].weight is not None or given[i].parts for i in of):
            of_messages = self._weights_of_messages(whole, given, messages, of)[: len(text) + 1]
            weights = _unless_alike(of_messages if weights is None else weights * of_messages)
        if self._mask == "completion" and answers:
            self.seen.notices[
                "of several assistant turns only the last is trained; data.mask: assistant trains each"
            ] += 1
        if any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
            raise Refused("the chat template does not write the messages in their order")
        self._notice(text, messages, spans)
        if begins:
            (first, after), marks = begins, prompt[begins[0] :]
            more, text = first + len(marks) - after, text[:first] + marks + text[after:]
            spans = [(a + more * (a >= after), b + more * (b > first)) for a, b in spans]
            if weights is not None:
                weights = np.concatenate([weights[:first], np.ones(len(marks)), weights[after:]])
        words = messages[last].content
        return RenderedRow(where, text, tuple(spans), prompt, words, ends=not ending, weights=weights)

    def _other_marks(self, text: str, prompt: str) -> tuple[int, int] | None:
        """Where the last turn begins otherwise than generation, by marks of thoughts alone: from where to where in the
        text those at the prompt's end belong. Raises Refused: they open thoughts that the text does not close."""
        marks = "" if text.startswith(prompt) else str(thoughts.AT_END.findall(prompt)[0])
        first = len(prompt) - len(marks)
        if not marks or not text.startswith(prompt[:first]):
            return None
        opens, closes = thoughts.MARKS.findall(text[first:])[0]
        if thoughts.CLOSE in marks:
            return None if opens and not closes else (first, first + len(opens + closes))
        if thoughts.CLOSE not in text[first:]:
            what = f"{self._named} asks for an answer behind {marks.strip()}, and writes this one without"
            raise Refused(f"{what}; data.chat_template: one that does not, as chatml-tools")
        return first, first + len(opens)

    def _weights(self, text: str, spans: Sequence[tuple[int, int]]) -> NDArray[np.float64] | None:
        """What patterns say that each character of the spans counts for, and what is appended: (characters + 1,)."""
        if not self._patterns:
            return None
        weights = np.ones(len(text) + 1)
        for start, stop in spans:
            ends = [m for m in self._endings.finditer(text, start, stop) if m.end() == stop]
            for pattern, weight in self._patterns:
                for match in pattern.finditer(text, start, ends[0].start() if ends else stop):
                    first, last = match.span(min(1, pattern.groups))
                    weights[max(0, first) : max(0, last)] *= weight
        return _unless_alike(weights)

    def _weights_of_messages(
        self, text: str, given: Sequence[ChatMessage], messages: tuple[ChatMessage, ...],
        spans: Mapping[int, tuple[int, int]],
    ) -> NDArray[np.float64]:  # fmt: skip
        """The same by what the messages of these spans say, as they were `given`."""
        weights = np.ones(len(text) + 1)
        for i, (start, stop) in spans.items():
            message, mark = given[i], _unused(given[i].content + messages[i].content)
            if self._mask == "all":
                if message.parts or message.weight not in (None, 0, 1):
                    raise Refused(f"data.mask all trains every token alike, and messages[{i}] has weights of its own")
                continue
            weights[start : stop + 1] = 1.0 if message.weight is None else message.weight
            if message.parts:
                other = replace(messages[i], content=mark), mark
                first, last = self._text_of(text, messages, i, other)
                words = message.content.strip()
                at = text.rfind(words, first if message.content == messages[i].content else start, last)
                if at < 0:
                    raise Refused(f"messages[{i}]: the chat template changes its text, so its parts are not found")
                at -= message.content.index(words)
                for begins, ends, weight in message.parts:
                    weights[max(start, at + begins) : min(stop, at + ends)] = weight
        return weights

    def _thinking(self, where: str, messages: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
        """The messages with their thoughts as `data.thoughts` leaves them, and as the template takes them."""
        asked = max((i for i, m in enumerate(messages) if m.role == "user"), default=0)
        talk = [*messages]
        for i, message in enumerate(messages):
            thought = thoughts.of(message)
            if message.role != "assistant" or (thought.text is None and thought.is_whole):
                continue
            if not thought.is_whole:
                self.seen.open_thoughts.add(f"{where}, messages[{i}]")
            elif self._thoughts == "strip":
                message = thoughts.without(message)
            elif self._thoughts == "last" and i < asked:
                message = replace(thoughts.without(message), train=False)
            elif not str(thought.text).strip():
                self.seen.empty_thoughts.add(f"{where}, messages[{i}]")
            talk[i] = thoughts.put(message, self._form)
        return tuple(talk)

    def _check_thoughts(
        self, where: str, text: str, messages: tuple[ChatMessage, ...], spans: Mapping[int, tuple[int, int]]
    ) -> None:
        """Count messages that are trained, by their spans, and whose thoughts the template has not written."""
        for i, (start, stop) in spans.items():
            thought = (thoughts.of(messages[i]).text or "").strip()
            closed = thoughts.CLOSE in self._header  # generation begins behind the thoughts
            if messages[i].role == "assistant" and thought and (closed or thought not in text[start:stop]):
                self.seen.lost_thoughts.add(f"{where}, messages[{i}], by {self._named}")

    def _form_of_thoughts(self) -> thoughts.Form:
        """How the template takes an assistant's thoughts, by what it writes of some."""
        mark, answer = _ANSWER.content, ChatMessage("assistant", "b")
        try:
            if mark in self._apply((_QUESTION, replace(answer, more=dict.fromkeys(thoughts.KEYS, mark)))):
                return "keys"
            inline = replace(answer, content=f"{thoughts.OPEN}\n{mark}\n{thoughts.CLOSE}\n\nb")
            return "text" if mark in self._apply((_QUESTION, inline)) else "none"
        except (Refused, DataError):
            return "text"

    def _check_calls(self, text: str, messages: tuple[ChatMessage, ...], i: int) -> None:
        """Refuse a turn whose tool calls the template leaves out: an empty turn would stand in their place."""
        if "tool_calls" in messages[i].more:
            changed, _ = _other(messages[i])
            if self._apply((*messages[:i], changed, *messages[i + 1 :])) == text:
                raise Refused(f"{_UNWRITTEN.format(i=i, what='tool calls', role='assistant')}; {_TOOLS_FIX}")

    def _earlier(self, text: str, messages: tuple[ChatMessage, ...], i: int, *, ends: bool) -> tuple[int, int]:
        """The span of a turn before the last one. `ends`: a token ends the last turn, so one ends this turn too. Of who
        is no assistant the text alone, as the model does not write its end."""
        if messages[i].role != "assistant":
            return self._text_of(text, messages, i)
        start, stop, _ = self._turn(text, messages, i)
        if "tool_calls" in messages[i].more:
            stop = self._after_calls(text, messages, i, stop)
        at = len(text) - len(text[stop:].lstrip())
        ending = (self._endings.match(text, at) or self._added.match(text, at)) if ends else None
        if ending:
            return start, ending.end()
        self.seen.notices["no end-of-turn token after an earlier assistant turn; only its text is labelled"] += 1
        return start, stop

    def _after_calls(self, text: str, messages: tuple[ChatMessage, ...], i: int, stop: int) -> int:
        """Where a turn's own text ends, given `stop`, the end of the last argument of its last tool call."""
        alone, other = self._apply(messages[: i + 1]), self._apply((*messages[:i], _other(messages[i])[0]))
        tail = alone[len(alone) - common_length(alone[::-1], other[::-1]) :]  # brackets, marks, the end of the turn
        for ending in self._endings.finditer(tail):
            if text.startswith(tail[: ending.start()], stop):
                return stop + ending.start()
        return stop

    def _turn(self, text: str, messages: tuple[ChatMessage, ...], i: int) -> tuple[int, int, str]:
        """Of turn i: where the model's own text opens, where it closes, and the prompt before it."""
        message = messages[i]
        prompt = self._apply(messages[:i], prompt=True) + self._lead if i else ""
        follows = bool(i) and text.startswith(prompt)
        if follows and not message.more and text.startswith(message.content, len(prompt)):
            return len(prompt), len(prompt) + len(message.content), prompt

        start, stop = self._text_of(text, messages, i)
        # Between prompt and text: white space, or a block of thoughts. The model writes that too; not what of them the
        # prompt has.
        if follows and len(prompt) <= stop:
            return len(prompt), stop, prompt
        # What came before is rewritten. The last header before the text is this turn's.
        opens = self._after_header(text, start)
        if opens is not None or not i:
            opens = start if opens is None else opens
            return opens, stop, text[:opens]
        # Without a header, the prompt's end still tells where the model's own text begins (white space, or the mark of
        # a call): at the place whose text before it agrees longest with the prompt's end.
        places = {*range(len(text[:start].rstrip()), start + 1), *self._places(text, prompt[-_TAIL_CHARS:], start)}
        agree = {o: common_length(prompt[::-1], text[:o][::-1]) for o in sorted(places)}
        opens = max(agree, key=lambda o: agree[o])
        return opens if agree[opens] else start, stop, prompt

    def _text_of(
        self, text: str, messages: tuple[ChatMessage, ...], i: int, by: tuple[ChatMessage, str] | None = None
    ) -> tuple[int, int]:
        """Where a message's own text, or its last tool call's arguments, are: what another one (`by`) would change."""
        message, (other, mark) = messages[i], by or _other(messages[i])
        changed = self._apply((*messages[:i], other, *messages[i + 1 :]))
        start = common_length(text, changed)
        if mark not in changed:
            what = "tool calls" if "tool_calls" in message.more else "text"
            raise Refused(_UNWRITTEN.format(i=i, what=what, role=message.role))
        return start, len(text) - common_length(text[start:][::-1], changed[start:][::-1])

    def _places(self, text: str, tail: str, start: int) -> Iterator[int]:
        """Behind each `tail` before `start`, as long as no turn ends between."""
        at = text.rfind(tail, 0, start)
        while at >= 0 and not any(end in text[at + len(tail) : start] for end in self._ends):
            yield at + len(tail)
            at = text.rfind(tail, 0, at + len(tail) - 1)

    def _after_header(self, text: str, start: int) -> int | None:
        """Behind the last generation prompt that ends at or before `start`, unless another turn ends in between."""
        if not self._header:
            return None
        at = text.rfind(self._header, 0, start)
        opens = at + len(self._header)
        return opens if at >= 0 and not any(end in text[opens:start] for end in self._ends) else None

    def _notice(self, text: str, messages: tuple[ChatMessage, ...], spans: list[tuple[int, int]]) -> None:
        self._count_special(m.content for m in messages)
        for role in {m.role for m in messages if m.role != "assistant" and m.content.strip() not in text}:
            self.seen.notices[f"the chat template changes or leaves out the text of a {role} message"] += 1
        names = [(tool.get("function") or tool).get("name") for tool in self._tools or ()]
        if any(isinstance(name, str) and name not in text for name in names):
            self.seen.notices[f"the chat template leaves out the tools; {_TOOLS_FIX}"] += 1

    def _apply(self, messages: Sequence[ChatMessage], *, prompt: bool = False) -> str:
        chat = [m.to_template() for m in messages]
        tools = None if self._tools is None else list(self._tools)
        try:
            with limits.template(self._template):
                text: str = self._tokenizer.apply_chat_template(
                    chat, tools=tools, chat_template=self._template, tokenize=False, add_generation_prompt=prompt
                )
                text.encode()  # half a surrogate pair is no text, and no token
        except TemplateSyntaxError as error:
            raise DataError(
                f"the chat template cannot be read: {error.message} (line {error.lineno}).",
                fix="data.chat_template: a file with a template that can",
            ) from None
        except limits.TooMuch as error:
            raise DataError(f"{error}.", fix="data.chat_template: a file with another template") from None
        except Exception as error:  # a template may raise anything
            raise Refused(f"the chat template refuses it: {first_line(error)}") from None
        return text

    def _generation_prompt(self) -> str:
        """The text between a user's words and an assistant's; empty if that is nothing, or only white space.

        It is what `add_generation_prompt` adds. Some templates need none. Some ignore that flag and yet write a header:
        then the header is put behind each prompt (`_lead`).
        """
        try:
            without, with_it = self._apply((_QUESTION,)), self._apply((_QUESTION,), prompt=True)
            if with_it != without:
                same = common_length(without, with_it)
                cut = [m.start() for m in self._added.finditer(with_it) if m.start() <= same]  # not inside a token
                return with_it[same:] if with_it.startswith(without) else with_it[max(cut, default=same) :]
            whole = self._apply((_QUESTION, _ANSWER))
        except Refused:
            return ""
        lead = whole[len(without) : whole.find(_ANSWER.content)] if whole.startswith(without) else ""
        self._lead = lead if lead.strip() else ""
        return self._lead

    def _end_marks(self) -> set[str]:
        """The tokens that end an assistant's turn: the last one, and one that others follow."""
        ends: set[str] = set()
        for talk in ((_QUESTION, _ANSWER), (_QUESTION, _ANSWER, _QUESTION, _ANSWER)):
            try:
                text = self._apply(talk)
            except Refused:
                continue
            ending = self._endings.search(text, max(0, text.find(_ANSWER.content)))
            ends |= {ending.group().rstrip()} if ending else set()
        return ends

    def _count_special(self, texts: Iterable[str]) -> None:
        if any(self._special.search(t) for t in texts):
            self.seen.notices["the text holds a special token of this tokenizer, and is read as that token"] += 1


def _unless_alike(weights: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """None where each character counts once: a `weight: 1` in every row says nothing."""
    return weights if bool((weights != 1).any()) else None


def _other(message: ChatMessage) -> tuple[ChatMessage, str]:
    """The same message with another text, or with other arguments of its tool calls; and that other text."""
    mark = _unused(f"{message.content}{dict(message.more)}")
    calls = message.more.get("tool_calls")
    if not calls and message.role != "assistant":
        return replace(message, content=mark), mark
    if not calls:
        return ChatMessage("assistant", mark), mark
    changed = [{**c, "function": {"name": c["function"]["name"], "arguments": {mark: mark}}} for c in calls]
    return replace(message, more={**message.more, "tool_calls": changed}), mark


def _unused(text: str) -> str:
    """A character that is not in it."""
    return next(c for c in map(chr, _PRIVATE_USE) if c not in text)


def _any_of(words: dict[str, bool]) -> re.Pattern[str]:
    """Any of these words, the longest first; with the white space after it where the value is True."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(re.escape(w) + (r"\s*" if words[w] else "") for w in longest_first) or r"(?!)")
