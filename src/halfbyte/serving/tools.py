"""Calls of tools: how a chat template has a model write them, a grammar for them, and which parts of a text are calls.

Two forms: JSON between `<tool_call>` marks (Qwen, Hermes, SmolLM), where `arguments` are, and several calls follow each
other; and Llama 3's, whose whole answer is `{"name": ..., "parameters": ...}`, or several with `; ` between them.
What: the reader takes a text as it grows. A call's name comes first, once it is whole, then pieces of its arguments;
what only looks like a call is text. Its parts are the same however the text was cut.
Source: the templates in the models' tokenizer_config.json; llguidance's Lark syntax for grammars with JSON inside.
Cost: a table of a tokenizer's tokens, about a second, once for each tokenizer; then some 50 microseconds a token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch

from halfbyte.errors import DataError
from halfbyte.types import Document, Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from torch import Tensor

    from halfbyte.serving.models import ServedModel

_LOCK = Lock()
_TABLES: WeakKeyDictionary[Tokenizer, dict[int, LLTokenizer]] = WeakKeyDictionary()  # by a tokenizer and a vocabulary


MOST_CALLS = 16  # of an answer that has to be calls
_STRING = r'"(?:[^"\\]|\\.)*"'
_NAME = re.compile(rf'\s*\{{\s*"name"\s*:\s*({_STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)', re.DOTALL)
_BRACE = re.compile(r"\s*\{\s*")
# Some models would write line ends without end where JSON allows any number of them.
SPACES = {"whitespace_pattern": r"[ ]?|\n[ ]{0,12}"}


@dataclass(frozen=True)
class CallForm:
    """What is before and after a call, what its arguments are called, and what is between calls."""

    begin: str
    end: str
    arguments: str
    between: str


MARKED = CallForm("<tool_call>", "</tool_call>", "arguments", "\n")
LLAMA = CallForm("", "", "parameters", "; ")


def form_of(template: str) -> CallForm:
    """As a chat template has it; marked calls where it does not say."""
    return LLAMA if '"parameters"' in template and MARKED.begin not in template else MARKED


@dataclass(frozen=True)
class CallRules:
    """Which calls an answer may have."""

    tools: Sequence[Document] = ()  # as OpenAI has them
    must: bool = False  # it has to be calls, else it may be
    several: bool = True  # more than one
    schema: Document | None = None  # of an answer without calls

    @property
    def bound(self) -> bool:
        """Whether a grammar is needed."""
        strict = any(tool["function"].get("strict") for tool in self.tools)
        return self.must or strict or self.schema is not None or bool(self.tools and not self.several)


def grammar(form: CallForm, rules: CallRules) -> str:
    """For llguidance, in its Lark syntax: of an answer that is bound."""
    line = "\n" if form.begin else ""
    begin, end = (json.dumps(mark) for mark in (form.begin + line, line + form.end))
    one = f"call {end}"
    more = f"({json.dumps(form.between)} {begin} {one}){{0,{MOST_CALLS - 1}}}" if rules.several else ""
    lines = [f"calls: {begin} {one} {more}", "call: " + " | ".join(f"call{i}" for i in range(len(rules.tools)))]
    lines += [_function(i, tool, form.arguments) for i, tool in enumerate(rules.tools)]
    if rules.schema is not None:
        start = "calls | answer" if rules.tools else "answer"
        lines = [f"answer: {_json(rules.schema)}", *(lines if rules.tools else [])]
    elif rules.must:
        start = "calls"
    elif form.begin:  # any text, then calls from the first mark on
        start = f"TEXT | mark {json.dumps(line)} {one} {more}"
        lines += ["TEXT: /(?s:.*)/", f"mark[lazy]: TEXT {json.dumps(form.begin)}"]
    else:
        start = "calls | TEXT"
        lines.append(r"TEXT: /([^\s{](?s:.*))?/")
    return "\n".join([f"start: {start}", *lines])


def constraint(table: LLTokenizer, form: CallForm, rules: CallRules) -> Grammar:
    """What an answer is bound to. Raises DataError: a schema that cannot be followed, with the field that has it."""
    try:
        return Grammar(table, grammar(form, rules))
    except DataError:
        alone = {"response_format": CallRules(schema=rules.schema)} if rules.schema is not None else {}
        alone |= {f"tools: {tool['function']['name']}": CallRules([tool], must=True) for tool in rules.tools}
        for field_, one in alone.items():
            try:
                Grammar(table, grammar(form, one))
            except DataError as error:
                raise DataError(f"{field_}: {error.message}") from None
        raise


def _function(number: int, tool: Document, key: str) -> str:
    function = tool["function"]
    parameters = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    head = f'{{"name": {json.dumps(function["name"])}, "{key}": '
    return f'call{number}: {json.dumps(head)} {_json(parameters)} "}}"'


def _json(schema: Document) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': SPACES})}"


@dataclass(frozen=True)
class AnswerPart:
    """What is new of an answer: text; or of call `number` its name, or a piece of its arguments."""

    text: str = ""
    number: int = 0
    name: str = ""
    arguments: str = ""


@dataclass
class CallReader:
    """A text as it grows, in parts."""

    form: CallForm
    count: int = 0
    _rest: str = ""
    _state: str = "text"
    _scan: _JsonScan = field(default_factory=lambda: _JsonScan())

    def add(self, new: str, *, ended: bool = False) -> list[AnswerPart]:
        """ended: nothing comes after it."""
        self._rest += new
        parts: list[AnswerPart] = []
        before: tuple[str, int] | None = None
        while before != (before := (self._state, len(self._rest))):
            match self._state:
                case "text":
                    parts += self._text(ended) if self.form.begin else self._first(ended)
                case "head":
                    parts += self._head(ended)
                case "value":
                    parts += self._value()
                case "tail":
                    self._tail(ended)
                case "between":  # of Llama's form
                    self._rest = self._rest.lstrip("; \n")
                    self._state = "text" if self._rest else "between"
                case _:
                    parts += self._said(len(self._rest))
        return parts

    def _text(self, ended: bool) -> list[AnswerPart]:
        """Up to where a call may begin, without the spaces before it."""
        rest, mark = self._rest, self.form.begin
        at = rest.find(mark)
        if at >= 0:
            self._state = "head"
            return self._said(len(rest[:at].rstrip()))
        held = next((n for n in range(min(len(mark) - 1, len(rest)), 0, -1) if rest.endswith(mark[:n])), 0)
        return self._said(len(rest) if ended else len(rest[: len(rest) - held].rstrip()))

    def _first(self, ended: bool) -> list[AnswerPart]:
        """Of Llama's form: whether the answer is a call; once it is text no call comes any more."""
        if not _may_be_call(self._rest) or (ended and not self._rest.strip()):
            self._state = "plain"
        elif self._rest.strip():
            self._state = "head"
        return []

    def _said(self, size: int) -> list[AnswerPart]:
        """So many characters are text, but for spaces between calls and after them."""
        text, self._rest = self._rest[:size], self._rest[size:]
        return [AnswerPart(text)] if text and not (self.count and text.isspace()) else []

    def _head(self, ended: bool) -> list[AnswerPart]:
        """A call's name; where it has other keys first, the whole of it."""
        mark, end = self.form.begin, self.form.end
        before = self._rest.index(mark) + len(mark)
        inside = self._rest[before:]
        head = _NAME.match(inside)
        if head is not None and (name := _decoded(head[1])):
            self._rest, self._state, self._scan = inside[head.end() :], "value", _JsonScan()
            return [self._begun(name)]
        closed = inside.find(end) if end else -1
        if closed < 0 and not ended and (end or _may_be_call(inside)):
            return []
        body = inside[:closed] if closed >= 0 else inside
        size = before + len(body) + (len(end) if closed >= 0 else 0)
        self._state = "text" if mark else "plain"
        try:
            call = json.loads(body)
            name, arguments = call["name"], call.get("arguments", {}) if mark else call["parameters"]
            if not isinstance(name, str) or not name:
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError):
            return self._said(size)
        self._rest = self._rest[size:]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        return [self._begun(name), AnswerPart(number=self.count - 1, arguments=text)]

    def _begun(self, name: str) -> AnswerPart:
        self.count += 1
        return AnswerPart(number=self.count - 1, name=name)

    def _value(self) -> list[AnswerPart]:
        """New characters of arguments, up to their end."""
        size = self._scan.add(self._rest)
        new, self._rest = self._scan.sent(self._rest[:size]), self._rest[size:]
        if self._scan.whole:
            self._state = "tail"
        return [AnswerPart(number=self.count - 1, arguments=new)] if new else []

    def _tail(self, ended: bool) -> None:
        """The end of a call, which says nothing."""
        end = self.form.end or "}"
        at = self._rest.find(end)
        if at >= 0:
            self._rest, self._state = self._rest[at + len(end) :], "text" if self.form.end else "between"
        elif ended:
            self._rest = ""


def _decoded(string: str) -> str:
    """What a JSON string says; nothing where it is none."""
    try:
        return str(json.loads(string, strict=False))
    except ValueError:
        return ""


def _may_be_call(text: str) -> bool:
    """Whether a text, or what it may become, begins as a call does."""
    begun, wanted = _BRACE.sub("{", text.lstrip(), count=1), '{"name"'
    return wanted.startswith(begun[: len(wanted)])


@dataclass
class _JsonScan:
    """One JSON value, character by character. An object goes on as it comes; a string once it is whole."""

    depth: int = 0
    string: bool = False
    escape: bool = False
    whole: bool = False
    held: str = ""

    def add(self, text: str) -> int:
        """How many characters belong to it."""
        for n, letter in enumerate(text):
            if self.string:
                self.string = self.escape or letter != '"'
                self.escape = letter == "\\" and not self.escape
            elif letter == '"':
                self.string = True
            elif letter in "{[":
                self.depth += 1
            elif letter in "}]":
                self.depth -= 1
            if self.depth < 0:  # after a number or a word
                self.whole = True
                return n
            if self.depth == 0 and not self.string and letter in '}]"':
                self.whole = True
                return n + 1
        return len(text)

    def sent(self, new: str) -> str:
        self.held += new
        if self.held[:1] in ("{", "["):
            return new
        if not self.whole:
            return ""
        if self.held.startswith('"'):
            return _decoded(self.held)
        return "{}" if self.held.strip() == "null" else self.held


class Grammar:
    """A `writing.sampling.Constraint`: one text's way through a grammar in llguidance's Lark syntax. Raises DataError:
    what is wrong with a schema in it."""

    def __init__(self, table: LLTokenizer, grammar: str) -> None:
        from llguidance import LLMatcher

        self._table, self._grammar = table, grammar
        self._matcher = LLMatcher(table, grammar, log_level=0)
        if self._matcher.is_error():
            text = re.split(r"\n\s+\d+ \| ", self._matcher.get_error())[0]  # then lines of our own grammar follow
            why = " ".join(text.rpartition("failed to compile JSON schema: ")[2].split())
            raise DataError(f"the schema cannot be followed: {why[:300].removesuffix('.')}.")

    def copy(self) -> Grammar:
        return Grammar(self._table, self._grammar)

    def allowed(self, size: int) -> Tensor:
        """Which of so many tokens may come next: (V,) bool."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        flags = np.unpackbits(bits, bitorder="little").astype(bool)[:size]
        allowed = torch.zeros(size, dtype=torch.bool)
        allowed[: len(flags)] = torch.from_numpy(flags)
        return allowed

    def take(self, token: int) -> bool:
        """Go on by a token; whether the text is whole."""
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"token {token} was not allowed: {self._matcher.get_error()}")
        return bool(self._matcher.is_stopped())


def table_of(model: ServedModel, vocabulary: int) -> LLTokenizer:
    """The tokens of a model's tokenizer as llguidance wants them."""
    from llguidance.hf import from_tokenizer

    with _LOCK:
        tables = _TABLES.setdefault(model.tokenizer, {})
        if vocabulary not in tables:
            if not model.tokenizer.is_fast:
                raise DataError("the tokenizer has no table of its tokens: no grammar can be followed.")
            tables[vocabulary] = from_tokenizer(model.tokenizer, n_vocab=vocabulary, eos_token=sorted(model.stop_ids))
        return tables[vocabulary]
