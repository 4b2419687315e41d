"""The `data:` section of a recipe: which rows, how they are read, and what of them is trained. No torch; pydantic."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias, TypeGuard

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_serializer, model_validator

from halfbyte.types import Document


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


MOST = 2**31  # of anything that is counted; the product of two fits into 64 bits
Whole = Annotated[int, must("a number", lambda v: not isinstance(v, bool))]
Int = Annotated[Whole, Field(le=MOST)]
Format = Literal[
    "messages", "sharegpt", "alpaca", "prompt_completion", "text", "preference", "unpaired_preference", "labels",
    "tags", "vectors",
]  # fmt: skip
Mask = Literal["completion", "assistant", "all"]


def false_is(word: str) -> BeforeValidator:
    """YAML 1.1 reads a bare `no` and `off` as false."""
    return BeforeValidator(lambda value: word if value is False else value)


_LIKE = "rows: files, a glob, a hub: dataset, or a list of them; 5% or a number of the training rows; none; or auto"
_SPLIT = re.compile(r"(?P<count>\d+)|(?P<percent>\d+(\.\d+)?)\s*%|(?P<share>0?\.\d+)")
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
    if not (int(match["count"]) > 0 if match["count"] else 0 < percent < 100):
        raise ValueError(f"must be {_LIKE}")
    return match["count"] or f"{percent:g}%"


MIXING = ("name", "weight", "repeat", "limit", "replay")
"""Fields of an entry that do not say how its files are read."""


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
    chosen: str = field("chosen", "of two answers the better one", min_length=1)
    rejected: str = field("rejected", "of two answers the worse one", min_length=1)
    label: str = field("label", "a text's label, labels or number; kto: whether an answer is good (true)", min_length=1)
    answers: str = field("answers", "several answers, the best first or each with one of the scores", min_length=1)
    scores: str = field("scores", "what each of several answers is worth", min_length=1)
    query: str = field("query", "of task embed, the text that asks", min_length=1)
    passage: str = field("passage", "of task embed, the text that fits it", min_length=1)
    negative: str = field("negative", "of task embed, a text that does not, or a list; may be absent", min_length=1)
    score: str = field("score", "of task embed with CoSENTLoss, how much the two are alike", min_length=1)
    text_pair: str = field("text_pair", "of task classify or regress, a second text; may be absent", min_length=1)
    tokens: str = field("tokens", "of task tag, the list of words; rows without have text and spans", min_length=1)
    tags: str = field("tags", "of task tag, a tag for each word", min_length=1)
    spans: str = field("spans", "of task tag, a list of {start, end, label} in a text, by characters", min_length=1)


class DataEntry(Section):
    """Files that are read in a way of their own, or mixed with others: `path` is a name as in `data.train`; null is as
    `data` says."""

    path: Annotated[str, Field(min_length=1)]
    format: Format | None = None
    fields: Fields | None = None
    mask: Mask | None = None
    chat_template: str | None = None
    name: Annotated[str, Field(pattern=r"^[\w-]{1,40}$")] | None = None
    weight: Annotated[float, Field(gt=0)] | None = None
    """Its part of the rows of every step, beside those of the others."""
    repeat: Annotated[int, Field(ge=1, le=MOST)] | None = None
    """How often an epoch has each of its rows."""
    limit: Annotated[int, Field(ge=1, le=MOST)] | None = None
    replay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Its share of every step, of rows that keep what the base knows; an epoch does not count them."""

    @property
    def mixes(self) -> list[str]:
        """The fields that say how it is mixed with others."""
        return [name for name in MIXING if name != "name" and getattr(self, name) is not None]

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
            # a misspelt path is missing, too
            first = min(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
            name, wrong = ".".join(map(str, first["loc"])), first["msg"]
            if first["type"] == "extra_forbidden":
                near = get_close_matches(name, cls.model_fields, 1)
                allowed = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(cls.model_fields)}"
                wrong = f"is not a field; {allowed}"
            raise ValueError(f"entry {number}: {name}: {wrong}") from None

    @model_serializer
    def _given(self) -> dict[str, object]:
        values = {name: value for name, value in self if value is not None}
        return {n: v.model_dump(exclude_defaults=True) if isinstance(v, Fields) else v for n, v in values.items()}


def sources_of(names: object) -> tuple[DataEntry, ...]:
    """The sources of a mixture, each with a name of its own; none where no entry says what it is called or how it is
    mixed."""
    given = [n if isinstance(n, DataEntry) else DataEntry(path=n) for n in names] if isinstance(names, tuple) else []
    if not any(entry.name or entry.mixes for entry in given):
        return ()
    taken: list[str] = []
    for entry in given:
        stem = entry.name or re.sub(r"[^\w-]+", "-", Path(re.sub(r"[?*].*", "", entry.path)).stem).strip("-") or "rows"
        again = (f"{stem}-{number}" for number in count(2))
        taken.append(stem if stem not in taken else next(name for name in again if name not in taken))
    return tuple(e.model_copy(update={"name": name}) for e, name in zip(given, taken, strict=True))


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


_ARGS = "a mapping of names that the template reads to values, such as {enable_thinking: false}"


def _are_args(value: object) -> bool:
    given = {"messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"}
    return isinstance(value, Mapping) and all(isinstance(k, str) and k.isidentifier() and k not in given for k in value)


_WEIGHTS = "a mapping of regular expressions to numbers from 0 on, such as {'(?s)<think>.*?</think>': 0}"


def _are_weights(value: object) -> bool:
    try:
        return isinstance(value, Mapping) and all(0 <= float(w) < math.inf and re.compile(p) for p, w in value.items())
    except (TypeError, ValueError, re.error, RecursionError, OverflowError):
        return False


class Data(Section):
    """What is trained on."""

    train: RowNames = field(
        ...,
        "the rows to train on: JSONL, JSON, CSV, Parquet, .txt or .md; a glob, hub:org/name?split=train, or a list of "
        "them and of {path, format, fields, mask, chat_template, name, weight, repeat, limit, replay}",
    )
    eval: HeldOut = field(
        "auto", "held-out rows: files; 5% or a number of the training rows; none; auto (5% of 200 rows and more)"
    )
    format: Literal["auto"] | Format = field("auto", "how a row is read; auto tells it from the columns")
    fields: Fields = field(Fields(), "which columns hold what")
    max_length: Int = field(1024, "tokens of the longest row", ge=2)
    mask: Mask = field("completion", "what is trained: the last assistant turn, every one, or all tokens")
    weights: Annotated[dict[str, float], must(_WEIGHTS, _are_weights)] = field(
        {}, "what text counts for that a regular expression finds in what is trained: 0 masks it, 2 counts it twice"
    )
    overlong: Literal["error", "truncate", "skip"] = field("error", "what happens to a longer row")
    packing: Literal["rows", "stream"] = field(
        "rows", "rows as they are; or stream: plain texts end to end, in blocks of max_length tokens"
    )
    streaming: bool = field(
        False, "rows are read and tokenised while training goes on, in blocks whose order is seeded: files of any size"
    )
    share_prefixes: Annotated[Literal["auto", "off"], false_is("off")] = field(
        "auto", "compute once what rows of a step have in common at their beginnings; the same is learned"
    )
    order: Literal["random", "families"] = field(
        "random", "the rows of a step: any, or families: those whose beginnings are most alike; steps are at random"
    )
    query_prompt: str = field("", "task embed: put in front of each query, as sentence-transformers' prompt `query`")
    passage_prompt: str = field("", "task embed: put in front of each passage, as its prompt `document`")
    chat_template: str | None = field(
        None, "not the model's own: a Jinja template, its file, or chatml, chatml-tools, qwen-tools, llama3-tools"
    )

    template_args: Annotated[Document, must(_ARGS, _are_args)] = field(
        {}, "arguments of the chat template, such as {enable_thinking: false}; kept with the adapter, and used again"
    )
    thoughts: Literal["keep", "strip", "last"] = field(
        "keep",
        "an assistant's thoughts: keep, strip (none are learned), or last: those since the last question; earlier "
        "turns that had some are context",
    )

    def of(self, entry: DataEntry | None) -> Self:
        """As these files are read."""
        given = {} if entry is None else {n: v for n, v in entry if n not in ("path", *MIXING) and v is not None}
        return self.model_copy(update=given) if given else self

    @property
    def sources(self) -> tuple[DataEntry, ...]:
        """The sources that `train` mixes, as of `sources_of`."""
        return sources_of(self.train)

    @property
    def scored_sources(self) -> list[str]:
        """The names of the sources that held-out rows are of."""
        names = self.eval_names
        return [str(source.name) for source in (self.sources if names is None else sources_of(names))]

    def source_of(self, metric: str) -> str:
        """With what the name of a source's metric begins: `tickets_` of tickets_loss; empty for one of all rows."""
        return next((f"{name}_" for name in self.scored_sources if metric.startswith(f"{name}_")), "")

    def problems(self, task: str, train: Document) -> Iterator[str]:
        """What excludes each other in `data:`, in sentences; `train`: that section of the recipe."""
        yield from self._in_streaming(task, train)
        sources, given = (
            self.sources,
            [entry.name for entry in self.train if isinstance(entry, DataEntry) and entry.name],
        )
        kinds = {kind for source in sources for kind in source.mixes}
        if twice := [name for name in given if name and (given.count(name) > 1 or name == "base_text")]:
            yield f"data.train cannot have two sources {twice[0]}; base_text is the text that forgetting is measured on"
        names = [self.train] if isinstance(self.train, str) else self.train
        paths = [str(n.path if isinstance(n, DataEntry) else n) for n in names if sources or isinstance(n, DataEntry)]
        if double := next((path for path in paths if paths.count(path) > 1), None):
            numbers = " and ".join(str(number) for number, n in enumerate(names, 1) if getattr(n, "path", n) == double)
            yield f"data.train: entries {numbers} name {double}, and a row is of one source; keep one of them"
        if {"weight", "repeat"} <= kinds:
            yield "data.train: weight is a share of every step, repeat a number in an epoch; mix by one of them"
        if any({"replay"} < {*source.mixes} - {"limit"} for source in sources):
            yield "data.train: replay is a share of its own, beside weight and repeat of the others"
        replays = [source.replay for source in sources if source.replay is not None]
        if sources and (len(replays) == len(sources) or sum(replays) >= 1):
            yield "data.train: replay is a share beside other sources, and nothing is left for them"
        if self.packing == "stream" and kinds:
            yield "data.packing stream lays all texts end to end, so that data.train cannot mix sources; say rows"
        if self.order == "families" and (kinds or self.packing == "stream"):
            other = "data.train mixes sources" if kinds else "data.packing stream cuts all texts into blocks"
            yield f"data.order families puts rows that begin alike into a step, and {other}; say random"
        if any(source.mixes for source in sources_of(self.eval_names)):
            yield "data.eval: weight, repeat, limit and replay are for data.train; a source that is scored has a name"
        if self.packing != "stream":
            return
        if self.weights:
            yield "data.weights is not read with data.packing stream, where each token counts once; say rows"
        if self.format not in ("auto", "text"):
            yield f"data.packing stream is for plain text, and data.format is {self.format}; say rows, or format: text"
        if self.mask == "assistant":
            yield "data.packing stream is for plain text, in which no assistant speaks; data.mask: all"
        if self.overlong != "error":
            yield f"data.overlong {self.overlong} is not read with data.packing stream: long texts are cut into blocks"

    def _in_streaming(self, task: str, train: Document) -> Iterator[str]:
        evaluates, strategies = self.eval_names is not None, (train["save_strategy"], train["eval_strategy"])
        excluded = {
            f"is for task causal_lm and train.method sft; it is {task}, {train['method']}":
                task != "causal_lm" or train["method"] != "sft",
            "needs train.max_steps: how many rows there are is not known ahead": train["max_steps"] < 1,
            "does not go with train.within, which counts rows ahead; train.max_steps": train["within"] is not None,
            "knows no epoch ahead: train.save_strategy steps, and train.eval_steps: 100 with data.eval":
                "epoch" in strategies or (evaluates and train["eval_steps"] is None),
            "takes rows in the order of their blocks, so that data.train cannot mix named sources": bool(self.sources),
            f"knows no number of rows to hold {self.eval} out of; data.eval: a file, or none":
                not evaluates and self.eval not in ("auto", "none"),
            "knows no row ahead, and data.order is families; say random": self.order == "families",
            "knows no row ahead, and data.overlong is error; say truncate or skip":
                self.packing == "rows" and self.overlong == "error",
        }  # fmt: skip
        yield from (f"data.streaming {why}" for why, wrong in excluded.items() if self.streaming and wrong)

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
