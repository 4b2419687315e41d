"""What of an example is learned, as text."""

from itertools import groupby
from typing import Any

from halfbyte.data.encoding.examples import IGNORED, Example


def labelled_texts(tokenizer: Any, example: Example) -> list[str]:
    """Each run of labelled tokens, decoded."""
    pairs = zip(example.input_ids, example.labels, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    return [tokenizer.decode([token for token, _ in run]) for labelled, run in runs if labelled]
