"""The manifest: what differs is named, at a glance or in full; other formats are refused; files are whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.base.store import manifest, supply
from halfbyte.errors import StoreError
from tests.base.store.helpers import flip

Damage = Callable[[Path], object]


def made(folder: Path) -> manifest.Manifest:
    """A store in the eyes of its manifest: two safetensors files and a config."""
    folder.mkdir()
    for name in ("a", "b"):
        save_file({"x": torch.arange(300.0)}, folder / f"{name}.safetensors")
    (folder / "config.json").write_text("{}\n")
    (folder / "tokenizer.json").write_text("tokens\n")
    entries = tuple(manifest.entry_of(folder / path) for path in sorted(os.listdir(folder)))
    built = manifest.Manifest("key", {"id": "org/name"}, "0" * 64, {"type": "nf4"}, 600, 1.0, "now", entries)
    manifest.write(folder, built)
    return built


def test_it_comes_back_as_it_was_written(tmp_path: Path) -> None:
    built = made(tmp_path / "s")
    assert manifest.read(tmp_path / "s") == built == supply.verify(tmp_path / "s")
    assert built.nbytes == sum(f.stat().st_size for f in (tmp_path / "s").iterdir() if f.name != manifest.MANIFEST)
    assert not list((tmp_path / "s").glob("*.tmp"))


@pytest.mark.parametrize(
    ("damage", "cheaply", "said"),
    [
        pytest.param(lambda s: (s / "a.safetensors").unlink(), True, "a.safetensors is missing", id="missing"),
        pytest.param(lambda s: os.truncate(s / "a.safetensors", 900), True, "a.safetensors has 900 bytes", id="cut"),
        pytest.param(lambda s: flip(s / "b.safetensors", 20), True, "the header of b.safetensors has", id="header"),
        pytest.param(lambda s: (s / "config.json").write_text("[]\n"), True, "config.json has changed", id="config"),
        pytest.param(lambda s: flip(s / "b.safetensors", 900), False, "b.safetensors has another sha", id="one bit"),
        pytest.param(lambda s: flip(s / "tokenizer.json", 2), False, "tokenizer.json has another sha", id="tokenizer"),
    ],
)
def test_what_differs_is_named(damage: Damage, cheaply: bool, said: str, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    built = made(folder)
    damage(folder)
    quick, full = (manifest.problems(folder, built, full=full) for full in (False, True))
    assert len(quick) == int(cheaply) and len(full) == 1
    assert all(problem.startswith(said) for problem in (*quick, *full))
    with pytest.raises(StoreError, match="is not what was built"):
        supply.verify(folder)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    made(tmp_path / "s")
    for name in ("a", "b"):
        (tmp_path / "s" / f"{name}.safetensors").unlink()
    with pytest.raises(
        StoreError, match=r"(?s)a\.safetensors is missing.*b\.safetensors is missing.*fix: build it again"
    ):
        supply.verify(tmp_path / "s")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is not a store: it has no halfbyte-store.json, which is written last"),
        ("{", "cannot be read"),
        ('{"format": 99}', "is a store of format 99, and this halfbyte reads format 1"),
        ("[]", "is a store of format None"),
        ('{"format": 1}', "is not a manifest of a store"),
        ('{"format": 1, "files": [{"name": "a"}]}', "is not a manifest of a store"),
    ],
)
def test_what_is_no_manifest_is_refused(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / manifest.MANIFEST).write_text(content)
    with pytest.raises(StoreError, match=said):
        manifest.read(tmp_path)


def test_a_field_of_a_later_halfbyte_is_not_passed_over(tmp_path: Path) -> None:
    made(tmp_path / "s")
    path = tmp_path / "s" / manifest.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "encrypted": True}))
    with pytest.raises(StoreError, match="is not a manifest"):
        manifest.read(tmp_path / "s")


def test_a_tree_of_hashes_does_not_depend_on_their_order() -> None:
    parts = [("a", "1"), ("b", "2"), ("c", "3")]
    assert manifest.tree_hash(parts) == manifest.tree_hash(parts[::-1])
    assert len({manifest.tree_hash(p) for p in (parts, parts[:2], [("a", "2"), ("b", "1"), ("c", "3")])}) == 3
