"""A shelf of its own for a test."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """halfbyte's cache folder, empty, for this test alone; stores lie in `bases/` below it."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HALFBYTE_CACHE", str(folder))
    return folder
