"""Which chat template a run uses, the recipe's or the tokenizer's own; and which tokens no text has trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.errors import DataError

if TYPE_CHECKING:
    from halfbyte.recipe.data import Data
    from halfbyte.types import Tokenizer

CHATML = "chatml"  # in the recipe: ChatML as `chatml.py` makes it
_RESERVED = re.compile(r"<?\W*(reserved|unused|extra_id|dummy|placeholder)\w*\W*\d+\W*>?", re.IGNORECASE)


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
            fix="data.chat_template: chat.jinja, or chatml",
        ) from None
