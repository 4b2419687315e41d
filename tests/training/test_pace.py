"""The rehearsal: what it measures, what it leaves as it was, how it steps down; and when a run goes without one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import finetune
from halfbyte.errors import TrainError
from halfbyte.layers import loss
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


def test_it_runs_the_longest_micro_batch_and_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran = adapted("llama").eval(), list[bool]()
    real = loss.micro_batch_loss

    def seen(model: Any, *args: Any, **kwargs: Any) -> Any:
        ran.append(model.training)
        return real(model, *args, **kwargs)

    monkeypatch.setattr(loss, "micro_batch_loss", seen)
    state, weights = torch.random.get_rng_state(), {n: p.detach().clone() for n, p in model.named_parameters()}
    asked: list[tuple[int, ...]] = []

    def made(rows: tuple[int, ...]) -> Any:
        asked.append(rows)
        return batch()

    found = rehearse(model, pace([], []), (0, 1), made, [batch()])
    assert asked == [(0, 1)] and found.tokens == 50
    assert ran == [True, False], "a micro-batch of training, a batch of an evaluation"
    assert found.held.private > 0 and found.micro_batch_bytes >= 0 and found.seconds > 0
    assert torch.equal(torch.random.get_rng_state(), state) and not model.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, weights[name])


def failing(times: int) -> Callable[..., Any]:
    real = loss.micro_batch_loss

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal times
        times -= 1
        if times >= 0:
            raise torch.OutOfMemoryError("can't allocate memory")
        return real(*args, **kwargs)

    return run


def test_it_steps_down_until_it_fits_and_tells_where_nothing_does(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    applied: list[str] = []
    monkeypatch.setattr(loss, "micro_batch_loss", failing(2))
    way = pace(said, applied)
    found = rehearse(adapted("llama"), way, (0, 1, 2), lambda rows: batch())
    assert applied == ["full"] and way.tokens == 30 and found.tokens == 30
    assert "none -> full" in said[0] and "60 -> 30 tokens" in said[1]
    monkeypatch.setattr(loss, "micro_batch_loss", failing(99))
    with pytest.raises(TrainError, match="there is no smaller way"):
        rehearse(adapted("llama"), pace([], [], policies=("none",)), (0, 1, 2), lambda rows: batch())


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
