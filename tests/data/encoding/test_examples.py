"""Record batches of tokens, made from buffers: those that Arrow makes of Python's own lists."""

from __future__ import annotations

import hashlib
import struct

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.data.encoding.examples import SCHEMA, TokenizedRow, batch

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=6)
ROWS = st.builds(
    TokenizedRow, TOKENS, st.lists(st.tuples(st.integers(0, 9), st.integers(10, 20)), max_size=2), st.text(max_size=5),
    TOKENS, st.text(max_size=5),
)  # fmt: skip


def by_arrow(row: TokenizedRow) -> dict[str, object]:
    begins = row.ids[: len(row.prompt)] == row.prompt
    digest = hashlib.blake2b(struct.pack(f"{len(row.ids)}I", *row.ids), digest_size=8).digest()
    return {
        "ids": row.ids, "spans": [edge for span in row.spans for edge in span], "labelled": row.labelled,
        "prompt": [] if begins else row.prompt, "prompt_length": len(row.prompt) if begins else -1,
        "completion": row.completion, "where": row.where, "digest": struct.unpack("<Q", digest)[0],
        "starts": [], "alike": 0, "desirable": -1, "weights": [], "weight": float(sum(b - a for a, b in row.spans)),
    }  # fmt: skip


@given(st.lists(ROWS, max_size=4))
def test_a_batch_is_the_one_that_arrow_makes(rows: list[TokenizedRow]) -> None:
    rows += [TokenizedRow([1, 2, 3], [(1, 3)], "a:1", [1, 2], "ä\n")]
    made = batch(rows)
    made.validate(full=True)
    assert made.equals(pa.RecordBatch.from_pylist([by_arrow(row) for row in rows], schema=SCHEMA))
