"""Every row once an epoch, in few micro-batches within the budget, the same wherever it is planned."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data.pack import EVAL_WINDOW_ROWS, Step, Steps, arrange, count_steps, eval_micro_batches, share


def plan(
    lengths: list[int], rows_per_step: int = 4, epochs: float = 1.0, max_steps: int = -1, **changed: Any
) -> list[Step]:
    total = count_steps(len(lengths), rows_per_step=rows_per_step, epochs=epochs, max_steps=max_steps)
    arguments = {"seed": 0, "max_tokens_per_micro_batch": 100, "examples_per_micro_batch": None, **changed}
    steps = Steps(np.array(lengths), np.array(lengths) - 1, rows_per_step, total, **arguments)
    made = list(steps)
    assert len(steps) == len(made) and steps.tokens == sum(step.tokens for step in made)
    return made


def rows(steps: list[Any]) -> list[list[int]]:
    return [[r for p in s.micro_batches for r in p] for s in steps]


def test_the_last_step_of_an_epoch_keeps_the_remainder() -> None:
    steps = plan([10] * 10, epochs=2.0)
    assert [len(r) for r in rows(steps)] == [4, 4, 2, 4, 4, 2]
    assert [s.index for s in steps] == [0, 1, 2, 3, 4, 5]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(chain.from_iterable(rows(epoch))) == list(range(10))
    assert rows(steps)[:3] != rows(steps)[3:]


def test_passes_over_the_data() -> None:
    steps = Steps(np.full(10, 10), np.full(10, 9), 4, 7, 0, 100, None)  # 4, 4 and 2 rows an epoch
    assert [steps.passes(n) for n in (0, 1, 2, 3, 4, 6)] == [0.0, 0.4, 0.8, 1.0, 1.4, 2.0]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "count"),
    [(1.0, -1, 3), (0.5, -1, 2), (1.5, -1, 5), (2.0, 0, 6), (1.0, 7, 7), (100.0, 2, 2)],
)
def test_number_of_steps(epochs: float, max_steps: int, count: int) -> None:
    steps = plan([10] * 10, epochs=epochs, max_steps=max_steps)
    assert len(steps) == count
    assert count_steps(10, rows_per_step=4, epochs=epochs, max_steps=max_steps) == count


@given(n=st.integers(1, 60), batch=st.integers(1, 5), accumulation=st.integers(1, 5), epochs=st.floats(0.01, 3))
def test_number_of_steps_is_the_trainers(n: int, batch: int, accumulation: int, epochs: float) -> None:
    batches = math.ceil(n / batch)  # Trainer.set_initial_training_values
    updates = max(batches // accumulation + int(batches % accumulation > 0), 1)
    assert count_steps(n, rows_per_step=batch * accumulation, epochs=epochs, max_steps=-1) == math.ceil(
        epochs * updates
    )


@pytest.mark.parametrize(("rows_per_step", "epochs"), [(1, 1.0), (4, 1.0), (4, 2.6), (7, 0.4), (64, 1.0)])
def test_the_largest_step_is_that_of_the_steps_themselves(rows_per_step: int, epochs: float) -> None:
    lengths = [int(n) for n in np.random.default_rng(3).integers(1, 90, 50)]
    total = count_steps(len(lengths), rows_per_step=rows_per_step, epochs=epochs, max_steps=-1)
    steps = Steps(np.array(lengths), np.array(lengths), rows_per_step, total, 5, 100, None)
    assert steps.most_tokens() == max(sum(lengths[r] for r in step) for step in rows(list(steps)))


def test_order_is_pinned_and_follows_the_seed() -> None:
    assert rows(plan([10] * 6, rows_per_step=6))[0] == [0, 5, 1, 4, 3, 2]
    assert rows(plan([10] * 6, rows_per_step=6, seed=1)) != rows(plan([10] * 6, rows_per_step=6))


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    assert plan([7, 9, 11, 30, 40], epochs=4.0)[:3] == list(plan([7, 9, 11, 30, 40], max_steps=3))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=40),
    rows_per_step=st.integers(1, 9),
    budget=st.integers(1, 200),
    most=st.one_of(st.none(), st.integers(1, 4)),
    seed=st.integers(0, 5),
)
def test_steps_hold_what_they_say(
    lengths: list[int], rows_per_step: int, budget: int, most: int | None, seed: int
) -> None:
    steps = plan(
        lengths,
        epochs=1.0,
        rows_per_step=rows_per_step,
        max_tokens_per_micro_batch=budget,
        examples_per_micro_batch=most,
        seed=seed,
    )
    assert sorted(chain.from_iterable(rows(steps))) == list(range(len(lengths)))
    wide = plan(lengths, rows_per_step=rows_per_step, max_tokens_per_micro_batch=10**6, seed=seed)
    for step, other in zip(steps, wide, strict=True):
        for p in step.micro_batches:
            assert len(p) == 1 or sum(lengths[r] for r in p) <= budget
            assert most is None or len(p) <= most
        inside = [r for p in step.micro_batches for r in p]
        assert step.tokens == sum(lengths[r] for r in inside)
        assert step.labelled_tokens == step.tokens - len(inside)
        assert len(other.micro_batches) == 1
        assert sorted(inside) == sorted(other.micro_batches[0])


def test_first_fit_decreasing_fills_what_arrival_order_would_not() -> None:
    lengths = [40, 40, 60, 60, 50, 50]
    assert arrange(range(6), lengths, 100, None) == ((0, 2), (1, 3), (4, 5))


def test_a_row_over_the_budget_is_a_micro_batch_of_its_own() -> None:
    assert arrange([0, 1, 2], [30, 500, 30], 100, None) == ((1,), (0, 2))


def test_at_most_so_many_examples_a_micro_batch() -> None:
    assert arrange(range(5), [5] * 5, 100, 2) == ((0, 1), (2, 3), (4,))


def test_one_example_a_micro_batch_keeps_the_order() -> None:
    assert arrange([2, 0, 1], [30, 500, 30], 100, 1) == ((2,), (0,), (1,))


def test_evaluation_takes_every_row_once() -> None:
    lengths = [1 + i * 7919 % 90 for i in range(2 * EVAL_WINDOW_ROWS + 3)]
    micro_batches = eval_micro_batches(lengths, 256, None)
    assert sorted(r for p in micro_batches for r in p) == list(range(len(lengths)))
    assert all(sum(lengths[r] for r in p) <= 256 for p in micro_batches)
    assert len(micro_batches) <= 1.1 * sum(lengths) / 256
    assert eval_micro_batches([5, 5], 256, 1) == [(0,), (1,)]


@pytest.mark.parametrize("bad", [{"max_tokens_per_micro_batch": 0}, {"examples_per_micro_batch": 0}])
def test_impossible_arguments(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        plan([5, 6], **bad)


def test_a_process_without_rows_has_no_micro_batches() -> None:
    assert share([4], [9] * 5, 2) == [[4], []]
    assert arrange([], [9] * 5, 40, None) == ()


def test_padded_rows_are_sorted_by_length_and_padding_counts() -> None:
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 400, 64)
    mixed, sorted_ = (arrange(range(64), lengths, 1600, None, padded=padded) for padded in (False, True))
    assert sorted(r for rows in sorted_ for r in rows) == list(range(64))
    assert all(len(rows) * max(lengths[list(rows)]) <= 1600 for rows in sorted_)
    padding = [
        sum(len(rows) * max(lengths[list(rows)]) for rows in parts) / lengths.sum() for parts in (mixed, sorted_)
    ]
    assert padding[1] < 1.15 < padding[0]
    assert arrange([0, 1, 2], [30, 500, 30], 100, None, padded=True) == ((1,), (0, 2))
