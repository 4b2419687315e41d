"""Turn rows into token ids and labels, by the tokenizer's own chat template.

Why: no token may straddle the edge of what is labelled, and the prompt of a training row must be the very tokens that
generation starts from. So the rendered text is cut at the edges of its labelled spans, and each piece tokenised alone,
as a prompt is. Tokenizers that mark the start of every text (SentencePiece with its dummy prefix) cannot be cut; there
an edge is where the tokens of the text up to it stop agreeing with those of the whole. Earlier turns that carry no
label are tokenised with what surrounds them, as generation sees them.
Cost: one tokenisation a row (three where the tokenizer cannot be cut), about 0.4 ms for 200 tokens.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice, pairwise
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from halfbyte.data.encoding import chatml, texts
from halfbyte.data.encoding.examples import Examples, Subset, TokenizedRow, batch
from halfbyte.data.encoding.render import Refused, RenderedRow, Renderer
from halfbyte.data.encoding.tally import Tally
from halfbyte.data.reading.formats import Row
from halfbyte.data.reading.pairs import common_length
from halfbyte.data.reading.problems import Problems
from halfbyte.data.reading.read import Chunk, understand
from halfbyte.errors import DataError, HalfbyteError
from halfbyte.recipe.data import Data, DataEntry
from halfbyte.types import Tokenizer

# If these give the same tokens cut and whole, the tokenizer marks no start of text, and texts may be cut.
_CUT_PROBES = (("\n", "a b"), (":", " a"), ("]", "7"))


@dataclass(frozen=True)
class Stats:
    rows: int
    tokens: int
    labelled_tokens: int
    min_length: int
    mean_length: float
    max_length: int

    @property
    def labelled_share(self) -> float:
        return self.labelled_tokens / self.tokens


@dataclass(frozen=True, eq=False)
class SourceRows:
    """Which source of a mixture each row is of: `names[of_row[i]]` for row i; (rows,) int64."""

    names: tuple[str, ...]
    of_row: NDArray[np.int64]

    def numbers(self) -> dict[str, NDArray[np.int64]]:
        """The rows of each source that has any."""
        every = {name: np.flatnonzero(self.of_row == number) for number, name in enumerate(self.names)}
        return {name: rows for name, rows in every.items() if len(rows)}


@dataclass(frozen=True)
class EncodedRows:
    """All rows of a recipe's `data.train` or `data.eval` as tokens, and what was counted meanwhile."""

    examples: Examples
    tally: Tally
    texts: int | None = None  # how many texts the blocks hold, with `data.packing: stream`; else None
    shared: NDArray[np.int64] | None = None
    """(rows,) tokens of each row that its texts share, and that are computed once; None: none are."""
    sources: SourceRows | None = None

    def take(self, numbers: NDArray[np.int64]) -> Self:
        """Some of the rows, by their numbers, ascending."""
        of = self.sources and SourceRows(self.sources.names, self.sources.of_row[numbers])
        return replace(self, examples=Subset(self.examples, numbers), sources=of)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row: (rows,) int64."""
        return self.examples.lengths() if self.shared is None else self.examples.lengths() - self.shared

    @cached_property
    def text_lengths(self) -> NDArray[np.int64]:
        """Tokens of the longest text of each row: (rows,) int64."""
        lengths, seconds = self.examples.lengths(), self.examples.seconds()
        return lengths if seconds is None else np.maximum(seconds, lengths - seconds)

    @cached_property
    def labelled(self) -> NDArray[np.int64]:
        """Labelled tokens of each row: (rows,) int64."""
        return self.examples.labelled()

    @cached_property
    def label_weights(self) -> NDArray[np.int64] | NDArray[np.float64]:
        """What the labels of each row count for together: (rows,); `labelled` itself where each counts once."""
        weights = self.examples.label_weights()
        return self.labelled if weights is None or np.array_equal(weights, self.labelled) else weights

    @cached_property
    def stats(self) -> Stats:
        lengths = self.lengths
        return Stats(
            rows=len(lengths), tokens=int(lengths.sum()), labelled_tokens=int(self.labelled.sum()),
            min_length=int(lengths.min()), mean_length=float(lengths.mean()), max_length=int(lengths.max()),
        )  # fmt: skip


@dataclass
class EncodedChunk:
    problems: Problems
    batch: pa.RecordBatch | None = None  # of `examples.SCHEMA`; None where nothing was encoded
    tally: Tally = field(default_factory=Tally)
    error: HalfbyteError | None = None  # why none of its rows could be encoded


class Encoder:
    """Rows to tokens, chunk by chunk. The tokens of a chunk do not depend on the chunks before."""

    def __init__(self, tokenizer: Tokenizer, data: Data) -> None:
        self._data, self._tokenizer = data, tokenizer
        self._others: dict[DataEntry, Self] = {}
        self._renderer, self._lexer = Renderer(tokenizer, data), _Lexer(tokenizer)
        self._ends = self._renderer.end_tokens()
        added = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self._special = frozenset(added | set(tokenizer.all_special_ids))

    def encode_chunk(self, chunk: Chunk, *, only_read: bool) -> EncodedChunk:
        """The tokens of a chunk; with `only_read` only what is wrong with its records."""
        rows, problems = understand(chunk, self._data)
        encoded = EncodedChunk(problems)
        if not only_read:
            try:
                encoded.batch, encoded.tally = self._of(chunk.source.entry).encode(rows)
                encoded.tally.sources[str((chunk.source.path, chunk.source.hub))] = encoded.tally.kept
            except HalfbyteError as error:
                encoded.error = error
        return encoded

    def _of(self, entry: DataEntry | None) -> Self:
        """The encoder of files that a recipe's entry stands for."""
        if entry is None:
            return self
        if entry not in self._others:
            chatml.check_tokens(self._tokenizer, entry.chat_template)
            self._others[entry] = type(self)(self._tokenizer, self._data.of(entry))
        return self._others[entry]

    def encode(self, rows: Sequence[Row]) -> tuple[pa.RecordBatch, Tally]:
        """A record batch of the rows that are trained on, cut as `data.overlong` says, and the counts. Raises
        DataError: not one row of this kind can be encoded."""
        if self._data.packing == "stream" and any(row.text is None for row in rows):
            raise DataError(
                "data.packing stream is for plain text, and the rows are conversations or prompts.",
                fix="data.packing: rows, or data.format: text",
            )
        if any(row.parts for row in rows):
            tally = Tally(seen=len(rows))
            tally.different.update(islice(dict.fromkeys(str(row.parts) for row in rows), 2))
            fitting = texts.tokenize(self._tokenizer, rows, self._data, tally)
            tally.keep(fitting, self._ends, self._special)
            return batch(fitting), tally
        tally, rendered = Tally(seen=len(rows), texts=sum(row.text is not None for row in rows)), list[RenderedRow]()
        self._renderer.seen = tally
        several = list[Row]()  # rows whose texts are rendered, one after another
        for row in rows:
            try:
                texts_of = [self._renderer.render(text) for text in row.texts]
                if (len(texts_of) > 1 or row.desirable is not None) and any(t.weights is not None for t in texts_of):
                    raise Refused("weights of messages or parts are for train.method sft")
                several.append(row)
                rendered += texts_of  # of rows that are not refused
            except Refused as refused:
                tally.refused.add(f"{row.where}: {refused}")
        of_row = len(several[0].texts) if several else 1
        whole = ("".join(r.text for r in rendered[i : i + of_row]) for i in range(0, len(rendered), of_row))
        tally.different.update(hashlib.sha256(t.encode()).hexdigest() for t in islice(dict.fromkeys(whole), 2))
        tally.weighed = sum(text.weights is not None for text in rendered)
        in_turn = iter(self._lexer.tokenize(rendered))
        each = [[self._fit(text, tally) for text in islice(in_turn, of_row)] for _ in several]
        fits = [(row, [t for t in texts if t is not None]) for row, texts in zip(several, each, strict=True)]
        fits = [(row, texts) for row, texts in fits if len(texts) == of_row]
        before = [texts[0] for _, texts in fits[-1:] + fits[:-1]]
        fitting = [_as_row(row, texts, b, self._data.max_length) for (row, texts), b in zip(fits, before, strict=True)]
        tally.keep(fitting, self._ends, self._special)
        return batch(fitting), tally

    def _fit(self, row: TokenizedRow, tally: Tally) -> TokenizedRow | None:
        """The row as `data.overlong` leaves it; None if it is left out."""
        length, limit = len(row.ids), self._data.max_length
        if not row.labelled:
            what = f"not one token is labelled (data.mask {self._data.mask}), so there is nothing to learn from it"
            tally.refused.add(f"{row.where}: {what}")
            return None
        if length <= limit or self._data.packing == "stream":  # a long text goes on in the next block
            return row
        tally.longest = max(tally.longest, length)
        cut = row.cut(limit)
        if self._data.overlong == "error":
            tally.long.add(f"{row.where}: {length:,} tokens")  # kept, so that it can be looked at
            return row
        if self._data.overlong == "skip":
            tally.skipped.add(f"{row.where}: {length:,} tokens, over {limit:,}")
        elif not cut.labelled:
            tally.skipped.add(f"{row.where}: {length:,} tokens, and none of the first {limit:,} is labelled")
        else:
            tally.truncated += 1
            return cut
        return None


def _as_row(row: Row, texts: list[TokenizedRow], before: TokenizedRow, most: int) -> TokenizedRow:
    """The texts of a row as one. The second one of an answer with a verdict is the answer of the row `before`, of at
    most `most` tokens: KTO asks how likely an answer is that does not belong to its prompt."""
    first = texts[0]
    if row.desirable is not None:
        start, begins = first.spans[0][0], before.spans[0][0]
        spans = [(a - begins + start, b - begins + start) for a, b in before.spans]
        texts = [first, replace(before, ids=first.ids[:start] + before.ids[begins:], spans=spans).cut(most)]
    if len(texts) == 1:
        return first
    start, alike = len(first.ids), common_length(first.ids, texts[1].ids)
    spans = first.spans + [(a + start, b + start) for a, b in texts[1].spans]
    row_of = replace(first, ids=first.ids + texts[1].ids, spans=spans, starts=(start,), alike=alike)
    return replace(row_of, desirable=row.desirable)


class _Lexer:
    """Text and spans to tokens and labels."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._eos = tokenizer.eos_token_id
        self._cuts = all(a + b == whole for a, b, whole in (self._ids([a, b, a + b]) for a, b in _CUT_PROBES))
        (bare,), with_special = self._ids(["a"]), list(tokenizer("a").input_ids)
        start = next((k for k in range(len(with_special)) if bare and with_special[k : k + len(bare)] == bare), 0)
        self._opening: list[int] = with_special[:start]

    def tokenize(self, rendered: Sequence[RenderedRow]) -> Iterator[TokenizedRow]:
        if self._eos is None and any(r.ends for r in rendered):
            raise DataError(
                "nothing would teach this model to stop: its tokenizer has no eos token, and its chat template, if it "
                "has one, ends no assistant turn with a special token.",
                fix="data.chat_template: a file with a template that does",
            )
        texts = [self._texts(r) for r in rendered]
        ids = iter(self._ids([t for group in texts for t in group]))
        for r, group in zip(rendered, texts, strict=True):
            yield self._row(r, list(islice(ids, len(group))))

    def _texts(self, r: RenderedRow) -> list[str]:
        """What to tokenise for a row: its pieces, or the row and its beginnings; then the prompt, if not among them."""
        edges = _edges(r)
        if not self._cuts:
            return [r.text, *(r.text[:edge] for edge in edges), r.prompt]
        pieces = [r.text[a:b] for a, b in zip([0, *edges], [*edges, len(r.text)], strict=True)]
        return pieces if r.text.startswith(r.prompt) else [*pieces, r.prompt]

    def _row(self, r: RenderedRow, parts: list[list[int]]) -> TokenizedRow:
        edges = _edges(r)
        ids: list[int] = []
        token_at = {0: 0}  # edge in characters -> in tokens
        if self._cuts:
            for edge, part in zip([*edges, len(r.text)], parts, strict=False):
                ids += part
                token_at[edge] = len(ids)
        else:
            ids += parts[0]
            token_at |= {edge: common_length(ids, part) for edge, part in zip(edges, parts[1:], strict=False)}
            token_at[len(r.text)] = len(ids)
        begins_with_prompt = self._cuts and r.text.startswith(r.prompt)
        prompt = ids[: token_at[len(r.prompt)]] if begins_with_prompt else parts[-1]
        trained = [(token_at[a], token_at[b]) for a, b in r.spans]
        if r.ends:
            if r.spans and r.spans[-1][1] == len(r.text):
                trained[-1] = (trained[-1][0], len(ids) + 1)
            ids.append(self._eos)
        if r.opens:
            opening = len(self._opening)
            ids, prompt = self._opening + ids, self._opening + prompt
            trained = [(a and a + opening, b + opening) for a, b in trained]
        # nothing predicts the first token
        row = TokenizedRow(ids, [(max(a, 1), b) for a, b in trained if b > max(a, 1)], r.where, prompt, r.completion)
        return row if r.weights is None else row.weigh(self._weights(r, len(ids)))

    def _weights(self, r: RenderedRow, count: int) -> list[float]:
        """What each of a row's tokens counts for: the least of its characters, white space around words aside. Raises
        DataError: a tokenizer that does not say which characters a token is of."""
        if r.weights is None or not getattr(self._tokenizer, "is_fast", False):
            raise DataError(
                "parts of a text with weights need a fast tokenizer (tokenizer.json), and this one is slow."
            )
        edges = [0, *(_edges(r) if self._cuts else ()), len(r.text)]
        weights = [1.0] * (len(self._opening) if r.opens else 0)
        for begin, end in pairwise(edges):
            piece = r.text[begin:end]
            encoded = self._tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            for first, last in encoded.offset_mapping:
                each = r.weights[begin + first : begin + last].tolist()
                words = [w for w, c in zip(each, piece[first:last], strict=True) if not c.isspace()]
                weights.append(min(words or each, default=weights[-1] if weights else 1.0))
        return weights + [float(r.weights[-1])] * (count - len(weights))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []  # a tokenizer of transformers fails on an empty list
        once = list(dict.fromkeys(texts))  # rows often share their last piece
        ids = self._tokenizer(once, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
        known: dict[str, list[int]] = dict(zip(once, ids, strict=True))
        return [known[t] for t in texts]


def _edges(r: RenderedRow) -> list[int]:
    """No token may cross these: the edges of the labelled spans, and the end of the prompt."""
    edges = {edge for span in r.spans for edge in span}
    if r.text.startswith(r.prompt):
        edges.add(len(r.prompt))
    return sorted(edges - {0, len(r.text)})
