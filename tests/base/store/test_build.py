"""Building: it continues where it was, waits for another, and ends in a whole store or in one clear error."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.base.store import build, manifest, shelf, supply
from halfbyte.errors import HalfbyteError, StoreError
from halfbyte.plan import store_build
from halfbyte.quant.kernels import nf4_cpu
from halfbyte.system import files
from tests import tiny
from tests.base.store.helpers import differing, opened, wanted

LAYERS = 6


def model(folder: Path, name: str = "llama", *, layers: int = LAYERS) -> Path:
    """A checkpoint in shards, one of them beside the next layer's."""
    made = tiny.model(name, dtype=torch.bfloat16, changes={"num_hidden_layers": layers})
    made.save_pretrained(folder, max_shard_size="100KB")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a store but the time of its last use and the manifest, which holds seconds and dates."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in (shelf.USED, manifest.MANIFEST)}


def left_over(cache: Path) -> list[str]:
    """What lies on the shelf besides locks."""
    return sorted(p.name for p in (cache / "bases").iterdir() if p.name != shelf.LOCKS)


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Fail when so many files are finished, as a build that is interrupted does."""
    add, done = build._Journal.add, 0

    def counted(self: Any, *args: Any) -> None:
        nonlocal done
        if done == count:
            raise error
        done += 1
        add(self, *args)

    monkeypatch.setattr(build._Journal, "add", counted)


def test_the_bytes_do_not_depend_on_threads_chunks_or_shards(tmp_path: Path, cache: Path, monkeypatch: Any) -> None:
    first = supply.ensure(wanted(model(tmp_path / "m")), out=tmp_path / "a")
    monkeypatch.setattr(store_build, "CHUNK_ELEMENTS", 4096)
    monkeypatch.setattr(store_build, "EXTRA_THREADS", 4)
    tiny.model("llama", dtype=torch.bfloat16, changes={"num_hidden_layers": LAYERS}).save_pretrained(tmp_path / "one")
    second = supply.ensure(wanted(tmp_path / "one"), out=tmp_path / "b")
    assert content(first) == content(second)
    assert supply.verify(first).content_sha256 == supply.verify(second).content_sha256


def test_an_interrupted_build_goes_on(tmp_path: Path, cache: Path) -> None:
    request, told = wanted(model(tmp_path / "m")), []
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            supply.ensure(request)
    (partial,) = (cache / "bases").glob("*.partial")
    assert not (partial / manifest.MANIFEST).exists() and not list(partial.glob("*.tmp"))
    kept = {p.name: p.stat().st_ino for p in partial.glob("*.safetensors")}
    journal = (partial / build.JOURNAL).read_text()
    finished = [name for name in kept if f'"{name}"' in journal]
    assert len(finished) == 3
    folder = supply.ensure(request, tell=supply.Tell(progress=told.append))
    assert {name: (folder / name).stat().st_ino for name in finished} == {name: kept[name] for name in finished}
    assert left_over(cache) == [folder.name]
    assert told[-1].done_bytes == told[-1].total_bytes and told[-1].bytes_per_second > 0
    assert content(folder) == content(supply.ensure(request, out=tmp_path / "anew"))
    stored, loaded = (opened(tmp_path / "m", use_store=use, compute_dtype="bf16") for use in (True, False))
    assert stored.origin == f"store {folder}" and differing(stored.model, loaded.model) == []


@pytest.mark.parametrize("damage", ["a weight", "cut", "gone", "journal", "stranger", "other settings"])
def test_what_an_interrupted_build_left_is_not_believed(damage: str, tmp_path: Path, cache: Path) -> None:
    request = wanted(model(tmp_path / "m"))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            supply.ensure(request)
    (partial,) = (cache / "bases").glob("*.partial")
    first = next(
        p for p in sorted(partial.glob("*.safetensors")) if f'"{p.name}"' in (partial / build.JOURNAL).read_text()
    )
    if damage == "a weight":
        raw = bytearray(first.read_bytes())
        raw[-5000] ^= 1
        first.write_bytes(raw)
    elif damage == "cut":
        os.truncate(first, first.stat().st_size // 2)
    elif damage == "gone":
        first.unlink()
    elif damage == "journal":
        text = (partial / build.JOURNAL).read_text()
        (partial / build.JOURNAL).write_text("garbage\n[]\n" + text[: len(text) // 2])
    elif damage == "stranger":
        (partial / "model-layer-9999.safetensors").write_bytes(b"x")
    else:
        text = (partial / build.JOURNAL).read_text()
        (partial / build.JOURNAL).write_text(text.replace(request_key(request), "another-key"))
    folder = supply.ensure(request)
    supply.verify(folder)
    assert content(folder) == content(supply.ensure(request, out=tmp_path / "anew"))


def request_key(request: shelf.StoreSpec) -> str:
    return shelf.key_of(request.checkpoint, request.quant, request.dtype_name)


def threads_left() -> list[str]:
    """Names of the build's threads that do not end; one that has no work any more may need a moment to go."""
    left = [thread for thread in threading.enumerate() if thread.name.startswith("store")]
    for thread in left:
        thread.join(5)
    return [thread.name for thread in left if thread.is_alive()]


def waits_for_threads() -> None:
    """Until the main thread is in its wait: where it frees objects an interrupt would be told and lost."""
    main = threading.main_thread().ident
    assert main is not None
    end = time.monotonic() + 10
    while time.monotonic() < end and sys._current_frames()[main].f_code.co_name != "wait":
        time.sleep(0.001)


def test_ctrl_c_ends_the_threads_and_keeps_what_is_done(tmp_path: Path, cache: Path) -> None:
    work, calls = nf4_cpu.quantise, 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 10:
            waits_for_threads()
            signal.raise_signal(signal.SIGINT)  # Python's handler runs in the main thread, as with a terminal's
            time.sleep(0.2)
        return work(*args, **kwargs)

    request = wanted(model(tmp_path / "m"))
    # a shell that starts a command in the background lets it ignore the interrupt
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nf4_cpu, "quantise", interrupted)
            with pytest.raises(KeyboardInterrupt):
                supply.ensure(request)
    finally:
        signal.signal(signal.SIGINT, before)
    assert threads_left() == []
    assert [name for name in left_over(cache) if not name.endswith(".partial")] == []
    supply.verify(supply.ensure(request))


def test_ctrl_c_while_a_thread_starts_waits_for_that_thread_too(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool notes a thread as its own after starting it; an interrupt in between leaves it unknown to the pool."""
    work, start = nf4_cpu.quantise, threading.Thread.start
    inside: list[str] = []

    def slow(*args: Any, **kwargs: Any) -> Any:
        inside.append(threading.current_thread().name)
        time.sleep(0.05)
        found = work(*args, **kwargs)
        inside.remove(threading.current_thread().name)
        return found

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "store_1":
            while not inside:
                time.sleep(0.001)
            raise KeyboardInterrupt

    request = wanted(model(tmp_path / "m"))
    with monkeypatch.context() as patch:
        patch.setattr(nf4_cpu, "quantise", slow)
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            supply.ensure(request)
    assert inside == []
    assert threads_left() == []
    supply.verify(supply.ensure(request))


@pytest.mark.parametrize("when", ["weights", "journal", "manifest", "rename"])
def test_a_disk_that_fills_up_is_one_error_and_a_continuation(
    when: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every kind of write: no space is left from some moment on, and then there is room again."""
    request, full = wanted(model(tmp_path / "m")), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    counts = {"pwrite": 0}

    def fail(*_: Any) -> Any:
        raise full

    with monkeypatch.context() as patch:
        if when == "weights":
            pwrite = os.pwrite

            def some(*args: Any) -> int:
                counts["pwrite"] += 1
                return pwrite(*args) if counts["pwrite"] < 40 else fail()

            patch.setattr(os, "pwrite", some)
        elif when == "journal":
            stop_after(2, patch, full)
        elif when == "manifest":
            patch.setattr(files, "write", fail)
        else:
            replace = os.replace
            patch.setattr(os, "replace", lambda a, b: fail() if str(a).endswith(shelf.PARTIAL) else replace(a, b))
        said = "(?s)cannot be written: .*No space left on device.*B are free there.*fix: free some space"
        with pytest.raises(StoreError, match=said):
            supply.ensure(request)
    assert [name for name in left_over(cache) if not name.endswith(".partial")] == []
    assert content(supply.ensure(request)) == content(supply.ensure(request, out=tmp_path / "anew"))


def test_a_disk_that_is_too_small_is_told_before_anything_is_read(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = wanted(model(tmp_path / "m"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    monkeypatch.setattr(nf4_cpu, "quantise", None)  # not called
    with pytest.raises(
        StoreError, match=r"of org/name: it needs \d.* MB in .*bases, and 100.00 kB are free\n.*store gc"
    ):
        supply.ensure(request)
    with pytest.raises(StoreError, match=rf"`rm -r {tmp_path}/anew{shelf.PARTIAL}` removes it"):
        supply.ensure(request, out=tmp_path / "anew")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(TypeError):  # there is room: the work begins
        supply.ensure(request)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is quantised while it is loaded, and it is said; asked for alone, the store is an error."""
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "file" / "cache"))
    notes: list[str] = []
    made = opened(
        model(tmp_path / "m"), compute_dtype="bf16", tell=supply.Tell(note=lambda _, text: notes.append(text))
    )
    assert "cannot be written" in made.origin and notes[0].startswith(
        "no store, the base is quantised while it is loaded"
    )
    with pytest.raises(StoreError, match=r"(?s)no store can be built in .*cannot be written.*fix: name a folder"):
        supply.ensure(wanted(tmp_path / "m"))
    assert supply.verify(supply.ensure(wanted(tmp_path / "m"), out=tmp_path / "out")).parameters > 0


def test_a_store_in_a_cache_that_can_only_be_read_opens(tmp_path: Path, cache: Path) -> None:
    folder = supply.ensure(wanted(model(tmp_path / "m")))
    shelf._in_use.clear()
    shutil.rmtree(cache / "bases" / shelf.LOCKS)
    (cache / "bases" / shelf.LOCKS).write_text("no lock can be had")
    assert opened(tmp_path / "m", compute_dtype="bf16").origin == f"store {folder}"


def bad_weight(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = next(n for n in sorted(tensors) if "proj" in n)
    tensors[name].view(-1)[7] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})


def cut_shard(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size - 1000)


def no_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (bad_weight, r"proj\.weight holds inf at \(0, 7\)"),
        (cut_shard, r"model-00002-of-\d+\.safetensors"),
        (no_shard, r"model-00002-of-\d+\.safetensors"),
    ],
)
def test_a_source_that_is_not_whole_makes_no_store(
    damage: Callable[[Path], None], said: str, tmp_path: Path, cache: Path
) -> None:
    damage(model(tmp_path / "m"))
    with pytest.raises(HalfbyteError, match=said):
        opened(tmp_path / "m", compute_dtype="bf16")
    names = left_over(cache) if (cache / "bases").is_dir() else []
    assert [name for name in names if not name.endswith(".partial")] == []


@pytest.mark.parametrize("how", ["longer", "shorter"])
def test_a_source_that_changes_while_it_is_read_makes_no_store(
    how: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = wanted(model(tmp_path / "m"))
    path = sorted((tmp_path / "m").glob("*.safetensors"))[-1]
    add, done = build._Journal.add, []

    def meddling(self: Any, *args: Any) -> None:
        if not done:
            done.append(1)
            size = path.stat().st_size
            os.truncate(path, size + 8 if how == "longer" else size - 20_000)
        add(self, *args)

    monkeypatch.setattr(build._Journal, "add", meddling)
    monkeypatch.setattr(store_build, "EXTRA_THREADS", 0)
    with pytest.raises(
        StoreError, match="was changed while it was read" if how == "longer" else "cut short|was changed"
    ):
        supply.ensure(shelf.StoreSpec(**{**vars(request), "cores": 1}))
    assert [name for name in left_over(cache) if not name.endswith(".partial")] == []
