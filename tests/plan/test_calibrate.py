"""Rates of a machine: measured, kept under what they depend on, and never trusted when the file is not whole."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte.layers.kernels.cpu import matmul
from halfbyte.layers.kernels.cpu.integer import products as integer
from halfbyte.plan import Rates, Rows, Time, calibrate, plan_training
from halfbyte.system import device
from tests import fake_card
from tests.plan.test_choose import cpu, job

RATES = Rates(1e9, 2e9, 3e9, 4e9, 5e9, "measured for this test")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    return tmp_path


def test_every_rate_is_measured(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(calibrate, "SECONDS_EACH", 0.01)
    monkeypatch.setattr(calibrate, "FILE_BYTES", 32_000_000)
    monkeypatch.setattr(calibrate, "MEMORY_BYTES", 1_000_000)
    here, multiply, products = device.detect(), matmul.into, list[torch.dtype]()

    def into(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        products.append(a.dtype)
        return multiply(out, a, b)

    monkeypatch.setattr(matmul, "into", into)
    for dtype in ("fp32", "bf16") if device.compute_dtype(here, "auto")[0] == "bf16" else ("fp32",):
        found = calibrate.measure(here, dtype)
        for name, value in asdict(found).items():
            if isinstance(value, float) and name != "correction":
                there = name != "integer_ops" or not integer.why_not()
                assert (1e6 if there else 0) <= value < (1e15 if there else 1), name
        assert dtype in found.source and found.measured and time.strftime("%Y-%m-%d") in found.source
    assert torch.float32 in products, "the engine's own products: in fp32 not torch's, where they are faster"
    assert not list(cache.iterdir()), "the file that was read is gone"


def test_a_try_that_takes_long_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], iter([40.0, 30.0])
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += next(calls)

    assert calibrate.Tries("cpu").best(work) == 30.0


def test_the_best_of_several_tries_is_taken_and_their_spread_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slow = [0.0], iter([9.0, 0.5, 0.4, 0.2, 0.8, 0.4, 0.4])
    monkeypatch.setattr(calibrate.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(calibrate, "SECONDS_EACH", 1.0)
    monkeypatch.setattr(calibrate, "MIN_TRIES", 6)

    def call() -> None:
        now[0] += next(slow)

    tries = calibrate.Tries("cpu")
    assert tries.best(call) == pytest.approx(0.2)  # the first, which compiles, does not count
    assert tries.spread == pytest.approx(0.4 / 0.2)


def test_load_is_seen_by_waiting_by_pressure_and_by_spread() -> None:
    assert (
        calibrate.load_seen(0.01, 1.1) == calibrate.load_seen(None, 1.1) == calibrate.load_seen(None, 1.1, 0.05) == ""
    )
    assert "43%" in calibrate.load_seen(0.43, 1.1)
    assert "99%" in calibrate.load_seen(None, 1.1, 0.99)
    assert calibrate.load_seen(0.01, 1.1, 0.99) == "", "others run, but our threads did not wait"
    assert "3.0 times" in calibrate.load_seen(0.01, 3.0)


def step_s(rates: Rates) -> float:
    device = cpu(64)
    return plan_training(job(device, rows=Rows((500,) * 64)), device, rates).time.step_s


def measured(monkeypatch: pytest.MonkeyPatch, *each: Rates) -> None:
    waiting = iter(each)
    monkeypatch.setattr(calibrate, "measure", lambda machine, dtype: next(waiting))


IDLE = Rates(400e9, 60e9, 11e9, 140e9, 2e9, "calibrated on an idle machine")
BUSY = Rates(180e9, 20e9, 0.1e9, 40e9, 1e9, "calibrated beside two processes", busy="its threads waited")


@pytest.mark.parametrize("anew", [False, True])
def test_a_calibration_beside_two_busy_processes_does_not_change_a_plan_afterwards(
    monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    here, said = cpu(64), list[str]()
    assert step_s(BUSY) > 2 * step_s(IDLE), "kept, it would poison every plan"
    measured(monkeypatch, BUSY, IDLE, BUSY, BUSY)
    assert calibrate.ensure(here, "bf16", say=said.append, anew=anew).busy
    assert "not kept" in said[-1] and calibrate.cached(here, "bf16") is None
    calibrate.ensure(here, "bf16")
    for _ in range(2):  # `doctor` measures anew, and what was kept stays
        calibrate.ensure(here, "bf16", anew=anew)
        kept = calibrate.cached(here, "bf16")
        assert kept is not None and step_s(kept) == pytest.approx(step_s(IDLE), rel=0.15)


def test_finished_runs_correct_what_is_kept_and_no_run_beside_other_load_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load that was not noticed: rates three times too low. Runs that take a third of the planned time put it right."""
    here, device = cpu(64), cpu(64)
    slow = Rates(400e9 / 3, 60e9 / 3, 11e9 / 3, 140e9 / 3, 2e9, "calibrated 2026-01-01: 2 threads, bf16")
    measured(monkeypatch, slow)
    calibrate.ensure(here, "bf16")
    one = job(device, rows=Rows((500,) * 64))

    def planned() -> Time:
        return plan_training(one, device, calibrate.cached(here, "bf16")).time

    truth = step_s(IDLE)
    before, corrections = planned(), []
    for waited in (None, 0.4):
        assert calibrate.correct(here, "bf16", before, truth, waited) is None
    assert calibrate.correct(here, "bf16", replace(before, source="time assumed"), truth, 0.0) is None
    assert calibrate.correct(here, "bf16", replace(before, reading_s=1.0), truth, 0.0) is None
    assert planned() == before
    for _ in range(8):
        rates = calibrate.correct(here, "bf16", planned(), truth, 0.01)
        assert rates is not None
        corrections.append(rates.correction)
    assert corrections[0] == pytest.approx(0.5**0.5), "one run moves it by no more than the root of two"
    assert corrections == sorted(corrections, reverse=True)
    assert planned().step_s == pytest.approx(truth, rel=0.15)
    assert planned().source.count("corrected") == 1 and "calibrated 2026-01-01" in planned().source
    for _ in range(20):
        calibrate.correct(here, "bf16", planned(), 1e6, 0.0)
    assert planned().step_s <= calibrate.CORRECTION_LIMIT * before.step_s * 1.001


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
    monkeypatch.setattr(calibrate, "asked_threads", lambda: (7, "OMP_NUM_THREADS"))
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


@pytest.mark.parametrize("where", ["cpu", f"{fake_card.KIND}:0"])
def test_a_card_is_measured_in_large_pieces_and_waited_for(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, one at a time, would measure how fast the host can ask."""
    waits, ran, sizes = list[int](), list[int](), list[int]()
    monkeypatch.setattr(fake_card._Module, "synchronize", lambda *_: waits.append(len(ran)))
    with fake_card.cards():
        calibrate.Tries(where)._once(lambda: ran.append(1))
        assert (len(ran), waits) == ((1, []) if where == "cpu" else (8, [0, 8]))
        own, randn = torch.ones, torch.randn
        monkeypatch.setattr(torch, "ones", lambda *size, **_: sizes.append(math.prod(size)) or own(1))
        monkeypatch.setattr(torch, "randn", lambda *size, **_: sizes.append(math.prod(size)) or randn(256, 8, 64))
        monkeypatch.setattr("halfbyte.quant.bnb.quantised_linear", lambda weight, at: None)
        monkeypatch.setattr(calibrate.Tries, "best", lambda self, call: 1.0)
        monkeypatch.setattr(calibrate, "_disk_rate", lambda: 1.0)
        with contextlib.suppress(RuntimeError):  # attention of tensors that are not what was asked for
            calibrate._main_rates(calibrate.Tries(where), torch.bfloat16)
    assert (sizes[0], sizes[-1]) == ((2048**2, 1024 * 8 * 64) if where == "cpu" else (8192**2, 8192 * 32 * 128))
