"""From names of files to rows as tokens: from the cache, or read, rendered and tokenised now, many rows on every core.

What: chunks of records are encoded one after another and written to the cache as they come, so memory does not grow
with the rows. Up to `ALONE_CHUNKS` chunks are encoded in this process; more, by helper processes on every core.
Cost: see `encoder`; divided by the cores where rows are many.
"""

import contextlib
from collections.abc import Callable, Generator, Sequence
from itertools import chain, islice
from pathlib import Path

import pyarrow as pa

from halfbyte.data.encoding import token_cache, workers
from halfbyte.data.encoding.encoder import Encoded, Encoder, Part
from halfbyte.data.encoding.examples import Examples
from halfbyte.data.encoding.tally import Tally
from halfbyte.data.reading import files
from halfbyte.data.reading.read import Reader
from halfbyte.errors import HalfbyteError
from halfbyte.recipe.data import Data
from halfbyte.types import Tokenizer

ALONE_CHUNKS = 32  # thirty thousand rows, ten seconds: where starting helpers begins to pay


def encode(names: Path | str | Sequence[str], tokenizer: Tokenizer, data: Data, *, cores: int = 1) -> Encoded:
    """Rows as tokens. The same ones, in the same order, whatever `cores` is.

    Raises:
        DataError: names that stand for nothing; all rows that cannot be read; else all that cannot be encoded.
    """
    name = token_cache.key(names, tokenizer, data)
    cached = token_cache.load(name) if name else None
    if cached is not None:
        return cached
    try:
        with token_cache.Writer(name) as writer:
            return writer.finish(_run(names, tokenizer, data, cores, writer.add))
    except OSError:  # the cache cannot be written: once more, in memory
        batches: list[pa.RecordBatch] = []
        tally = _run(names, tokenizer, data, cores, batches.append)
        return Encoded(Examples(batches), tally)


def _run(
    names: Path | str | Sequence[str],
    tokenizer: Tokenizer,
    data: Data,
    cores: int,
    keep: Callable[[pa.RecordBatch], None],
) -> Tally:
    reader, encoder, tally = Reader(files.find(names), data), Encoder(tokenizer, data), Tally()
    error: HalfbyteError | None = None

    def only_read() -> bool:
        """Whether an error is certain: then the rest is read, to name all that is wrong, and not encoded."""
        return error is not None or bool(reader.problems)

    chunks = reader.chunks()
    first = list(islice(chunks, ALONE_CHUNKS + 1)) if cores > 1 else []
    chunks = chain(first, chunks)
    parts: Generator[Part] = (encoder.part(chunk, only_read=only_read()) for chunk in chunks)
    if len(first) > ALONE_CHUNKS:
        parts = workers.Helpers(min(cores, workers.MOST), tokenizer, data, encoder).parts(chunks, only_read)
    with contextlib.closing(parts):
        for part in parts:
            reader.problems.update(part.problems)
            error = error or part.error
            if part.batch is not None and not only_read():
                tally.merge(part.tally)
                keep(part.batch)
    reader.check()
    if error is not None:
        raise error
    tally.check(data)
    return tally
