"""The shelf: which store belongs to what, who uses it, what is listed, and what `gc` takes away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.base.store import manifest, shelf, supply
from halfbyte.errors import StoreError
from halfbyte.recipe.schema import Quant
from tests import tiny
from tests.base.store.helpers import checkpoint, wanted


@pytest.fixture
def folder(tmp_path: Path, cache: Path) -> Path:
    return tiny.save(tmp_path / "m", "llama", torch.bfloat16)


def key(folder: Path, dtype: str = "bfloat16", **quant: Any) -> str:
    return shelf.key_of(checkpoint(folder), Quant(**quant), dtype)


def forget() -> None:
    """As a process does when it ends: let go of what it has opened."""
    for file in shelf._in_use.values():
        file.close()
    shelf._in_use.clear()


def collectable(**values: Any) -> list[shelf.CacheEntry]:
    return shelf.collect(dry_run=True, **values)[0]


@pytest.mark.parametrize(
    "quant",
    [{"type": "fp4"}, {"double_quant": False},  {"skip_modules": ("o_proj",)}, {"fp32_modules": ("norm",)}],
    ids=lambda q: next(iter(q)),
)  # fmt: skip
def test_every_setting_that_decides_bytes_is_another_store(quant: dict[str, Any], folder: Path) -> None:
    assert key(folder, **quant) != key(folder)
    assert key(folder, dtype="float32", **quant) != key(folder, **quant)


def test_what_decides_no_byte_is_the_same_store(folder: Path) -> None:
    assert key(folder, placement="streamed") == key(folder)
    assert key(folder, skip_modules=("a", "b")) == key(folder, skip_modules=("b", "a"))


def rewrite(folder: Path) -> None:
    """Other numbers, same size: only the time of writing tells, here a tick of the file system's clock later."""
    path = folder / "model.safetensors"
    stat = path.stat()
    tensors = load_file(path)
    tensors["model.norm.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10_000_000))


def rename_a_tensor(folder: Path) -> None:
    """Another header in a file of the same size and the same time."""
    path = folder / "model.safetensors"
    stat, raw = path.stat(), path.read_bytes()
    path.write_bytes(raw.replace(b"up_proj", b"pu_proj", 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def change_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": 1e-3}))


@pytest.mark.parametrize("change", [rewrite, rename_a_tensor, change_config])
def test_a_source_that_has_changed_is_another_store(change: Callable[[Path], None], folder: Path) -> None:
    before = key(folder)
    assert key(folder) == before
    change(folder)
    assert key(folder) != before


def test_a_folder_elsewhere_is_another_store_and_a_hub_model_is_its_revision(folder: Path, tmp_path: Path) -> None:
    other = tiny.save(tmp_path / "other", "llama", torch.bfloat16)
    assert key(other) != key(folder)
    hub = [replace(checkpoint(f), kind="hub", revision="abc") for f in (folder, other)]
    assert len({shelf.key_of(h, Quant(), "bfloat16") for h in hub}) == 1


def test_a_cache_that_is_moved_keeps_its_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packaged model lies in the cache itself; one beside it is known by its path."""
    inside = tiny.save(tmp_path / "cache/packages/m", "llama", torch.bfloat16)
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    before = key(inside)
    (tmp_path / "cache").rename(tmp_path / "moved")
    inside = tmp_path / "moved/packages/m"
    assert key(inside) != before
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "moved"))
    assert key(inside) == before


def test_the_locks_of_a_process_are_closed_when_it_ends(cache: Path) -> None:
    code = "from halfbyte.base.store import shelf; shelf.hold('name-nf4-0123456789abcdef'); assert shelf._in_use"
    ended = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    assert "ResourceWarning" not in ended.stderr and list((cache / "bases").rglob("*.use"))


def test_a_name_that_no_file_can_have_becomes_one(folder: Path) -> None:
    named = replace(checkpoint(folder), id="a/b c:d@é" + "x" * 100)
    found = shelf.key_of(named, Quant(), "bfloat16")
    assert "/" not in found and " " not in found and len(found) < 80


def test_the_list_tells_states_sizes_and_last_use(folder: Path) -> None:
    whole = supply.ensure(wanted(folder))
    old = supply.ensure(wanted(folder, type="fp4"))
    values = json.loads((old / manifest.MANIFEST).read_text())
    (old / manifest.MANIFEST).write_text(json.dumps({**values, "format": 0}))
    broken = supply.ensure(wanted(folder, double_quant=False))
    (broken / "model-rest.safetensors").unlink()
    building = whole.with_name(key(folder, "float32") + shelf.PARTIAL)
    building.mkdir()
    (building / "x").write_bytes(b"12345")
    os.utime(whole / shelf.USED, (time.time() + 100,) * 2)
    found = shelf.listing()
    assert {entry.path: entry.state for entry in found} == {
        whole: "whole", old: "old format", broken: "broken", building: "building",
    }  # fmt: skip
    assert found[0].path == whole and found[0].last_used > time.time() + 50
    assert found[0].nbytes == sum(f.stat().st_size for f in whole.iterdir())
    assert next(entry for entry in found if entry.path == building).nbytes == 5
    assert found[0].to_json()["source"]["id"] == "org/name"
    assert {entry.path for entry in shelf.find_stores(["org/name"])} == {whole, broken}
    assert [entry.path for entry in shelf.find_stores([whole.name])] == [whole]
    assert {entry.path for entry in shelf.find_stores([])} == {whole, old, broken}
    with pytest.raises(StoreError, match="no store is called nothing; there are: "):
        shelf.find_stores(["nothing"])


def test_opening_is_a_use(folder: Path) -> None:
    found = supply.ensure(wanted(folder))
    os.utime(found / shelf.USED, (1, 1))
    supply.ensure(wanted(folder))
    assert time.time() - (found / shelf.USED).stat().st_mtime < 100


def test_gc_takes_what_is_of_no_use_and_with_an_age_what_is_not_used(folder: Path) -> None:
    whole = supply.ensure(wanted(folder))
    broken = supply.ensure(wanted(folder, double_quant=False))
    (broken / "config.json").unlink()
    (whole.parent / (whole.name + shelf.PARTIAL)).mkdir()
    forget()
    assert {entry.state for entry in collectable()} == {"broken", "building"}
    assert all(shelf.remove(entry) for entry in collectable())
    assert [entry.path for entry in shelf.listing()] == [whole]
    assert collectable(unused_days=1) == []
    for file in whole.iterdir():
        os.utime(file, (time.time() - 2 * 86400,) * 2)
    assert [entry.path for entry in collectable(unused_days=1)] == [whole]
    assert [entry.path for entry in collectable(everything=True)] == [whole]


def test_gc_leaves_what_a_process_uses_or_builds(folder: Path) -> None:
    supply.ensure(wanted(folder))
    (entry,) = shelf.listing()
    assert entry.in_use and collectable(everything=True) == [] and not shelf.remove(entry)
    forget()
    (free,) = shelf.listing()
    assert not free.in_use
    with shelf.building(entry.key):
        assert collectable(everything=True) == [] and not shelf.remove(free)
    assert shelf.remove(free) and shelf.listing() == []


def test_a_folder_that_cannot_be_removed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supply.ensure(wanted(folder))
    forget()
    (entry,) = shelf.listing()

    def fail(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StoreError, match="cannot be removed: Operation not permitted"):
        shelf.remove(entry)


def test_locks_of_two_builders(cache: Path) -> None:
    waited: list[int] = []
    with (
        shelf.building("one-nf4-0123456789abcdef"),
        shelf.building("two-nf4-0123456789abcdef", lambda: waited.append(1)),
    ):
        assert waited == []  # another store
    with shelf.building("one-nf4-0123456789abcdef", lambda: waited.append(1)):
        assert waited == []  # nobody holds it any more


def test_who_waited_for_a_folder_outside_holds_it_alone(tmp_path: Path) -> None:
    """The first holder removes its lock's file; who waited must not hold a lock that the next one does not see."""
    where, inside, most, lock = tmp_path / "four", 0, 0, threading.Lock()

    def build() -> None:
        nonlocal inside, most
        for _ in range(20):
            with shelf.building("key", where=where):
                with lock:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.001)
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and not list(tmp_path.iterdir())
