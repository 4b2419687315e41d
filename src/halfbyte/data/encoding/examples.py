"""Rows as tokens, in Arrow: ids, which of them are labelled, and what generation starts from.

Why: a row of Python integers takes 24 bytes a token and more; here it takes four, and they may be in a file that is
mapped into memory. Two million rows then cost only the pages that are read.
Source: Arrow's columnar format; record batches of at most `read.CHUNK_ROWS` rows.
Cost: 4 bytes a token on disk or in memory; about 30 microseconds to make one `Example`.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, groupby, pairwise
from typing import Any, Self, overload

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

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
        ("starts", pa.list_(pa.uint32())),  # of the second text and later ones; a row is nearly always one
        ("alike", pa.uint32()),  # tokens that its first two texts begin with alike
        ("desirable", pa.int32()),  # whether the answer is a good one; -1 where nobody says
        ("weights", pa.list_(pa.float32())),  # what the labels of each span count for; none where all count once
        ("weight", pa.float64()),  # what all labels count for together
    ]
)


@dataclass(frozen=True)
class Example:
    """One row, or one block, as it trains: ids and labels."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """As long as `input_ids` and not shifted; -100 where no loss is taken, and always at the first token."""
    where: str = ""
    prompt_ids: tuple[int, ...] = ()  # what generation starts from to answer this row
    completion: str = ""  # the reference answer: the last assistant text; empty for plain text
    starts: tuple[int, ...] = (0,)
    """Where each text begins; attention does not cross it. A block of several texts has more than one, and a pair of
    answers, each behind its prompt."""
    desirable: bool | None = None  # whether the answer is a good one; None where nobody says
    reference: tuple[float, ...] = ()
    """Of each text the log-probability that the reference gives its labels, once it is known."""
    weights: tuple[float, ...] = ()  # what each label counts for, as long as `labels`; empty where each counts once

    @property
    def labelled(self) -> int:
        return sum(label != IGNORED for label in self.labels)

    @property
    def label_weight(self) -> float:
        """What its labels count for together."""
        each = zip(self.labels, self.weights, strict=True)
        return sum(weight for label, weight in each if label != IGNORED) if self.weights else self.labelled

    @property
    def pieces(self) -> list[int]:
        """Tokens of each text in it."""
        return [b - a for a, b in pairwise((*self.starts, len(self.input_ids)))]

    @property
    def texts(self) -> list[Self]:
        """Each text alone."""
        if len(self.starts) == 1:
            return [self]
        parts = [slice(a, b) for a, b in pairwise((*self.starts, len(self.input_ids)))]
        fields = ("input_ids", "labels", "weights")
        return [replace(self, starts=(0,), **{name: getattr(self, name)[p] for name in fields}) for p in parts]


@dataclass
class TokenizedRow:
    """One row as token ids; `spans` are tokens [start, stop) that are labelled, never the first one."""

    ids: list[int]
    spans: list[tuple[int, int]]
    where: str
    prompt: list[int]  # what generation starts from; nearly always the row's own first ids
    completion: str
    starts: tuple[int, ...] = ()  # of the texts after the first
    alike: int = 0  # tokens that the first two texts begin with alike
    desirable: bool | None = None
    weights: tuple[float, ...] = ()  # what the labels of each span count for; none where all count once

    @property
    def labelled(self) -> int:
        return sum(b - a for a, b in self.spans)

    @property
    def weight(self) -> float:
        return sum(w * (b - a) for w, (a, b) in zip(self.weights or (1,) * len(self.spans), self.spans, strict=True))

    def cut(self, limit: int) -> Self:
        """Its first `limit` tokens. The prompt for generation stays whole."""
        spans = [(a, min(b, limit)) for a, b in self.spans if a < limit]
        return replace(self, ids=self.ids[:limit], spans=spans, weights=self.weights[: len(spans)])

    def weigh(self, weights: Sequence[float]) -> Self:
        """With what each token counts for: spans of one weight each; those of 0 are not labelled."""
        runs = (list(run) for a, b in self.spans for _, run in groupby(range(a, b), key=weights.__getitem__))
        spans = [(run[0], run[-1] + 1) for run in runs if weights[run[0]]]
        each = tuple(weights[a] for a, _ in spans)
        return replace(self, spans=spans, weights=each if any(weight != 1 for weight in each) else ())


def batch(rows: Sequence[TokenizedRow]) -> pa.RecordBatch:
    """Rows as a record batch of `SCHEMA`, from buffers: `pa.array` would import pandas."""
    ids = [row.ids for row in rows]
    begins = [row.ids[: len(row.prompt)] == row.prompt for row in rows]
    # of an answer with a verdict without the other row's
    ends = ((len(r.ids), r.starts) if r.desirable is None else (r.starts[0], (int(r.desirable),)) for r in rows)
    parts = ([*r[:end], *more] for r, (end, more) in zip(ids, ends, strict=True))
    digests = (hashlib.blake2b(array("I", part).tobytes(), digest_size=8).digest() for part in parts)
    columns = {
        "ids": _lists(ids, "q"),
        "spans": _lists([list(chain.from_iterable(row.spans)) for row in rows], "i"),
        "labelled": _numbers([row.labelled for row in rows], "I"),
        "prompt": _lists([[] if yes else row.prompt for row, yes in zip(rows, begins, strict=True)], "i"),
        "prompt_length": _numbers([len(row.prompt) if yes else -1 for row, yes in zip(rows, begins, strict=True)], "i"),
        "completion": _texts([row.completion for row in rows]),
        "where": _texts([row.where for row in rows]),
        "digest": _numbers([int.from_bytes(digest, "little") for digest in digests], "Q"),
        "starts": _lists([row.starts for row in rows], "i"),
        "alike": _numbers([row.alike for row in rows], "I"),
        "desirable": _numbers([-1 if row.desirable is None else int(row.desirable) for row in rows], "i"),
        "weights": _lists([row.weights for row in rows], "i", "f"),
        "weight": _numbers([row.weight for row in rows], "d"),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


_TYPES = {"I": pa.uint32(), "i": pa.int32(), "Q": pa.uint64(), "f": pa.float32(), "d": pa.float64()}
_LISTS = {"i": pa.list_, "q": pa.large_list}


def _numbers(values: Sequence[float], code: str) -> pa.Array:
    """`code`: of Python's `array`."""
    return pa.Array.from_buffers(_TYPES[code], len(values), [None, pa.py_buffer(array(code, values))])


def _offsets(parts: Sequence[Sequence[float] | bytes], code: str) -> pa.Buffer:
    return pa.py_buffer(array(code, accumulate(map(len, parts), initial=0)))


def _lists(parts: Sequence[Sequence[float]], code: str, of: str = "I") -> pa.Array:
    """`code`: of the offsets; `of`: of the values."""
    values, kind = _numbers(list(chain.from_iterable(parts)), of), _LISTS[code](_TYPES[of])
    return pa.Array.from_buffers(kind, len(parts), [None, _offsets(parts, code)], children=[values])


def _texts(texts: Sequence[str]) -> pa.Array:
    parts = [text.encode() for text in texts]
    buffers = [None, _offsets(parts, "q"), pa.py_buffer(b"".join(parts))]
    return pa.Array.from_buffers(pa.large_string(), len(parts), buffers)


def in_order(rows: Iterable[NDArray[np.uint32]]) -> list[int]:
    """Places of rows in the order of their tokens, so that those which begin alike are neighbours."""
    keys = [row.astype(">u4").tobytes() for row in rows]
    return sorted(range(len(keys)), key=keys.__getitem__)


class Examples(Sequence[Example]):
    """All rows, as record batches of `SCHEMA`; each is made into an `Example` when it is asked for."""

    reference: NDArray[np.float64] | None = None  # (rows, texts) of `Example.reference`, once it is known

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self.batches = [b for b in batches if b.num_rows]
        self._starts = np.cumsum([0, *(b.num_rows for b in self.batches)])  # of each batch, and the number of all rows

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._example(index % len(self))

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row: (rows,) int64."""
        return np.concatenate([np.diff(np.from_dlpack(b.column("ids").offsets)) for b in self.batches])

    @cached_property
    def neighbours(self) -> NDArray[np.uint32]:
        """The rows in the order of their tokens: (rows,) uint32."""
        return np.array(in_order(map(self.ids, range(len(self)))), np.uint32)

    def labelled(self) -> NDArray[np.int64]:
        """Labelled tokens of each row: (rows,) int64."""
        return self._column("labelled").astype(np.int64)

    def label_weights(self) -> NDArray[np.float64] | None:
        """What the labels of each row count for together: (rows,); None where each counts once."""
        return self._column("weight") if self._are_weighed else None

    def seconds(self) -> NDArray[np.int64] | None:
        """Where the second text of each row begins: (rows,) int64; None where rows are one text."""
        starts = self._column("starts").astype(np.int64) if self._has_texts() else None
        return None if starts is None or not len(starts) else starts

    def alike(self) -> NDArray[np.int64]:
        """Tokens that the two texts of each row begin with alike: (rows,) int64."""
        return self._column("alike").astype(np.int64)

    def digests(self) -> NDArray[np.uint64]:
        """A 64-bit hash of each row's tokens: (rows,) uint64."""
        return self._column("digest")

    def completions(self) -> Iterator[tuple[str, str]]:
        """Each row's reference answer, and its name."""
        for part in self.parts():
            yield from zip(part.column("completion").to_pylist(), part.column("where").to_pylist(), strict=True)

    def ids(self, index: int) -> NDArray[np.uint32]:
        """The tokens of a row, without a copy: (length,) uint32."""
        return np.asarray(np.from_dlpack(self._value("ids", index).values), np.uint32)

    def desirable(self) -> NDArray[np.int64]:
        """Whether each row's answer is a good one, -1 where nobody says: (rows,) int64."""
        return self._column("desirable").astype(np.int64)

    def prompt(self, index: int) -> NDArray[np.uint32]:
        """The tokens that generation starts from."""
        length = self._value("prompt_length", index).as_py()
        return self.ids(index)[:length] if length >= 0 else np.array(self._value("prompt", index).as_py(), np.uint32)

    def where(self, index: int) -> str:
        return str(self._value("where", index))

    def parts(self) -> list[pa.RecordBatch]:
        return self.batches

    def _example(self, index: int) -> Example:
        names = ("ids", "spans", "prompt", "prompt_length", "completion", "where")
        ids, spans, prompt, length, completion, where = (self._value(name, index).as_py() for name in names)
        labels = [IGNORED] * len(ids)
        for a, b in zip(spans[::2], spans[1::2], strict=True):
            labels[a:b] = ids[a:b]
        example = Example(tuple(ids), tuple(labels), where, tuple(ids[:length] if length >= 0 else prompt), completion)
        if self._are_weighed and (each := self._value("weights", index).as_py()):
            weights = [1.0] * len(ids)
            for weight, a, b in zip(each, spans[::2], spans[1::2], strict=True):
                weights[a:b] = [weight] * (b - a)
            example = replace(example, weights=tuple(weights))
        if not self._has_texts():
            return example
        starts, label = (self._value(name, index).as_py() for name in ("starts", "desirable"))
        reference = () if self.reference is None else tuple(self.reference[index].tolist())
        desirable = None if label < 0 else bool(label)
        return replace(example, starts=(0, *starts), desirable=desirable, reference=reference)

    @cached_property
    def _are_weighed(self) -> bool:
        """Whether any label counts for more or less than another; older files do not say so."""
        columns = (b.column("weights") for b in self.batches if "weights" in b.schema.names)
        return any(column.offsets[-1].as_py() > column.offsets[0].as_py() for column in columns)

    def _has_texts(self) -> bool:
        """Whether rows may be several texts; older files do not say so."""
        return bool(self.batches) and "starts" in self.batches[0].schema.names

    def _value(self, name: str, index: int) -> pa.Scalar:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.batches[number].column(name)[index - int(self._starts[number])]

    def _column(self, name: str) -> NDArray[Any]:
        columns = (b.column(name) for b in self.batches)  # of lists the values; `to_numpy` would import pandas
        return np.concatenate([np.from_dlpack(getattr(column, "values", column)) for column in columns])


class Subset(Examples):
    """Some rows of others, by their numbers: (n,) int64, ascending. Nothing is copied."""

    def __init__(self, rows: Examples, numbers: NDArray[np.int64]) -> None:
        super().__init__(rows.batches)
        self._numbers: NDArray[np.int64] = rows._numbers[numbers] if isinstance(rows, Subset) else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def lengths(self) -> NDArray[np.int64]:
        return super().lengths()[self._numbers]

    def parts(self) -> list[pa.RecordBatch]:
        edges = np.searchsorted(self._numbers, self._starts)
        chosen = [self._numbers[a:b] - start for a, b, start in zip(edges, edges[1:], self._starts, strict=False)]
        return [b.take(pa.array(rows)) for b, rows in zip(self.batches, chosen, strict=True) if len(rows)]

    def _value(self, name: str, index: int) -> pa.Scalar:
        return super()._value(name, int(self._numbers[index]))

    def _column(self, name: str) -> NDArray[Any]:
        column = super()._column(name)
        return column[self._numbers] if len(column) else column
