"""From a record to a row: five common formats, named by the recipe or told from the columns.

Why: the same conversation is written as `messages`, as ShareGPT's `conversations`, as Alpaca's three columns, or as a
prompt and its completion. All become messages here, or one text; a field that does not fit is named.
Source: OpenAI's chat fine-tuning files (messages, tools, weight), ShareGPT (from, value), Stanford Alpaca (instruction,
input, output), TRL's prompt and completion. `reasoning_content` and `thinking` are what Qwen3's and gpt-oss's chat
templates call an assistant's thoughts; a message may use either name for any model.
Cost: a few microseconds a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from halfbyte.data.reading.problems import BadRow, keys, kind, near, shorten, text_of, value_of
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from halfbyte.recipe.data import Data, Fields

Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]

ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bard": "assistant", "bing": "assistant", "model": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
_KNOWN = ("role", "content", "train", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "weight")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    train: bool = True
    """False on an assistant message: it is context and gets no labels."""
    more: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    """What else the chat template gets: tool_calls, tool_call_id, name, reasoning_content, thinking."""

    def to_template(self) -> dict[str, Any]:
        return {"role": self.role, "content": self.content, **self.more}


@dataclass(frozen=True)
class Row:
    """One example as its file has it: `messages`, or `prompt` and `completion`, or `text`."""

    where: str
    """File name and line, `train.jsonl:12`."""
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    tools: tuple[Any, ...] | None = None


Parser = Callable[[str, Mapping[str, object]], Row]


def detect_format(record: Mapping[str, object], data: Data, where: str = "the first row") -> tuple[Format, str]:
    """The format of a file and why, told from the recipe or else from the columns of one row.

    Raises:
        DataError: `data.format` is auto and the row has the columns of no format.
    """
    if data.format != "auto":
        return data.format, "data.format in the recipe"
    f = data.fields
    if f.messages in record:
        keys_of_first = _keys_of_first(record[f.messages])
        if "from" in keys_of_first and "role" not in keys_of_first:
            return "sharegpt", f"auto: {where} has the key {f.messages!r}, whose messages have the key 'from'"
        return "messages", f"auto: {where} has the key {f.messages!r}"
    if f.conversations in record:
        if "role" in _keys_of_first(record[f.conversations]):
            return "messages", f"auto: {where} has the key {f.conversations!r}, whose messages have the key 'role'"
        return "sharegpt", f"auto: {where} has the key {f.conversations!r}"
    if f.prompt in record and f.completion in record:
        return "prompt_completion", f"auto: {where} has the keys {f.prompt!r} and {f.completion!r}"
    if f.instruction in record and f.output in record:
        return "alpaca", f"auto: {where} has the keys {f.instruction!r} and {f.output!r}"
    if f.text in record:
        return "text", f"auto: {where} has the key {f.text!r}"
    raise DataError(
        f"{where}: cannot tell the format. Needed: the key {f.messages!r} or {f.conversations!r}, or both {f.prompt!r} "
        f"and {f.completion!r}, or {f.instruction!r} and {f.output!r}, or {f.text!r}; got {keys(record)}.",
        fix="name the columns, as in --set data.fields.prompt=question --set data.fields.completion=answer",
    )


def _keys_of_first(messages: object) -> Collection[str]:
    first = messages[0] if isinstance(messages, list) and messages else None
    return first.keys() if isinstance(first, dict) else ()


def parser(shape: Format, data: Data, record: Collection[str]) -> Parser:
    """What turns a record of this format into a row, or raises `BadRow`.

    Args:
        record: the first one, or its keys; they tell which of the two columns holds the conversation.
    """
    f = data.fields
    if shape in ("messages", "sharegpt"):
        shares = shape == "sharegpt"
        column, other = (f.conversations, f.messages) if shares else (f.messages, f.conversations)
        if column not in record and other in record:
            column = other
        role = f.role or ("from" if shares else "role")
        content = f.content or ("value" if shares else "content")
        return lambda where, r: _conversation(where, r, f, column, role, content, shares=shares)
    return {"alpaca": _alpaca, "prompt_completion": _pair, "text": _text}[shape](f)


def _conversation(
    where: str, record: Mapping[str, object], f: Fields, column: str, role: str, content: str, *, shares: bool
) -> Row:
    value = value_of(record, column, column)
    if not isinstance(value, list):
        raise BadRow(f"{column}: a list of messages is needed, got {kind(value)}")
    messages = [_message(m, f"{column}[{i}]", role, content, shares=shares) for i, m in enumerate(value)]
    if not any(m.role == "assistant" for m in messages):
        raise BadRow(f"{column}: no message has the role assistant, so there is nothing to learn from")
    if messages[-1].role != "assistant":
        last = shorten(str(value[-1][role]))
        raise BadRow(f"{column}[{len(messages) - 1}].{role}: the last message must be of the assistant, got {last!r}")
    return Row(where, tuple(_with_system(record, f, messages)), tools=_tools(record, f))


def _message(item: object, field: str, role_key: str, content_key: str, *, shares: bool) -> Message:
    if not isinstance(item, dict):
        raise BadRow(f"{field}: an object with {role_key} and {content_key} is needed, got {kind(item)}")
    said = text_of(value_of(item, role_key, f"{field}.{role_key}"), f"{field}.{role_key}")
    names = SPEAKERS if shares else ROLES
    role = SPEAKERS.get(said, said) if shares else said
    if said not in names:
        allowed = ", ".join(names)
        raise BadRow(f"{field}.{role_key}: one of {allowed} is needed, got {shorten(said)!r}{near(said, names)}")
    for key, value in item.items():
        if key not in _KNOWN and key not in (role_key, content_key) and value is not None:
            raise BadRow(f"{field}: {key!r} is not supported; allowed: {', '.join(_KNOWN)}")
    more = _more(item, field, role)
    if shares and said == "function_call":
        call = _from_json(value_of(item, content_key, f"{field}.{content_key}"), f"{field}.{content_key}")
        return Message(role, "", _train(item, field, role), {"tool_calls": [_call(call, f"{field}.{content_key}")]})
    content = item.get(content_key) if more else value_of(item, content_key, f"{field}.{content_key}")
    may_be_empty = role in ("system", "tool") or "tool_calls" in more
    if content is None and may_be_empty:
        content = ""
    if isinstance(content, list):
        content = _parts(content, f"{field}.{content_key}")
    content = text_of(content, f"{field}.{content_key}", empty=may_be_empty)
    return Message(role, content, _train(item, field, role), more)


def _more(item: dict[str, Any], field: str, role: str) -> Mapping[str, Any]:
    if len(item) <= 2:
        return _NOTHING
    more: dict[str, Any] = {}
    for key in ("tool_call_id", "name"):
        if item.get(key) is not None:
            more[key] = text_of(item[key], f"{field}.{key}")
    thoughts = [item[key] for key in ("reasoning_content", "thinking") if item.get(key)]
    if thoughts:
        if role != "assistant":
            raise BadRow(f"{field}: only an assistant thinks, this message is of {role}")
        if len(thoughts) == 2 and thoughts[0] != thoughts[1]:
            raise BadRow(f"{field}: reasoning_content and thinking are two names of one thing, and differ")
        text = text_of(thoughts[0], f"{field}.{'reasoning_content' if item.get('reasoning_content') else 'thinking'}")
        more |= {"reasoning_content": text, "thinking": text}
    calls = item.get("tool_calls")
    if calls is not None and calls != []:
        if role != "assistant":
            raise BadRow(f"{field}.tool_calls: only an assistant calls tools, this message is of {role}")
        if not isinstance(calls, list):
            raise BadRow(f"{field}.tool_calls: a list is needed, got {kind(calls)}")
        more["tool_calls"] = [_call(call, f"{field}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return more or _NOTHING


def _call(call: object, field: str) -> dict[str, Any]:
    """One tool call as templates want it: its arguments an object, not the text of one."""
    if not isinstance(call, dict):
        raise BadRow(f"{field}: an object is needed, got {kind(call)}")
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise BadRow(f"{field}.function: an object is needed, got {kind(function)}")
    name = text_of(value_of(function, "name", f"{field}.name"), f"{field}.name")
    arguments = _from_json(function.get("arguments", {}), f"{field}.arguments")
    if not isinstance(arguments, dict):
        raise BadRow(f"{field}.arguments: an object, or its JSON, is needed, got {kind(arguments)}")
    made: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": _pruned(arguments)}}
    if call.get("id") is not None:
        made["id"] = text_of(call["id"], f"{field}.id")
    return made


def _pruned(arguments: dict[str, Any]) -> dict[str, Any]:
    """Without nulls: columnar files give every call the arguments of all the others, as null."""
    return {k: v for k, v in arguments.items() if v is not None}


def _from_json(value: object, field: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"{field}: JSON is needed, got {kind(value)}") from None


def _parts(parts: list[Any], field: str) -> str:
    """OpenAI's content in parts, of which only text is known here."""
    texts = []
    for i, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise BadRow(f"{field}[{i}]: an object with type text and a text is needed, got {kind(part)}")
        if part.get("type", "text") not in ("text", "input_text", "output_text"):
            raise BadRow(f"{field}[{i}].type: only text can be trained on, got {shorten(str(part['type']))!r}")
        texts.append(part["text"])
    return "".join(texts)


def _train(item: dict[str, Any], field: str, role: str) -> bool:
    train = item.get("train")
    if train is None and item.get("weight") is not None:
        if item["weight"] not in (0, 1) or isinstance(item["weight"], bool):
            raise BadRow(f"{field}.weight: 0 or 1 is needed, got {kind(item['weight'])}")
        return bool(item["weight"])
    if train is None:
        return True
    if not isinstance(train, bool):
        raise BadRow(f"{field}.train: true or false is needed, got {kind(train)}")
    if train and role != "assistant":
        raise BadRow(f"{field}.train: only an assistant message can be trained on, this one is {role}")
    return train


def _tools(record: Mapping[str, object], f: Fields) -> tuple[Any, ...] | None:
    value = record.get(f.tools)
    if value is None or value in ("", []):
        return None
    value = _from_json(value, f.tools)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadRow(f"{f.tools}: a list of tools (objects), or its JSON, is needed, got {kind(value)}")
    return tuple(value) or None


def _with_system(record: Mapping[str, object], f: Fields, messages: list[Message]) -> list[Message]:
    """The messages, behind the text of the system column where a row has one."""
    text = record.get(f.system)
    if text is None or text == "":
        return messages
    text = text_of(text, f.system)
    if messages[0].role == "system":
        raise BadRow(f"{f.system}: the first message is a system message too; which one is meant?")
    return [Message("system", text), *messages]


def _alpaca(f: Fields) -> Parser:
    def parse(where: str, record: Mapping[str, object]) -> Row:
        asked = text_of(value_of(record, f.instruction, f.instruction), f.instruction)
        given = record.get(f.input)
        given = "" if given is None else text_of(given, f.input, empty=True)
        answer = text_of(value_of(record, f.output, f.output), f.output)
        talk = [Message("user", f"{asked}\n\n{given}" if given.strip() else asked), Message("assistant", answer)]
        return Row(where, tuple(_with_system(record, f, talk)))

    return parse


def _pair(f: Fields) -> Parser:
    def parse(where: str, record: Mapping[str, object]) -> Row:
        prompt = text_of(value_of(record, f.prompt, f.prompt), f.prompt)
        completion = text_of(value_of(record, f.completion, f.completion), f.completion)
        if record.get(f.system):
            talk = [Message("user", prompt), Message("assistant", completion)]
            return Row(where, tuple(_with_system(record, f, talk)))
        return Row(where, prompt=prompt, completion=completion)

    return parse


def _text(f: Fields) -> Parser:
    return lambda where, record: Row(where, text=text_of(value_of(record, f.text, f.text), f.text))
