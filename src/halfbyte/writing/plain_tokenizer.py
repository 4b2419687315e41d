"""A tokenizer without transformers: the `tokenizers` library's own, and a chat template rendered as transformers does.

Source: `transformers/utils/chat_template_utils.py`. Cost: reading a tokenizer.json.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer as Backend

from halfbyte.errors import DataError
from halfbyte.layers.decoding.decoder import CannotKeep as CannotKeep
from halfbyte.system import files, limits
from halfbyte.types import Document, Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

FILE = "tokenizer.json"
_WORDS = " A b\n\n  c's , 1234567.5 ? Straße naïve 日本語 🙂\tend . "


class PlainTokenizer:
    """In a folder. `chat`: template, special tokens, and the file's hash. Raises CannotKeep: it is another file."""

    is_fast = True

    def __init__(self, folder: Path, chat: Document) -> None:
        if files.sha256(folder / FILE) != chat["sha256"]:
            raise CannotKeep(FILE)
        self.chat, self.backend_tokenizer = chat, Backend.from_file(str(folder / FILE))

    @classmethod
    def of(cls, tokenizer: Tokenizer, folder: Path, chat_ids: Callable[..., list[int]]) -> "PlainTokenizer":
        """Of transformers' tokenizer, written into a folder. `chat_ids`: what it makes of a conversation. Raises
        CannotKeep: conversations or tokens would become others."""
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.backend_tokenizer.save(str(folder / FILE))
        template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        special, digest = dict(tokenizer.special_tokens_map), files.sha256(folder / FILE)
        plain = cls(folder, {"template": template, "special": special, "sha256": digest})
        words = _WORDS + "".join(map(str, tokenizer.all_special_tokens))
        turns = [{"role": role, "content": words} for role in ("system", "user", "assistant", "user")]
        for talk in (turns[1:2], turns[:2], turns[1:], turns):
            try:
                ids = chat_ids(tokenizer, talk)
            except DataError:
                continue  # the template refuses it
            texts = [[x.decode(ids, skip_special_tokens=skips) for skips in (False, True)] for x in (plain, tokenizer)]
            if plain.chat_ids(talk) != ids or texts[0] != texts[1]:
                raise CannotKeep("the tokenizer does more than its tokenizer.json says")
        return plain

    def chat_ids(self, messages: Sequence[Document]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks."""
        if self.chat["template"] is None:
            return list(self.backend_tokenizer.encode("".join(m["content"] for m in messages)).ids)
        with limits.template(self.chat["template"]):
            more = {"tools": None, "documents": None, "add_generation_prompt": True, **self.chat["special"]}
            text = self._template.render(messages=list(messages), **more)
        return list(self.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @cached_property
    def _template(self) -> "Template":
        """In a sandbox, with what transformers gives a template."""
        from jinja2.exceptions import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        loops = ["jinja2.ext.loopcontrols"]
        room = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)  # nosec B701
        room.filters["tojson"] = lambda x, ensure_ascii=False, **more: json.dumps(x, ensure_ascii=ensure_ascii, **more)
        room.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        return room.from_string(self.chat["template"])
