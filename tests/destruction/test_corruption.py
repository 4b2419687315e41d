"""Every file that a run or a cache leaves, cut, with a flipped bit, emptied and swapped for another: found and named,
and nothing wrong is used."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from halfbyte import finetune
from halfbyte.adapters import passport
from halfbyte.base.store import manifest, supply
from halfbyte.data.encoding import encode
from halfbyte.errors import AdapterError, HalfbyteError, RunError
from halfbyte.plan import calibrate
from halfbyte.recipe import adapter
from halfbyte.runs import points
from halfbyte.system import device, files
from tests import tiny_run

CHECKPOINT = ("adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "optimizer.json",
              "rng.safetensors", "trainer_state.json", "manifest.json")  # fmt: skip
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "halfbyte.json")
STORE = ("*.safetensors", "config.json", "tokenizer.json", manifest.MANIFEST)


def cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flip(path: Path, other: Path) -> None:
    """One bit, in the middle third, where there are numbers in all of them."""
    data = bytearray(path.read_bytes())
    at = random.Random(path.name).randrange(len(data) // 3, 2 * len(data) // 3)
    data[at] ^= 1
    path.write_bytes(data)


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path, other: Path) -> None:
    shutil.copyfile(other, path)


DAMAGES: dict[str, Callable[[Path, Path], None]] = {"cut": cut, "flip": flip, "empty": empty, "swap": swap}


@dataclass
class World:
    """Two finished runs of different seeds, with their stores and caches."""

    folder: Path
    run: Path
    other: Path
    stores: list[Path]
    caches: list[Path]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, runs = tmp_path_factory.mktemp("world"), list[Path]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALFBYTE_CACHE", str(folder / "cache"))
        patch.setattr(encode, "MIN_ROWS", 1)
        for seed in (0, 1):
            here = folder / str(seed)
            here.mkdir()
            tiny_run.checkpoint(here / "model", seed=seed)
            tiny_run.rows(here / "train.jsonl", 16, seed=seed)
            loaded = tiny_run.recipe(here, train__save_strategy="steps", train__save_steps=2, train__seed=seed)
            finetune.train(loaded)
            runs.append(here / "run")
        stores = sorted(p.parent for p in (folder / "cache").rglob(manifest.MANIFEST))
        caches = sorted((folder / "cache").rglob("*.arrow"))
        yield World(folder, *runs, stores, caches)


@pytest.fixture
def kept() -> Iterator[Callable[[Path], None]]:
    """Puts files back as they were."""
    saved: dict[Path, bytes] = {}

    def keep(path: Path) -> None:
        saved[path] = path.read_bytes()

    yield keep
    for path, content in saved.items():
        path.write_bytes(content)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", CHECKPOINT)
def test_checkpoints(name: str, how: str, world: World, kept: Callable[[Path], None]) -> None:
    last, before = (world.run / "checkpoints" / f"step-{step:06d}" for step in (4, 2))
    kept(last / name)
    other = before if name == "adapter_config.json" else before / name  # the configs of two steps are the same
    if name in ("adapter_config.json", "manifest.json") and how == "swap":
        other = last / "trainer_state.json"
    other = other / name if other.is_dir() else other
    if other.read_bytes() == (last / name).read_bytes():  # nothing was drawn between the two
        other = last / "optimizer.json"
    DAMAGES[how](last / name, other)
    wrong = points.damage(last, hashes=True)
    assert wrong is not None and name in wrong
    found = points.newest(last.parent)
    assert found is not None and found.step == 2 and found.passed_over == (f"step-000004 ({wrong})",)
    kept(before / name)
    empty(before / name, other)
    with pytest.raises(RunError, match="found only damaged ones: step-000002"):
        points.newest(last.parent)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ADAPTER)
def test_adapters(name: str, how: str, world: World, kept: Callable[[Path], None]) -> None:
    folder = world.run / "adapter"
    was = json.loads((folder / "halfbyte.json").read_text())
    kept(folder / name)
    other = world.other / "adapter" / name
    if name == "adapter_config.json" and how == "swap":
        other.write_text(other.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    DAMAGES[how](folder / name, other)

    def opened() -> None:
        adapter.read_config(folder)
        passport.check(folder, was["belongs_to"])

    if name == "halfbyte.json" and how == "flip":  # of what the file says, only this decides anything
        decides = ("adapter_sha256", "config_sha256", "belongs_to")
        with suppress(ValueError):  # no JSON any more
            now = json.loads((folder / name).read_bytes().decode(errors="replace"))
            if all(now.get(key) == was[key] for key in decides):
                return
    with pytest.raises(AdapterError) as raised:
        opened()
    assert name in str(raised.value) or "does not belong" in str(raised.value) or name == "adapter_model.safetensors"


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", STORE)
def test_stores(name: str, how: str, world: World, kept: Callable[[Path], None]) -> None:
    mine, theirs = world.stores
    path = next(iter(sorted(mine.glob(name))))
    other = theirs / path.name
    if other.read_bytes() == path.read_bytes():
        other = mine / manifest.MANIFEST
    kept(path)
    DAMAGES[how](path, other)
    said: list[str] = []
    assert supply._complete_store(mine, mine.name, supply.Tell(note=lambda label, text: said.append(text))) is None
    assert len(said) == 1 and said[0].startswith("a damaged store is built again")
    assert path.name in said[0] or path.name == manifest.MANIFEST, "one of another store names what differs from it"


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("ending", [".arrow", ".sha256"])
def test_token_caches(ending: str, how: str, world: World, kept: Callable[[Path], None]) -> None:
    mine, other = world.caches
    kept(mine.with_suffix(ending))
    assert encode.load(mine.stem) is not None
    DAMAGES[how](mine.with_suffix(ending), other.with_suffix(ending))
    assert encode.load(mine.stem) is None, "so rows are encoded again"


@pytest.mark.parametrize("how", DAMAGES)
def test_calibrations(how: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, names = device.detect(), list(calibrate.Rates.__dataclass_fields__)
    values = {name: 1.0 if name != "source" else "measured" for name in names}
    for dtype in ("bf16", "fp32"):
        path = calibrate.path_of(machine, dtype)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files.as_json(files.seal({**values, "of": path.stem})))
    assert calibrate.cached(machine, "fp32") is not None
    DAMAGES[how](calibrate.path_of(machine, "fp32"), calibrate.path_of(machine, "bf16"))
    assert calibrate.cached(machine, "fp32") is None, "so the machine is measured again"


def test_there_are_sixty_of_them() -> None:
    assert len(DAMAGES) * (len(CHECKPOINT) + len(ADAPTER) + len(STORE) + 2 + 1) >= 60


def test_a_resume_over_damage_ends_in_the_same_bytes(world: World, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(world.run, copy)
    flip(copy / "checkpoints" / "step-000004" / "optimizer.safetensors", copy)
    (copy / "report.json").unlink()
    from halfbyte.recipe.file import load_recipe

    try:
        finetune.train(load_recipe(copy / "recipe.yaml", [f"output={copy}"], of_run=True), resume=True)
    except HalfbyteError:
        finetune.train(load_recipe(world.folder / "0" / "recipe.yaml", [f"output={copy}"]), resume=True)
    name = "adapter/adapter_model.safetensors"
    assert (copy / name).read_bytes() == (world.run / name).read_bytes()
