"""How a step is split into micro-batches, and what changes when memory runs short: recompute more, then split smaller.

Why: a run that dies after an hour is the pain that people name first. What a step learns does not depend on its split
(the loss is a sum over labelled tokens, divided once), so a run can step down in the middle of a step.
What: before the first step the longest micro-batch and one evaluation batch run once. Between micro-batches free memory
is compared with a margin; below it, freed memory goes back to the system, and if that is not enough, the run steps
down. If an allocation fails (cards raise an error; Linux mostly kills), the micro-batch runs again, smaller.
Cost: a look at /proc between micro-batches, 0.2 ms; where failures are caught, a copy of the gradients.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Protocol

import numpy as np
from torch import Tensor

from halfbyte.data import collate, pack, prefixes
from halfbyte.errors import TrainError, first_line
from halfbyte.layers import fuse, packing
from halfbyte.layers.kernels import pool
from halfbyte.models import structure
from halfbyte.objectives import objective as objectives
from halfbyte.objectives.objective import Objective
from halfbyte.plan.result import GB, Recompute
from halfbyte.system import accelerator, pages, usage
from halfbyte.system.device import ram_available
from halfbyte.types import Batch, Document, Model
from halfbyte.upstream import transformers as upstream

MARGIN_SHARE = 0.03  # of the machine's memory (or the group's limit) that stays free between micro-batches
MARGIN_BYTES = 64_000_000
NEAR_BYTES = 16_000_000  # below the plan's upper figure: more than a step adds by itself


@dataclass
class Pace:
    """The split of a run's steps. Changes only downwards, and says so. `need`: bytes that a micro-batch of so many
    tokens adds, under a policy of recomputation."""

    lengths: pack.Sizes  # tokens of each row
    tokens: int  # the most in a micro-batch; never below the longest row
    examples_per_micro_batch: int | None
    recompute: Recompute
    policies: tuple[Recompute, ...]  # from the one that recomputes least to the one that recomputes most
    need: Callable[[int, Recompute], int]
    apply: Callable[[Recompute], None]  # makes the model recompute as a policy says
    tell: Callable[[str], None]
    ram_bytes: int
    on_card: bool = False  # on a card an allocation that fails is an error; RAM is looked at before it runs out
    limit: usage.Usage | None = None  # the plan's upper figures of this process's memory; None for none
    peak: usage.Peak | None = None  # samples it all the while
    ids: prefixes.IdsOf | None = None  # the tokens of a row, where rows share their beginnings
    padded: bool = False  # rows of a micro-batch are padded to its longest
    longest: int = 0  # tokens of the run's largest micro-batch, where they are known
    downs: list[str] = field(default_factory=list)
    _tight: bool = False
    _near: bool = False
    _last_need: int = 0
    _most_need: int = 0  # since blocks were last given back
    _releases: int = 0
    _last_private: int = 0
    _largest: int = 0

    @property
    def margin(self) -> int:
        return max(MARGIN_BYTES, round(MARGIN_SHARE * self.ram_bytes))

    def begin(self) -> None:
        """Before the first step: what was measured until now has left nothing, and is no micro-batch's memory."""
        give_back()
        if self.peak is not None:
            self.peak.take()

    def split(self, micro_batches: Sequence[pack.MicroBatch]) -> list[pack.MicroBatch]:
        """A step's micro-batches as they were planned, or arranged anew since the budget was lowered."""
        if all(self.largest([rows]) <= self.tokens or len(rows) == 1 for rows in micro_batches):
            return list(micro_batches)
        rows = [r for part in micro_batches for r in part]
        limits = self.tokens, self.examples_per_micro_batch, self.ids
        return list(pack.arrange(rows, self.lengths, *limits, padded=self.padded))

    def between(self, waiting: Sequence[pack.MicroBatch]) -> list[pack.MicroBatch]:
        """The micro-batches that are still to come, after a look at what is free."""
        if self.on_card:
            return self.split(waiting)
        if waiting:
            self._make_room_for_larger(waiting)
            self._keep_to_limit(waiting)
        free = ram_available() - self.margin
        if not waiting or free >= 0:
            return self.split(waiting)
        give_back()
        free, largest = ram_available() - self.margin, self.largest(waiting)
        needed = self.need(largest, self.recompute)
        if free >= needed:
            return self.split(waiting)
        needs = f"the next micro-batch needs {needed / GB:.2f} beside a margin of {self.margin / GB:.2f}"
        reason = f"{(free + self.margin) / GB:.2f} GB are free, {needs}"
        before = len(self.downs)
        while free < self.need(min(self.tokens, largest), self.recompute) and self.down(reason):
            pass
        if len(self.downs) == before and not self._tight:
            self._tight = True
            self.tell(f"{reason}; there is no smaller way to run this step")
        return self.split(waiting)

    def expect(self, tokens: int) -> None:
        """The next micro-batch has so many tokens, perhaps aligned; blocks for its tensors are made for the longest."""
        pool.POOL.expect((tokens, packing.up_to(tokens)), packing.up_to(self.longest))

    def _make_room_for_larger(self, waiting: Sequence[pack.MicroBatch]) -> None:
        """Before one larger than all before and than `longest`, let go of their blocks: none holds a tensor of it."""
        if (largest := self.largest(waiting)) > max(self._largest, self.longest):
            self._largest = largest
            pool.POOL.give_back()

    def _keep_to_limit(self, waiting: Sequence[pack.MicroBatch]) -> None:
        """Give memory back where the next micro-batch may come near the plan's upper figure; step down where that is
        not enough, or was not enough before and the next one would be above it."""
        if self.limit is None or self.peak is None:
            return
        needed = self.need(self.largest(waiting), self.recompute)
        gone = pool.POOL.releases != self._releases  # of what ran before; the peak has seen the last one
        more = max(0, needed - (self._last_need if gone else self._most_need))
        recent = self.peak.take()
        if recent.file > self.limit.file:
            pages.release_code()
        near = recent.private + more > self.limit.private - NEAR_BYTES
        if near:
            give_back()
            held = usage.now().private
            reason = f"{recent.private / GB:.2f} GB were in use, {self.limit.private / GB:.2f} are planned at most"
            # near again: if it grows as it did since the last look, will the next micro-batch be above the figure?
            grown = max(0, recent.private - self._last_private)
            over = self._near and recent.private + grown > self.limit.private
            while (
                over or held + self.need(min(self.tokens, self.largest(waiting)), self.recompute) > self.limit.private
            ):
                if not self.down(reason):
                    break
                over = False
        self._near, self._last_private = near, recent.private
        self._most_need = needed if near or gone else max(needed, self._most_need)
        self._last_need, self._releases = needed, pool.POOL.releases

    def down(self, reason: str) -> bool:
        """One step down; False where there is none."""
        place, longest = self.policies.index(self.recompute), int(np.max(self.lengths, initial=1))
        if place + 1 < len(self.policies):
            before, self.recompute = self.recompute, self.policies[place + 1]
            self.apply(self.recompute)
            change = f"recomputation {before} -> {self.recompute}"
        elif self.tokens > longest:
            before_tokens, self.tokens = self.tokens, max(longest, self.tokens // 2)
            change = f"micro-batches of {before_tokens} -> {self.tokens} tokens"
        else:
            return False
        self.downs.append(f"{change}: {reason}")
        self.tell(f"stepping down, {change} ({reason}); what is learned stays the same")
        return True

    def gradients_to_restore(self, model: Model) -> list[Tensor | None] | None:
        """The gradients before a micro-batch, to undo a failed one with; None where failures do not come as errors."""
        if not self.on_card:
            return None
        return [None if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]

    def after_failure(
        self, error: BaseException, model: Model, before: list[Tensor | None] | None, waiting: Sequence[pack.MicroBatch]
    ) -> list[pack.MicroBatch]:
        """After an allocation failed in the first of `waiting`: gradients as before it, one step down, all again.

        Raises:
            TrainError: there is no step down left. `error` itself if it is another one, or gradients were not kept.
        """
        if before is None or not accelerator.out_of_memory(error):
            raise error
        for parameter, gradient in zip((p for p in model.parameters() if p.requires_grad), before, strict=True):
            parameter.grad = gradient
        accelerator.empty_cache()
        if not self.down(f"an allocation failed: {first_line(error, 120)}"):
            raise TrainError(
                f"memory: a micro-batch of {self.largest(waiting)} tokens does not fit, and there is no smaller way.",
                fix="lower data.max_length or lora.r; `halfbyte plan RECIPE.yaml` lists what fits",
            ) from error
        return self.split(waiting)

    def largest(self, micro_batches: Sequence[pack.MicroBatch]) -> int:
        """Tokens that the largest one computes."""
        size = partial(pack.tokens_of, lengths=self.lengths, ids=self.ids, padded=self.padded)
        return max(map(size, micro_batches), default=0)


class StepRows(Protocol):
    """What writes the rows of a step itself; see `rollouts/rollouts.py`."""

    def begin(self, step: pack.Step, pace: Pace, look: Callable[[int, int], None]) -> collate.StepItem: ...
    def end(self, row: Document) -> Document: ...


def give_back() -> None:
    """Give the system what is free here: the pool's blocks, the C library's, and code that is not at work."""
    pool.POOL.give_back()
    usage.trim()
    pages.release_code()


@dataclass(frozen=True)
class Rehearsal:
    """What the longest micro-batch took, above the memory before it."""

    tokens: int
    memory_before: usage.Usage
    micro_batch_bytes: int
    seconds: float


def rehearse(
    objective: Objective, model: Model, pace: Pace, longest: pack.MicroBatch, batch: Callable[[pack.MicroBatch], Batch],
    evaluation: Iterable[Batch] = (),
) -> Rehearsal:  # fmt: skip
    """Run the longest micro-batch forward and backward, and one batch of an evaluation, before anything is learned.

    Gradients and the random state are as before. Steps down until it fits; a TrainError if there is no smaller way.
    """
    training = model.training
    devices = {p.device for p in model.parameters()}
    while True:
        rows = max(pace.split([longest]), key=lambda rows: pace.largest([rows]))
        before, began = usage.now(), time.perf_counter()
        accelerator.reset_peaks()
        on_card = max(accelerator.allocated(), default=0)
        try:
            with accelerator.keep_random_state(devices), usage.Peak() as peak:
                model.train()
                objectives.micro_batch_loss(objective, model, batch(rows)).backward()
                model.zero_grad()
                objectives.evaluate(objective, model, islice(evaluation, 1))
            model.train(training)
            took = max(0, peak.private - before.private)
            if pace.on_card:
                took = max(0, max((allocated for allocated, _ in accelerator.peaks()), default=0) - on_card)
            return Rehearsal(pace.largest([rows]), before, took, time.perf_counter() - began)
        except (RuntimeError, MemoryError) as error:
            model.zero_grad()
            pace.after_failure(error, model, [None for p in model.parameters() if p.requires_grad], [rows])


def recompute_as(model: Model, policy: Recompute) -> None:
    """Make a model (PEFT around it or not) do again in backward what the policy says; may be called at any time."""
    lm = structure.causal_lm(model)
    fuse.recompute_cheap(lm, on=policy == "selective")
    if policy == "full":
        upstream.recompute(lm, {"use_reentrant": False})
        return
    if upstream.recomputes(lm):
        upstream.recompute_nothing(lm)
