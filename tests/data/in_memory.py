"""Rows read and encoded in memory, a list at a time, for tests that look at every one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.data.encoding.encoder import EncodedRows, Encoder
from halfbyte.data.encoding.examples import Examples
from halfbyte.data.encoding.tally import Tally
from halfbyte.data.reading import files
from halfbyte.data.reading.formats import Row
from halfbyte.data.reading.read import CHUNK_ROWS, Reader
from halfbyte.recipe.data import Data


def read_rows(names: Path | str | Sequence[str], data: Data) -> list[Row]:
    """Every row of what `data.train` or `data.eval` names; raises what is wrong with any of them."""
    reader = Reader(files.find(names), data)
    rows = list(reader)
    reader.check()
    return rows


def encode(rows: Sequence[Row], tokenizer: Any, data: Data) -> EncodedRows:
    """Rows to examples; raises what is wrong with any of them."""
    encoder, tally, batches = Encoder(tokenizer, data), Tally(), []
    for at in range(0, len(rows), CHUNK_ROWS):
        made, seen = encoder.encode(rows[at : at + CHUNK_ROWS])
        batches.append(made)
        tally.merge(seen)
    tally.check(data)
    tally.check_length(data)
    return EncodedRows(Examples(batches), tally)
