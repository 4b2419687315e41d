"""How many steps, which of them save and evaluate: counted here by hand, and by walking through the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from halfbyte.training.prepare import Prepared, prepare
from halfbyte.training.schedule import Cadence, cadence, count_steps, eval_batches, eval_every, plan_steps
from tests import tiny_run

ROWS, HELD_OUT = 10, 5


@pytest.fixture
def prepared(tmp_path: Path) -> Any:
    tiny_run.rows(tmp_path / "train.jsonl", ROWS)
    tiny_run.rows(tmp_path / "eval.jsonl", HELD_OUT, seed=5)

    def make(**train: Any) -> Prepared:
        values = {f"train__{name}": value for name, value in {"max_steps": None, **train}.items()}
        return prepare(tiny_run.recipe(tmp_path, data__eval=tmp_path / "eval.jsonl", **values).recipe)

    return make


@pytest.mark.parametrize(
    ("train", "steps"),
    [
        ({"num_train_epochs": 2}, 6),  # 4 + 4 + 2 rows an epoch
        ({"num_train_epochs": 0.5}, 2),
        ({"num_train_epochs": 2, "max_steps": 5}, 5),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 5}, 1),
    ],
)
def test_how_many_steps(train: dict[str, Any], steps: int, prepared: Any) -> None:
    assert count_steps(prepared(**train)) == steps


# 6 steps in 2 epochs of 3
@pytest.mark.parametrize(
    ("train", "every"),
    [
        ({"eval_strategy": "no"}, 0),
        ({"eval_strategy": "epoch"}, 3),
        ({"eval_strategy": "auto"}, 3),
        ({"eval_strategy": "auto", "eval_steps": 4}, 4),
        ({"eval_strategy": "steps", "eval_steps": 2}, 2),
        ({"eval_strategy": "steps", "eval_steps": 0.4}, 3),  # 2.4 steps, rounded up as the Trainer does
        ({"eval_strategy": "steps", "eval_steps": 0.01}, 1),
        ({"eval_strategy": "steps", "logging_steps": 5}, 5),
    ],
)
def test_when_it_is_evaluated(train: dict[str, Any], every: int, prepared: Any) -> None:
    assert eval_every(prepared(num_train_epochs=2, **train)) == every


def test_without_held_out_rows_nothing_is_evaluated(tmp_path: Path) -> None:
    assert eval_every(prepare(tiny_run.recipe(tmp_path).recipe)) == 0


@pytest.mark.parametrize(
    ("train", "wanted"),
    [
        ({"save_strategy": "no"}, Cadence(0, 30.0, 2, at_end=False)),
        ({"save_strategy": "epoch"}, Cadence(3, 30.0, 2)),
        ({"save_strategy": "steps", "save_steps": 4}, Cadence(4, 30.0, 2)),
        ({"save_strategy": "steps", "save_steps": 0.5, "save_total_limit": 7}, Cadence(3, 30.0, 7)),
    ],
)
def test_when_it_is_saved(train: dict[str, Any], wanted: Cadence, prepared: Any) -> None:
    values = {"save_minutes": 30, "save_total_limit": 2, "num_train_epochs": 2}
    assert cadence(prepared(**{**values, **train})) == wanted


@pytest.mark.parametrize(
    ("when", "step", "seconds", "due"),
    [
        (Cadence(3, None, None), 6, 0.0, True),
        (Cadence(3, None, None), 7, 1e9, False),
        (Cadence(0, 2.0, None), 7, 119.0, False),
        (Cadence(0, 2.0, None), 7, 120.0, True),
        (Cadence(3, 2.0, None), 3, 0.0, True),
        (Cadence(0, None, None), 0, 1e9, False),
    ],
)
def test_a_cadence_is_due(when: Cadence, step: int, seconds: float, due: bool) -> None:
    assert when.is_due(step, seconds) is due


@pytest.mark.parametrize(("tokens", "examples", "eval_batch"), [(60, None, 2), (10**6, 1, 4), (1, None, 3)])
def test_micro_batches_hold_every_row_once_within_the_limits(
    tokens: int, examples: int | None, eval_batch: int, prepared: Any
) -> None:
    made = prepared(num_train_epochs=1, per_device_eval_batch_size=eval_batch)
    steps, held_out = plan_steps(made, tokens, examples), eval_batches(made, made.evaluation, tokens, examples)
    lengths = made.train.lengths
    rows = [row for step in steps for part in step.micro_batches for row in part]
    assert sorted(rows) == list(range(ROWS)) and len(steps) == 3
    for step in steps:
        for part in step.micro_batches:
            assert len(part) <= (examples or ROWS)
            assert len(part) == 1 or sum(lengths[row] for row in part) <= tokens
    assert sorted(row for part in held_out.micro_batches for row in part) == list(range(HELD_OUT))
    assert max(len(part) for part in held_out.micro_batches) <= (examples or eval_batch)
    assert sum(batch["input_ids"].shape[1] for batch in held_out) == sum(made.evaluation.lengths)


def test_without_held_out_rows_there_is_no_batch_of_them(tmp_path: Path) -> None:
    made = prepare(tiny_run.recipe(tmp_path).recipe)
    assert len(plan_steps(made, 100, None)) == 4 and len(eval_batches(made, made.evaluation, 100, None)) == 0
