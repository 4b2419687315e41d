"""A store is found, or built where it is damaged; a folder of the user's is never replaced."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from halfbyte.base.store import build, supply
from halfbyte.errors import StoreError
from tests.base.store.helpers import opened, wanted
from tests.base.store.test_build import content, left_over, model


def test_a_damaged_store_is_built_again_and_it_is_said(tmp_path: Path, cache: Path) -> None:
    request, notes = wanted(model(tmp_path / "m")), []
    folder = supply.ensure(request)
    before = content(folder)
    os.truncate(folder / "model-layer-0001.safetensors", 5000)
    assert supply.ensure(request, tell=supply.Tell(note=lambda _, text: notes.append(text))) == folder
    assert "a damaged store is built again" in notes[0] and "model-layer-0001.safetensors has 5,000 bytes" in notes[0]
    assert content(folder) == before and left_over(cache) == [folder.name]


def test_a_folder_of_the_user_s_is_never_replaced(tmp_path: Path, cache: Path) -> None:
    request = wanted(model(tmp_path / "m"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(StoreError, match="is not a store"):
        supply.ensure(request, out=tmp_path / "mine")
    out = supply.ensure(request, out=tmp_path / "out")
    assert supply.ensure(request, out=tmp_path / "out") == out
    with pytest.raises(StoreError, match="exists and is the store of org/name with other contents or settings"):
        supply.ensure(wanted(tmp_path / "m", type="fp4"), out=out)
    os.truncate(out / "model-layer-0001.safetensors", 5000)
    with pytest.raises(StoreError, match="is not what was built"):
        supply.ensure(request, out=out)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_opening_finds_the_store_that_quantize_made_without_building(
    tmp_path: Path, cache: Path, monkeypatch: Any
) -> None:
    folder = supply.ensure(wanted(model(tmp_path / "m")))
    monkeypatch.setattr(build, "build", None)
    assert opened(tmp_path / "m", compute_dtype="bf16").origin == f"store {folder}"
    with pytest.raises(TypeError):
        opened(tmp_path / "m", compute_dtype="bf16", double_quant=False)
