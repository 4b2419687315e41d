"""Which chat template a run uses: the recipe's, the tokenizer's own, or a bundled one; which embedding rows it trains.

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
The bundled ones lie in jinja/: ChatML without and with tools, and tools as Qwen and Llama 3 write them.
Source: OpenAI's ChatML; Hermes 2 Pro, Qwen 2.5 and 3, Llama 3.1 for how tools are written.
Cost: the first records of each source are read once more.
"""

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from halfbyte.data.reading import files
from halfbyte.data.reading.read import Reader
from halfbyte.errors import DataError
from halfbyte.recipe.data import Data, Sources
from halfbyte.types import Tokenizer

CHATML = ("chatml", "chatml-tools", "qwen-tools")  # in the recipe; their marks can be new to a tokenizer
_RESERVED = re.compile(r"<?\W*(reserved|unused|extra_id|dummy|placeholder)\w*\W*\d+\W*>?", re.IGNORECASE)
START, END = "<|im_start|>", "<|im_end|>"
BUNDLED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(CHATML, (START, END)),
    "llama3-tools": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""Name in the recipe -> the tokens that the template writes."""


def is_reserved(token: str) -> bool:
    """Whether a token's name says that the model's makers have kept it for later: no text has trained it."""
    return _RESERVED.fullmatch(token) is not None


def chat_template(tokenizer: Tokenizer, data: Data) -> str | None:
    """The chat template as Jinja text: the recipe's (a bundled name, text, or a file of it), else the tokenizer's own,
    else None. `data.template_args` stand at its top as defaults, so that whoever renders it has them. Raises DataError:
    an argument that it does not read; as `_template`."""
    text, args = _template(tokenizer, data), data.template_args
    if text is None:
        return None
    if strange := [name for name in args if not re.search(rf"\b{name}\b", text)]:
        raise DataError(f"data.template_args.{strange[0]}: the chat template does not read it.", fix="leave it out")
    # each on a line of its own, which Jinja takes away as transformers sets it up
    top = "".join(f"{{% if {n} is not defined %}}{{% set {n} = {v!r} %}}{{% endif %}}\n" for n, v in args.items())
    return text if text.startswith(top) else top + text


def _template(tokenizer: Tokenizer, data: Data) -> str | None:
    """The same without arguments.

    Raises:
        DataError: a file that cannot be read, a bundled template whose tokens the tokenizer has not, or several
            templates and no default one.
    """
    asked = data.chat_template
    if asked in BUNDLED and _knows(tokenizer, asked):
        return bundled(asked, tokenizer)
    if asked is None or asked in CHATML:  # by now ChatML with other marks is the tokenizer's own template
        if not tokenizer.chat_template:
            return None
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:
            raise DataError(
                f"the tokenizer has several chat templates and no default one: {error}",
                fix="data.chat_template: a file with the one to use",
            ) from None
    check_tokens(tokenizer, asked)
    if "{" in asked:
        return asked
    try:
        return Path(asked).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"data.chat_template {asked!r} is neither Jinja text nor a file that can be read ({error}).",
            fix=f"data.chat_template: chat.jinja, or {', '.join(BUNDLED)}",
        ) from None


def bundled(name: str, tokenizer: Tokenizer, marks: tuple[str, str] = (START, END)) -> str:
    """A template of `BUNDLED` for this tokenizer: a text begins with its BOS where it begins texts with one. `marks`:
    what stands for ChatML's two."""
    text = resources.files(__package__).joinpath("jinja", f"{name}.jinja").read_text(encoding="utf-8").strip()
    opens = tokenizer.bos_token is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return ("{{ bos_token }}" if opens else "") + text.replace(START, marks[0]).replace(END, marks[1])


def with_tools(tokenizer: Tokenizer) -> str | None:
    """The chat template for a conversation with tools, as Jinja text, to be given to `apply_chat_template(messages,
    tools=..., chat_template=...)`: the tokenizer's own where it reads tools, else the bundled one in whose tokens it
    speaks: chatml-tools (calls are JSON in <tool_call>), or llama3-tools (JSON with name and parameters). None where it
    speaks in neither."""
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        templates = templates.get("tool_use", templates.get("default"))
    if templates and "tools" in templates:
        return str(templates)
    return next((bundled(n, tokenizer) for n in ("chatml-tools", "llama3-tools") if _knows(tokenizer, n)), None)


def check_tokens(tokenizer: Tokenizer, name: str | None) -> None:
    """Raise a DataError where a bundled template writes tokens that the tokenizer has not."""
    if name in BUNDLED and not _knows(tokenizer, name):
        raise DataError(
            f"data.chat_template {name} writes {', '.join(BUNDLED[name])}, which this tokenizer has not.",
            fix="data.chat_template: chatml-tools, for all rows",
        )


def _knows(tokenizer: Tokenizer, name: str) -> bool:
    return tokenizer.get_vocab().keys() >= set(BUNDLED[name])


@dataclass(frozen=True)
class ChatmlMarks:
    """ChatML's new tokens, whose rows of the embedding must train, and what to tell the user."""

    new_tokens: tuple[int, ...]
    notice: str


def is_needed(names: Sources, tokenizer: Tokenizer, data: Data) -> bool:
    """Whether the recipe asks for ChatML, or conversations meet a tokenizer without a template. Raises DataError: names
    that stand for nothing, sources that cannot be read."""
    if data.chat_template is not None or tokenizer.chat_template:
        return data.chat_template in CHATML
    reader = Reader(sources := [s for s in files.find(names) if data.of(s.entry).chat_template is None], data)
    first = (next(iter(reader.rows_of(source)), None) for source in sources)
    return any(row is not None and row.messages is not None for row in first)


def install(tokenizer: Tokenizer, data: Data, *, embedding_rows: int, tied: bool) -> ChatmlMarks:
    """Give the tokenizer ChatML: its template, and new tokens where there are rows for them.

    Args:
        tokenizer: is changed.
        embedding_rows: how many tokens have a row in the base's embedding. tied: the head is the embedding.

    Raises:
        DataError: the tokenizer has no end token, and no row is free for a new one.
    """
    name = data.chat_template or CHATML[0]
    why = f"{name}, as data.chat_template says" if data.chat_template else "ChatML, the model has no chat template"
    start, end, how, new = _marks(tokenizer, embedding_rows, tied)
    tokenizer.chat_template = bundled(name, tokenizer, (start, end))
    ids = tuple(sorted(int(tokenizer.convert_tokens_to_ids(token)) for token in new))
    trained = f"; rows {', '.join(map(str, ids))} of the embedding are trained" if ids else ""
    return ChatmlMarks(ids, f"{why}: {how}{trained}")


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
