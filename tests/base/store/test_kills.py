"""Killed at random moments, a build goes on next time and never leaves half a store; two builders build once."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.base.store import manifest, shelf, supply
from tests import tiny
from tests.base.store import nursery
from tests.base.store.helpers import checkpoint, differing, opened, wanted

KILLS = 20
SECONDS = 120
OPENING_SECONDS = 0.05  # of which a kill falls into the opening of a whole store


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough files that many moments are between two of them."""
    sizes = {"num_hidden_layers": 16, "hidden_size": 256, "intermediate_size": 1024}
    folder = tmp_path_factory.mktemp("model")
    tiny.model("llama", dtype=torch.bfloat16, changes=sizes).save_pretrained(folder, max_shard_size="5MB")
    return folder


def end(process: Any) -> int:
    process.join(SECONDS)
    assert process.exitcode is not None
    return int(process.exitcode)


def state(bases: Path) -> str:
    """What a process left: nothing, a part, or a store."""
    folders = [p for p in bases.iterdir() if p.name != shelf.LOCKS] if bases.is_dir() else []
    if not folders:
        return "nothing"
    if any(not p.name.endswith(shelf.PARTIAL) for p in folders):
        return "whole"
    return "part" if any(folders[0].glob("*.safetensors")) else "begun"


def written(bases: Path) -> int:
    """Bytes of a build that is not over."""
    total = 0
    for file in bases.glob(f"*{shelf.PARTIAL}/*"):
        with contextlib.suppress(FileNotFoundError):  # moved meanwhile
            total += file.stat().st_size
    return total


def in_build(process: Any, bases: Path, draw: random.Random, whole_bytes: int) -> None:
    """Wait until a random share of what is still to be written is there."""
    goal = draw.uniform(written(bases), whole_bytes)
    while process.is_alive() and written(bases) < goal:
        time.sleep(0.0005)


def in_opening(process: Any, bases: Path, draw: random.Random) -> None:
    """Wait until the store is in place, and a moment more."""
    while process.is_alive() and state(bases) != "whole":
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, OPENING_SECONDS))


@pytest.mark.slow
@pytest.mark.parametrize("work", [nursery.build, nursery.open_first], ids=["building", "opening"])
def test_killed_at_any_moment_there_is_a_whole_store_or_none(
    work: Callable[[Path, Path], None], model: Path, tmp_path: Path, cache: Path
) -> None:
    seed = int(os.environ.get("HALFBYTE_TEST_SEED", time.time_ns() % 10**6))
    print(f"seed {seed}; HALFBYTE_TEST_SEED repeats its moments")
    draw, bases = random.Random(seed), cache / "bases"
    reference = supply.ensure(wanted(model), out=tmp_path / "reference")
    expected = manifest.read(reference)
    loaded = opened(model, use_store=False, compute_dtype="bf16").model
    whole_bytes = sum(file.stat().st_size for file in reference.iterdir())
    left: Counter[str] = Counter()
    for _ in range(KILLS):
        process = nursery.running(work, model, cache)
        if work is nursery.build or draw.random() < 0.5:
            in_build(process, bases, draw, whole_bytes)
        else:
            in_opening(process, bases, draw)
        process.kill()
        killed = end(process) == -signal.SIGKILL
        left[state(bases) if killed else "over before"] += 1
        for folder in bases.iterdir() if bases.is_dir() else ():
            if folder.name != shelf.LOCKS and not folder.name.endswith(shelf.PARTIAL):
                assert supply.verify(folder).files == expected.files
        # else the next one finds what this one left
        if work is nursery.open_first or state(bases) == "whole" or draw.random() < 0.3:
            found = opened(model, compute_dtype="bf16")
            assert found.origin.startswith("store ") and differing(found.model, loaded) == []
            del found
            shutil.rmtree(bases)
            shelf._in_use.clear()
    print(f"left after {KILLS} kills: {dict(left)}")
    assert end(nursery.running(work, model, cache)) == 0
    (whole,) = (p for p in bases.iterdir() if p.name != shelf.LOCKS)
    assert supply.verify(whole).files == expected.files
    inside = left["part"] + left["begun"]
    assert inside >= (KILLS * 3 // 4 if work is nursery.build else KILLS // 4), "kills that fell into a build"


def test_of_two_processes_one_builds_and_the_other_waits(model: Path, cache: Path) -> None:
    context = nursery.context()
    events, go = context.Queue(), context.Event()
    first = nursery.running(nursery.report, model, cache, "first", events, go)
    assert events.get(timeout=SECONDS) == ("first", "building")
    second = nursery.running(nursery.report, model, cache, "second", events, go)
    assert events.get(timeout=SECONDS) == ("second", "another process builds the store of org/name; waiting for it")
    assert second.is_alive()
    go.set()
    said = []
    while len(said) < 3:
        if (event := events.get(timeout=SECONDS)) != ("first", "building"):  # said ten times a second
            said.append(event)
    assert end(first) == end(second) == 0
    folder = str(cache / "bases" / shelf.key_of(checkpoint(model), wanted(model).quant, "bfloat16"))
    assert sorted(said) == sorted([("first", "built"), ("first", folder), ("second", folder)])
    supply.verify(Path(folder))


def test_who_waits_goes_on_where_the_builder_was_killed(model: Path, cache: Path) -> None:
    context = nursery.context()
    events, go, again = context.Queue(), context.Event(), context.Event()
    first = nursery.running(nursery.report, model, cache, "first", events, go)
    assert events.get(timeout=SECONDS) == ("first", "building")
    again.set()
    second = nursery.running(nursery.report, model, cache, "second", events, again)
    assert events.get(timeout=SECONDS)[1].startswith("another process builds")
    first.kill()
    assert events.get(timeout=SECONDS) == ("second", "built")
    assert end(second) == 0
    supply.verify(Path(events.get(timeout=SECONDS)[1]))
