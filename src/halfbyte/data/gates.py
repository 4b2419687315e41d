"""The gates: checks of the data before a run, so that it learns what was meant. Each says what it found.

Why: half of all failed fine-tunes are data: no labels, no end token learned, one row a hundred times, held-out rows
among the trained ones, tokens that the model has never seen. None of these raises an error by itself.
Cost: the counts were taken with the tokens (`tally`); a sort of one number a row, under a second for two million rows.

Of pairs: two same answers teach nothing; where the better answer is nearly always the longer one, a run learns to write
long (arXiv:2310.03716, arXiv:2404.04475); a prompt that trains and is held out flatters its evaluation.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from halfbyte.data.encoding.chatml import is_reserved
from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.encoding.examples import Examples
from halfbyte.data.reading.problems import some
from halfbyte.errors import DataError
from halfbyte.models.context import Context
from halfbyte.recipe.data import Data
from halfbyte.types import Tokenizer

Level = Literal["ok", "warning", "refused"]
Verdict = tuple[Level, str, str | None]  # level, what was found, fix
LEAST_LABELLED_SHARE = 0.01


@dataclass(frozen=True)
class Finding:
    gate: str
    level: Level
    found: str
    fix: str | None

    @property
    def line(self) -> str:
        """One line of the table: level, gate, what was found."""
        return f"{self.level:<9}{self.gate:<15}{self}"

    def __str__(self) -> str:
        return f"{self.found}; {self.fix}" if self.fix else self.found


def check(
    train: EncodedRows, held_out: EncodedRows | None, tokenizer: Tokenizer, data: Data, *, embedding_rows: int,
    trained: frozenset[int] = frozenset(), context: Context | None = None,
) -> tuple[Finding, ...]:  # fmt: skip
    """The findings of all gates. `trained`: tokens whose rows train, so that the model may meet them as new; `context`:
    what it reads at once, None without a limit."""
    verdicts = {
        "labels": _labels(train, data),
        "end token": _ends(train),
        "length": _length(train, held_out, data),
        "context": _context([train, *([held_out] if held_out else [])], data, context),
        "duplicates": _duplicates(train),
        "empty answers": _empty(train),
        "overlap": _overlap(train, held_out),
        "unseen tokens": _unseen(train, tokenizer, trained),
        "vocabulary": _vocabulary(train, held_out, tokenizer, embedding_rows),
    }
    if (first := train.examples.seconds()) is not None:
        verdicts |= of_pairs(train.examples, first, None if held_out is None else held_out.examples)
    if thoughts := _thoughts(train):
        verdicts["thoughts"] = thoughts
    if data.format in ("labels", "tags", "vectors"):  # no answer is written
        for gate in ("labels", "end token", "empty answers"):
            del verdicts[gate]
    return tuple(Finding(gate, *verdict) for gate, verdict in verdicts.items())


def refuse(findings: Sequence[Finding]) -> None:
    """Raise a DataError that names everything refused, if anything is."""
    refused = [f for f in findings if f.level == "refused"]
    if refused:
        text = "; ".join(f"{f.gate}: {f.found}" for f in refused)
        raise DataError(f"the data is refused: {text}.", fix="; ".join(f.fix for f in refused if f.fix) or None)


def _labels(train: EncodedRows, data: Data) -> Verdict:
    stats, share = train.stats, train.stats.labelled_share
    percent = f"{share:.1%}" if share >= LEAST_LABELLED_SHARE else f"{share:.2%}"
    text = f"{stats.labelled_tokens:,} of {stats.tokens:,} tokens are labelled ({percent})"
    if train.label_weights is not train.labelled:
        text += f" and count for {train.label_weights.sum():,.1f}"
    if data.weights and not train.tally.weighed:
        return "warning", f"{text}; data.weights finds nothing in what is trained", "look at its regular expressions"
    if share < LEAST_LABELLED_SHARE:
        return "warning", text, "data.mask: assistant or all, if more was meant"
    return "ok", text, None


def _ends(train: EncodedRows) -> Verdict:
    without, rows = train.tally.endless, train.tally.kept
    fix = "a larger data.max_length, or data.overlong: skip"
    if not without:
        of = train.stats.rows if train.texts is None else rows  # without those that are held out
        return "ok", f"among the labels of {'the one row' if of == 1 else f'each of {of:,} rows'}", None
    if without.count == rows:
        return "refused", "no row has one among its labels, so the model would not learn to stop", fix
    return "warning", f"missing in the labels of {without.count:,} of {rows:,} rows ({without.first()})", fix


def _length(train: EncodedRows, held_out: EncodedRows | None, data: Data) -> Verdict:
    stats, limit = train.stats, data.max_length
    if data.packing == "stream":
        return "ok", f"texts of {stats.min_length:,} to {stats.max_length:,} tokens in blocks of {limit:,}", None
    for tally in [train.tally, *([held_out.tally] if held_out else [])]:
        if tally.long:
            text = f"{tally.long.count:,} of {tally.seen:,} rows are over {limit:,} tokens ({tally.long.first()})"
            return "refused", text, tally.length_fix()
    tally = train.tally
    if not tally.longest:
        return "ok", f"the longest row has {train.text_lengths.max():,} tokens of {limit:,}", None
    over = tally.truncated + tally.skipped.count
    text = (
        f"{over:,} of {tally.seen:,} rows are over {limit:,} tokens, the longest has {tally.longest:,}: "
        f"{tally.truncated:,} truncated, {tally.skipped.count:,} skipped"
    )
    return "warning", text, f"data.max_length: {tally.longest} takes them whole"


def _context(encoded: Sequence[EncodedRows], data: Data, context: Context | None) -> Verdict:
    lengths = np.concatenate([rows.text_lengths for rows in encoded])
    if data.packing == "stream":  # blocks of that many
        lengths = np.array([min(data.max_length, max(int(rows.lengths.sum()) for rows in encoded))])
    if data.streaming:  # later rows may be as long
        lengths = np.array([data.max_length])
    if context is None:
        return "ok", "nothing in its config limits what the model reads at once", None
    if data.format == "vectors":  # a row is several texts, each of at most so many tokens
        lengths = np.minimum(lengths, data.max_length)
    over, longest = int((lengths > context.tokens).sum()), int(lengths.max())
    if not over:
        return "ok", f"the model reads {context.tokens:,} tokens at once ({context.why})", None
    what = f"blocks of {longest:,} tokens are" if data.packing == "stream" else f"{over:,} of {len(lengths):,} rows are"
    what = "rows that are read later may be" if data.streaming and data.packing != "stream" else what
    text = (
        f"{what} over the {context.tokens:,} that the model reads ({context.why}), the longest has {longest:,} tokens"
    )
    cut = "" if data.packing == "stream" else " with data.overlong: truncate or skip"
    fix = f"data.max_length: {context.tokens}{cut}; or rope scaling in config.json, where it was made for that"
    return "refused", text, fix


def _duplicates(train: EncodedRows) -> Verdict:
    digests = train.examples.digests()
    again = np.setdiff1d(np.arange(len(digests)), np.unique(digests, return_index=True)[1])
    if not len(again):
        return "ok", "none", None
    if len(again) == len(digests) - 1 and len(train.tally.different) > 1:
        text = f"{len(digests):,} rows of different text have all become the same {train.stats.max_length:,} tokens"
        return "refused", text, "check the model's tokenizer: it does not know this text"
    are = "row is" if len(again) == 1 else "rows are"
    text = f"{len(again):,} {are} an earlier one again ({named(train.examples, again)})"
    return "warning", text, "take them out, unless they are meant to count twice"


def _empty(train: EncodedRows) -> Verdict:
    empty = train.tally.empty
    if not empty:
        return "ok", "none", None
    have = "row has" if empty.count == 1 else "rows have"
    text = f"{empty.count:,} {have} no labelled word, only special tokens ({empty.first()})"
    return "warning", text, "the model would learn to say nothing"


def _thoughts(train: EncodedRows) -> Verdict | None:
    """What is wrong with an assistant's thoughts; None where nothing is."""
    tally = train.tally
    if some := tally.open_thoughts:
        text = f"in {some.count:,} messages <think> and </think> are no pair ({some.first()})"
        return "refused", text, "close the thoughts, or take these rows out"
    if some := tally.lost_thoughts:
        many = f"{some.count:,} trained messages ({some.first()})"
        text = f"the chat template leaves out, or answers behind, the thoughts of {many}"
        fix = "data.thoughts: last (earlier turns become context) or strip; data.chat_template: chatml-tools keeps them"
        return "refused", text, fix
    if some := tally.empty_thoughts:
        text = f"{some.count:,} messages have thoughts without a word ({some.first()})"
        return "warning", text, "the model would learn to think nothing; data.thoughts: strip leaves them out"
    return None


def _overlap(train: EncodedRows, held_out: EncodedRows | None) -> Verdict:
    if held_out is None:
        return "ok", "no rows are held out (data.eval)", None
    theirs = held_out.examples.digests()
    both = np.flatnonzero(np.isin(theirs, train.examples.digests()))
    if not len(both):
        return "ok", f"none of {len(theirs):,} held-out rows is trained on", None
    text = f"{len(both):,} of {len(theirs):,} held-out rows are trained on ({named(held_out.examples, both)})"
    return "warning", text, "the eval loss will look better than it is"


def _unseen(train: EncodedRows, tokenizer: Tokenizer, trained: frozenset[int]) -> Verdict:
    unknown, used = tokenizer.unk_token_id, train.tally.used
    reserved = {i for i, t in tokenizer.added_tokens_decoder.items() if is_reserved(t.content)}
    strange = (reserved | {unknown}) - trained
    new = Counter({i: n for i, n in used.items() if i in strange})
    if not new:
        what = f", {len(trained)} of them trained as new" if trained else ""
        return "ok", f"none among the {len(used):,} different tokens{what}", None
    shown = [f"{tokenizer.convert_ids_to_tokens(i)} {n:,} times" for i, n in new.most_common()]
    fix = f"lora.trainable_token_indices: [{', '.join(map(str, sorted(new)[:8]))}] trains them"
    text = f"{new.total():,} tokens that the model has never seen ({some(shown, len(shown))})"
    return "warning", text, "the tokenizer cannot write that text" if unknown in new else fix


def _vocabulary(train: EncodedRows, held_out: EncodedRows | None, tokenizer: Tokenizer, rows: int) -> Verdict:
    size = len(tokenizer)
    if size <= rows:
        return "ok", f"{size:,} tokens, the embedding has {rows:,} rows", None
    text = f"the tokenizer knows {size:,} tokens, the embedding has {rows:,} rows"
    used = train.tally.used | (held_out.tally.used if held_out is not None else Counter())
    beyond = sorted(i for i in used if i >= rows)
    if not beyond:
        return "warning", f"{text}; no row uses a token beyond them", None
    shown = some([f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in beyond[:3]], len(beyond))
    return "refused", f"{text}, and the rows use {shown}", "use the tokenizer that belongs to this checkpoint"


BIASED = 0.6  # of the pairs; or 1 - it


def of_pairs(train: Examples, first: NDArray[np.int64], held_out: Examples | None) -> dict[str, Verdict]:
    """By name. `first`: tokens of the first text of each row."""
    gates, desirable = {"prompts": _prompts(train, held_out)}, train.desirable()
    second, rows = train.lengths() - first, len(train)
    same, differ = np.flatnonzero((first == second) & (train.alike() == first)), first != second
    if (desirable >= 0).all():
        share, fix = float(desirable.mean()), "train.desirable_weight and train.undesirable_weight make up for it"
        gates["verdicts"] = _within(share, 0.2, f"{share:.0%} of {rows:,} answers are good ones", fix)
    else:
        longer = float((first > second)[differ].mean()) if differ.any() else 0.5
        text = (
            f"of pairs of two lengths the chosen answer is the longer one in {longer:.0%}, so a rule of length alone "
        )
        text += f"is right in {max(longer, 1 - longer):.0%}"
        fix = "train.ld_alpha, train.loss_type sigmoid_norm or train.method simpo"
        gates["length bias"] = _within(longer, 1 - BIASED, text, fix)
        text = f"{len(same):,} of {rows:,} pairs have the same answer twice ({named(train, same)})"
        fix = "take them out: nothing is learned of them"
        gates["same answers"] = ("warning", text, fix) if len(same) else ("ok", "none", None)
    return gates


def _within(share: float, least: float, text: str, fix: str) -> Verdict:
    return ("ok", text, None) if least < share < 1 - least else ("warning", text, fix)


def _prompts(train: Examples, held_out: Examples | None) -> Verdict:
    trained = {_hash(train, i) for i in range(len(train))} if held_out is not None else set()
    both = [i for i in range(len(held_out or ())) if held_out is not None and _hash(held_out, i) in trained]
    if held_out is None or not both:
        return "ok", "none of those that are held out is trained on", None
    text = f"{len(both):,} of {len(held_out):,} held-out rows have one that is trained on"
    return "warning", f"{text} ({named(held_out, np.array(both))})", "data.eval: a file of other prompts"


def _hash(rows: Examples, index: int) -> bytes:
    return hashlib.blake2b(rows.prompt(index).tobytes(), digest_size=16).digest()


def named(rows: Examples, numbers: NDArray[np.int64]) -> str:
    return some([rows.where(int(number)) for number in numbers[:3]], len(numbers))
