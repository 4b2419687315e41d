"""Turn rows into token ids and labels, by the tokenizer's own chat template.

Why: no token may straddle the edge of what is labelled, and the prompt of a training row must be the very tokens that
generation starts from. So the rendered text is cut at the edges of its labelled spans, and each piece tokenised alone,
as a prompt is. Tokenizers that mark the start of every text (SentencePiece with its dummy prefix) cannot be cut; there
an edge is where the tokens of the text up to it stop agreeing with those of the whole. Earlier turns that carry no
label are tokenised with what surrounds them, as generation sees them.
Source: `render` says which spans; -100 is torch's `ignore_index`.
Cost: one tokenisation a row (three where the tokenizer cannot be cut); 24 bytes a token are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from halfbyte.data.formats import Row
from halfbyte.data.problems import listing
from halfbyte.data.render import Refused, Rendered, Renderer, common_length
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from halfbyte.recipe_data import Data

IGNORED = -100

_CHUNK_ROWS = 1024  # rows tokenised in one call: enough for the tokenizer's threads, few enough to stay small
_CUT_PROBES = (("\n", "a b"), (":", " a"), ("]", "7"))  # cut or whole, the same tokens: it marks no start


@dataclass(frozen=True)
class Example:
    """One row as tokens."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """As long as `input_ids` and not shifted; -100 where nothing is learnt, and always at the first token."""
    where: str
    prompt_ids: tuple[int, ...]
    """What generation starts from to answer this row."""
    completion: str
    """The reference answer: the last assistant text."""


@dataclass(frozen=True)
class Stats:
    """What an encoded file holds; tokens count no padding, there is none."""

    rows: int
    tokens: int
    labelled_tokens: int
    min_length: int
    mean_length: float
    max_length: int

    @property
    def labelled_share(self) -> float:
        return self.labelled_tokens / self.tokens


@dataclass(frozen=True)
class Encoded:
    examples: list[Example]
    skipped: list[str] = field(default_factory=list)
    """Rows left out because of their length, each with its reason."""
    truncated: int = 0
    notices: list[str] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return [len(e.input_ids) for e in self.examples]

    @property
    def labelled(self) -> list[int]:
        return [_labelled(e) for e in self.examples]

    @property
    def stats(self) -> Stats:
        lengths = self.lengths
        return Stats(
            rows=len(lengths),
            tokens=sum(lengths),
            labelled_tokens=sum(self.labelled),
            min_length=min(lengths),
            mean_length=sum(lengths) / len(lengths),
            max_length=max(lengths),
        )


def encode(rows: Sequence[Row], tokenizer: Any, data: Data) -> Encoded:
    """Rows to examples.

    Raises:
        DataError: rows that the template refuses, that have no labelled token, or that are over `data.max_length` when
            `data.overlong` is error (all of them are named); no chat template for messages; no row left.
    """
    if not rows:
        raise DataError("there are no rows to encode.")
    renderer, lexer = Renderer(tokenizer, data), _Lexer(tokenizer)
    problems: list[str] = []
    examples: list[Example] = []
    for start in range(0, len(rows), _CHUNK_ROWS):
        rendered: list[Rendered] = []
        for row in rows[start : start + _CHUNK_ROWS]:
            try:
                rendered.append(renderer.render(row))
            except Refused as refused:
                problems.append(f"{row.where}: {refused}")
        examples.extend(lexer.examples(rendered))
    problems.extend(
        f"{e.where}: not one token is labelled (data.mask {data.mask}), so there is nothing to learn from it"
        for e in examples
        if not _labelled(e)
    )
    if problems:
        raise DataError(listing(f"{len(problems):,} of {len(rows):,} rows cannot be encoded", problems))
    return _fit(examples, data, renderer.notices())


def _labelled(example: Example) -> int:
    return len(example.labels) - example.labels.count(IGNORED)


def _fit(examples: list[Example], data: Data, notices: list[str]) -> Encoded:
    """Apply `data.overlong`."""
    limit = data.max_length
    long = [e for e in examples if len(e.input_ids) > limit]
    if not long:
        return Encoded(examples, notices=notices)
    longest = max(len(e.input_ids) for e in long)
    if data.overlong == "error":
        raise DataError(
            listing(
                f"{len(long):,} of {len(examples):,} rows are longer than data.max_length {limit:,}; "
                f"the longest has {longest:,} tokens",
                [f"{e.where}: {len(e.input_ids):,} tokens" for e in long],
            ),
            fix=f"data.max_length: {longest}, or data.overlong: truncate (cut the end off) or skip",
        )
    kept: list[Example] = []
    skipped: list[str] = []
    truncated = 0
    for example in examples:
        length = len(example.input_ids)
        cut = replace(example, input_ids=example.input_ids[:limit], labels=example.labels[:limit])
        if length <= limit:
            kept.append(example)
        elif data.overlong == "skip":
            skipped.append(f"{example.where}: {length:,} tokens, over {limit:,}")
        elif not _labelled(cut):
            skipped.append(f"{example.where}: {length:,} tokens, and none of the first {limit:,} is labelled")
        else:
            truncated += 1
            kept.append(cut)
    if not kept:
        raise DataError(
            f"no row is left: all {len(examples):,} have more than data.max_length {limit:,} tokens, "
            f"{'and are skipped' if data.overlong == 'skip' else 'and no label among the first'}.",
            fix=f"data.max_length: {longest}",
        )
    return Encoded(kept, skipped, truncated, notices)


class _Lexer:
    """Text and spans to tokens and labels."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_token_id
        self._cuts = all(a + b == whole for a, b, whole in (self._ids([a, b, a + b]) for a, b in _CUT_PROBES))
        (bare,), dressed = self._ids(["a"]), list(tokenizer("a").input_ids)
        at = next((k for k in range(len(dressed)) if bare and dressed[k : k + len(bare)] == bare), 0)
        self._opening: list[int] = dressed[:at]
        # One int object for each id, not one for each token (32 bytes).
        self._ints: dict[int, int] = {}

    def examples(self, rendered: Sequence[Rendered]) -> Iterator[Example]:
        if self._eos is None and any(r.ends for r in rendered):
            raise DataError(
                "nothing would teach this model to stop: its tokenizer has no eos token, and its chat template, if it "
                "has one, ends no assistant turn with a special token.",
                fix="data.chat_template: a file with a template that does",
            )
        texts = [self._texts(r) for r in rendered]
        ids = iter(self._ids([t for group in texts for t in group]))
        for r, group in zip(rendered, texts, strict=True):
            yield self._example(r, list(islice(ids, len(group))))

    def _texts(self, r: Rendered) -> list[str]:
        """What to tokenise for a row: its pieces, or it and its beginnings; then its prompt, if not among them."""
        edges = _edges(r)
        if not self._cuts:
            return [r.text, *(r.text[:edge] for edge in edges), r.prompt]
        pieces = [r.text[a:b] for a, b in zip([0, *edges], [*edges, len(r.text)], strict=True)]
        return pieces if r.text.startswith(r.prompt) else [*pieces, r.prompt]

    def _example(self, r: Rendered, parts: list[list[int]]) -> Example:
        edges = _edges(r)
        ids: list[int] = []
        at = {0: 0}  # edge in characters -> in tokens
        if self._cuts:
            for edge, part in zip([*edges, len(r.text)], parts, strict=False):
                ids += part
                at[edge] = len(ids)
        else:
            ids += parts[0]
            at |= {edge: common_length(ids, part) for edge, part in zip(edges, parts[1:], strict=False)}
            at[len(r.text)] = len(ids)
        prompt = ids[: at[len(r.prompt)]] if self._cuts and r.text.startswith(r.prompt) else parts[-1]
        trained = [(at[a], at[b]) for a, b in r.spans]
        if r.ends:
            if r.spans and r.spans[-1][1] == len(r.text):
                trained[-1] = (trained[-1][0], len(ids) + 1)
            ids = [*ids, self._eos]
        if r.opens:
            ids, prompt = self._opening + ids, self._opening + prompt
            trained = [(a and a + len(self._opening), b + len(self._opening)) for a, b in trained]
        ids = list(map(self._ints.setdefault, ids, ids))
        labels = [IGNORED] * len(ids)
        for a, b in trained:
            labels[a:b] = ids[a:b]
        labels[0] = IGNORED
        prompt = list(map(self._ints.setdefault, prompt, prompt))
        return Example(tuple(ids), tuple(labels), r.where, tuple(prompt), r.completion)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        once = list(dict.fromkeys(texts))  # rows often share their last piece
        ids = self._tokenizer(once, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
        known: dict[str, list[int]] = dict(zip(once, ids, strict=True))
        return [known[t] for t in texts]


def _edges(r: Rendered) -> list[int]:
    """Where the text may not be tokenised across: the edges of the labelled spans, and the end of the prompt."""
    edges = {edge for span in r.spans for edge in span}
    if r.text.startswith(r.prompt):
        edges.add(len(r.prompt))
    return sorted(edges - {0, len(r.text)})
