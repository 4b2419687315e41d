"""The rehearsal: what it measures, what it leaves as it was, how it steps down; and when a run goes without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from halfbyte import finetune
from halfbyte.errors import TrainError
from halfbyte.objectives.causal_lm import CausalLM
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

        def sums(self, model: Any, batch: Any) -> Any:
            ran.append(model.training)
            return super().sums(model, batch)

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
