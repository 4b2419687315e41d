"""The rehearsal: what it measures, what it leaves as it was, how it steps down; and when a run goes without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import finetune
from halfbyte.errors import TrainError
from halfbyte.layers.kernels import pool
from halfbyte.layers.kernels.pool import Pool
from halfbyte.objectives.causal_lm import CausalLM
from halfbyte.system.usage import Usage
from halfbyte.training import fit
from halfbyte.training.events import Listener
from halfbyte.training.pace import Pace, rehearse
from tests import tiny_run
from tests.layers.test_fuse import adapted, batch

LENGTHS = (30, 20, 10)


def pace(said: list[str], applied: list[str], *, policies: Any = ("none", "full")) -> Pace:
    return Pace(
        lengths=LENGTHS, tokens=60, examples_per_micro_batch=None, recompute="none", policies=policies,
        need=lambda tokens, recompute: 0, apply=applied.append, tell=said.append, ram_bytes=10**10,
    )  # fmt: skip


def test_it_runs_the_longest_micro_batch_and_leaves_everything_as_it_was() -> None:
    model, ran = adapted("llama").eval(), list[bool]()

    class Seen(CausalLM):
        def loss(self, model: Any, batch: Any) -> Any:
            ran.append(model.training)
            return super().loss(model, batch)

        def text_sums(self, model: Any, batch: Any) -> Any:
            ran.append(model.training)
            return super().text_sums(model, batch)

    state, weights = torch.random.get_rng_state(), {n: p.detach().clone() for n, p in model.named_parameters()}
    asked: list[tuple[int, ...]] = []

    def made(rows: tuple[int, ...]) -> Any:
        asked.append(rows)
        return batch()

    found = rehearse(Seen(), model, pace([], []), (0, 1), made, [batch()])
    assert asked == [(0, 1)] and found.tokens == 50
    assert ran == [True, False], "a micro-batch of training, a batch of an evaluation"
    assert found.memory_before.private > 0 and found.micro_batch_bytes >= 0 and found.seconds > 0
    assert torch.equal(torch.random.get_rng_state(), state) and not model.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, weights[name])


class Failing(CausalLM):
    """Finds no memory for its first micro-batches."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = [None] * times

    def loss(self, model: Any, batch: Any) -> Any:
        if self.left:
            self.left.pop()
            raise torch.OutOfMemoryError("can't allocate memory")
        return super().loss(model, batch)


def test_it_steps_down_until_it_fits_and_tells_where_nothing_does() -> None:
    said: list[str] = []
    applied: list[str] = []
    way = pace(said, applied)
    found = rehearse(Failing(2), adapted("llama"), way, (0, 1, 2), lambda rows: batch())
    assert applied == ["full"] and way.tokens == 30 and found.tokens == 30
    assert "none -> full" in said[0] and "60 -> 30 tokens" in said[1]
    with pytest.raises(TrainError, match="there is no smaller way"):
        rehearse(Failing(99), adapted("llama"), pace([], [], policies=("none",)), (0, 1, 2), lambda rows: batch())


@pytest.mark.parametrize(("share", "rehearsed"), [(0.0, True), (1.0, False)])
def test_a_run_is_rehearsed_unless_its_plan_is_a_small_part_of_free_memory(
    share: float, rehearsed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[tuple[str, str]] = []

    class Notes(Listener):
        def note(self, label: str, text: str) -> None:
            notes.append((label, text))

    monkeypatch.setattr(fit, "UNREHEARSED", share)
    outcome = finetune.train(tiny_run.recipe(tmp_path, train__max_steps=1), listener=Notes())
    (said,) = (text for label, text in notes if label == "rehearsed")
    assert ("the longest micro-batch" in said) == rehearsed and ("nothing" in said) != rehearsed
    lines = {found["name"]: found for found in outcome.report["lines"]}
    assert lines["before a micro-batch, private"]["measured"] > 0, "compared either way"


class Level:
    """In place of what samples this process's memory."""

    def __init__(self, *privates: int) -> None:
        self.left = [Usage(private, 0) for private in privates]

    def take(self) -> Usage:
        return self.left.pop(0)


def limited(said: list[str], applied: list[str], *privates: int, held: int, monkeypatch: pytest.MonkeyPatch) -> Pace:
    way = pace(said, applied)
    way.limit, way.peak = Usage(1_000_000_000, 10**12), Level(*privates)
    way.need = lambda tokens, recompute: 1_000_000 * tokens // (1 if recompute == "none" else 2)
    monkeypatch.setattr("halfbyte.training.pace.usage.now", lambda: Usage(held, 0))
    return way


def test_a_run_that_stays_below_the_upper_figure_keeps_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    applied: list[str] = []
    way = limited(said, applied, 900_000_000, 940_000_000, held=0, monkeypatch=monkeypatch)
    assert way.between([(0, 1, 2)]) == [(0, 1, 2)] == way.between([(0, 1, 2)])[0:1] and not said


def test_a_run_that_comes_near_gives_back_first_and_then_steps_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is free in the process is given back; where that did not help and it still grows, a step down each
    time before it is above the figure."""
    said: list[str] = []
    applied: list[str] = []
    seen = [990_000_000, 990_000_000, 996_000_000, 1_001_000_000, 900_000_000]
    way = limited(said, applied, *seen, held=500_000_000, monkeypatch=monkeypatch)
    assert way.between([(0, 1, 2)]) == [(0, 1, 2)] and not said, "given back"
    assert way.between([(0, 1, 2)]) == [(0, 1, 2)] and not said, "near, and no nearer"
    way.between([(0, 1, 2)])
    assert applied == ["full"] and "1.00 GB were in use, 1.00 are planned at most" in said[0]
    way.between([(0, 1, 2)])
    assert way.tokens == 30 and [sum(LENGTHS[r] for r in rows) for rows in way.between([(0, 1, 2)])] == [30, 30]


def test_blocks_go_before_a_micro_batch_that_is_larger_than_all_before(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Pool()
    monkeypatch.setattr(pool, "POOL", memory)
    run, kept = pace([], []), []
    for waiting in ([(2,)], [(2,)], [(0,), (2,)], [(0,)], [(1,)], [(0, 1)]):
        block = memory.empty((1 << 20,), torch.float32)
        del block
        run.between(waiting)
        kept.append(memory.total_bytes > 0)
    assert kept == [False, True, False, True, True, False]


@pytest.mark.parametrize("released", [False, True])
def test_blocks_stay_where_they_were_made_for_the_longest_micro_batch(
    released: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also near the plan's upper figure: what the longest has added is there already, unless blocks went since, as
    where a run writes answers."""
    memory = Pool()
    monkeypatch.setattr(pool, "POOL", memory)
    way = limited([], [], 900_000_000, 950_000_000, 950_000_000, held=950_000_000, monkeypatch=monkeypatch)
    way.longest, places = 60, set[int]()
    for waiting, tokens in ([(0, 1, 2)], 60), ([(2,)], 10), ([(0, 1, 2)], 60):
        way.between(waiting)
        way.expect(tokens)
        block = memory.empty((tokens, 1 << 14), torch.float32)
        places.add(block.data_ptr())
        del block
        if released and tokens == 60:
            memory.give_back()
    releases = memory.releases
    assert len(places) == 1 or released
    assert releases == (3 if released else 0), "two of the loop's, and one before the long one that comes near"


def test_what_was_measured_before_the_first_step_is_no_micro_batchs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    applied: list[str] = []
    way = limited(said, applied, 990_000_000, 930_000_000, held=930_000_000, monkeypatch=monkeypatch)
    way.begin()
    assert way.between([(0, 1)]) == [(0, 1)] and not said


def test_a_run_steps_down_before_a_micro_batch_that_would_be_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    applied: list[str] = []
    way = limited(said, applied, 950_000_000, held=950_000_000, monkeypatch=monkeypatch)
    assert way.between([(0, 1, 2)]) == [(0, 1, 2)] and applied == ["full"], "held and what half as much takes fit"
    way = limited(said, applied, 985_000_000, held=975_000_000, monkeypatch=monkeypatch)
    assert len(way.between([(0, 1, 2)])) == 2 and way.tokens == 30


class Leaking(CausalLM):
    """Each of the first eight micro-batches leaves so many bytes behind."""

    def __init__(self, leak_bytes: int) -> None:
        super().__init__()
        self.leak_bytes, self.left = leak_bytes, list[Any]()

    def loss(self, model: Any, batch: Any) -> Any:
        if len(self.left) < 8:
            self.left.append(torch.ones(self.leak_bytes // 4))
        return super().loss(model, batch)


@pytest.mark.parametrize(("leak_bytes", "downs"), [(0, False), (200_000_000, True)])
def test_a_whole_run_steps_down_where_it_comes_near_its_upper_figure(
    leak_bytes: int, downs: bool, tmp_path: Path
) -> None:
    recipe = tiny_run.recipe(tmp_path, train__max_steps=6)
    report = finetune.train(recipe, objective=Leaking(leak_bytes)).report
    assert any("are planned at most" in notice for notice in report["notices"]) == downs
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(row.get("stepped_down") for row in rows) == downs
