"""Rows as tokens, kept on disk: what was tokenised once is mapped into memory the next time.

Why: seven thousand rows take two seconds to render and tokenise, two million take minutes, and nothing of it changes
between runs.
What: one Arrow file for each content of the rows' files, tokenizer, template and settings; any of them changed is
another file. Written beside its place, batch by batch as rows are encoded, and moved there whole; the last batch has
no rows, and carries what was seen of them. Rows that have no name are written as well, and go with the process.
Cost: a hash of the files (about 1 GB/s; of large ones only once), 4 bytes a token on disk. The oldest files go when all
take more than `MOST_BYTES`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from halfbyte.data.encoding import file_digests
from halfbyte.data.encoding.chat_template import CHATML
from halfbyte.data.encoding.encoder import Encoded
from halfbyte.data.encoding.examples import SCHEMA, Examples
from halfbyte.data.encoding.tally import Tally
from halfbyte.data.reading import files
from halfbyte.system.files import cache_dir, put
from halfbyte.system.versions import version

if TYPE_CHECKING:
    from halfbyte.recipe.data import Data
    from halfbyte.types import Tokenizer

# Counts up when rendering, tokenising or the file's layout changes.
FORMAT = 3
LEAST_ROWS = 1000  # fewer are tokenised in no time
MOST_BYTES = 5_000_000_000
_TALLY = b"halfbyte.tally"
_ELSEWHERE = {"train", "eval"}  # fields of `data:` that name the rows


def folder() -> Path:
    return cache_dir() / "tokens"


def key(names: Path | str | Sequence[str], tokenizer: Tokenizer, data: Data) -> str | None:
    """The name under which these rows are kept; None for what is not kept: hub datasets, tokenizers that are code.

    Raises:
        DataError: names that no file has.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    sources = files.find(names)
    if backend is None or any(source.kind == "hub" for source in sources):
        return None
    asked = data.chat_template if data.chat_template != CHATML else None
    template = Path(asked) if asked and "{" not in asked else None
    with contextlib.suppress(OSError):  # a template that cannot be read is an error where it is used
        values = {
            "format": FORMAT,
            "versions": [version(name) for name in ("halfbyte", "transformers", "tokenizers", "jinja2")],
            "files": [[str(source.path), source.label, file_digests.digest(source.path)] for source in sources],
            "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "template": tokenizer.chat_template,
            "asked": template.read_text(encoding="utf-8") if template else asked,
            "data": data.model_dump(mode="json", exclude=_ELSEWHERE),
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return None


def load(name: str) -> Encoded | None:
    """What was kept under `name`, mapped; None if nothing whole is there."""
    path = folder() / f"{name}.arrow"
    kept = _map(path)
    if kept is not None:
        with contextlib.suppress(OSError):
            path.touch()  # when it was last of use
    return kept


def _map(path: Path) -> Encoded | None:
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        *batches, _ = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        seen = reader.get_batch_with_custom_metadata(len(batches)).custom_metadata
        tally = Tally.from_json(json.loads(seen[_TALLY]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    return Encoded(Examples(batches), tally)


class Writer:
    """Rows as they are encoded: few stay in memory, many go to a file at once. A context; what is not kept is removed.

    Args:
        name: what they are kept under; None to keep them only as long as they are mapped.
    """

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._rows = 0
        self._batches: list[pa.RecordBatch] = []  # as long as they are few
        self._partial = folder() / f"{name or 'unnamed'}.{os.getpid()}.partial"
        self._sink: pa.OSFile | None = None
        self._writer: pa.RecordBatchFileWriter | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *raised: object) -> None:
        for opened in (self._writer, self._sink):
            with contextlib.suppress(OSError, pa.ArrowException):
                if opened is not None:
                    opened.close()
        with contextlib.suppress(OSError):
            self._partial.unlink(missing_ok=True)

    def add(self, batch: pa.RecordBatch) -> None:
        """
        Raises:
            OSError: the disk is full, or cannot be written.
        """
        self._rows += batch.num_rows
        self._batches.append(batch)
        if self._rows < LEAST_ROWS:
            return
        if self._writer is None:
            folder().mkdir(parents=True, exist_ok=True)
            self._sink = pa.OSFile(str(self._partial), "wb")
            self._writer = pa.ipc.new_file(self._sink, SCHEMA)
        for held in self._batches:
            if held.num_rows:
                self._writer.write_batch(held)
        self._batches = []

    def finish(self, tally: Tally) -> Encoded:
        """All rows; mapped where they are many, and kept under their name if they have one.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        if self._writer is None or self._sink is None:
            return Encoded(Examples(self._batches), tally)
        nothing = SCHEMA.empty_table().to_batches() or [pa.record_batch([[]] * len(SCHEMA), schema=SCHEMA)]
        self._writer.write_batch(nothing[0], custom_metadata={_TALLY: json.dumps(tally.to_json()).encode()})
        self._writer.close()
        self._sink.close()
        if self._name is None:
            made = _map(self._partial)
        else:
            path = folder() / f"{self._name}.arrow"
            put(self._partial, path)
            made = _map(path)
            _tidy()
        if made is None:
            raise OSError("what was written cannot be read back")
        return made


def _tidy() -> None:
    """Remove what was longest of no use, down to `MOST_BYTES`."""
    kept = sorted((f.stat().st_mtime, f.stat().st_size, f) for f in folder().glob("*.arrow"))
    total = sum(size for _, size, _ in kept)
    for _, size, path in kept[:-1]:
        if total <= MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= size
