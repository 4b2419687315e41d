"""Mutated files: rows or halfbyte's own errors, in time, and none lost (`benchmarks/fuzz_reader.py` has 100,000)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks import fuzz_reader

from halfbyte.data.reading import read, records


@pytest.mark.parametrize("count", [1500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutated_files_are_read_or_refused(count: int, tmp_path: Path) -> None:
    outcomes, failed, _ = fuzz_reader.fuzz(count, 0, tmp_path)
    assert failed == []
    assert outcomes.total() == count and min(outcomes[name] for name in ("rows", "reported", "refused")) > count / 50


def loses_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    real = records._lines
    monkeypatch.setattr(records, "_lines", lambda source: (line for line in real(source) if line[0] != 2))


def says_nothing_of_a_bad_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read.Problems, "add", lambda self, text: None)


def hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_reader, "LIMIT_S", 0.05)
    monkeypatch.setattr(records, "parse", lambda raw: time.sleep(60))


def breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "parse", lambda raw: {}[0])


@pytest.mark.parametrize("harm", [loses_a_row, says_nothing_of_a_bad_row, hangs, breaks])
def test_what_is_looked_for_would_be_found(harm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harm(monkeypatch)
    _, failed, _ = fuzz_reader.fuzz(20, 0, tmp_path)
    assert failed
