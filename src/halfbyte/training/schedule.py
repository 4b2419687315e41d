"""The steps of a run, counted and arranged: how many, which rows, when to save and to evaluate.

Cost: none; a step is made when it is asked for.
"""

from __future__ import annotations

import math

from halfbyte.data import pack
from halfbyte.recipe.schema import Recipe
from halfbyte.runs.folder import RunFolder
from halfbyte.training.callback import Best, Cadence
from halfbyte.training.prepare import Prepared


def count_steps(prepared: Prepared) -> int:
    train = prepared.recipe.train
    return pack.count_steps(
        len(prepared.train.examples),
        rows_per_step=prepared.recipe.train.rows_per_step,
        epochs=train.num_train_epochs,
        max_steps=train.max_steps,
    )


def plan_steps(
    prepared: Prepared, *, max_tokens_per_micro_batch: int, examples_per_micro_batch: int | None
) -> pack.Steps:
    """Every optimiser step of the run: which rows, in which order, in which micro-batches."""
    train = prepared.recipe.train
    return pack.plan_steps(
        prepared.train.lengths,
        prepared.train.labelled,
        rows_per_step=prepared.recipe.train.rows_per_step,
        epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        seed=train.seed if train.data_seed is None else train.data_seed,
        max_tokens_per_micro_batch=max_tokens_per_micro_batch,
        examples_per_micro_batch=examples_per_micro_batch,
    )


def cadence(recipe: Recipe, total_steps: int, steps_per_epoch: int) -> Cadence:
    train = recipe.train
    steps = {"no": 0, "epoch": steps_per_epoch}.get(train.save_strategy, _count(train.save_steps, total_steps))
    return Cadence(
        steps=steps, minutes=train.save_minutes, keep=train.save_total_limit, at_end=train.save_strategy != "no"
    )


def eval_every(recipe: Recipe, train_rows: int) -> int:
    """Steps between evaluations; 0 for none. The Trainer sees one epoch of all steps, so epochs become steps here."""
    train = recipe.train
    steps_per_epoch = math.ceil(train_rows / train.rows_per_step)
    if train.eval_strategy == "no":
        return 0
    if train.eval_strategy == "epoch" or (train.eval_strategy == "auto" and train.eval_steps is None):
        return steps_per_epoch
    total = pack.count_steps(
        train_rows, rows_per_step=train.rows_per_step, epochs=train.num_train_epochs, max_steps=train.max_steps
    )
    return _count(train.eval_steps or train.logging_steps, total)


def best(recipe: Recipe, run: RunFolder) -> Best:
    name = recipe.train.metric_for_best_model or "loss"
    found = Best(
        metric=name if name.startswith("eval_") else f"eval_{name}",
        folder=run.checkpoints / "best",
    )
    found.restore()
    return found


def _count(value: float, total: int) -> int:
    """Steps from a number, or from a share of all steps below 1, as the Trainer reads `save_steps` and `eval_steps`."""
    return max(1, math.ceil(value * total)) if value < 1 else int(value)
