"""`halfbyte doctor`: the machine, and proofs on a model; a proof that fails is told and ends with 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import doctor
from halfbyte.plan import Rates, calibrate
from halfbyte.system import device, pages
from tests import tiny_run
from tests.in_process import Cli, runner

RATES = Rates(380e9, 20e9, 8e9, 150e9, 1.5e9, "measured for this test")


@pytest.fixture
def halfbyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calibrate, "measure", lambda *args, **kwargs: RATES)
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    tiny_run.checkpoint(tmp_path / "model")
    return runner(tmp_path, capsys)


def test_the_machine_alone(halfbyte: Cli) -> None:
    ended = halfbyte("doctor")
    assert (ended.code, ended.err) == (0, "calibrating this machine (a few seconds)\n")
    for word in (
        "processor",
        "memory",
        "platform  Linux, ",
        "executed: ",
        "cache",
        ", waiting: ",
        "computes",
        "380 GFLOP/s in matrix products (none in int8)",
        "versions  python",
    ):
        assert word in ended.out
    assert "model" not in ended.out


@pytest.mark.skipif(not pages.supported(), reason="needs Linux and /proc/self/pagemap")
def test_every_claim_is_proven_on_a_model(halfbyte: Cli) -> None:
    ended = halfbyte("doctor", "model", "--set", "quant.compute_dtype=fp32")
    assert ended.code == 0, ended.out
    assert ended.out.count("\nok      ") == 5
    assert "mapped, streamed and resident are equal to the bit" in ended.out
    report = json.loads(halfbyte("doctor", "model", "--set", "quant.compute_dtype=fp32", "--json").out)
    assert report["ok"] and report["layers"] == 2 and len(report["checks"]) == 5
    assert report["rates"]["matmul_flops"] == 380e9


@pytest.mark.skipif(not pages.supported(), reason="needs Linux and /proc/self/pagemap")
def test_a_claim_that_does_not_hold_is_told(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = doctor.sample_gradients, []

    def off(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        result = real(*args, **kwargs)
        return {n: g + 1e-6 for n, g in result.items()} if len(calls) == 2 else result

    monkeypatch.setattr(doctor, "sample_gradients", off)
    ended = halfbyte("doctor", "model", "--set", "quant.compute_dtype=fp32")
    assert ended.code == 1
    assert "FAILED  the same gradients wherever the base lies: streamed differs from mapped" in ended.out


def test_it_measures_anew_and_keeps_what_it_found_for_plans(halfbyte: Cli) -> None:
    machine = device.detect()
    dtype = device.compute_dtype(machine, "auto")[0]
    assert calibrate.cached(machine, dtype) is None
    halfbyte("doctor")
    assert calibrate.cached(machine, dtype) == RATES
    path = calibrate.path_of(machine, dtype)
    path.write_text(path.read_text().replace("380000000000.0", "1.0"))
    assert "380 GFLOP/s" in halfbyte("doctor").out and calibrate.cached(machine, dtype) == RATES


def test_a_model_that_is_not_there_is_one_message(halfbyte: Cli) -> None:
    ended = halfbyte("doctor", "no/such/folder")
    assert ended.code == 2 and "error: " in ended.err and "Traceback" not in ended.err


def test_a_cache_that_cannot_be_written_is_seen(halfbyte: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where a folder is needed stops a superuser too."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "file" / "cache"))
    ended = halfbyte("doctor")
    assert ended.code == 1 and "the cache cannot be written (TMP/file: Not a directory)" in " ".join(ended.err.split())
    assert "export HALFBYTE_CACHE" in ended.err


def test_a_version_that_the_tests_do_not_cover_is_told(halfbyte: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "outside_ranges", lambda: {"peft<0.22,>=0.21": "0.20.0"})
    ended = halfbyte("doctor")
    assert ended.code == 1 and "0.20.0 is installed, and the tests cover peft<0.22,>=0.21" in ended.err
    assert "fix: pip install 'peft<0.22,>=0.21'" in ended.err


def test_what_the_installed_versions_lack_is_listed_and_is_no_failure(
    halfbyte: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "lacking", lambda: {"peft 9 has no layer": "it runs slowly"})
    ended = halfbyte("doctor")
    assert ended.code == 0 and "without   peft 9 has no layer: it runs slowly\n" in ended.out
    assert json.loads(halfbyte("doctor", "--json").out)["lacking"] == {"peft 9 has no layer": "it runs slowly"}
