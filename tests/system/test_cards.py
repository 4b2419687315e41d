"""cards.py: what torch sees is used, what it does not see is named. A stand-in for torch is what the child imports."""

from __future__ import annotations

import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

from halfbyte.system import cards, device
from halfbyte.system.cards import Card, choose, find

GIB = 2**30
TORCH = """
import json, os
from types import SimpleNamespace as _N
_SEEN = json.loads(%r)
version = _N(hip=_SEEN.get("hip"))
class _Cuda:
    def is_available(self): return bool(self._list())
    def is_initialized(self): return False
    def device_count(self): return len(self._list())
    def _list(self):
        seen, visible = _SEEN["cards"], os.environ.get("CUDA_VISIBLE_DEVICES")
        return seen if visible is None else [seen[int(n)] for n in visible.split(",") if n.isdigit()]
    def get_device_properties(self, n):
        return _N(**{k: v for k, v in self._list()[n].items() if k != "free"})
    def mem_get_info(self, n):
        if self._list()[n]["free"] is None: raise RuntimeError("out of memory")
        return self._list()[n]["free"], self._list()[n]["total_memory"]
    def init(self): raise RuntimeError(_SEEN.get("error", "No CUDA GPUs are available"))
cuda = _Cuda()
"""


def card(name: str, gib: float, free: float | None, major: int, minor: int = 0, **more: Any) -> dict[str, Any]:
    room = None if free is None else int(free * GIB)
    return {"name": name, "total_memory": int(gib * GIB), "free": room, "major": major, "minor": minor, **more}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with device files of a card, whose torch says what it is told to."""

    def made(
        *seen: dict[str, Any], build: str = "cuda", visible: str | None = None, **more: Any
    ) -> cards.AvailableCards:
        folder = tmp_path / "site" / "torch"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "__init__.py").write_text(TORCH % json.dumps({"cards": seen, **more}))
        (tmp_path / "dev").mkdir(exist_ok=True)
        (tmp_path / "dev" / "nvidia0").touch()
        monkeypatch.setattr(cards, "torch_build", lambda: build)
        env = {"PYTHONPATH": str(folder.parent)} | ({"CUDA_VISIBLE_DEVICES": visible} if visible is not None else {})
        return find(tmp_path, env, 100 * GIB)

    return made


def pci(root: Path, vendor: str, address: str = "0000:01:00.0", kind: str = "0x030000") -> None:
    folder = root / "sys/bus/pci/devices" / address
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "class").write_text(f"{kind}\n")


def test_a_gb10_whose_driver_tells_no_memory_is_used(machine: Any) -> None:
    """nvidia-smi says [N/A] of memory that is the machine's own; torch knows it, and what of it is free is RAM's."""
    found = machine(card("NVIDIA GB10", 119, 3, 12, 1, is_integrated=True))
    assert [c.name for c in found.cards] == ["NVIDIA GB10"]
    assert (found.kind, found.cards[0].shares_ram, found.cards[0].free_bytes) == ("cuda", True, 100 * GIB)


def test_a_jetson_is_used(machine: Any) -> None:
    found = machine(card("Orin", 62, 40, 8, 7, is_integrated=True))
    assert found.cards[0].multiplies_bf16
    assert found.cards[0].capability == (8, 7)


def test_a_mig_instance_is_used(machine: Any) -> None:
    """Its name in CUDA_VISIBLE_DEVICES is on no list of the driver's; torch sees one card."""
    found = machine(card("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.75, 9.5, 9))
    assert [c.total_bytes for c in found.cards] == [int(9.75 * GIB)]


def test_the_order_of_cards_is_torchs(machine: Any) -> None:
    """The driver lists by PCI address: a T4 first. For CUDA, 0 is the fastest, and so it is for torch."""
    found = machine(card("NVIDIA RTX 4090", 24, 23, 8, 9), card("Tesla T4", 15, 14, 7, 5), visible="0")
    assert [c.name for c in found.cards] == ["NVIDIA RTX 4090"]


def test_of_mixed_cards_those_of_one_dtype_are_used(machine: Any) -> None:
    found = machine(card("Tesla T4", 15, 14.5, 7, 5), card("NVIDIA RTX 4090", 24, 23, 8, 9))
    assert [(c.name, c.index) for c in found.cards] == [("NVIDIA RTX 4090", 1)]
    (note,) = found.notes
    assert note == (
        "card 0 (Tesla T4) is not used: it has no bf16 multiply and card 1 (NVIDIA RTX 4090) has. "
        "CUDA_VISIBLE_DEVICES=0 uses it alone"
    )


def test_a_busy_card_comes_last(machine: Any) -> None:
    found = machine(card("A100", 40, 1, 8), card("A100", 40, 39, 8))
    assert [c.index for c in found.cards] == [1, 0]
    assert "card 1 (A100) comes first: it has 41.9 GB free, card 0 1.1" in found.notes[0]
    full = machine(card("A100", 40, None, 8), card("A100", 40, 39, 8))  # not even a context fits
    assert [(c.index, c.free_bytes > 0) for c in full.cards] == [(1, True), (0, False)]


def test_equal_cards_stay_in_their_order() -> None:
    two = tuple(Card("A100", 40 * GIB, (39 - n % 2) * GIB, (8, 0), index=n) for n in range(3))
    assert choose(two) == (two, ())


def test_cards_of_amd_are_used_where_torch_is_built_for_them(machine: Any) -> None:
    found = machine(card("AMD Instinct MI250X", 64, 63, 9), build="rocm", hip="6.4")
    assert found.kind == "cuda"
    assert found.cards[0].multiplies_bf16
    seen = device.Device("cuda", (), 2, GIB, GIB, found.cards)
    assert device.compute_dtype(seen) == ("bf16", "auto: AMD Instinct MI250X multiplies it")


def test_a_card_that_torch_does_not_see_is_named(machine: Any, tmp_path: Path) -> None:
    pci(tmp_path, "0x10de")
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information").write_text("Model: \t\t NVIDIA L4\nIRQ: 1\n")
    found = machine(error="The NVIDIA driver on your system is too old (found version 11040).")
    assert (found.kind, found.cards) == ("cpu", ())
    (note,) = found.notes
    assert note == (
        "NVIDIA L4 is seen and not used: torch, a build for cuda, does not use it: The NVIDIA driver on your system is "
        "too old (found version 11040)."
    )
    (note,) = machine(build="").notes
    assert note.startswith(
        "NVIDIA L4 is seen and not used: the installed torch is a build for CPUs; https://pytorch.org"
    )
    assert machine(build="", visible="").notes == ()  # hidden on purpose


@pytest.mark.parametrize(("vendor", "maker"), [("0x1002", "AMD"), ("0x8086", "Intel")])
def test_cards_of_other_makers_are_seen_and_named(tmp_path: Path, monkeypatch: Any, vendor: str, maker: str) -> None:
    pci(tmp_path, vendor, "0000:03:00.0")
    pci(tmp_path, "0x8086", "0000:00:02.0")  # in every laptop: a part of the processor
    pci(tmp_path, "0x1af4", "0000:00:03.0")  # a virtual machine's
    monkeypatch.setattr(cards, "torch_build", lambda: "cuda")
    (note,) = find(tmp_path, {}, GIB).notes
    assert note.startswith(f"a card of {maker} is seen and not used: the installed torch is a build for cuda; ")


def test_a_torch_that_crashes_when_it_is_asked_costs_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "site/torch").mkdir(parents=True)
    (tmp_path / "site/torch/__init__.py").write_text("raise SystemExit('libcudart.so.13: not found')")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    pci(tmp_path, "0x10de")
    monkeypatch.setattr(cards, "torch_build", lambda: "cuda")
    (note,) = find(tmp_path, {"PYTHONPATH": str(tmp_path / "site")}, GIB).notes
    assert note.endswith("libcudart.so.13: not found")


def test_without_a_device_file_torch_is_not_asked(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(cards, "torch_build", lambda: "cuda")
    monkeypatch.setattr(cards, "_asked", lambda env: pytest.fail("asked"))
    assert find(tmp_path, {}, GIB) == cards.AvailableCards()


def test_torchs_build_is_read_without_importing_it() -> None:
    import torch

    wanted = "rocm" if torch.version.hip else "cuda" if torch.version.cuda else ""
    assert cards.torch_build() == wanted


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ("cuda: str | None = None\nhip: str | None = None", ""),
        ("cuda = '13.0'\nhip = None", "cuda"),
        ("cuda: str | None = None\nhip: str | None = '7.0'", "rocm"),
        ("cuda = None\nxpu: str | None = '20250302'", "xpu"),
    ],
)
def test_a_build_of_torch_for_cards_is_told_by_its_version_file(
    lines: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{lines}\n")
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    cards.torch_build.cache_clear()
    assert cards.torch_build() == wanted
    cards.torch_build.cache_clear()
