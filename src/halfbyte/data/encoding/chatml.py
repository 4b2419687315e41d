"""ChatML for a base model without a chat template that is given conversations; and which embedding rows train for it.

Why: a base model has never seen the marks of a conversation. A new mark needs a row of the embedding, and a base that
is mapped or quantised is never resized or copied. So marks use rows that exist, and only those rows train (PEFT's
`trainable_token_indices`); if no row is free, the marks do without one.
What, in this order:
- the tokenizer knows both tokens: they are used as they are;
- the embedding has rows behind the tokenizer's last token (it is often padded), or the vocabulary has tokens that the
  model's makers reserved: `<|im_start|>` takes one of them, and `<|im_end|>` another if the head is the embedding
  (tied). If the head is a matrix of its own, its row for a new token would stay untrained, and the model could not
  learn to write it: then a turn ends with the tokenizer's own end token;
- else `<|im_start|>` is plain text, of tokens that the model knows, and a turn ends with the tokenizer's end token.
Source: OpenAI's ChatML.
Cost: the first records of each source are read once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.data.encoding.chat_template import CHATML, is_reserved
from halfbyte.data.reading import files
from halfbyte.data.reading.read import Reader
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from halfbyte.recipe.data import Data
    from halfbyte.types import Tokenizer

START, END = "<|im_start|>", "<|im_end|>"
_TURNS = (
    "{%- for m in messages %}{{ START + m['role'] + '\\n' + m['content'] + END + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ START + 'assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Settled:
    """What was chosen: the marks, the tokens whose rows must train, and what to tell the user."""

    start: str
    end: str
    new_tokens: tuple[int, ...]
    notice: str


def is_needed(names: str | Sequence[str], tokenizer: Tokenizer, data: Data) -> bool:
    """Whether the recipe asks for ChatML, or conversations meet a tokenizer without a template.

    Raises:
        DataError: names that stand for nothing, sources that cannot be read.
    """
    if data.chat_template is not None or tokenizer.chat_template:
        return data.chat_template == CHATML
    first = (next(Reader([source], data).chunks(), None) for source in files.find(names))
    return any(c is not None and c.known and c.known[0] in ("messages", "sharegpt", "alpaca") for c in first)


def settle(tokenizer: Tokenizer, data: Data, *, embedding_rows: int, tied: bool) -> Settled:
    """Give the tokenizer ChatML: its template, and new tokens where there are rows for them.

    Args:
        tokenizer: is changed.
        embedding_rows: how many tokens have a row in the base's embedding. tied: the head is the embedding.

    Raises:
        DataError: the tokenizer has no end token, and no row is free for a new one.
    """
    why = "as data.chat_template says" if data.chat_template == CHATML else "the model has no chat template"
    known = tokenizer.get_vocab()
    opens = tokenizer.bos_token is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    start, end, how, new = _marks(tokenizer, known, embedding_rows, tied)
    quoted = {"START": repr(start), "END": repr(end)}
    template = _TURNS
    for name, text in quoted.items():
        template = template.replace(name, text)
    tokenizer.chat_template = ("{{ bos_token }}" if opens else "") + template
    ids = tuple(sorted(int(tokenizer.convert_tokens_to_ids(token)) for token in new))
    trained = f"; rows {', '.join(map(str, ids))} of the embedding are trained" if ids else ""
    return Settled(start, end, ids, f"ChatML, {why}: {how}{trained}")


def _marks(
    tokenizer: Tokenizer, known: dict[str, int], embedding_rows: int, tied: bool
) -> tuple[str, str, str, tuple[str, ...]]:
    """The two marks, how they came about, and which of them are new."""
    own_end = tokenizer.eos_token
    if START in known and END in known:
        return START, END, "its tokenizer knows both tokens", ()
    wanted = (START, END) if tied or own_end is None else (START,)
    ends = f"; a turn ends with {own_end}" if len(wanted) == 1 else ""
    if embedding_rows - max(known.values()) > len(wanted):
        tokenizer.add_special_tokens({"additional_special_tokens": list(wanted)})
        how = f"{' and '.join(wanted)} {'are new tokens' if len(wanted) == 2 else 'is a new token'}{ends}"
        return START, wanted[-1] if len(wanted) == 2 else own_end, how, wanted
    reserved = sorted((i, t) for t, i in known.items() if i < embedding_rows and is_reserved(t))[: len(wanted)]
    if len(reserved) == len(wanted):
        names = tuple(token for _, token in reserved)
        how = f"reserved tokens stand for its marks, {' and '.join(names)}{ends}"
        return names[0], names[-1] if len(names) == 2 else own_end, how, names
    if own_end is None:
        raise DataError(
            f"the rows are conversations, and this tokenizer has no chat template and no end token; {END} would be "
            f"new, but the embedding has {embedding_rows:,} rows for {len(tokenizer):,} tokens, none to spare, and it "
            "is not resized.",
            fix="data.chat_template: a file with a template of the model's own tokens",
        )
    return START, own_end, f"{START} is written as plain text, and a turn ends with {own_end}", ()
