"""Steps on more cores, by hand: a machine whose products scale whole, whose memory does not, and whose threads wait."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from halfbyte.plan import scaling
from halfbyte.plan.estimate import plan_model
from halfbyte.plan.scaling import Measured, Scaling, expect, over_nodes, step_on
from halfbyte.recipe.file import recipe_from
from halfbyte.system import device
from halfbyte.system.topology import Core, Topology

# Products scale whole; of two threads memory is 1.5 times as fast: by Amdahl a third of it does not scale, so 3 is all.
TWO = Scaling((Measured(1, 100e9, 10e9, 0.0), Measured(2, 200e9, 15e9, 2e-6)))
PARTS = {"overhead": 0.5, "matrix products": 4.0, "elementwise": 1.5}  # with two threads


def test_rates_between_and_beyond_what_was_measured() -> None:
    four = Scaling((*TWO.rows, Measured(4, 300e9, 20e9, 5e-6)))
    assert [four.rate("products", n) for n in (1, 2, 3, 4)] == [100e9, 200e9, 250e9, 300e9]
    # 300 of 400: s = (4/3 - 1) / 3 = 1/9, so 8 have 1 / (1/9 + 8/9/8) = 4.5
    assert four.rate("products", 8) == pytest.approx(450e9)
    assert TWO.rate("products", 64) == pytest.approx(6.4e12)
    assert TWO.rate("memory", 4) == pytest.approx(20e9) and TWO.rate("memory", 1e9) == pytest.approx(30e9, rel=1e-6)
    assert (four.barrier_s(2), four.barrier_s(3), four.barrier_s(16)) == (2e-6, pytest.approx(3.5e-6), 20e-6)
    assert Scaling(TWO.rows[:1]).rate("memory", 8) == 80e9  # of one thread nothing is known to stay


def test_what_python_does_stays_and_the_rest_goes_as_its_rate() -> None:
    assert step_on(PARTS, TWO, 2, 2, 1000) == {**PARTS, "waiting": 0.0}
    one = step_on(PARTS, TWO, 2, 1, 1000)
    assert one == pytest.approx({"overhead": 0.5, "matrix products": 8.0, "elementwise": 2.25, "waiting": 0.0})
    eight = step_on(PARTS, TWO, 2, 8, 1000)
    # memory with 8: 1 / (1/3 + 2/3/8) = 2.4 times that of one; a barrier 8 us, 6 more than with two
    assert eight == pytest.approx(
        {"overhead": 0.5, "matrix products": 1.0, "elementwise": 2.25 / 2.4, "waiting": 1000 * 6e-6}
    )


def test_speed_on_more_cores_and_what_limits_it() -> None:
    seen = {each.cores: each for each in expect(PARTS, TWO, 2, 0, 48)}
    assert list(seen) == [1, 2, 4, 8, 16, 32, 48, 64]
    assert seen[1].speed_up == 1 and seen[1].limit == ""
    assert seen[2].step_s == pytest.approx(6.0) and seen[2].speed_up == pytest.approx(10.75 / 6)
    assert [each.speed_up for each in seen.values()] == sorted(each.speed_up for each in seen.values())
    # on 64: Python 0.5 - 0.5/64 more than its share, memory 2.25 x (1/2.909 - 1/64)
    assert seen[64].limit == "elementwise"
    assert expect({**PARTS, "overhead": 5.0}, TWO, 2, 0, 2)[-1].limit == "overhead"
    assert expect(PARTS, TWO, 2, 1e6, 2)[-1].limit == "waiting"
    assert expect(PARTS, TWO, 2, 1e6, 2)[-1].speed_up < 1  # more threads would only wait


def lying(nodes: int, cores: int, far: float) -> Topology:
    return Topology(tuple(Core((n,), n * nodes // cores) for n in range(cores)), far)


def choice(
    *, micro_batches: int, trainable: int = 0, far: float = 3.0, parts: dict[str, float] = PARTS
) -> tuple[float, float]:
    """Seconds of one process over all of four nodes, and of one on each."""
    linear = Scaling((Measured(1, 1e9, 1e9, 0.0), Measured(2, 2e9, 2e9, 0.0)))
    seen = over_nodes(parts, linear, 2, 0, lying(4, 16, far), micro_batches=micro_batches, trainable=trainable)
    assert seen is not None and seen[0] == 4
    return seen[1:]


def test_one_process_over_all_nodes_reaches_far_and_several_share_the_micro_batches() -> None:
    """16 cores beside two: an eighth of products 0.5; of memory 0.1875, in one process (1 + 3 x 3) / 4 = 2.5 times."""
    whole = choice(micro_batches=8)
    assert whole[0] == pytest.approx(0.5 + 0.5 + 0.1875 * 2.5)
    # each of four makes two of eight micro-batches with four cores: Python's quarter, and the same of all else
    assert whole[1] == pytest.approx(0.125 + 0.5 + 0.1875)
    single = choice(micro_batches=1)  # which each makes a part of, with all of Python's time
    assert single[1] == pytest.approx(0.5 + 0.5 + 0.1875)
    # 2 x 3/4 x 4 bytes of each trained number, at 4 GB/s
    assert choice(micro_batches=8, trainable=10**9)[1] - whole[1] == pytest.approx(6e9 / 4e9)


def test_where_one_process_is_as_good_nothing_else_is_said_to_be() -> None:
    near = choice(micro_batches=1, far=1.0, trainable=10**6)
    assert near[0] < near[1]
    assert over_nodes(PARTS, TWO, 2, 0, lying(1, 16, 1.0), micro_batches=8, trainable=0) is None


def test_what_was_measured_is_kept_for_the_same_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    here = device.Device("cpu", ("avx2",), 2, 1, 1, cpu="X")
    scaling.keep(here, "fp32", TWO)
    assert scaling.cached(here, "fp32") == TWO
    assert scaling.cached(here, "bf16") is None and scaling.cached(replace(here, cpu="Y"), "fp32") is None
    (file,) = (tmp_path / "calibration").glob("*.scaling.json")
    file.write_text(file.read_text().replace("15000000000.0", "16000000000.0"))
    assert scaling.cached(here, "fp32") is None


def test_a_measurement_has_each_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("halfbyte.plan.calibrate.SECONDS_EACH", 0.0)
    monkeypatch.setattr(scaling, "threads", lambda machine: 3)
    seen = scaling.measure(device.detect(), "fp32")
    assert [row.threads for row in seen.rows] == [1, 2, 3] and torch.get_num_threads() == before
    assert all(row.products > 1e8 and row.memory > 1e8 and 0 <= row.barrier_s < 1 for row in seen.rows)


def test_a_plan_says_what_more_cores_bring_once_this_machine_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    planned = plan_model(recipe_from("tinyllama-1.1b", "rows.jsonl", []), length=256)
    here = replace(planned.device, kind="cpu", cards=())
    assert scaling.of_plan(planned.plan, planned.job, here) is None
    scaling.keep(here, planned.plan.compute_dtype, TWO)
    seen = scaling.of_plan(planned.plan, planned.job, here, lying(4, 32, 2.0))
    assert seen is not None and seen.measured == 2 and seen.nodes is not None
    assert [each.cores for each in seen.steps] == [1, 2, 4, 8, 16, 32, 64]
    now = min(seen.steps, key=lambda each: abs(each.cores - scaling.threads(here)))
    assert now.step_s == pytest.approx(sum(planned.plan.time.parts.values()), rel=0.05)
