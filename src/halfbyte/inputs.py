"""What a recipe names, before a weight is loaded: the checkpoint, its tokenizer, and every row as tokens.

Why: a missing file or a bad row must be told in seconds, not after the base is loaded.
Cost: tokenising, about 3,000 rows a second a core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte import base, sources
from halfbyte.data import read, template
from halfbyte.data.template import Encoded
from halfbyte.recipe import Recipe


@dataclass(frozen=True)
class Prepared:
    """What is known before a weight is loaded: the source, the tokenizer, and every row as tokens."""

    recipe: Recipe
    checkpoint: sources.Checkpoint
    tokenizer: Any
    train: Encoded
    evaluation: Encoded | None


def prepare(recipe: Recipe) -> Prepared:
    """Find the model, read its tokenizer, and turn every row into tokens and labels."""
    found = find_model(recipe)
    base.read_config(found.path, trust_remote_code=recipe.trust_remote_code)
    tokenizer = base.open_tokenizer(found, trust_remote_code=recipe.trust_remote_code)
    train = encode(recipe, recipe.data.train, tokenizer)
    evaluation = encode(recipe, recipe.data.eval, tokenizer) if recipe.data.eval else None
    return Prepared(recipe, found, tokenizer, train, evaluation)


def find_model(recipe: Recipe) -> sources.Checkpoint:
    name = f"{recipe.model}@{recipe.revision}" if recipe.revision else recipe.model
    return sources.resolve(name, allow_pickle=recipe.allow_pickle)


def encode(recipe: Recipe, names: Path | str | Sequence[str], tokenizer: Any) -> Encoded:
    return template.encode(read.read_rows(names, recipe.data), tokenizer, recipe.data)


def data_note(prepared: Prepared) -> str:
    stats = prepared.train.stats
    note = (
        f"{stats.rows:,} rows, {stats.tokens:,} tokens ({stats.min_length} to {stats.max_length} a row), "
        f"{stats.labelled_share:.0%} of them trained"
    )
    left_out = len(prepared.train.skipped)
    note += f", {left_out} rows skipped" if left_out else ""
    note += f", {prepared.train.truncated} truncated" if prepared.train.truncated else ""
    return note + (f"; {prepared.evaluation.stats.rows:,} rows held out" if prepared.evaluation else "")
