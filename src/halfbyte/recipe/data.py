"""The `data:` section of a recipe: which rows, how they are read, and what of them is trained.

Cost: no torch; pydantic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeGuard

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def number(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def is_list_of_names(value: object) -> TypeGuard[Sequence[str]]:
    return isinstance(value, (tuple, list)) and bool(value) and all(isinstance(v, str) and v for v in value)


def names_of_rows(value: object) -> object:
    """Names of files, globs or hub datasets."""
    if isinstance(value, str) and value:
        return value
    if is_list_of_names(value):
        return tuple(value)
    raise ValueError("must be the name of a file, a glob, a hub: dataset, or a list of them")


Int = Annotated[int, BeforeValidator(number)]
RowNames = Annotated[str | tuple[str, ...], BeforeValidator(names_of_rows)]


class Section(BaseModel):
    """A part of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Fields(Section):
    """Which columns of a row hold what."""

    prompt: str = Field("prompt", min_length=1, description="the column with the question")
    completion: str = Field("completion", min_length=1, description="the column with the answer")
    messages: str = Field("messages", min_length=1, description="the column with the list of messages")
    conversations: str = Field("conversations", min_length=1, description="the same under ShareGPT's name")
    role: str | None = Field(None, min_length=1, description="who speaks, in a message: role; in ShareGPT's: from")
    content: str | None = Field(
        None, min_length=1, description="what is said, in a message: content; in ShareGPT's: value"
    )
    instruction: str = Field("instruction", min_length=1, description="Alpaca's task")
    input: str = Field("input", min_length=1, description="what Alpaca's task is about; may be absent or empty")
    output: str = Field("output", min_length=1, description="Alpaca's answer")
    text: str = Field("text", min_length=1, description="the column with plain text")
    system: str = Field("system", min_length=1, description="a system message for the row, in any format but text")
    tools: str = Field("tools", min_length=1, description="the tools that a conversation may call, or their JSON")


class Data(Section):
    """What is trained on."""

    train: RowNames = Field(
        description="the rows to train on: JSONL, JSON, CSV or Parquet; a glob, a list, or hub:org/name?split=train"
    )
    eval: RowNames | None = Field(None, description="held-out rows, for evaluation")
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = Field(
        "auto", description="how a row is read; auto tells it from the columns"
    )
    fields: Fields = Field(default_factory=Fields, description="which columns hold what")
    max_length: Int = Field(1024, ge=2, description="tokens of the longest row")
    mask: Literal["completion", "assistant", "all"] = Field(
        "completion", description="what is trained: the last assistant turn, every one, or all tokens"
    )
    overlong: Literal["error", "truncate", "skip"] = Field("error", description="what happens to a longer row")
    packing: Literal["rows", "stream"] = Field(
        "rows", description="rows as they are; or stream: plain texts end to end, in blocks of max_length tokens"
    )
    chat_template: str | None = Field(
        None, description="a Jinja template, or its file, or chatml, instead of the model's own"
    )
