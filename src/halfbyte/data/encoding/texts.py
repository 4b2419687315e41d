"""Rows of labels as tokens: a text, or a pair of texts as one, as the tokenizer itself has it.

Why: such a text is read elsewhere as `tokenizer(text)` or `tokenizer(text, pair)`; one token more is another text.
What: the last token is marked as the labelled one; what a row is labelled with travels as JSON in `completion`.
"""

from collections.abc import Sequence

from halfbyte.data.encoding.examples import TokenizedRow
from halfbyte.data.reading.formats import Row
from halfbyte.types import Tokenizer


def tokenize(tokenizer: Tokenizer, rows: Sequence[Row], cut: int | None) -> list[TokenizedRow]:
    """Rows of texts as tokens; `cut` as of `ids_of`."""
    every = zip(rows, ids_of(tokenizer, [row.parts for row in rows], cut), strict=True)
    return [TokenizedRow(ids, [(len(ids) - 1, len(ids))], r.where, [], r.completion or "") for r, ids in every]


def ids_of(tokenizer: Tokenizer, texts: Sequence[tuple[str, ...]], cut: int | None = None) -> list[list[int]]:
    """The tokens of texts and pairs, the tokenizer's own special ones among them; cut to `cut` tokens as the tokenizer
    cuts. What transformers takes for padding at a text's end is left out: its classes pool the token before it."""
    every, how = [list[int]()] * len(texts), {} if cut is None else {"truncation": True, "max_length": cut}
    for count in {len(text) for text in texts}:
        numbers = [i for i, text in enumerate(texts) if len(text) == count]
        columns = [list(column) for column in zip(*(texts[i] for i in numbers), strict=True)]
        ids = tokenizer(*columns, return_attention_mask=False, verbose=False, **how).input_ids
        for number, tokens in zip(numbers, ids, strict=True):
            while len(tokens) > 1 and tokens[-1] == tokenizer.pad_token_id:
                tokens.pop()
            every[number] = tokens
    return every
