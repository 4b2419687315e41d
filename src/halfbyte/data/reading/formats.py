"""From a record to a row: five common formats, named by the recipe or told from the columns.

Why: the same conversation is written as `messages`, as ShareGPT's `conversations`, as Alpaca's three columns, or as a
prompt and its completion. All become messages here, or one text; a field that does not fit is named.
Source: OpenAI's chat fine-tuning files (messages, tools, weight), ShareGPT (from, value), Stanford Alpaca (instruction,
input, output), TRL's prompt and completion (texts, or lists of messages).
`reasoning_content` and `thinking` are what Qwen3's and gpt-oss's chat
templates call an assistant's thoughts; a message may use either name for any model.
Cost: a few microseconds a row.
"""

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

from halfbyte.data.reading.problems import BadRow, keys, kind, near, shorten, text_in, text_of, value_of
from halfbyte.errors import DataError
from halfbyte.recipe.data import Data, Fields, Format

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bard": "assistant", "bing": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "assistant", "developer": "system",
}  # fmt: skip
TELLING = ("prompt", "completion", "messages", "conversations", "instruction", "output", "text", "chosen", "rejected")
"""The fields whose columns tell a format; the others may be absent from a row."""
_KNOWN = ("role", "content", "train", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "weight",
          "train_detail")  # fmt: skip
Tools = tuple[Any, ...] | None
Parts = tuple[tuple[int, int, float], ...]
"""Characters [start, stop) of a text, and what each of their tokens counts for."""


@dataclass(frozen=True)
class ChatMessage:
    role: str
    content: str
    train: bool = True  # False on an assistant message: it is context and gets no labels
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else the chat template gets: tool_calls, tool_call_id, name, reasoning_content, thinking."""
    weight: float | None = None
    """What each of its tokens counts for, where the row says so; who is no assistant trains only then."""
    parts: Parts = ()  # of `content`, where the row says so; later ones win

    @property
    def trains(self) -> bool:
        """Whether it may be trained; of an assistant `data.mask` has the last word."""
        return self.train if self.role == "assistant" else self.weight is not None

    def to_template(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content, **self.more}


@dataclass(frozen=True)
class Row:
    """One example as its file has it: `messages`, or `prompt` and `completion`, or `text`."""

    where: str  # file name and line, `train.jsonl:12`
    messages: tuple[ChatMessage, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    tools: Tools = None
    rejected: "Row | None" = None
    """The same with the worse answer, where this one has the better (`data/reading/pairs.py`)."""
    desirable: bool | None = None
    """Whether the answer is a good one; None where nobody says."""

    parts: tuple[str, ...] = ()
    """Of a task other than causal_lm: the texts; `completion` is then the label, labels or number, as JSON."""

    @property
    def texts(self) -> "tuple[Row, ...]":
        return (self,) if self.rejected is None else (self, self.rejected)


Parser = Callable[[str, Mapping[str, object]], Row]


def detect_format(record: Mapping[str, object], data: Data, where: str = "the first row") -> Format:
    """The format of a file, told from the recipe or else from the columns of one row. Raises DataError: `data.format`
    is auto and the row has the columns of no format."""
    f = data.fields
    if data.format != "auto":
        return data.format
    if f.messages in record or f.conversations in record:
        talk = record[f.messages if f.messages in record else f.conversations]
        first = talk[0] if isinstance(talk, list) and talk and isinstance(talk[0], dict) else {}
        shares = "from" in first or f.messages not in record
        return "sharegpt" if shares and "role" not in first else "messages"
    if f.prompt in record and f.completion in record:
        return "prompt_completion"
    if f.instruction in record and f.output in record:
        return "alpaca"
    if f.text in record:
        return "text"
    if f.chosen in record or f.answers in record:
        raise DataError(
            f"{where}: {keys(record)} say which answer is better, and train.method sft does not read that.",
            fix="--set train.method=dpo",
        )
    raise DataError(
        f"{where}: cannot tell the format. Needed: the key {f.messages!r} or {f.conversations!r}, or both {f.prompt!r} "
        f"and {f.completion!r}, or {f.instruction!r} and {f.output!r}, or {f.text!r}; got {keys(record)}."
    )


def unread(shape: Format, data: Data, columns: Collection[str]) -> list[str]:
    """The columns of a row that nothing is read from."""
    f = data.fields
    others = (f.messages, f.conversations, f.system, f.tools)
    read = {
        "messages": (f.messages, f.conversations, f.tools, f.system),
        "sharegpt": (f.messages, f.conversations, f.tools, f.system),
        "alpaca": (f.instruction, f.input, f.output, f.system),
        "prompt_completion": (f.prompt, f.completion, f.tools, f.system),
        "text": (f.text,),
        "preference": (f.prompt, f.chosen, f.rejected, *others, f.instruction, f.input, f.answers, f.scores),
        "unpaired_preference": (f.prompt, f.completion, f.label, *others),
        "labels": (f.text, f.text_pair, f.label),
        "tags": (f.tokens, f.tags, f.text, f.spans),
        "vectors": (f.query, f.passage, f.negative, f.score, f.text, f.label),
    }[shape]
    return [column for column in columns if column not in read]


def parser(shape: Format, data: Data, record: Collection[str]) -> Parser:
    """What turns a record of this format into a row, or raises `BadRow`. `record`: the first one, or its keys; they
    tell which of the two columns holds the conversation."""
    f = data.fields
    if shape in ("messages", "sharegpt"):
        shares = shape == "sharegpt"
        column, other = (f.conversations, f.messages) if shares else (f.messages, f.conversations)
        if column not in record and other in record:
            column = other
        role = f.role or ("from" if shares else "role")
        content = f.content or ("value" if shares else "content")
        return partial(conversation, f, column, role, content, shares)
    simple = {"alpaca": alpaca, "prompt_completion": prompted, "text": _text, "labels": _labels}
    simple |= {"tags": _tags, "vectors": _vectors}
    return partial(simple[shape], f)


def conversation(
    f: Fields, column: str, role: str, content: str, shares: bool, where: str, record: Mapping[str, object]
) -> Row:
    value = value_of(record, column)
    if not isinstance(value, list):
        raise BadRow(f"{column}: a list of messages is needed, got {kind(value)}")
    messages = [_message(m, f"{column}[{i}]", role, content, shares) for i, m in enumerate(value)]
    if not any(m.role == "assistant" for m in messages):
        raise BadRow(f"{column}: no message has the role assistant, so there is nothing to learn from")
    if messages[-1].role != "assistant":
        last = shorten(str(value[-1][role]))
        raise BadRow(f"{column}[{len(messages) - 1}].{role}: the last message must be of the assistant, got {last!r}")
    return _row(f, where, record, messages, _tools(record, f))


def _message(item: object, field: str, role_key: str, content_key: str, shares: bool) -> ChatMessage:
    if not isinstance(item, dict):
        raise BadRow(f"{field}: an object with {role_key} and {content_key} is needed, got {kind(item)}")
    speaker, content_field = text_in(item, role_key, f"{field}."), f"{field}.{content_key}"
    names = SPEAKERS if shares else ROLES
    role = SPEAKERS.get(speaker, speaker)
    if speaker not in names:
        allowed = ", ".join(names)
        raise BadRow(f"{field}.{role_key}: one of {allowed} is needed, got {shorten(speaker)!r}{near(speaker, names)}")
    for key, value in item.items():
        if key not in _KNOWN and key not in (role_key, content_key) and value is not None:
            raise BadRow(f"{field}: {key!r} is not supported; allowed: {', '.join(_KNOWN)}")
    more, weight = _more(item, field, role), _weight(item, field)
    if shares and speaker == "function_call":
        call = _from_json(value_of(item, content_key, f"{field}."), content_field)
        return ChatMessage(role, "", weight != 0, {"tool_calls": [_call(call, content_field)]}, weight)
    may_be_empty = role in ("system", "tool") or "tool_calls" in more
    content = item.get(content_key) if more or may_be_empty else value_of(item, content_key, f"{field}.")
    if content is None and may_be_empty:
        content = ""
    parts: Parts = ()
    if isinstance(content, list):
        content, parts = _parts(content, content_field)
    content = text_of(content, content_field, empty=may_be_empty)
    if item.get("train_detail") is not None:
        parts = ((0, len(content), 0.0), *_details(item["train_detail"], f"{field}.train_detail", len(content)))
    some = any(part_weight for *_, part_weight in parts)
    if role == "assistant":
        return ChatMessage(role, content, weight != 0 or some, more, weight, parts)
    weight = (1.0 if weight is None else weight) if item.get("train") is True else 0.0
    return ChatMessage(role, content, True, more, weight if weight or some else None, parts)


def _more(item: dict[str, Any], field: str, role: str) -> Mapping[str, Any]:
    more: dict[str, Any] = {}
    for key in ("tool_call_id", "name"):
        if item.get(key) is not None:
            more[key] = text_in(item, key, f"{field}.")
    thoughts = [key for key in ("reasoning_content", "thinking") if item.get(key)]
    if thoughts:
        if role != "assistant":
            raise BadRow(f"{field}: only an assistant thinks, this message is of {role}")
        if item[thoughts[0]] != item[thoughts[-1]]:
            raise BadRow(f"{field}: reasoning_content and thinking are two names of one thing, and differ")
        more |= dict.fromkeys(("reasoning_content", "thinking"), text_in(item, thoughts[0], f"{field}."))
    calls = item.get("tool_calls")
    if calls is not None and calls != []:
        if role != "assistant":
            raise BadRow(f"{field}.tool_calls: only an assistant calls tools, this message is of {role}")
        if not isinstance(calls, list):
            raise BadRow(f"{field}.tool_calls: a list is needed, got {kind(calls)}")
        more["tool_calls"] = [_call(call, f"{field}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return more


def _call(call: object, field: str) -> dict[str, Any]:
    """One tool call as templates want it: its arguments an object, not the text of one."""
    if not isinstance(call, dict):
        raise BadRow(f"{field}: an object is needed, got {kind(call)}")
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise BadRow(f"{field}.function: an object is needed, got {kind(function)}")
    name = text_in(function, "name", f"{field}.")
    given = function.get("arguments", {})
    arguments = _from_json(given, f"{field}.arguments")
    if not isinstance(arguments, dict):
        raise BadRow(f"{field}.arguments: an object, or its JSON, is needed, got {kind(arguments)}")
    if arguments is given:  # columnar files give every call the arguments of all the others, as null
        arguments = {k: v for k, v in arguments.items() if v is not None}
    tool_call: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        tool_call["id"] = text_in(call, "id", f"{field}.")
    return tool_call


def _from_json(value: object, field: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{field}: JSON is needed, got {kind(value)}") from None


def _parts(parts: Sequence[object], field: str) -> tuple[str, Parts]:
    """OpenAI's content in parts, of which only text is known here; and those that say what they count for."""
    texts, weighed = list[str](), list[tuple[int, int, float]]()
    for i, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise BadRow(f"{field}[{i}]: an object with type text and a text is needed, got {kind(part)}")
        if part.get("type", "text") not in ("text", "input_text", "output_text"):
            raise BadRow(f"{field}[{i}].type: only text can be trained on, got {shorten(str(part['type']))!r}")
        texts.append(part["text"])
        start, at = sum(map(len, texts[:-1])), sum(map(len, texts))
        weight = 1.0 if part.get("train") is True and part.get("weight") is None else _weight(part, f"{field}[{i}]")
        weighed += [(start, at, weight)] if weight is not None else []
    return "".join(texts), tuple(weighed)


def _weight(item: Mapping[str, object], field: str) -> float | None:
    """What each token of a message, or of a part, counts for; None where the row does not say."""
    train, weight = item.get("train"), item.get("weight")
    if not isinstance(train, bool | None):
        raise BadRow(f"{field}.train: true or false is needed, got {kind(train)}")
    if not isinstance(weight, int | float | None) or isinstance(weight, bool) or not 0 <= (weight or 0) < math.inf:
        raise BadRow(f"{field}.weight: a number from 0 on is needed, got {kind(weight)}")
    return 0.0 if train is False else weight


def _details(details: object, field: str, length: int) -> Parts:
    """Axolotl's: parts of a text by their first and last character."""
    parts = []
    for i, detail in enumerate(details if isinstance(details, list) else [details]):
        name = f"{field}[{i}]"
        first, last = (detail.get(k) for k in ("begin_offset", "end_offset")) if isinstance(detail, dict) else ("", "")
        if not isinstance(first, int) or not isinstance(last, int) or not 0 <= first <= last < length:
            raise BadRow(f"{name}: begin_offset and end_offset within 0 to {length - 1} are needed, got {kind(detail)}")
        weight = _weight(detail, name)
        parts.append((first, last + 1, 1.0 if weight is None else float(weight)))
    return tuple(parts)


def _tools(record: Mapping[str, object], f: Fields) -> Tools:
    value = record.get(f.tools)
    if value in (None, "", []):
        return None
    value = _from_json(value, f.tools)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"{f.tools}: a list of tools (objects), or its JSON, is needed, got {kind(value)}")
    return tuple(value) or None


def _row(
    f: Fields, where: str, record: Mapping[str, object], messages: Sequence[ChatMessage], tools: Tools = None
) -> Row:
    """The messages, behind the text of the system column where a row has one."""
    if record.get(f.system) not in (None, ""):
        text = text_in(record, f.system)
        if messages[0].role == "system":
            raise BadRow(f"{f.system}: the first message is a system message too; which one is meant?")
        messages = [ChatMessage("system", text), *messages]
    return Row(where, tuple(messages), tools=tools)


def alpaca(f: Fields, where: str, record: Mapping[str, object]) -> Row:
    asked = text_in(record, f.instruction)
    given = record.get(f.input)
    given = "" if given is None else text_of(given, f.input, empty=True)
    talk = ChatMessage("user", f"{asked}\n\n{given}" if given.strip() else asked)
    return _row(f, where, record, [talk, ChatMessage("assistant", _answer(record, f.output))])


def prompted(f: Fields, where: str, record: Mapping[str, object]) -> Row:
    if isinstance(record.get(f.prompt), list) or isinstance(record.get(f.completion), list):
        return lists(f, where, record)
    prompt, completion = text_in(record, f.prompt), _answer(record, f.completion)
    if record.get(f.system):
        return _row(f, where, record, [ChatMessage("user", prompt), ChatMessage("assistant", completion)])
    return Row(where, prompt=prompt, completion=completion)


def lists(f: Fields, where: str, record: Mapping[str, object], *, shares: bool = False) -> Row:
    """TRL's conversational prompt and completion: two lists of messages, of which only the second is trained."""
    talk: list[ChatMessage] = []
    for column, role in ((f.prompt, "user"), (f.completion, "assistant")):
        value = value_of(record, column)
        names = f.role or ("from" if shares else "role"), f.content or ("value" if shares else "content")
        items = value if isinstance(value, list) else [dict(zip(names, (role, text_in(record, column)), strict=True))]
        messages = [_message(m, f"{column}[{i}]", *names, shares) for i, m in enumerate(items)]
        if column == f.completion and (not messages or messages[-1].role != "assistant"):
            raise BadRow(f"{column}: the last message must be of the assistant")
        context = column == f.prompt
        talk += [replace(m, train=False) if context and m.role == "assistant" else m for m in messages]
    return _row(f, where, record, talk, _tools(record, f))


def _answer(record: Mapping[str, object], key: str) -> str:
    """A text, or a label as JSON writes it: a whole number, true or false."""
    value = record.get(key)
    return json.dumps(value) if isinstance(value, int) else text_in(record, key)


def _text(f: Fields, where: str, record: Mapping[str, object]) -> Row:
    return Row(where, text=text_in(record, f.text))


def texts_of(f: Fields, record: Mapping[str, object]) -> tuple[str, ...]:
    """The text, or the two texts, that get a label."""
    second = record.get(f.text_pair)
    pair = () if second in (None, "") else (text_of(second, f.text_pair),)
    return (text_in(record, f.text), *pair)


def _labels(f: Fields, where: str, record: Mapping[str, object]) -> Row:
    value = value_of(record, f.label)
    if isinstance(value, str) and value.startswith("["):  # CSV has no lists
        value = _from_json(value, f.label)
    every = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | int | float) and str(one).strip() for one in every):
        raise BadRow(f"{f.label}: a label, a list of labels or a number is needed, got {kind(value)}")
    return Row(where, parts=texts_of(f, record), completion=json.dumps(value, ensure_ascii=False))


def words_of(f: Fields, record: Mapping[str, object]) -> tuple[str, ...]:
    """The words that get tags; or the one text in which spans get labels."""
    words = record.get(f.tokens)
    if words is None:
        return (text_in(record, f.text),)
    words = _from_json(words, f.tokens)
    if not isinstance(words, list) or not words or not all(isinstance(w, str) and w.strip() for w in words):
        raise BadRow(f"{f.tokens}: a list of words is needed, got {kind(words)}")
    return tuple(text_of(word, f"{f.tokens}[{i}]") for i, word in enumerate(words))


def _tags(f: Fields, where: str, record: Mapping[str, object]) -> Row:
    """`completion`: as JSON a tag for each word; or [start, end, label] of each span in a text, in their order."""
    parts, name = words_of(f, record), f.tags if record.get(f.tokens) is not None else f.spans
    value = _from_json(value_of(record, name), name)
    if not isinstance(value, list):
        raise BadRow(f"{name}: a list is needed, got {kind(value)}")
    if name == f.tags:
        if len(value) != len(parts) or not all(isinstance(tag, str | int) for tag in value):
            raise BadRow(f"{name}: a tag for each of {len(parts)} words is needed, got {len(value)}")
        return Row(where, parts=parts, completion=json.dumps([str(tag) for tag in value], ensure_ascii=False))
    spans = list[tuple[int, int, str]]()
    for i, each in enumerate(value):
        match each:
            case {"start": int(start), "end": int(end), "label": str(label)} if 0 <= start < end <= len(parts[0]):
                spans.append((start, end, label))
            case _:
                need = "start, end (characters of the text) and label are needed"
                raise BadRow(f"{name}[{i}]: {need}, got {kind(each)}")
    spans.sort()
    if any(a[1] > b[0] for a, b in pairwise(spans)):
        raise BadRow(f"{name}: spans overlap")
    return Row(where, parts=parts, completion=json.dumps(spans, ensure_ascii=False))


def _vectors(f: Fields, where: str, record: Mapping[str, object]) -> Row:
    if f.label in record and f.passage not in record:  # of a labelled group
        label = json.dumps(value_of(record, f.label), ensure_ascii=False)
        return Row(where, parts=(text_in(record, f.text),), completion=label)
    negatives = record.get(f.negative)
    negatives = negatives if isinstance(negatives, list) else [negatives] if negatives not in (None, "") else []
    texts = text_in(record, f.query), text_in(record, f.passage), *(text_of(one, f.negative) for one in negatives)
    score = record.get(f.score)
    try:
        number = None if score in (None, "") else float(score)  # type: ignore[arg-type]
        if not math.isfinite(number or 0):
            raise ValueError
    except (TypeError, ValueError):
        raise BadRow(f"{f.score}: a number is needed, a finite one, got {kind(score)}") from None
    return Row(where, parts=texts, completion=json.dumps(number))
