"""A model is looked for as far as that takes no time, and found by the name that a recipe gives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from halfbyte.errors import SourceError
from halfbyte.models.sources import gguf_file, hub, lookup, pypi
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.recipe.schema import Recipe


def recipe(model: str, **values: object) -> Recipe:
    return Recipe.model_validate({"model": model, "data": {"train": "rows.jsonl"}, **values})


@pytest.fixture(autouse=True)
def costly(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would be converted or downloaded."""
    asked: list[str] = []

    def spy(kind: str) -> object:
        def called(name: object, **_: object) -> Checkpoint:
            asked.append(f"{kind} {name}")
            return Checkpoint(Path("x"), str(name), None, "hub")

        return called

    monkeypatch.setattr(pypi, "checkpoint_of", spy("packaged"))
    monkeypatch.setattr(gguf_file, "checkpoint_of", spy("gguf"))
    monkeypatch.setattr(hub, "fetch", spy("hub"))
    monkeypatch.setattr(hub, "is_out_of_reach", lambda: False)
    return asked


def test_to_look_converts_and_downloads_nothing(tmp_path: Path, costly: list[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    for model in ("smollm2-135m", str(tmp_path / "m.gguf"), "org/name"):
        lookup.look(recipe(model))
    assert costly == []
    for model in (str(tmp_path / "missing"), str(tmp_path), "./smollm2", "gpt2"):
        with pytest.raises(SourceError):
            lookup.look(recipe(model))


def test_a_hub_that_is_out_of_reach_is_asked_for_what_it_has_kept(
    costly: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "is_out_of_reach", lambda: True)
    lookup.look(recipe("org/name", revision="v2"))
    assert costly == ["hub org/name@v2"]


def test_each_kind_of_name_goes_its_way(tmp_path: Path, costly: list[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    for model in ("smollm2-135m", str(tmp_path / "m.gguf"), "org/name"):
        lookup.find_model(recipe(model))
    assert costly == ["packaged smollm2-135m", f"gguf {tmp_path / 'm.gguf'}", "hub org/name"]
