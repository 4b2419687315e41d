"""Rows as tokens, in Arrow: ids, which of them are labelled, and what generation starts from.

Why: a row of Python integers takes 24 bytes a token and more; here it takes four, and they may be in a file that is
mapped into memory. Two million rows then cost only the pages that are read.
Source: Arrow's columnar format; record batches of at most `read.CHUNK_ROWS` rows.
Cost: 4 bytes a token on disk or in memory; about 30 microseconds to make one `Example`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

IGNORED = -100

SCHEMA = pa.schema(
    [
        ("ids", pa.large_list(pa.uint32())),
        ("spans", pa.list_(pa.uint32())),  # start, stop, start, stop ... of the labelled tokens
        ("labelled", pa.uint32()),
        ("prompt", pa.list_(pa.uint32())),  # only where the row does not begin with it
        ("prompt_length", pa.int32()),
        ("completion", pa.large_string()),
        ("where", pa.large_string()),
        ("digest", pa.uint64()),
    ]
)


@dataclass(frozen=True)
class Example:
    """One row as tokens."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """As long as `input_ids` and not shifted; -100 where no loss is taken, and always at the first token."""
    where: str
    prompt_ids: tuple[int, ...]
    """What generation starts from to answer this row."""
    completion: str
    """The reference answer: the last assistant text."""
    starts: tuple[int, ...] = (0,)
    """Where each text begins; attention does not cross it. Only a block of several texts has more than one."""

    @property
    def pieces(self) -> list[int]:
        """Tokens of each text in it."""
        return [b - a for a, b in pairwise((*self.starts, len(self.input_ids)))]


@dataclass
class Tokens:
    """One row as the lexer makes it; `spans` are tokens [start, stop) that are labelled, never the first one."""

    ids: list[int]
    spans: list[tuple[int, int]]
    where: str
    prompt: list[int] | int
    """Its ids; or a number, if it is so many of the row's own first ids."""
    completion: str

    @property
    def labelled(self) -> int:
        return sum(b - a for a, b in self.spans)

    def cut(self, limit: int) -> Tokens:
        """Its first `limit` tokens. The prompt for generation stays whole."""
        prompt = self.ids[: self.prompt] if isinstance(self.prompt, int) and self.prompt > limit else self.prompt
        spans = [(a, min(b, limit)) for a, b in self.spans if a < limit]
        return Tokens(self.ids[:limit], spans, self.where, prompt, self.completion)


def batch(rows: Sequence[Tokens]) -> pa.RecordBatch:
    """Rows as one record batch of `SCHEMA`."""
    own = [[] if isinstance(r.prompt, int) else r.prompt for r in rows]
    columns = [
        _lists([r.ids for r in rows], "ids"),
        _lists([[edge for span in r.spans for edge in span] for r in rows], "spans"),
        pa.array([r.labelled for r in rows], pa.uint32()),
        _lists(own, "prompt"),
        pa.array([r.prompt if isinstance(r.prompt, int) else -1 for r in rows], pa.int32()),
        pa.array([r.completion for r in rows], pa.large_string()),
        pa.array([r.where for r in rows], pa.large_string()),
        pa.array([_digest(r.ids) for r in rows], pa.uint64()),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _lists(values: Sequence[Sequence[int]], name: str) -> pa.Array:
    """A list column of `SCHEMA`, made from one flat buffer."""
    kind, flat = SCHEMA.field(name).type, array("I")
    for value in values:
        flat.extend(value)
    large = pa.types.is_large_list(kind)
    ends = pa.array(np.cumsum([0, *map(len, values)], dtype=np.int64 if large else np.int32))
    made = pa.LargeListArray if large else pa.ListArray
    return made.from_arrays(ends, pa.array(np.frombuffer(flat, dtype=np.uint32)), type=kind)


def _digest(ids: Sequence[int]) -> int:
    return int.from_bytes(hashlib.blake2b(array("I", ids).tobytes(), digest_size=8).digest(), "little")


class Examples(Sequence[Example]):
    """All rows, each made into an `Example` when it is asked for. A slice is a list.

    Attributes:
        batches: the rows as record batches of `SCHEMA`.
    """

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self.batches = [b for b in batches if b.num_rows]
        self._ends = np.cumsum([b.num_rows for b in self.batches], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._made(index % len(self))

    def __iter__(self) -> Iterator[Example]:
        for held in self.batches:
            for row in range(held.num_rows):
                yield _example(held, row)

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row: (rows,) int64."""
        ends = [_numbers(b.column("ids"), np.int64, 1) for b in self.batches]
        return np.concatenate([np.zeros(0, np.int64), *map(np.diff, ends)])

    def labelled(self) -> NDArray[np.int64]:
        """Labelled tokens of each row: (rows,) int64."""
        return self._column("labelled", np.uint32).astype(np.int64)

    def digests(self) -> NDArray[np.uint64]:
        """A 64-bit hash of each row's tokens: (rows,) uint64."""
        return self._column("digest", np.uint64)

    def ids(self, index: int) -> NDArray[np.uint32]:
        """The tokens of a row, without a copy: (length,) uint32."""
        held, row = self._place(index)
        ids: NDArray[np.uint32] = held.column("ids")[row].values.to_numpy()
        return ids

    def where(self, index: int) -> str:
        """The name of a row, without making the whole of it."""
        held, row = self._place(index)
        return str(held.column("where")[row].as_py())

    def _made(self, index: int) -> Example:
        """The row of an index in range."""
        return _example(*self._place(index))

    def _place(self, index: int) -> tuple[pa.RecordBatch, int]:
        """The batch that holds a row, and its number there."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        held = self.batches[number]
        return held, index - int(self._ends[number]) + held.num_rows

    def _column(self, name: str, dtype: DTypeLike) -> NDArray[Any]:
        return np.concatenate([np.zeros(0, dtype), *(_numbers(b.column(name), dtype) for b in self.batches)])


def _numbers(column: pa.Array, dtype: DTypeLike, more: int = 0) -> NDArray[Any]:
    """A column's numbers, or a list column's offsets (one `more` than rows), without a copy.

    Arrow's own `to_numpy` would import pandas first, a quarter of a second.
    """
    return np.frombuffer(column.buffers()[1], dtype)[column.offset : column.offset + len(column) + more]


def _example(held: pa.RecordBatch, row: int) -> Example:
    ids = _values(held, "ids", row)
    spans = _values(held, "spans", row)
    labels = [IGNORED] * len(ids)
    for a, b in zip(spans[::2], spans[1::2], strict=True):
        labels[a:b] = ids[a:b]
    length = held.column("prompt_length")[row].as_py()
    prompt = ids[:length] if length >= 0 else _values(held, "prompt", row)
    where, completion = held.column("where")[row].as_py(), held.column("completion")[row].as_py()
    return Example(tuple(ids), tuple(labels), where, tuple(prompt), completion)


def _values(held: pa.RecordBatch, name: str, row: int) -> list[int]:
    values: list[int] = held.column(name)[row].values.to_numpy().tolist()
    return values
