"""Rows as tokens, kept on disk: what was tokenised once is mapped into memory the next time.

Why: seven thousand rows take two seconds to render and tokenise, two million take minutes, and nothing of it changes
between runs.
What: one Arrow file for each content of the rows' files, tokenizer, template and settings; any of them changed is
another file. Written beside its place and moved there whole.
Cost: a hash of the files (about 1 GB/s), 4 bytes a token on disk. The oldest files go when all take more than
`MOST_BYTES`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from halfbyte.data import files
from halfbyte.data.examples import SCHEMA, Examples
from halfbyte.data.tally import Tally
from halfbyte.data.template import Encoded
from halfbyte.sources.checkpoint import cache_dir

if TYPE_CHECKING:
    from halfbyte.recipe_data import Data

# Counts up when rendering, tokenising or the file's layout changes.
FORMAT = 2
LEAST_ROWS = 1000  # fewer are tokenised in no time
MOST_BYTES = 5_000_000_000
_TALLY = b"halfbyte.tally"
_ELSEWHERE = {"train", "eval"}  # fields of `data:` that name the rows


def folder() -> Path:
    return cache_dir() / "tokens"


def key(names: Path | str | Sequence[str], tokenizer: Any, data: Data) -> str | None:
    """The name under which these rows are kept; None for what is not kept: hub datasets, tokenizers that are code.

    Raises:
        DataError: names that no file has.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = files.find(names)
    if backend is None or any(source.kind == "hub" for source in found):
        return None
    template = Path(data.chat_template) if data.chat_template and "{" not in data.chat_template else None
    with contextlib.suppress(OSError):  # a template that cannot be read is an error where it is used
        values = {
            "format": FORMAT,
            "versions": [version(name) for name in ("halfbyte", "transformers", "tokenizers", "jinja2")],
            "files": [[str(source.path), source.label, files.digest(source.path)] for source in found],
            "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "template": tokenizer.chat_template,
            "asked": template.read_text(encoding="utf-8") if template else data.chat_template,
            "data": data.model_dump(mode="json", exclude=_ELSEWHERE),
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
    return None


def load(name: str) -> Encoded | None:
    """What was kept under `name`, mapped; None if nothing whole is there."""
    path = folder() / f"{name}.arrow"
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        tally = Tally.from_json(json.loads(reader.schema.metadata[_TALLY]))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        path.touch()  # when it was last of use
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    return Encoded(Examples(batches), tally)


def save(name: str, encoded: Encoded) -> None:
    """Keep rows under `name`, if they are many. A disk that is full, or that cannot be written, keeps nothing."""
    if len(encoded.examples) < LEAST_ROWS:
        return
    schema = SCHEMA.with_metadata({_TALLY: json.dumps(encoded.tally.to_json())})
    partial = folder() / f"{name}.{os.getpid()}.partial"
    try:
        folder().mkdir(parents=True, exist_ok=True)
        try:
            with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for batch in encoded.examples.batches:
                    writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            partial.replace(folder() / f"{name}.arrow")
        finally:
            partial.unlink(missing_ok=True)
        _tidy()
    except OSError:
        return


def _tidy() -> None:
    """Remove what was longest of no use, down to `MOST_BYTES`."""
    kept = sorted((f.stat().st_mtime, f.stat().st_size, f) for f in folder().glob("*.arrow"))
    total = sum(size for _, size, _ in kept)
    for _, size, path in kept[:-1]:
        if total <= MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= size
