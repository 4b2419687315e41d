"""Hold rows out of those that train: `data.eval: 5%`, a count, or auto.

Why: without rows that were never trained on, nothing says whether the adapter has learned or only remembers.
What: a seed draws the rows, from each file its share (systematic sampling over the files' shuffled rows); rows with the
same tokens are on one side together. The run keeps them, as tokens, so that `eval` scores the very same ones and
`--resume` notices other data.
Cost: a sort of one number a row; a copy of the tokens that are held out.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from halfbyte.data.encoding.encoder import EncodedRows, SourceRows
from halfbyte.data.encoding.examples import SCHEMA, Examples
from halfbyte.data.encoding.tally import Tally
from halfbyte.data.mixture import shuffled
from halfbyte.data.reading import files as reading
from halfbyte.errors import DataError, RunError
from halfbyte.recipe.data import Data, DataEntry, Sources, sources_of
from halfbyte.system import files

_SOURCES = b"halfbyte.sources"


def split(
    rows: EncodedRows, data: Data, seed: int, *, wanted: bool | None = None
) -> tuple[EncodedRows, EncodedRows | None]:
    """The rows that train and those that `data.eval` holds out of them, None for none.

    Args:
        wanted: whether the run asks for evaluations; False: auto holds nothing out. None: it does not say.

    Raises:
        DataError: more rows are to be held out than there are, or auto finds too few where evaluations are asked for.
    """
    total, of = len(rows.examples), rows.sources
    count = 0 if data.eval == "auto" and wanted is False else data.held_out_of(total)
    if count >= total:
        raise DataError(
            f"data.eval {data.eval}: {count:,} rows cannot be held out of {total:,}, and none left to train on.",
            fix="data.eval: 10%, or a file of other rows",
        )
    if not count and wanted and data.eval == "auto":
        raise DataError(
            f"evaluations are asked for, and {total:,} rows are too few to hold some of them out unasked.",
            fix="data.eval: 10%, or a file of other rows",
        )
    digests = rows.examples.digests()
    if of is None:
        held_out = choose(digests, list(rows.tally.sources.values()), count, seed)
    elif count:  # of each source as much as of a file of its own, but for a number, which is shared out
        each = {name: len(some) for name, some in of.numbers().items()}
        alone = data.eval == "auto" or str(data.eval).endswith("%")
        many = {name: data.held_out_of(n) if alone else max(1, round(count * n / total)) for name, n in each.items()}
        some = [s[choose(digests[s], [len(s)], many[name], seed)] for name, s in of.numbers().items()]
        held_out = np.flatnonzero(np.isin(digests, digests[np.concatenate(some)]))
    if not count or not len(held_out):
        return rows, None
    left = np.setdiff1d(np.arange(total), held_out)
    tally = Tally(seen=len(held_out), kept=len(held_out))
    return rows.take(left), replace(rows.take(held_out), tally=tally)


def told_apart(rows: EncodedRows, names: Sources, seed: int) -> EncodedRows:
    """Rows with the source of each, and of a source at most its `limit`, drawn by the seed; as they are where `names`
    mixes nothing."""
    sources, drawn = sources_of(names), list[NDArray[np.int64]]()
    if not sources or not isinstance(names, tuple):
        return rows
    plain_first = sorted(range(len(sources)), key=lambda number: isinstance(names[number], DataEntry))
    owner = {str((file.path, file.hub)): n for n in plain_first for file in reading.find([sources[n]])}
    of_row = np.repeat([owner[key] for key in rows.tally.sources], [*rows.tally.sources.values()])
    for number, source in enumerate(sources):
        numbers = np.flatnonzero(of_row == number)
        few = source.limit is not None and source.limit < len(numbers)
        drawn.append(numbers[shuffled(len(numbers), f"{seed}/limit/{number}")[: source.limit]] if few else numbers)
    rows = replace(rows, sources=SourceRows(tuple(str(source.name) for source in sources), of_row))
    return rows.take(np.sort(np.concatenate(drawn)))


def choose(digests: NDArray[np.uint64], of_files: Sequence[int], count: int, seed: int) -> NDArray[np.int64]:
    """About `count` row numbers, ascending; exactly so many where no two rows are the same. `digests`: (rows,) equal
    for rows with the same tokens. `of_files`: the rows of each file, in the order of the rows."""
    _, first, which = np.unique(digests, return_index=True, return_inverse=True)
    many = min(max(1, round(count * len(first) / len(digests))), len(first) - 1) if count else 0
    if many < 1:
        return np.empty(0, np.int64)
    draw, order = random.Random(f"{seed}/held out"), list[int]()
    file_of = np.searchsorted(np.cumsum(of_files), first, side="right")
    for file in np.unique(file_of):
        texts = np.flatnonzero(file_of == file).tolist()
        draw.shuffle(texts)
        order += texts
    start = draw.random()
    chosen = [order[int((i + start) * len(order) / many)] for i in range(many)]
    return np.flatnonzero(np.isin(which, chosen))


def keep(held_out: Examples | None, path: Path, sources: SourceRows | None = None) -> None:
    """Write the rows that a run holds out, once, with their sources; a RunError where it has held out others, as its
    data has changed."""
    if path.is_file():
        before = load(path).examples.digests()
        now = held_out.digests() if held_out is not None else before[:0]
        if not np.array_equal(before, now):
            raise RunError(
                f"{path.parent} holds {len(before):,} rows out, and data.train has changed since: of the {len(now):,} "
                f"that it would hold out now, {int(np.isin(now, before).sum()):,} are the same.",
                fix="put data.train and its settings back as they were, or start a new run",
            )
    elif held_out is not None:
        partial, schema = path.with_suffix(".partial"), SCHEMA
        if sources is not None:
            schema = SCHEMA.with_metadata({_SOURCES: json.dumps([sources.names, sources.of_row.tolist()])})
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for part in held_out.parts():
                writer.write_batch(part)
        files.put(partial, path)


def load(path: Path) -> EncodedRows:
    """The rows that a run holds out; a RunError where the file cannot be read."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        rows = Examples([reader.get_batch(i) for i in range(reader.num_record_batches)])
        names, of_row = json.loads((reader.schema.metadata or {}).get(_SOURCES, "[[], []]"))
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    sources = SourceRows(tuple(names), np.array(of_row, np.int64)) if names else None
    return EncodedRows(rows, Tally(seen=len(rows), kept=len(rows)), sources=sources)
