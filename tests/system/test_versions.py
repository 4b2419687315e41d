"""versions.py: what is installed is named without being imported."""

from __future__ import annotations

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from halfbyte.system.versions import torch_has_cards, version, versions


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
