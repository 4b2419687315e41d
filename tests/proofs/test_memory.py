"""Proofs that are remembered: believed while all is as it was, and made again where anything has changed, so that a
fault that is put in after a remembered proof is seen."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from halfbyte import finetune
from halfbyte.base.store import supply
from halfbyte.inference import load, target
from halfbyte.layers import fuse
from halfbyte.proofs.memory import MOST, Proofs, RememberedProofs
from halfbyte.proofs.setting import StartProof
from halfbyte.system import libraries
from halfbyte.training.events import Listener
from tests import tiny_run

Patch = pytest.MonkeyPatch
GOOD = StartProof(True, "packed = alone", 1.5e-7, "cu_seq_lens")
CPU = "processor\t: 0\nflags\t\t: avx2 avx512f{}\ncpu MHz\t\t: {}\n\nprocessor\t: 1\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "proofs"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"one")
    return folder


def memory(adapter: Path, threads: int = 2, **how: Any) -> RememberedProofs:
    return RememberedProofs.of({"base": "m", "r": 8}, {"adapter": adapter}, threads, **how)


def another_version(patch: Patch, adapter: Path) -> None:
    real = libraries.version
    patch.setattr(libraries, "version", lambda name: "99.1" if name == "peft" else real(name))


def another_flag(patch: Patch, adapter: Path, flags: str = " avx512_bf16", mhz: int = 2400) -> None:
    (adapter.parent / "proc").mkdir(exist_ok=True)
    (adapter.parent / "proc" / "cpuinfo").write_text(CPU.format(flags, mhz))
    real = libraries.surroundings
    patch.setattr(libraries, "surroundings", partial(getattr(real, "func", real), root=adapter.parent))


def another_adapter(patch: Patch, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    content, stat = path.read_bytes(), path.stat()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


CHANGES: dict[str, Callable[[Patch, Path], None]] = {
    "peft": another_version, "processor": another_flag, "adapter": another_adapter,
}  # fmt: skip


def test_a_proof_that_succeeded_is_remembered_and_one_that_failed_ends_belief(adapter: Path) -> None:
    first = memory(adapter)
    assert first.recall("packing") is None and first.keep("packing", GOOD) == GOOD
    again = memory(adapter)
    known = again.recall("packing")
    assert known is not None and again.changed == () and again.recall("fused") is None
    assert (known.ok, known.difference, known.layout) == (True, 1.5e-7, "cu_seq_lens") and "before" in known.reason
    assert RememberedProofs.of({"base": "m", "r": 9}, {"adapter": adapter}, 2).recall("packing") is None
    again.keep("of rows", StartProof(False, "losses differ", 0.3))
    assert memory(adapter).recall("packing") is not None and memory(adapter).recall("of rows") is None
    again.keep("fused", StartProof(False, "gradients differ", 0.3))
    assert memory(adapter).recall("packing") is None


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_is_named_and_nothing_is_recalled(what: str, adapter: Path, monkeypatch: Patch) -> None:
    another_flag(monkeypatch, adapter, "")
    memory(adapter).keep("packing", GOOD)
    another_flag(monkeypatch, adapter, "", mhz=3100)  # which changes from moment to moment
    assert memory(adapter).recall("packing") is not None
    CHANGES[what](monkeypatch, adapter)
    seen = memory(adapter)
    assert seen.changed == (what,) and seen.recall("packing") is None


def test_threads_variables_and_code_count_too(adapter: Path, monkeypatch: Patch) -> None:
    memory(adapter).keep("packing", GOOD)
    assert memory(adapter, threads=3).changed == ("threads",)
    monkeypatch.setenv("HALFBYTE_KERNELS", "0")
    assert memory(adapter).changed == ("variables",)
    monkeypatch.delenv("HALFBYTE_KERNELS")
    monkeypatch.setattr(libraries, "__file__", str(adapter.parent / "system" / "libraries.py"))
    assert memory(adapter).changed == ("halfbyte's code",)


@pytest.mark.parametrize("damage", ["", "{}", "[1]", '{"made_with": {}, "proofs": {"packing": {}}}', "other proof"])
def test_a_file_that_is_not_as_it_was_written_is_no_proof(damage: str, adapter: Path, cache: Path) -> None:
    memory(adapter).keep("packing", GOOD)
    (file,) = cache.iterdir()
    file.write_text(damage if damage != "other proof" else file.read_text().replace("packed = alone", "packed"))
    assert memory(adapter).recall("packing") is None


def test_prove_recalls_nothing_and_a_cache_that_cannot_be_written_is_no_fault(
    adapter: Path, cache: Path, monkeypatch: Patch
) -> None:
    memory(adapter).keep("packing", GOOD)
    assert memory(adapter, prove=True).recall("packing") is None
    monkeypatch.setenv("HALFBYTE_CACHE", str(adapter / "adapter_model.safetensors"))
    assert memory(adapter).keep("packing", GOOD) == GOOD and memory(adapter).recall("packing") is None
    assert RememberedProofs().keep("packing", GOOD) == GOOD


def test_the_oldest_files_go(adapter: Path, cache: Path) -> None:
    for number in range(MOST + 3):
        RememberedProofs.of({"base": number}, {"adapter": adapter}, 2).keep("packing", GOOD)
        newest = max(cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (number, number))
    assert len(list(cache.iterdir())) == MOST
    assert RememberedProofs.of({"base": 0}, {"adapter": adapter}, 2).recall("packing") is None
    assert RememberedProofs.of({"base": MOST + 2}, {"adapter": adapter}, 2).recall("packing") is not None


class Notes(Listener):
    def __init__(self) -> None:
        self.lines = dict[str, str]()

    def note(self, label: str, text: str) -> None:
        self.lines[label] = text


def trained(folder: Path, name: str, proofs: Proofs = "remembered") -> tuple[dict[str, str], Any]:
    """What a run has said, and its report."""
    listener = Notes()
    outcome = finetune.train(tiny_run.recipe(folder, output=str(folder / name)), listener=listener, proofs=proofs)
    return listener.lines, outcome.report


def wrong_lora_scale(patch: Patch) -> None:
    real = fuse.lora_linear
    patch.setattr(fuse, "lora_linear", lambda x, layer, a, b, scale, p: real(x, layer, a, b, scale * 1.05, p))


def test_a_second_training_believes_and_learns_the_same(tmp_path: Path) -> None:
    first, one = trained(tmp_path, "a")
    second, two = trained(tmp_path, "b")
    assert "proven before" not in str(first) and "proofs" not in {*first, *second}
    assert "proven before" in second["packing"] and "proven before" in second["engine"]
    assert one["loss"] == two["loss"]
    assert "proven before" not in str(trained(tmp_path, "c", "again")[0])
    assert "proven before" not in str(trained(tmp_path, "d", "every")[0])


@pytest.mark.parametrize("what", ["peft", "processor"])
def test_a_fault_after_a_remembered_proof_is_seen_once_anything_has_changed(
    what: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    (tmp_path / "adapter").mkdir()
    another_flag(monkeypatch, tmp_path / "adapter", "")
    trained(tmp_path, "a")
    CHANGES[what](monkeypatch, tmp_path / "adapter")
    wrong_lora_scale(monkeypatch)
    said, report = trained(tmp_path, "b")
    assert said["proofs"] == f"made again, since this has changed: {what}"
    assert "gradients differ" in said["engine"] and any("gradients differ" in note for note in report["notices"])


def test_an_adapter_that_has_changed_is_proven_again_where_it_is_used(tmp_path: Path) -> None:
    trained(tmp_path, "run", "every")
    notes = list[tuple[str, str]]()
    tell = supply.Tell(note=lambda label, text: notes.append((label, text)))
    opens = partial(load.open_target, target.find(tmp_path / "run"), tell, proofs="remembered")
    opens()
    opens()
    assert not [text for label, text in notes if label == "proofs"]
    another_adapter(pytest.MonkeyPatch(), tmp_path / "run" / "adapter")
    (tmp_path / "run" / "adapter" / "halfbyte.json").unlink()  # which would refuse it
    opens()
    assert ("proofs", "made again, since this has changed: adapter") in notes
