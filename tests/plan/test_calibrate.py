"""Rates of a machine: measured, kept under what they depend on, and never trusted when the file is not whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfbyte.plan import Rates, calibrate
from halfbyte.system import device

RATES = Rates(1e9, 2e9, 3e9, 4e9, 5e9, "measured for this test")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    return tmp_path


def test_every_rate_is_measured(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(calibrate, "SECONDS_EACH", 0.01)
    monkeypatch.setattr(calibrate, "FILE_BYTES", 32_000_000)
    monkeypatch.setattr(calibrate, "MEMORY_BYTES", 1_000_000)
    for dtype in ("fp32", "bf16"):
        found = calibrate.measure(device.detect(), dtype)
        for name, value in found.to_json().items():
            if isinstance(value, float):
                assert 1e6 < value < 1e15, name
        assert dtype in found.source and found.measured
    assert not list(cache.iterdir()), "the file that was read is gone"


def test_they_are_measured_once_for_each_machine_dtype_and_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def measure(machine: Any, dtype: str) -> Rates:
        calls.append(dtype)
        return RATES

    monkeypatch.setattr(calibrate, "measure", measure)
    here, said = device.detect(), list[str]()
    assert calibrate.cached(here, "bf16") is None
    for _ in range(2):
        assert calibrate.ensure(here, "bf16", say=said.append) == RATES
    assert (calls, len(said)) == (["bf16"], 1)
    calibrate.ensure(here, "fp32")
    calibrate.ensure(replace(here, cpu="another"), "bf16")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    calibrate.ensure(here, "bf16")
    calibrate.ensure(here, "bf16", anew=True)
    assert calls == ["bf16", "fp32", "bf16", "bf16", "bf16"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"matmul_flops": 1.0}'])
def test_a_file_that_is_not_whole_is_none(text: str) -> None:
    path = calibrate.path_of(device.detect(), "bf16")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert calibrate.cached(device.detect(), "bf16") is None


def test_a_cache_that_cannot_be_written_costs_only_time(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("HALFBYTE_CACHE", str(cache / "file"))
    monkeypatch.setattr(calibrate, "measure", lambda *args: RATES)
    assert calibrate.ensure(device.detect(), "bf16") == RATES
