"""Shapes of well-known models, by name: `halfbyte plan llama-2-70b` needs no file and no network.

`references.json` has a model's config, and of a mixture of experts its tensors too, `0-31` for the number of a layer.
Source: the models' published `config.json`; the numbers of parameters that follow are compared with the published ones
in a test. Only what shapes follow from is kept.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from importlib import resources

from halfbyte.types import Document


@cache
def references() -> dict[str, Document]:
    """Name -> `config`, and of a mixture `tensors`: a name with the numbers of its layers -> shape."""
    text = resources.files(__package__).joinpath("references.json").read_text("utf-8")
    shapes: dict[str, Document] = json.loads(text)
    return shapes


def reference_tensors(name: str) -> list[tuple[str, tuple[int, ...]]] | None:
    """Every tensor of a bundled mixture, with its shape; None where they follow from the config."""
    tensors = references()[name].get("tensors")
    return None if tensors is None else [each for pattern in tensors.items() for each in _of_every_layer(*pattern)]


def _of_every_layer(pattern: str, shape: list[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    span = re.search(r"\.(\d+)-(\d+)\.", pattern)
    for layer in range(int(span[1]), int(span[2]) + 1) if span else (None,):
        yield pattern if span is None else pattern.replace(span[0], f".{layer}."), tuple(shape)
