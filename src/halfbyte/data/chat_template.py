"""Which chat template a run uses: the recipe's, the tokenizer's own, or ChatML where a base model has none.

Why: a base model has never seen the marks of a conversation. ChatML needs two tokens of its own; they are put where the
embedding has rows to spare, since a mapped or quantised base is never resized or copied, and those rows alone are
trained (PEFT's `trainable_token_indices`).
Source: OpenAI's ChatML; spare rows are those behind the tokenizer's last token (embeddings are padded to a multiple of
64 or more), or tokens that the model's makers have reserved.
Cost: none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import DataError

if TYPE_CHECKING:
    from halfbyte.recipe_data import Data

CHATML = "chatml"
START, END = "<|im_start|>", "<|im_end|>"
_RESERVED = re.compile(r"<?\W*(reserved|unused|extra_id|dummy|placeholder)\w*\W*\d+\W*>?", re.IGNORECASE)


def is_reserved(token: str) -> bool:
    """Whether a token's name says that the model's makers have kept it for later: no text has trained it."""
    return _RESERVED.fullmatch(token) is not None


@dataclass(frozen=True)
class Chosen:
    """What was settled about the template before rows are rendered."""

    new_tokens: tuple[int, ...] = ()
    """Rows of the embedding that must be trained."""
    notice: str | None = None


def chat_template(tokenizer: Any, data: Data) -> str | None:
    """The chat template as Jinja text: the recipe's (text, or a file of it), else the tokenizer's own, else None."""
    asked = data.chat_template
    if asked is None or asked == CHATML:
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
            f"data.chat_template {asked!r} is neither Jinja text nor a file that can be read ({error}), nor chatml.",
            fix="data.chat_template: chat.jinja",
        ) from None


def settle(tokenizer: Any, data: Data, *, embedding_rows: int, chats: bool) -> Chosen:
    """Give the tokenizer ChatML where the recipe asks for it, or where rows are conversations and it has no template.

    Args:
        tokenizer: its `chat_template` is set, and up to two tokens are added to it.
        embedding_rows: how many tokens the base has room for.
        chats: whether there are rows that need a chat template.

    Raises:
        DataError: ChatML's tokens are new to the tokenizer, and the embedding has no row to spare for them.
    """
    if data.chat_template != CHATML and (data.chat_template is not None or tokenizer.chat_template or not chats):
        return Chosen()
    why = "as data.chat_template says" if data.chat_template == CHATML else "the model has no chat template"
    vocabulary = tokenizer.get_vocab()
    start, end = START, END
    new: tuple[int, ...] = ()
    if START in vocabulary and END in vocabulary:
        what = "its tokenizer knows both tokens"
    elif embedding_rows >= len(tokenizer) + 2:
        tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
        new = tuple(tokenizer.convert_tokens_to_ids([START, END]))
        what = f"{START} and {END} take rows {new[0]} and {new[1]} of the embedding, which are trained"
    else:
        reserved = sorted((i, t) for t, i in vocabulary.items() if i < embedding_rows and is_reserved(t))
        if len(reserved) < 2:
            raise DataError(
                f"{why}, so ChatML is meant, and its tokens {START} and {END} are new; but the embedding has "
                f"{embedding_rows:,} rows for {len(tokenizer):,} tokens, none to spare, and it is not resized.",
                fix="data.chat_template: a file with a template of the model's own tokens, or rows of prompt and "
                "completion",
            )
        (first, start), (second, end) = reserved[:2]
        new = (first, second)
        what = f"the reserved tokens {start} and {end} stand for {START} and {END}, and are trained"
    opens = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    tokenizer.chat_template = _chatml(start, end, bos=opens)
    return Chosen(new, f"ChatML, since {why}: {what}" if why[0] == "t" else f"ChatML, {why}: {what}")


def _chatml(start: str, end: str, *, bos: bool) -> str:
    return (
        ("{{ bos_token }}" if bos else "")
        + "{% for m in messages %}{{ '"
        + start
        + "' + m['role'] + '\\n' + m['content'] + '"
        + end
        + "\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '"
        + start
        + "assistant\\n' }}{% endif %}"
    )
