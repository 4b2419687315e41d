"""The steps of a run, counted and arranged: how many, which rows, when to save and when to evaluate."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from halfbyte.data import collate, pack
from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.data.streaming import Flow
from halfbyte.recipe.schema import Train
from halfbyte.training.prepare import Prepared
from halfbyte.types import Document

if TYPE_CHECKING:
    from halfbyte.distributed.world import World
    from halfbyte.training.events import Listener
    from halfbyte.training.pace import Pace


def count_steps(prepared: Prepared) -> int:
    train = prepared.recipe.train
    return pack.count_steps(
        prepared.epoch_rows, rows_per_step=train.rows_per_step, epochs=train.num_train_epochs, max_steps=train.max_steps
    )


def plan_steps(
    prepared: Prepared, tokens: int, examples: int | None, *, rank: int = 0, ranks: int = 1, padded: bool = False
) -> pack.Steps:
    """Every optimiser step of the run, in micro-batches of at most `tokens` and `examples` (None: no limit); of several
    processes those of one. padded: rows are padded to the longest of their micro-batch."""
    train = prepared.recipe.train
    return pack.Steps(
        prepared.train.lengths, prepared.train.labelled, rows_per_step=train.rows_per_step,
        total=count_steps(prepared), seed=train.order_seed, max_tokens_per_micro_batch=tokens,
        examples_per_micro_batch=examples, rank=rank, ranks=ranks,
        weights=prepared.objective.weights(prepared.train), ids=None if padded else prepared.ids_of(prepared.train),
        padded=padded, mixture=prepared.mixture,
        neighbours=prepared.train.examples.neighbours if prepared.recipe.data.order == "families" else None,
    )  # fmt: skip


def eval_batches(
    prepared: Prepared, rows: EncodedRows | None, tokens: int, examples: int | None, *, rank: int = 0, ranks: int = 1,
    padded: bool = False, chosen: NDArray[np.int64] | None = None,
) -> collate.Batches:  # fmt: skip
    """Rows in micro-batches for an evaluation, all or the `chosen` ones; of several processes those of one. At most
    `tokens` and `examples` (None: `per_device_eval_batch_size`) share a micro-batch. No rows are no micro-batches."""
    if rows is None:
        return collate.Batches((), ())
    numbers = np.arange(len(rows.examples)) if chosen is None else chosen
    lengths = rows.lengths[numbers]
    ids, most = None if padded else prepared.ids_of(rows), examples or prepared.recipe.train.per_device_eval_batch_size
    of_chosen = None if ids is None else [*map(ids, numbers.tolist())].__getitem__
    parts = pack.eval_micro_batches(lengths, tokens, most, of_chosen, padded=padded)
    if ranks > 1:
        sizes = [int(lengths[list(part)].sum()) for part in parts]
        parts = [parts[number] for number in pack.share(range(len(parts)), sizes, ranks)[rank]]
    in_rows = [tuple(numbers[list(part)].tolist()) for part in parts]
    return collate.Batches(rows.examples, in_rows, prepared.lay_out)


@dataclass(frozen=True)
class Cadence:
    """When to save. `steps` 0: not by steps; `minutes` None: not by time; `keep` None: all of them."""

    steps: int
    minutes: float | None
    keep: int | None
    at_end: bool = True

    def is_due(self, step: int, seconds: float) -> bool:
        """Whether to save after a step, `seconds` after the last time."""
        by_time = self.minutes is not None and seconds >= 60 * self.minutes
        return by_time or (self.steps > 0 and step % self.steps == 0)


def cadence(prepared: Prepared) -> Cadence:
    train = prepared.recipe.train
    by_strategy = {"no": 0, "epoch": _steps_per_epoch(prepared), "steps": _count(train.save_steps, prepared)}
    steps, at_end = by_strategy[train.save_strategy], train.save_strategy != "no"
    return Cadence(steps, train.save_minutes, train.save_total_limit, at_end)


def warmup_steps(train: Train, total: int) -> int:
    """Steps over which the rate rises; of a short run at most a third."""
    given = train.warmup_steps
    return min(total // 3, int(given) if given >= 1 else math.ceil(given * total))


def eval_every(prepared: Prepared) -> int:
    """Steps between evaluations; 0 for none. The Trainer sees one epoch of all steps, so epochs become steps here."""
    train = prepared.recipe.train
    if prepared.evaluation is None or train.eval_strategy == "no":
        return 0
    if train.eval_strategy == "epoch" or (train.eval_strategy == "auto" and train.eval_steps is None):
        return _steps_per_epoch(prepared)
    return _count(train.eval_steps or train.logging_steps, prepared)


def count_evaluations(prepared: Prepared, done: int = 0) -> int:
    """Evaluations of the held-out rows in the steps after the first `done`."""
    every, total = eval_every(prepared), count_steps(prepared)
    return (total // every - done // every if every else 0) + (prepared.recipe.train.eval_on_start and not done)


@dataclass
class StreamedRows:
    """The rows of each step of a run that reads them as it goes on, as `pace.StepRows`. Each process reads all rows,
    and takes its share of a step's."""

    prepared: Prepared
    flow: Flow
    world: "World"
    tell: "Listener"
    left_out: int = 0

    def begin(self, step: pack.Step, pace: "Pace", look: Callable[[int, int], None]) -> collate.StepItem:
        count = self.prepared.recipe.train.rows_per_step
        rows = self.flow.rows(step.index * count, (step.index + 1) * count)
        if self.flow.left_out.count > self.left_out:
            self.left_out = self.flow.left_out.count
            text = f"{self.left_out:,} rows so far cannot be used, and are left out: {self.flow.left_out.first()}"
            self.tell.warn(text)
        pace.lengths, pace.ids = np.array([len(row.input_ids) for row in rows], np.int64), None
        share = pack.share(range(count), pace.lengths, self.world.size)[self.world.rank]
        limits = pace.tokens, pace.examples_per_micro_batch, None
        parts, tokens = pack.arrange(share, pace.lengths, *limits, padded=pace.padded), int(pace.lengths.sum())
        labelled, weight = (sum(each) for each in zip(*((row.labelled, row.label_weight) for row in rows), strict=True))
        counts = {"labelled_tokens": labelled, "weight": weight, "tokens": tokens, "computed": tokens}
        batches = collate.Batches(rows, parts, self.prepared.lay_out)
        return {"step": replace(step, micro_batches=parts, **counts), "micro_batches": batches}

    def end(self, row: Document) -> Document:
        left_out = {"rows_left_out": self.left_out} if self.left_out else {}
        return {"epoch": self.flow.passes(row["step"] * self.prepared.recipe.train.rows_per_step), **left_out}


def _steps_per_epoch(prepared: Prepared) -> int:
    return math.ceil(prepared.epoch_rows / prepared.recipe.train.rows_per_step)


def _count(value: float, prepared: Prepared) -> int:
    """Steps from a number, or from a share of all steps below 1, as the Trainer reads `save_steps` and `eval_steps`."""
    return max(1, math.ceil(value * count_steps(prepared))) if value < 1 else int(value)
