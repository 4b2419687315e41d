"""Rows of labels and vectors as tokens: texts as the tokenizer itself has them, and each one's last token marked.

Why: such a text is read elsewhere as `tokenizer(text)` or `tokenizer(text, pair)`; one token more is another text.
What: one text, or a pair as one, of task classify and regress; several end to end of task embed. What a row is labelled
with, or how alike its texts are, travels as JSON in `completion`. Marked ("labelled") is each text's last token, and
where the second one of a pair begins.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from halfbyte.data.encoding.examples import TokenizedRow
from halfbyte.data.encoding.tally import Tally
from halfbyte.data.reading.formats import Row
from halfbyte.errors import DataError
from halfbyte.recipe.data import Data
from halfbyte.types import Tokenizer

NO_TOKEN = "a text of which the tokenizer makes no token"
_FAST = (
    "a model with a tokenizer.json; AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL) writes one where it can"
)


def tokenize(tokenizer: Tokenizer, rows: Sequence[Row], data: Data, tally: Tally) -> list[TokenizedRow]:
    """The rows that are trained on, each text of at most `data.max_length` tokens; counted in `tally`."""
    texts, limit = [[row.parts] for row in rows], data.max_length
    fitting = list[TokenizedRow]()
    if data.format == "vectors":
        prompts = data.query_prompt, data.passage_prompt
        texts = [[(prompts[i > 0] + text,) for i, text in enumerate(row.parts)] for row in rows]
    cut = limit if data.overlong == "truncate" else None
    if data.format == "tags":
        return [row for row in (_tag(tokenizer, each, data) for each in rows) if _fits(row, len(row.ids), data, tally)]
    every = iter(tokens_of(tokenizer, [text for row in texts for text in row], cut))
    for row, parts in zip(rows, texts, strict=True):
        of_row = [next(every) for _ in parts]
        lengths = [len(ids) for ids, _ in of_row]
        begins, longest = accumulate(lengths, initial=0), max(lengths)
        marks = [at + mark for at, (_, marks) in zip(begins, of_row, strict=False) for mark in marks]
        marks = marks if min(lengths) else []
        together = [token for ids, _ in of_row for token in ids]
        tokens = TokenizedRow(together, [(mark, mark + 1) for mark in marks], row.where, [], row.completion or "")
        if _fits(tokens, longest, data, tally):
            fitting.append(tokens)
    return fitting


def _fits(row: TokenizedRow, longest: int, data: Data, tally: Tally) -> bool:
    """Whether a row stays, whose longest text has so many tokens; where not it is counted."""
    if longest > data.max_length:
        tally.longest = max(tally.longest, longest)
        (tally.skipped if data.overlong == "skip" else tally.long).add(f"{row.where}: {longest:,} tokens")
    elif not row.spans:
        tally.skipped.add(f"{row.where}: {'no token of it gets a tag' if data.format == 'tags' else NO_TOKEN}")
    return bool(row.spans) and (longest <= data.max_length or data.overlong == "error")


def tagged(
    tokenizer: Tokenizer, parts: tuple[str, ...], *, words: bool, cut: int | None
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """The tokens of words, joined by spaces, or of a text; which of them get a tag, the first ones of words or all but
    special ones; and of each its characters in the text, of words the word's."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("task tag needs a fast tokenizer (tokenizer.json), and this one is slow.", fix=_FAST)
    text, how = " ".join(parts), {} if cut is None else {"truncation": True, "max_length": cut}
    read = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False, **how)
    ends = list(accumulate(len(part) + 1 for part in parts))
    marks, places = list[int](), list[tuple[int, int]]()
    seen = -1
    for i, (start, end) in enumerate(read.offset_mapping):
        start += len(text[start:end]) - len(text[start:end].lstrip())
        word = bisect_right(ends, start)
        if read.special_tokens_mask[i] or start >= end or (words and word == seen):
            continue
        marks, seen = [*marks, i], word
        places.append((ends[word] - len(parts[word]) - 1, ends[word] - 1) if words else (start, end))
    return list(read.input_ids), marks, places


def _tags_of(row: Row, places: Sequence[tuple[int, int]]) -> list[str]:
    """The tag of each marked token: its word's, or by spans where an entity begins (B-), goes on (I-), and O."""
    value, tags = json.loads(row.completion or "[]"), list[str]()
    before = -1
    if not value or isinstance(value[0], list):
        for start, end in places:
            inside = next((i for i, (a, b, _) in enumerate(value) if start < b and end > a), -1)
            tags.append("O" if inside < 0 else f"{'I' if inside == before else 'B'}-{value[inside][2]}")
            before = inside
        return tags
    starts = list(accumulate((len(part) + 1 for part in row.parts), initial=0))
    return [value[bisect_right(starts, start) - 1] for start, _ in places]


def _tag(tokenizer: Tokenizer, row: Row, data: Data) -> TokenizedRow:
    words = isinstance((json.loads(row.completion or "[]") or [[]])[0], str)
    cut = data.max_length if data.overlong == "truncate" else None
    ids, marks, places = tagged(tokenizer, row.parts, words=words, cut=cut)
    tags = json.dumps(_tags_of(row, places), ensure_ascii=False)
    return TokenizedRow(ids, [(mark, mark + 1) for mark in marks], row.where, [], tags)


def tokens_of(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, ...]], cut: int | None = None
) -> list[tuple[list[int], list[int]]]:
    """The tokens of texts and pairs, the tokenizer's own special ones among them, cut to `cut` tokens as the tokenizer
    cuts; and which of them are marked: where the second text of a pair begins, if the tokenizer says so, and the last.
    What transformers takes for padding at a text's end is left out: its classes pool the token before it. Where a text
    has no token of its own, nothing is marked."""
    every = [(list[int](), list[int]())] * len(texts)
    how = {} if cut is None else {"truncation": True, "max_length": cut}
    for count in {len(text) for text in texts}:
        numbers = [i for i, text in enumerate(texts) if len(text) == count]
        columns = [list(column) for column in zip(*(texts[i] for i in numbers), strict=True)]
        read = tokenizer(*columns, return_attention_mask=False, verbose=False, **how)
        all_types = read.get("token_type_ids", [()] * len(numbers))
        for number, tokens, types in zip(numbers, read.input_ids, all_types, strict=True):
            while len(tokens) > 1 and tokens[-1] == tokenizer.pad_token_id:
                tokens.pop()
            last = len(tokens) - 1
            seconds = [types.index(1)] if 1 in types[: last + 1] else []
            every[number] = tokens, [*seconds, last] if tokens and last not in seconds else []
    return every
