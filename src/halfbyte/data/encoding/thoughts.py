"""An assistant's thoughts: apart from its words, and in the form that a chat template writes.

Why: rows hold them in `reasoning_content`, or in their text between <think> and </think>; templates read one or the
other, and some leave out both without a word.
Source: the templates of Qwen3, GLM 4.5 and gpt-oss read the key, those of SmolLM3 and ChatML write the text as it is,
that of DeepSeek-R1 cuts it out. DeepSeek-R1 begins to write inside the block, so that its texts may only close it.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal

from halfbyte.data.reading.formats import ChatMessage

OPEN, CLOSE = "<think>", "</think>"
KEYS = ("reasoning_content", "thinking")
Form = Literal["keys", "text", "none"]
MARKS, AT_END = re.compile(rf"({OPEN}\s*)?({CLOSE}\s*)?"), re.compile(rf"(?:{OPEN}\s*)?(?:{CLOSE}\s*)?\Z")


@dataclass(frozen=True)
class Thought:
    """`text`: None where there is none. `is_whole`: no mark is opened and not closed, or closed and not opened."""

    text: str | None
    words: str
    is_whole: bool = True


def of(message: ChatMessage) -> Thought:
    content, given = message.content, message.more.get(KEYS[0])
    opens, closes = content.count(OPEN), content.count(CLOSE)
    begins = content.lstrip().startswith(OPEN)
    if given is None and closes == 1 and (not opens or (opens == 1 and begins)):
        before, words = content.split(CLOSE)
        return Thought(before.replace(OPEN, "").strip("\n"), words.lstrip("\n"))
    return Thought(given, content, opens == closes)


def without(message: ChatMessage) -> ChatMessage:
    more = {name: value for name, value in message.more.items() if name not in KEYS}
    return replace(message, content=of(message).words, more=more)


def put(message: ChatMessage, form: Form) -> ChatMessage:
    """The message with its thoughts as a template takes them."""
    thought, given = of(message), KEYS[0] in message.more
    if form == "keys" and thought.text:
        return replace(without(message), more={**message.more, **dict.fromkeys(KEYS, thought.text)})
    if form == "text" and given:
        return replace(without(message), content=f"{OPEN}\n{thought.text}\n{CLOSE}\n\n{thought.words}")
    return message
