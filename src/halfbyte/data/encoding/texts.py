"""Rows of labels and vectors as tokens: texts as the tokenizer itself has them, and each one's last token marked.

Why: such a text is read elsewhere as `tokenizer(text)` or `tokenizer(text, pair)`; one token more is another text.
What: one text, or a pair as one, of task classify and regress; several end to end of task embed. What a row is labelled
with, or how alike its texts are, travels as JSON in `completion`. Marked ("labelled") is each text's last token.
"""

from collections.abc import Sequence
from itertools import accumulate

from halfbyte.data.encoding.examples import TokenizedRow
from halfbyte.data.encoding.tally import Tally
from halfbyte.data.reading.formats import Row
from halfbyte.recipe.data import Data
from halfbyte.types import Tokenizer


def tokenize(tokenizer: Tokenizer, rows: Sequence[Row], data: Data, tally: Tally) -> list[TokenizedRow]:
    """The rows that are trained on, each text of at most `data.max_length` tokens; counted in `tally`."""
    texts, limit = [[row.parts] for row in rows], data.max_length
    fitting = list[TokenizedRow]()
    if data.format == "vectors":
        prompts = data.query_prompt, data.passage_prompt
        texts = [[(prompts[i > 0] + text,) for i, text in enumerate(row.parts)] for row in rows]
    every = iter(ids_of(tokenizer, [t for row in texts for t in row], limit if data.overlong == "truncate" else None))
    for row, parts in zip(rows, texts, strict=True):
        ids = [next(every) for _ in parts]
        ends, longest = list(accumulate(map(len, ids))), max(map(len, ids))
        if longest > limit:
            tally.longest = max(tally.longest, longest)
            (tally.skipped if data.overlong == "skip" else tally.long).add(f"{row.where}: {longest:,} tokens")
        if longest <= limit or data.overlong == "error":
            spans, together = [(end - 1, end) for end in ends], [token for part in ids for token in part]
            fitting.append(TokenizedRow(together, spans, row.where, [], row.completion or ""))
    return fitting


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
