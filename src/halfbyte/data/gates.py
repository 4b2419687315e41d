"""The gates: checks of the data before a run, so that it learns what was meant. Each says what it found.

Why: half of all failed fine-tunes are data: no labels, no end token learned, one row a hundred times, held-out rows
among the trained ones, tokens that the model has never seen. None of these raises an error by itself.
Source: the counts of `tally`, taken while the rows were tokenised.
Cost: a sort of one number a row; under a second for two million rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from halfbyte.data.encoding.chat_template import is_reserved
from halfbyte.data.encoding.encoder import Encoded
from halfbyte.data.reading.problems import some
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from halfbyte.recipe.data import Data
    from halfbyte.types import Document, Tokenizer

Level = Literal["ok", "warning", "refused"]
LEAST_LABELLED_SHARE = 0.01
GATES = (
    "labels", "end token", "length", "duplicates", "empty answers", "overlap", "unseen tokens", "vocabulary",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """What one gate says."""

    gate: str
    level: Level
    found: str
    fix: str | None = None

    @property
    def line(self) -> str:
        """One line of the table: level, gate, what was found."""
        return f"{self.level:<9}{self.gate:<15}{self}"

    def __str__(self) -> str:
        return f"{self.found}; {self.fix}" if self.fix else self.found

    def to_json(self) -> Document:
        return asdict(self)


def check(
    train: Encoded,
    held_out: Encoded | None,
    tokenizer: Tokenizer,
    data: Data,
    *,
    embedding_rows: int,
    trained: frozenset[int] = frozenset(),
) -> tuple[Finding, ...]:
    """The findings of all gates, in the order of `GATES`.

    Args:
        embedding_rows: how many tokens have a row in the model's embedding.
        trained: tokens whose rows are trained, so that the model may meet them for the first time.
    """
    return (
        _labels(train),
        _ends(train),
        _length(train, data),
        _duplicates(train),
        _empty(train),
        _overlap(train, held_out),
        _unseen(train, tokenizer, trained),
        _vocabulary(train, held_out, tokenizer, embedding_rows),
    )


def refuse(findings: Sequence[Finding]) -> None:
    """
    Raises:
        DataError: names everything that was refused.
    """
    refused = [f for f in findings if f.level == "refused"]
    if refused:
        text = "; ".join(f"{f.gate}: {f.found}" for f in refused)
        raise DataError(f"the data is refused: {text}.", fix="; ".join(f.fix for f in refused if f.fix) or None)


def _labels(train: Encoded) -> Finding:
    stats = train.stats
    found = f"{stats.labelled_tokens:,} of {stats.tokens:,} tokens are labelled ({_percent(stats.labelled_share)})"
    if stats.labelled_share < LEAST_LABELLED_SHARE:
        return Finding("labels", "warning", found, "data.mask: assistant or all, if more was meant")
    return Finding("labels", "ok", found)


def _ends(train: Encoded) -> Finding:
    without, rows = train.tally.endless, train.tally.kept
    if not without:
        return Finding("end token", "ok", f"among the labels of {_each(rows)}")
    fix = "a larger data.max_length, or data.overlong: skip"
    if without.count == rows:
        return Finding(
            "end token", "refused", "no row has one among its labels, so the model would not learn to stop", fix
        )
    found = f"missing in the labels of {without.count:,} of {rows:,} rows ({without.first()})"
    return Finding("end token", "warning", found, fix)


def _length(train: Encoded, data: Data) -> Finding:
    tally, limit = train.tally, data.max_length
    if data.packing == "stream":
        found = f"texts of {train.stats.min_length:,} to {train.stats.max_length:,} tokens in blocks of {limit:,}"
        return Finding("length", "ok", found)
    if not tally.longest:
        return Finding("length", "ok", f"the longest row has {train.stats.max_length:,} tokens of {limit:,}")
    over = tally.truncated + tally.skipped.count
    found = (
        f"{over:,} of {tally.seen:,} rows are over {limit:,} tokens, the longest has {tally.longest:,}: "
        f"{tally.truncated:,} truncated, {tally.skipped.count:,} skipped"
    )
    return Finding("length", "warning", found, f"data.max_length: {tally.longest} takes them whole")


def _duplicates(train: Encoded) -> Finding:
    digests = train.examples.digests()
    _, first = np.unique(digests, return_index=True)
    count = len(digests) - len(first)
    if not count:
        return Finding("duplicates", "ok", "none")
    again = np.setdiff1d(np.arange(len(digests)), first)
    names = [train.examples.where(int(i)) for i in again[:3]]
    found = f"{count:,} {'row is' if count == 1 else 'rows are'} an earlier one again ({some(names, count)})"
    return Finding("duplicates", "warning", found, "take them out, unless they are meant to count twice")


def _empty(train: Encoded) -> Finding:
    empty = train.tally.empty
    if not empty:
        return Finding("empty answers", "ok", "none")
    have = "row has" if empty.count == 1 else "rows have"
    found = f"{empty.count:,} {have} no labelled word, only special tokens ({empty.first()})"
    return Finding("empty answers", "warning", found, "the model would learn to say nothing")


def _overlap(train: Encoded, held_out: Encoded | None) -> Finding:
    if held_out is None:
        return Finding("overlap", "ok", "no rows are held out (data.eval)")
    ours, theirs = train.examples.digests(), held_out.examples.digests()
    both = np.flatnonzero(np.isin(theirs, ours))
    if not len(both):
        return Finding("overlap", "ok", f"none of {len(theirs):,} held-out rows is trained on")
    names = [held_out.examples.where(int(i)) for i in both[:3]]
    found = f"{len(both):,} of {len(theirs):,} held-out rows are trained on ({some(names, len(both))})"
    return Finding("overlap", "warning", found, "the eval loss will look better than it is")


def _unseen(train: Encoded, tokenizer: Tokenizer, trained: frozenset[int]) -> Finding:
    used = train.tally.used
    names = {i: t.content for i, t in tokenizer.added_tokens_decoder.items()}
    strange = Counter(
        {i: n for i, n in used.items() if i == tokenizer.unk_token_id or (i in names and is_reserved(names[i]))}
    )
    new = [i for i in strange if i not in trained]
    if not new:
        what = f", {len(trained)} of them trained as new" if trained else ""
        return Finding("unseen tokens", "ok", f"none among the {len(used):,} different tokens{what}")
    total = sum(strange[i] for i in new)
    shown = [
        f"{tokenizer.convert_ids_to_tokens(i)} {strange[i]:,} times" for i in sorted(new, key=lambda i: -strange[i])
    ]
    found = f"{total:,} tokens that the model has never seen ({some(shown, len(shown))})"
    ids = ", ".join(map(str, sorted(new)[:8]))
    unknown = tokenizer.unk_token_id in new
    fix = "the tokenizer cannot write that text" if unknown else f"lora.trainable_token_indices: [{ids}] trains them"
    return Finding("unseen tokens", "warning", found, fix)


def _vocabulary(train: Encoded, held_out: Encoded | None, tokenizer: Tokenizer, rows: int) -> Finding:
    size = len(tokenizer)
    if size <= rows:
        return Finding("vocabulary", "ok", f"{size:,} tokens, the embedding has {rows:,} rows")
    found = f"the tokenizer knows {size:,} tokens, the embedding has {rows:,} rows"
    used = train.tally.used | (held_out.tally.used if held_out is not None else Counter())
    beyond = sorted(i for i in used if i >= rows)
    if not beyond:
        return Finding("vocabulary", "warning", f"{found}; no row uses a token beyond them")
    shown = some([f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in beyond[:3]], len(beyond))
    return Finding(
        "vocabulary",
        "refused",
        f"{found}, and the rows use {shown}",
        "use the tokenizer that belongs to this checkpoint",
    )


def _each(rows: int) -> str:
    return "the one row" if rows == 1 else f"each of {rows:,} rows"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= LEAST_LABELLED_SHARE else f"{share:.2%}"
