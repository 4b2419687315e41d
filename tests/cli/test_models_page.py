"""docs/models.md: made of what was looked at; every type is there; what was looked at is what is so (slow)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tools import models

from halfbyte.export import gguf, lora
from tests import small_models

DOCS = Path(__file__).parents[2] / "docs"


def facts() -> dict[str, dict[str, str]]:
    values: dict[str, dict[str, str]] = json.loads((DOCS / models.FACTS).read_text())
    return values


def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "DOCS", DOCS)
    page = models.page(models.read(models.FACTS), models.read(models.FIGURES))
    assert (DOCS / models.PAGE).read_text() == page, "run `python -m tools.models`"


def test_every_type_is_there_and_counted() -> None:
    there, page = facts(), (DOCS / models.PAGE).read_text()
    assert len(set(there) & set(small_models.TYPES)) > 0.9 * len(small_models.TYPES)  # older versions know fewer
    counts = Counter(each.get("packed", "not built") for each in there.values())
    assert (
        f"\n{len(there)} of transformers' causal LMs " in page
        and f"\n{counts['by lengths']} are packed by lengths" in page
    )
    assert all(f"| {kind} |" in page for kind in there)
    assert {tuple(each) for each in there.values()} <= {("packed", "fused", "decoded"), ("not built",)}


def test_exports_are_those_of_the_tables() -> None:
    assert models.exported("llama") == "gguf, vllm, mlx" and models.exported("smolvlm") == "vllm"
    assert models.exported("mamba") == "" and "gemma3_text" in gguf.ARCHITECTURES and "lfm2" in lora._LEAVES


@pytest.mark.slow
def test_what_the_file_says_is_so() -> None:
    wrong = {
        kind: (said, models.facts_of(kind))
        for kind, said in facts().items()
        if kind in small_models.TYPES and models.facts_of(kind) != said
    }
    assert wrong == {}
