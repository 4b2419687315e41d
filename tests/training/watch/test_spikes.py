"""Spikes are noted: far above the steps before, and not mere unrest."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import finetune
from halfbyte.objectives import objective
from halfbyte.runs.folder import RunFolder
from halfbyte.training.watch import Spikes, notice
from tests import tiny_run


def rows(losses: list[float], norm: float = 1.0) -> list[dict[str, Any]]:
    return [{"step": i, "loss": loss, "grad_norm": norm} for i, loss in enumerate(losses, 1)]


def seen(losses: list[float]) -> list[int]:
    spikes = Spikes()
    return [row["step"] for row in rows(losses) if spikes.find(row)]


def test_one_far_step_is_a_spike_and_the_ones_after_it_are_not() -> None:
    draw = random.Random(0)
    losses = [2.0 + draw.uniform(-0.2, 0.2) for _ in range(40)]
    assert seen(losses) == []
    losses[25] = 6.0
    assert seen(losses) == [26]


def test_unrest_a_falling_loss_and_the_first_steps_are_none() -> None:
    draw = random.Random(1)
    assert seen([draw.uniform(0.5, 3.5) for _ in range(200)]) == []
    assert seen([10 * 0.95**i for i in range(100)]) == []
    assert seen([1.0, 9.0, 1.0, 1.0]) == []


def test_a_gradient_alone_is_told_as_a_multiple() -> None:
    spikes = Spikes(rows([1.0] * 10))
    assert spikes.find({"step": 11, "loss": 1.0, "grad_norm": 20.0}) == {"grad_norm": 20.0}


def test_a_resumed_run_knows_the_steps_before() -> None:
    losses = [2.0] * 20 + [7.0]
    earlier = rows(losses)[:20]
    assert Spikes(earlier).find(rows(losses)[20]) == {"loss": 3.5}


def test_a_spike_is_in_metrics_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = objective.micro_batch_loss, [0]

    def faulty(*args: Any, **kwargs: Any) -> torch.Tensor:
        count[0] += 1
        return real(*args, **kwargs) * (30.0 if count[0] == 12 else 1.0)

    monkeypatch.setattr(objective, "micro_batch_loss", faulty)
    loaded = tiny_run.recipe(tmp_path, train__max_steps=14, train__learning_rate=1e-4)
    report = finetune.train(loaded).report
    found = RunFolder(tmp_path / "run").read_metrics()
    assert [row["step"] for row in found if "spike" in row] == [12]
    assert report["spikes"] == [{"step": 12, **found[11]["spike"]}] and found[11]["spike"]["loss"] > 10
    assert "1 of 14 steps spike in loss or gradient: 12" in report["notices"]
    assert notice([]) == []


def test_answers_that_fall_without_end_are_said() -> None:
    falls = [{"step": i, "loss": 1.0, "chosen_reward": -0.1 * i} for i in range(20)]
    assert "became less likely without end (reward -0.200, then -1.700)" in notice(falls)[0]
    levels = [{**row, "chosen_reward": max(row["chosen_reward"], -0.5)} for row in falls]
    rises = [{**row, "chosen_reward": -row["chosen_reward"]} for row in falls]
    assert not notice(levels) and not notice(rises) and not notice(falls[:8])
