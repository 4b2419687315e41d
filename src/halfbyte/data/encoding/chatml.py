"""Which chat template a run uses: the recipe's, the tokenizer's own, or ChatML; and which embedding rows train for it.

Why: a base model has never seen the marks of a conversation. A new mark needs a row of the embedding, and a base that
is mapped or quantised is never resized or copied. So marks use rows that exist, and only those rows train (PEFT's
`trainable_token_indices`); if no row is free, the marks do without one.
What ChatML takes, in this order:
- the tokenizer knows both tokens: they are used as they are;
- the embedding has rows behind the tokenizer's last token (it is often padded), or the vocabulary has tokens that the
  model's makers reserved: `<|im_start|>` takes one of them, and `<|im_end|>` another if the head is the embedding
  (tied). If the head is a matrix of its own, its row for a new token would stay untrained, and the model could not
  learn to write it: then a turn ends with the tokenizer's own end token;
- else `<|im_start|>` is plain text, of tokens that the model knows, and a turn ends with the tokenizer's end token.
Source: OpenAI's ChatML.
Cost: the first records of each source are read once more.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.data.reading import files
from halfbyte.data.reading.read import Reader
from halfbyte.errors import DataError
from halfbyte.recipe.data import Data
from halfbyte.types import Tokenizer

CHATML = "chatml"  # in the recipe
_RESERVED = re.compile(r"<?\W*(reserved|unused|extra_id|dummy|placeholder)\w*\W*\d+\W*>?", re.IGNORECASE)
START, END = "<|im_start|>", "<|im_end|>"
_TURNS = (
    "{%- for m in messages %}{{ START + m['role'] + '\\n' + m['content'] + END + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ START + 'assistant\\n' }}{% endif %}"
)


def is_reserved(token: str) -> bool:
    """Whether a token's name says that the model's makers have kept it for later: no text has trained it."""
    return _RESERVED.fullmatch(token) is not None


def chat_template(tokenizer: Tokenizer, data: Data) -> str | None:
    """The chat template as Jinja text: the recipe's (text, or a file of it), else the tokenizer's own, else None."""
    asked = data.chat_template
    if asked is None or asked == CHATML:  # by now ChatML is the tokenizer's own template
        if not tokenizer.chat_template:
            return None
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:
            raise DataError(
                f"the tokenizer has several chat templates and no default one: {error}",
                fix="data.chat_template: a file with the one to use",
            ) from None
    if "{" in asked:
        return asked
    try:
        return Path(asked).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.chat_template {asked!r} is neither Jinja text nor a file that can be read ({error}).",
            fix="data.chat_template: chat.jinja, or chatml",
        ) from None


@dataclass(frozen=True)
class ChatmlMarks:
    """ChatML's new tokens, whose rows of the embedding must train, and what to tell the user."""

    new_tokens: tuple[int, ...]
    notice: str


def is_needed(names: str | Sequence[str], tokenizer: Tokenizer, data: Data) -> bool:
    """Whether the recipe asks for ChatML, or conversations meet a tokenizer without a template.

    Raises:
        DataError: names that stand for nothing, sources that cannot be read.
    """
    if data.chat_template is not None or tokenizer.chat_template:
        return data.chat_template == CHATML
    first = (next(iter(Reader([source], data)), None) for source in files.find(names))
    return any(row is not None and row.messages is not None for row in first)


def install(tokenizer: Tokenizer, data: Data, *, embedding_rows: int, tied: bool) -> ChatmlMarks:
    """Give the tokenizer ChatML: its template, and new tokens where there are rows for them.

    Args:
        tokenizer: is changed.
        embedding_rows: how many tokens have a row in the base's embedding. tied: the head is the embedding.

    Raises:
        DataError: the tokenizer has no end token, and no row is free for a new one.
    """
    why = "as data.chat_template says" if data.chat_template == CHATML else "the model has no chat template"
    opens = tokenizer.bos_token is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    start, end, how, new = _marks(tokenizer, embedding_rows, tied)
    template = _TURNS.replace("START", repr(start)).replace("END", repr(end))
    tokenizer.chat_template = ("{{ bos_token }}" if opens else "") + template
    ids = tuple(sorted(int(tokenizer.convert_tokens_to_ids(token)) for token in new))
    trained = f"; rows {', '.join(map(str, ids))} of the embedding are trained" if ids else ""
    return ChatmlMarks(ids, f"ChatML, {why}: {how}{trained}")


def _marks(tokenizer: Tokenizer, embedding_rows: int, tied: bool) -> tuple[str, str, str, tuple[str, ...]]:
    """The two marks, how they came about, and which of them are new."""
    known, eos = tokenizer.get_vocab(), tokenizer.eos_token
    if START in known and END in known:
        return START, END, "its tokenizer knows both tokens", ()
    marks = (START, END) if tied or eos is None else (START,)
    ends = f"; a turn ends with {eos}" if len(marks) == 1 else ""
    if embedding_rows - max(known.values()) > len(marks):
        tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
        how = f"{' and '.join(marks)} {'are new tokens' if len(marks) == 2 else 'is a new token'}{ends}"
        return START, marks[-1] if len(marks) == 2 else eos, how, marks
    reserved = sorted((i, t) for t, i in known.items() if i < embedding_rows and is_reserved(t))[: len(marks)]
    if len(reserved) == len(marks):
        names = tuple(token for _, token in reserved)
        how = f"reserved tokens stand for its marks, {' and '.join(names)}{ends}"
        return names[0], names[-1] if len(names) == 2 else eos, how, names
    if eos is None:
        raise DataError(
            f"the rows are conversations, and this tokenizer has no chat template and no end token; {END} would be "
            f"new, but the embedding has {embedding_rows:,} rows for {len(tokenizer):,} tokens, none to spare, and it "
            "is not resized.",
            fix="data.chat_template: a file with a template of the model's own tokens",
        )
    return START, eos, f"{START} is written as plain text, and a turn ends with {eos}", ()
