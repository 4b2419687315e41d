"""versions.py: what is installed is named without being imported."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from halfbyte.system.versions import outside_ranges, torch_has_cards, version, versions
from tests.oldest import PYPROJECT, oldest


def test_versions_name_what_is_installed_without_importing_it() -> None:
    code = (
        "import sys; from halfbyte.system.versions import versions; print(versions()['torch'], 'torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    installed = versions()
    assert out == [installed["torch"], "False"]
    assert {"python", "halfbyte", "transformers", "peft", "bitsandbytes"} <= set(installed)
    assert all(installed.values())
    assert version("no-such-library") == ""


def test_a_version_outside_the_ranges_of_pyproject_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["peft<0.22,>=0.21", "torch>=2.9", "trl>=9; extra == 'x'"])
    installed = {"peft": "0.21.0", "torch": "2.9.0+cpu", "trl": "1.0"}
    monkeypatch.setattr(metadata, "version", installed.__getitem__)
    assert outside_ranges() == {}
    installed |= {"peft": "0.22.0", "torch": "2.8.1"}
    assert outside_ranges() == {"peft<0.22,>=0.21": "0.22.0", "torch>=2.9": "2.8.1"}


def test_the_oldest_versions_are_the_lower_bounds_of_pyproject() -> None:
    wanted = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    assert len(oldest(wanted)) == len(wanted)
    assert oldest(["torch>=2.9", "peft>=0.21,<0.22", "prompt_toolkit>=3.0.50,<4"]) == [
        *("torch==2.9", "peft==0.21", "prompt_toolkit==3.0.50"),
    ]
    for no_bound in ("torch", "torch<3", "torch>=2.9.*", "torch<3,>=2.9"):
        with pytest.raises(ValueError, match="write it as name>=version"):
            oldest([no_bound])


def test_a_build_of_torch_for_cards_is_told_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_has_cards.cache_clear()
    assert torch_has_cards() == (torch.version.cuda is not None or torch.version.hip is not None)
    (tmp_path / "lib").mkdir()
    spec = ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    for file, for_cards in (("libtorch_cpu.so", False), ("libtorch_hip.so", True)):
        (tmp_path / "lib" / file).touch()
        torch_has_cards.cache_clear()
        assert torch_has_cards() is for_cards
    torch_has_cards.cache_clear()
