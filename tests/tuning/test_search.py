"""Successive halving: which arms go on, for how long, and that a search that was killed decides the same."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from halfbyte.adapters import lora
from halfbyte.models.structure import meta_model
from halfbyte.recipe.schema import Lora
from halfbyte.training.deadline import Clock
from halfbyte.tuning import budget, results
from halfbyte.tuning.search import RATE, TARGETS, Result, Search, SearchState, of_all, of_rate, probe_rate
from tests import small_models

HELD_OUT = 24
NOISE = np.random.default_rng(3).normal(0, 0.2, HELD_OUT)


class Killed(Exception):
    pass


class Bench:
    """Probes whose loss is known: lowest at `best`, falling with the logarithm of the rows; a row takes `row_s`."""

    def __init__(self, folder: Path, *, until: float = 400.0, best: float = 2e-3, row_s: float = 1.0) -> None:
        self.file, self.best, self.row_s = folder / "tuning.json", best, row_s
        self.t, self.made = 0.0, list[tuple[float, int]]()
        self.kill_at: set[int] = set()
        start = {RATE: 1e-3}
        self.state = SearchState(2000.0, until, 1600, 1600, start, ["rate"], 1900.0, HELD_OUT, 0.0)
        self.diverges = 0.05

    def __call__(self, arm: dict[str, Any], rate: float, rows: int) -> Result | None:
        self.t += self.row_s * rows
        if len(self.made) in self.kill_at:
            self.kill_at.remove(len(self.made))
            raise Killed
        self.made.append((arm[RATE], rows))
        loss = 2.0 - 0.05 * math.log(rows) + 0.1 * math.log(arm[RATE] / self.best) ** 2
        sums = {f"row{n}": [10 * (loss + NOISE[n]), 10.0] for n in range(HELD_OUT)}
        return Result(rate, rows // 4, {} if rate > self.diverges else sums)

    def run(self) -> SearchState:
        clock = Clock(lambda: self.t)
        clock.go_on(self.state.spent_s)
        save = lambda: self.state.write(self.file)  # noqa: E731
        search = Search(self.state, {"rate": of_rate}, self, clock, save, self.row_s, 2.0, 4)
        assert search.run()
        return self.state

    def again(self) -> None:
        """A new process: what was written is all that is known."""
        state = SearchState.read(self.file)
        assert state is not None
        self.state, self.t = state, 99_999.0


def test_the_better_half_goes_on_to_more_rows_and_the_best_is_found(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    state = bench.run()
    first, second = state.rungs
    assert [arm[RATE] for arm in first.arms] == [1e-3, 2e-3, 5e-4, 4e-3]
    assert len(second.arms) == 2 and second.rows >= 1.5 * first.rows
    assert state.winner == {RATE: pytest.approx(2e-3 * (1600 / 1516) ** 0.1, rel=1e-2)}, "of the rows that are left"
    assert bench.t <= 400.0 and bench.t > 0.7 * 400.0, "the time for probes is used, and no more"


def test_a_probe_has_the_rate_of_its_rows() -> None:
    assert probe_rate({RATE: 1e-3}, 100, 1600) == pytest.approx(1e-3 * 16**0.1)


@pytest.mark.parametrize("kills", [{0}, {1, 3}, {2, 4}, {5}])
def test_a_search_that_was_killed_decides_the_same(kills: set[int], tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = Bench(tmp_path / "whole")
    wanted = whole.run()
    bench = Bench(tmp_path)
    bench.kill_at = set(kills)
    bench.state.write(bench.file)
    while bench.state.winner is None:
        try:
            bench.run()
        except Killed:
            bench.again()
    assert bench.made == whole.made, "no probe twice, none left out"
    assert bench.state == wanted


def test_a_slow_machine_makes_fewer_probes(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.row_s = 3.0
    state = bench.state
    clock = Clock(lambda: bench.t)
    Search(state, {"rate": of_rate}, bench, clock, lambda: None, 1.0, 2.0, 4).run()  # planned at a third
    assert len(bench.made) < 6 and bench.t <= 400.0 + 3.0 * state.rungs[-1].rows * 0.2
    assert state.winner is not None and state.run_rows < 1600 / 2, "and fewer rows are left for the run"


def test_a_fast_machine_tries_more_arms(tmp_path: Path) -> None:
    bench = Bench(tmp_path, until=100.0, row_s=1.0)
    bench.row_s = 0.4
    state = bench.state
    Search(state, {"rate": of_rate}, bench, Clock(lambda: bench.t), lambda: None, 1.0, 2.0, 4).run()
    assert len(state.rungs[0].arms) == 4 and bench.t <= 100.0, "two were planned for"


@pytest.mark.parametrize(("until", "arms"), [(400.0, 4), (160.0, 3), (60.0, 2), (40.0, 0), (-1.0, 0)])
def test_a_short_time_has_fewer_arms_or_none_and_says_why(until: float, arms: int, tmp_path: Path) -> None:
    state = Bench(tmp_path, until=until).run()
    assert (len(state.rungs[0].arms) if state.rungs else 0) == arms
    if not arms:
        assert state.winner == {RATE: 1e-3}
        said = f"rate was not probed: two short runs take 52 s, and {max(0.0, until):.0f} are given"
        assert results.verdicts(state) == [said]


def test_what_diverged_is_out(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.diverges = 0.0
    assert bench.run().best == {RATE: 1e-3}, "of equals the first"
    assert results.row(bench.state.rungs[0], 0)["loss"] is None
    bench = Bench(tmp_path)
    bench.diverges = probe_rate({RATE: 1.5e-3}, 40, 1600)
    assert bench.run().best[RATE] <= 1e-3


def test_the_words_say_how_sure(tmp_path: Path) -> None:
    state = Bench(tmp_path).run()
    (sentence,) = results.verdicts(state)
    assert sentence.startswith("rate 0.002: 0.0480 [0.0480, 0.0480] lower than rate 0.00")
    rung = state.rungs[-1]
    other = rung.results[rung.order[1]]
    draw = np.random.default_rng(0)
    noisy = {name: [a + draw.normal(0, 10), b] for name, (a, b) in other.sums.items()}
    rung.results[rung.order[1]] = replace(other, sums=noisy)
    (sentence,) = results.verdicts(state)
    assert "no difference from" in sentence


def test_more_time_is_told_from_the_line_through_finished_runs(tmp_path: Path) -> None:
    """Losses of 2 - 0.05 log(rows), so twice the time brings 0.05 log 2 = 0.035."""
    state = Bench(tmp_path).run()
    sums = {f"row{n}": [10 * (2.0 - 0.05 * math.log(1600) + NOISE[n]), 10.0] for n in range(HELD_OUT)}
    told = results.more(state, rows=1600, seconds=2000.0, sums=sums, at_end=False)
    assert told == "another 33:20: about -0.035"
    assert results.more(state, rows=1600, seconds=2000.0, sums=sums, at_end=True).startswith("more time brings nothing")
    state.rungs.clear()
    assert results.more(state, rows=1600, seconds=2000.0, sums=sums, at_end=False).endswith("as nothing was probed")


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "down_proj"]}),
        ("mixtral", {"target_modules": [], "target_parameters": ["down_proj"]}),
        ("qwen3", {"target_modules": r".*layers\.1\..*(q|v)_proj"}),
        ("qwen3", {"target_modules": ["layers.0.self_attn.q_proj", "up_proj"]}),
        ("rwkv", {"target_modules": "auto"}),
    ],
)
def test_a_search_begins_with_the_layers_that_were_asked_for(kind: str, asked: dict[str, Any]) -> None:
    model, settings = meta_model(small_models.config(kind)), Lora(lora_dropout=0.0, **asked)
    targets, modules = lora.choose_targets(model, settings)
    begins = Lora(**settings.model_dump() | {"target_modules": budget.first_targets(settings, targets)})
    assert lora.choose_targets(model, begins)[1] == modules


def test_what_a_search_begins_with_is_not_tried_twice() -> None:
    arms = of_all(["layers.0.attn.q", "layers.0.attn.v", "layers.0.mlp.up"])["targets"]
    tried = {str(now): [arm[TARGETS] for arm in arms({TARGETS: now})[1:]] for now in ("all-linear", ["v", "q"], ".*q")}
    every, attention, gate = ["q", "up", "v"], ["q", "v"], ["up"]
    assert tried == {
        "all-linear": [attention, gate], "['v', 'q']": [every, gate], ".*q": [every, attention, gate],
    }  # fmt: skip
