"""Rows of which answer is better: a pair (chosen, rejected), several ranked ones, or one answer with a verdict.

Why: the same pair is written as TRL's three columns, of texts or of messages, as two whole conversations
(UltraFeedback), as two transcripts (Anthropic's HH), as ShareGPT's conversation with two messages (LLaMA-Factory), as
Alpaca's task with two outputs, or as answers with scores. All become two rows of `formats.py` with one beginning.
Source: TRL's dataset formats (explicit and implicit prompts, unpaired preference), LLaMA-Factory's `data/README.md`.
Cost: that of two rows.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from halfbyte.data.reading import formats
from halfbyte.data.reading.formats import Parser, Row
from halfbyte.data.reading.problems import BadRow, kind, shorten, value_of
from halfbyte.recipe.data import Data, Fields, Format

Record = Mapping[str, object]
_SPEAKS = re.compile(r"\n\n(Human|Assistant):[ ]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def parser(shape: Format, data: Data, record: Collection[str]) -> Parser:
    """As `formats.parser`, and of rows of which answer is better."""
    ours = {"preference": pair, "unpaired_preference": answer}
    return partial(ours[shape], data.fields) if shape in ours else formats.parser(shape, data, record)


def pair(f: Fields, where: str, record: Record) -> Row:
    """A row whose `rejected` is the other one; what they have in common is context."""
    if f.chosen not in record and f.answers in record:
        record = _ranked(f, record)
    a, b = (value_of(record, column) for column in (f.chosen, f.rejected))
    if isinstance(a, str) and isinstance(b, str):
        if _SPEAKS.match(a) and _SPEAKS.match(b):
            record = {**record, f.chosen: _transcript(a), f.rejected: _transcript(b)}
        elif not {f.prompt, f.messages, f.conversations, f.instruction} & record.keys():
            record = _split(f, record, a, b)
    chosen, rejected = (_side(f, where, record, column) for column in (f.chosen, f.rejected))
    if chosen.messages is not None and rejected.messages is not None:
        alike = common_length(chosen.messages, rejected.messages)
        alike -= chosen.messages == rejected.messages  # the same answer twice: a gate says so
        if alike in (len(chosen.messages), len(rejected.messages)):
            raise BadRow(f"{f.chosen} and {f.rejected}: one is the beginning of the other")
        chosen, rejected = _after(chosen, alike), _after(rejected, alike)
    return replace(chosen, rejected=rejected)


def answer(f: Fields, where: str, record: Record) -> Row:
    """A row with whether its answer is a good one."""
    label = value_of(record, f.label)
    if str(label).lower() not in ("true", "false", "1", "0"):
        raise BadRow(f"{f.label}: true or false is needed, got {kind(label)}")
    column = next((n for n in (f.completion, f.messages, f.conversations) if n in record), f.completion)
    row = _side(f, where, record, column)
    row = row if row.messages is None else _after(row, len(row.messages) - 1)
    return replace(row, desirable=str(label).lower() in ("true", "1"))


def _side(f: Fields, where: str, record: Record, column: str) -> Row:
    """The row of one answer, in `column`: with a conversation of its own, or behind a prompt, another one or a task."""
    value = value_of(record, column)
    if isinstance(value, dict):  # one message
        value = [value]
        record = {**record, column: value}
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, dict) and first.get(f.role or "role", first.get("from")) not in ("assistant", "gpt", None):
        asked, words = record.get(f.prompt), first.get(f.content or "content", first.get("value"))
        if isinstance(asked, str) and first.get("role") == "user" and asked.strip() != str(words).strip():
            raise BadRow(f"{column}: it begins with another question than {f.prompt}: {shorten(str(words))!r}")
        shares = "from" in first
        names = f.role or ("from" if shares else "role"), f.content or ("value" if shares else "content")
        return formats.conversation(f, column, *names, shares, where, record)
    before = next((n for n in (f.prompt, f.conversations, f.messages, f.instruction) if n in record), f.prompt)
    f = f.model_copy(update={"completion": column, "output": column, "prompt": before})
    if before in (f.conversations, f.messages):
        asked = record[before]
        shares = isinstance(asked, list) and any("from" in m for m in asked if isinstance(m, dict))
        return formats.lists(f, where, record, shares=shares)
    return (formats.alpaca if before == f.instruction else formats.prompted)(f, where, record)


def _after(row: Row, first: int) -> Row:
    """The row, of which only the messages from `first` on are its answer."""
    messages = row.messages or ()
    context = (replace(m, train=False) if m.role == "assistant" else m for m in messages[:first])
    return replace(row, messages=(*context, *messages[first:]))


def _split(f: Fields, record: Record, a: str, b: str) -> Record:
    """The prompt is what two texts have in common, up to a space, as TRL takes it."""
    alike = common_length(a, b)
    alike -= a[alike - 1 : alike] == " "
    if not a[:alike].strip():
        raise BadRow(f"{f.prompt}: missing, and {f.chosen} and {f.rejected} do not begin alike")
    return {**record, f.prompt: a[:alike], f.chosen: a[alike:], f.rejected: b[alike:]}


def _transcript(text: str) -> list[dict[str, str]]:
    """A transcript of Human and Assistant as messages."""
    _, *parts = _SPEAKS.split(text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _ROLES[who], "content": words.strip()} for who, words in turns]


def common_length(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items two sequences have in common at their start."""
    return bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda n: a[:n] != b[:n])


def _ranked(f: Fields, record: Record) -> Record:
    """The best and the worst of several answers: by their scores, else in their order."""
    answers, scores = record[f.answers], record.get(f.scores)
    if not isinstance(answers, list) or len(answers) < 2:
        got = f"a list of {len(answers)}" if isinstance(answers, list) else kind(answers)
        raise BadRow(f"{f.answers}: a list of two answers or more is needed, got {got}")
    if scores is None:
        return {**record, f.chosen: answers[0], f.rejected: answers[-1]}
    numbers = [s for s in scores if isinstance(s, int | float)] if isinstance(scores, list) else []
    if len(numbers) != len(answers):
        raise BadRow(f"{f.scores}: a number for each of the {len(answers)} answers is needed, got {kind(scores)}")
    if (i := next((i for i, number in enumerate(numbers) if not math.isfinite(number)), None)) is not None:
        raise BadRow(f"{f.scores}[{i}]: a finite number is needed, got {numbers[i]}")
    best, worst = numbers.index(max(numbers)), numbers.index(min(numbers))
    if best == worst:
        raise BadRow(f"{f.scores}: all answers have the same score, {numbers[0]:g}, so none is better")
    return {**record, f.chosen: answers[best], f.rejected: answers[worst]}
