"""The `data:` section of a recipe: which rows, how they are read, and what of them is trained. No torch; pydantic."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeGuard

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_serializer, model_validator


class Section(BaseModel):
    """A part of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: object) -> object:
        """A section whose every line is commented out is an empty one, not null."""
        return {} if value is None else value


def field(default: Any, what: str, *usual: str, **limits: Any) -> Any:
    """A field with its default, what it does, and values that usually serve; `...` for a field that must be given."""
    return Field(default, description=what, examples=list(usual), **limits)


def must(be: str, allowed: Callable[[Any], object], kind: type[Any] = BeforeValidator) -> Any:
    """Refuses what is not `allowed`, in words of ours: pydantic's are about each member of a union."""

    def check(value: object) -> object:
        if not allowed(value):
            raise ValueError(f"must be {be}")
        return value

    return kind(check)


def is_list_of_names(value: object) -> TypeGuard[Sequence[str]]:
    return isinstance(value, (tuple, list)) and bool(value) and all(isinstance(v, str) and v for v in value)


def names_rows(value: object) -> bool:
    """As `is_name_or_list`, and `DataEntry` may be in the list."""
    if isinstance(value, tuple):
        value = [v.path if isinstance(v, DataEntry) else v for v in value]
    return is_name_or_list(value)


def is_name_or_list(value: object) -> bool:
    return (isinstance(value, str) and bool(value.strip())) or is_list_of_names(value)


Int = Annotated[int, must("a number", lambda v: not isinstance(v, bool))]
Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "text"]
Mask = Literal["completion", "assistant", "all"]
_LIKE = "rows: files, a glob, a hub: dataset, or a list of them; 5% or a number of the training rows; none; or auto"
_SPLIT = re.compile(r"(?P<count>[1-9]\d*)|(?P<percent>\d+(\.\d+)?)\s*%|(?P<share>0?\.\d+)")
AUTO_PERCENT = 5  # of the rows
AUTO_MIN_ROWS, AUTO_MAX_HELD_OUT = 200, 200


def _held_out(value: object) -> object:
    """`none`, `auto`, a count such as 64, a share such as 5%, each as text; or names of rows, as they are."""
    text = "none" if value is None else str(value).strip()
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        return value
    match = _SPLIT.fullmatch(text)
    if match is None:
        return text if isinstance(value, str | None) else value
    percent = float(match["percent"] or 100 * float(match["share"] or 0))
    if match["count"] is None and not 0 < percent < 100:
        raise ValueError(f"must be {_LIKE}")
    return match["count"] or f"{percent:g}%"


class Fields(Section):
    """Which columns of a row hold what."""

    prompt: str = field("prompt", "the column with the question", min_length=1)
    completion: str = field("completion", "the column with the answer", min_length=1)
    messages: str = field("messages", "the column with the list of messages", min_length=1)
    conversations: str = field("conversations", "the same under ShareGPT's name", min_length=1)
    role: str | None = field(None, "who speaks, in a message: role; in ShareGPT's: from", min_length=1)
    content: str | None = field(None, "what is said, in a message: content; in ShareGPT's: value", min_length=1)
    instruction: str = field("instruction", "Alpaca's task", min_length=1)
    input: str = field("input", "what Alpaca's task is about; may be absent or empty", min_length=1)
    output: str = field("output", "Alpaca's answer", min_length=1)
    text: str = field("text", "the column with plain text", min_length=1)
    system: str = field("system", "a system message for the row, in any format but text", min_length=1)
    tools: str = field("tools", "the tools that a conversation may call, or their JSON", min_length=1)


class DataEntry(Section):
    """Files that are read in a way of their own: `path` is a name as in `data.train`; null is as `data` says."""

    path: Annotated[str, Field(min_length=1)]
    format: Format | None = None
    fields: Fields | None = None
    mask: Mask | None = None
    chat_template: str | None = None

    def __str__(self) -> str:
        return str(self.model_dump()).replace("'", "")

    @classmethod
    def of(cls, value: object, number: int) -> object:
        """A mapping as an entry, the `number`th of its list; anything else as it is. Raises ValueError."""
        if not isinstance(value, Mapping):
            return value
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name, allowed = ".".join(map(str, first["loc"])), ", ".join(cls.model_fields)
            wrong = "is not a field" if first["type"] == "extra_forbidden" else first["msg"]
            raise ValueError(f"entry {number}: {name}: {wrong}; allowed: {allowed}") from None

    @model_serializer
    def _given(self) -> dict[str, object]:
        values = {name: value for name, value in self if value is not None}
        return {n: v.model_dump(exclude_defaults=True) if isinstance(v, Fields) else v for n, v in values.items()}


def _entries(value: object) -> object:
    return tuple(map(DataEntry.of, value, count(1))) if isinstance(value, (tuple, list)) else value


Sources: TypeAlias = str | Path | Sequence[str | DataEntry]
"""What names rows: a file, a glob, a hub dataset, or a list of them and of `DataEntry`."""
RowNames = Annotated[
    str | tuple[str | DataEntry, ...],
    must(
        "the name of a file, a glob, a hub: dataset, or a list of them and of {path: FILE, fields: {...}}",
        names_rows,
    ),
    BeforeValidator(_entries),
]  # fmt: skip
HeldOut = Annotated[
    str | tuple[str | DataEntry, ...], must(_LIKE, names_rows), BeforeValidator(_entries), BeforeValidator(_held_out)
]


class Data(Section):
    """What is trained on."""

    train: RowNames = field(
        ...,
        "the rows to train on: JSONL, JSON, CSV, Parquet, .txt or .md; a glob, hub:org/name?split=train, or a list of "
        "them and of {path, format, fields, mask, chat_template}",
    )
    eval: HeldOut = field(
        "auto", "held-out rows: files; 5% or a number of the training rows; none; auto (5% of 200 rows and more)"
    )
    format: Literal["auto"] | Format = field("auto", "how a row is read; auto tells it from the columns")
    fields: Fields = field(Fields(), "which columns hold what")
    max_length: Int = field(1024, "tokens of the longest row", ge=2)
    mask: Mask = field("completion", "what is trained: the last assistant turn, every one, or all tokens")
    overlong: Literal["error", "truncate", "skip"] = field("error", "what happens to a longer row")
    packing: Literal["rows", "stream"] = field(
        "rows", "rows as they are; or stream: plain texts end to end, in blocks of max_length tokens"
    )
    share_prefixes: Literal["auto", "off"] = field(
        "auto", "compute once what rows of a step have in common at their beginnings; the same is learned"
    )
    chat_template: str | None = field(
        None, "not the model's own: a Jinja template, its file, or chatml, chatml-tools, qwen-tools, llama3-tools"
    )

    def of(self, entry: DataEntry | None) -> Self:
        """As these files are read."""
        given = {} if entry is None else {n: v for n, v in entry if n != "path" and v is not None}
        return self.model_copy(update=given) if given else self

    @property
    def eval_names(self) -> str | tuple[str | DataEntry, ...] | None:
        """The rows that `eval` names; None where they are taken out of the training rows, or there are none."""
        splits = isinstance(self.eval, str) and (self.eval in ("auto", "none") or _SPLIT.fullmatch(self.eval))
        return None if splits else self.eval

    def held_out_of(self, rows: int) -> int:
        """How many of so many training rows `eval` holds out; it may ask for more than there are."""
        asked = self.eval
        if self.eval_names is not None or asked == "none":
            return 0
        if asked == "auto":
            return min(round(rows * AUTO_PERCENT / 100), AUTO_MAX_HELD_OUT) if rows >= AUTO_MIN_ROWS else 0
        assert isinstance(asked, str)
        return max(1, round(rows * float(asked[:-1]) / 100)) if asked.endswith("%") else int(asked)
