"""The rows on which a run's adapter is compared with its base, and the base's losses of them.

What: held-out rows where there are any; else training rows that the run never reaches, where it is shorter than an
epoch; else some that it trains on. As many as cost a small part of the run, in the order of a hash: a longer run has
the same ones first. The losses of the base and of its source are kept beside its store, row by row, and measured once.
Cost: a forward of these rows, three times in a base's first run.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from halfbyte.data import base_text, collate, pack
from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.distributed.world import World
from halfbyte.errors import RecipeError
from halfbyte.models import tensors
from halfbyte.models.context import context_of
from halfbyte.models.sources.checkpoint import Checkpoint
from halfbyte.plan import ITEMSIZE, Plan
from halfbyte.quant import policy
from halfbyte.recipe.schema import Recipe
from halfbyte.runs.folder import read_json
from halfbyte.runs.points import CAUSAL_LM
from halfbyte.scoring.verdict import Verdict, judge
from halfbyte.system import files
from halfbyte.system.device import Device
from halfbyte.system.libraries import versions
from halfbyte.system.words import duration
from halfbyte.training.prepare import Prepared
from halfbyte.training.schedule import count_evaluations, eval_batches, eval_every, plan_steps

Rows = NDArray[np.float64]
"""(rows, names): the sums of each row that the objective's evaluation adds up, its loss first."""
FEWEST, MOST = 8, 32  # rows
MOST_HELD_OUT = 200
SHARE, SHORT_S = 0.1, 5.0  # of a run's seconds, and seconds that are always given
WHOSE = 3  # losses: source, base, adapter
KEPT, SOURCE = "scores.json", "source "
MOST_KEPT = 20_000  # rows
SOURCE_SHARE = 0.8  # of the memory that a source may take; the rest is for a text's forward
# Seconds to open a source, and for each byte of its weights and of their files; a text's forward is the model's own,
# beside one of rows laid end to end. From 16 runs on two cores (docs/log).
OPENING_S, BYTE_S = 0.5, 1e-9
FORWARDS = 1.3
# Lines of a plan: what memory holds before the first step.
BESIDE = ("libraries", "libraries, mapped", "base", "adapters")
LEAVE_OUT = "leave train.max_forgetting out"


@dataclass
class Comparison:
    """`chosen`: the rows among the held-out or the training rows, ascending. `base`, `source`: what the base and the
    model as it came have lost on them, once known; None for a `source` that was not measured. `ends`: all held-out rows
    are evaluated after the last step. `kept`: the file that keeps these sums, None for none; `context`: what they
    depend on beside row and base. `text`: the same on a text of the base's own kind; or why that is not read."""

    batches: collate.Batches
    chosen: NDArray[np.int64]
    which: str
    held_out: bool
    ends: bool = False
    kept: Path | None = None
    context: str = ""
    text: "Comparison | str" = "nobody asked"
    base: Rows | None = None
    source: Rows | None = None

    @property
    def words(self) -> str:
        return f"{len(self.chosen)} {self.which}"

    def judge(self, adapter: Rows | None) -> Verdict:
        return judge(adapter, self.base, self.words, self.source)

    @cached_property
    def names(self) -> list[str]:
        """A hash of each row's tokens and labels."""
        rows = (self.batches.examples[number] for number in self.chosen.tolist())
        texts = (json.dumps([list(row.input_ids), list(row.labels), list(row.starts)]) for row in rows)
        return [hashlib.sha256(text.encode()).hexdigest()[:24] for text in texts]

    def read(self, whose: str = "") -> list[list[float]] | None:
        """The base's sums of all the rows, or the source's (`SOURCE`), where they are kept."""
        rows = {} if self.kept is None else read_json(self.kept).get(whose + self.context, {})
        return [rows[name] for name in self.names] if all(name in rows for name in self.names) else None

    def keep(self, sums: Rows, whose: str = "") -> None:
        """Keep these sums, where the store's folder can be written."""
        if self.kept is None or not np.isfinite(sums).all():
            return
        every, context = read_json(self.kept), whose + self.context
        rows = {**every.get(context, {}), **dict(zip(self.names, sums.tolist(), strict=True))}
        every = {**(every if sum(map(len, every.values())) < MOST_KEPT else {}), context: rows}
        with suppress(OSError):
            files.write(self.kept, files.as_json(every))


def compare(
    prepared: Prepared, steps: pack.Steps, plan: Plan, world: World, examples: int | None, store: Path | None,
    products: object, *, seconds: float | None = None,
) -> Comparison:  # fmt: skip
    """Choose the rows of a run's verdict; of several processes the first one does.

    Args:
        examples: the most in a micro-batch, as `schedule.plan_steps` has them. store: the base's.
        products: how they are computed. seconds: as of `choose`.
    """
    rows, chosen, which = choose(prepared, steps, plan, seconds)
    which += prepared.objective.of_base
    first, ends = world.from_first(lambda: [chosen.tolist(), ends_with_evaluation(prepared, steps, plan)])
    chosen = np.array(first, np.int64)
    limits = plan.evaluation_tokens, examples
    batches = eval_batches(prepared, rows, *limits, rank=world.rank, ranks=world.size, chosen=chosen)
    context = json.dumps([repr(prepared.objective), str(products), versions()])
    # what a base loses depends on the run: on its reference, or on the start of its head
    known = prepared.objective.name == CAUSAL_LM and not prepared.recipe.train.referenced
    kept = store / KEPT if store is not None and known else None
    text = _on_base_text(prepared, steps, plan, world, limits, kept)
    if isinstance(text, Comparison):
        text.context = context
    return Comparison(batches, chosen, which, prepared.evaluation is not None, ends, kept, context, text)


def _on_base_text(
    prepared: Prepared, steps: pack.Steps, plan: Plan, world: World, limits: tuple[int, int | None], kept: Path | None
) -> Comparison | str:
    """The same of a text of the base's own kind, as of `compare`; or why it is not read."""
    rows = text_rows(prepared, steps, plan) if world.alone else "several processes train"
    if isinstance(rows, str):
        if prepared.recipe.train.max_forgetting is not None:
            raise RecipeError(f"train.max_forgetting cannot be kept: the text is not read, as {rows}.", fix=LEAVE_OUT)
        return rows
    batches, numbers = eval_batches(prepared, rows, *limits), np.arange(len(rows.examples))
    return Comparison(batches, numbers, "texts of the base's kind", False, kept=kept)


def text_rows(prepared: Prepared, steps: pack.Steps, plan: Plan) -> EncodedRows | str:
    """The text of the base's kind, as rows; or why a run does not read it."""
    if prepared.objective.name != CAUSAL_LM:
        return f"a run of {prepared.objective.name} computes no loss of plain text; halfbyte eval does"
    context = context_of(prepared.config)
    rows = base_text.encode(prepared.tokenizer, base_text.LONGEST if context is None else context.tokens)
    tokens = int(rows.lengths.sum())
    seconds = WHOSE * tokens * plan.time.forward_s
    if prepared.recipe.train.max_forgetting is None and seconds > max(
        2 * SHORT_S, SHARE * plan.time.step_s * len(steps)
    ):
        return f"its {tokens:,} tokens would take {duration(seconds)}, more than a tenth of the run"
    return rows


def base_text_s(prepared: Prepared, plan: Plan, machine: Device) -> float:
    """Seconds of a run's losses on the text of the base's kind, as planned: of base, source, adapter and evaluations
    that it bounds."""
    if not (once := text_reading_s(prepared, plan)):
        return 0.0
    source = FORWARDS if _source_s(prepared, plan, machine, 0) else 0.0
    bounded = prepared.recipe.train.max_forgetting is not None
    times = (not plan.time.done) * (1 + source) + 1 + bounded * count_evaluations(prepared, plan.time.done)
    return times * once


def text_reading_s(prepared: Prepared, plan: Plan) -> float:
    """Seconds in which a run reads the text of the base's kind once, as planned; 0 where it does not."""
    rows = text_rows(prepared, plan_steps(prepared, plan.max_tokens_per_micro_batch, None), plan)
    return 0.0 if isinstance(rows, str) else int(rows.lengths.sum()) * plan.time.forward_s


def choose(
    prepared: Prepared, steps: pack.Steps, plan: Plan, seconds: float | None = None
) -> tuple[EncodedRows, NDArray[np.int64], str]:
    """(the held-out or the training rows, the numbers of those that are compared, ascending, what they are). `seconds`:
    what their evaluation may take, once; None for a share of the run's."""
    rows = prepared.evaluation or prepared.train
    most, which = MOST_HELD_OUT, "held-out rows"
    numbers = np.arange(len(rows.examples))
    if prepared.evaluation is None:
        most, which = MOST, "training rows"
        if len(unseen := steps.never_reached()) >= FEWEST:
            numbers, which = unseen, "training rows that it did not reach"
    keys = rows.examples.digests()
    if rows.texts is not None:  # of the texts; blocks are drawn by their numbers
        keys = np.random.default_rng(0).permutation(len(rows.examples)).astype(np.uint64)
    order = np.argsort(keys[numbers], kind="stable")
    costs = np.cumsum(rows.lengths[numbers[order]]) * plan.time.forward_s
    if seconds is None:
        seconds = max(SHORT_S, SHARE * plan.time.step_s * len(steps)) / 2
    count = max(FEWEST, min(most, int((costs <= seconds).sum())))
    if prepared.recipe.train.max_source_rise is not None:  # of every source as it is evaluated
        count = len(numbers)
    return rows, np.sort(numbers[order[:count]]), which


def verdict_s(prepared: Prepared, plan: Plan, machine: Device) -> float:
    """Seconds of a run's verdict, as planned: of the rows that base and adapter are compared on, and of an evaluation
    after the last step that is not there anyway."""
    steps = plan_steps(prepared, plan.max_tokens_per_micro_batch, None)
    rows, chosen, _ = choose(prepared, steps, plan)
    every, ends = eval_every(prepared), ends_with_evaluation(prepared, steps, plan)
    # those of base and source are kept by the process before this one, the adapter's are known after an evaluation
    one = int(rows.lengths[chosen].sum())
    tokens = ((not plan.time.done) + (not ends)) * one
    if prepared.evaluation is not None and ends and not (every and len(steps) % every == 0):
        tokens += int(prepared.evaluation.lengths.sum())
    return plan.time.forward_s * tokens + (0.0 if plan.time.done else _source_s(prepared, plan, machine, one))


def _source_s(prepared: Prepared, plan: Plan, machine: Device, tokens: int) -> float:
    """Seconds to measure the source on rows of so many tokens; 0 where it is the base, or where a run has no room."""
    recipe, checkpoint = prepared.recipe, prepared.checkpoint
    if not recipe.quant.quantises or recipe.quant.in_file or checkpoint.pickle or recipe.task != CAUSAL_LM:
        return 0.0
    if tensors.is_quantised(tensors.read_config(checkpoint.path)):
        return 0.0
    nbytes = source_bytes(recipe, checkpoint, ITEMSIZE[plan.compute_dtype])
    room = plan.peak_bytes - sum(line.bytes for line in plan.lines if line.name in BESIDE)
    if nbytes > SOURCE_SHARE * room and not machine.on_card:
        return 0.0
    return OPENING_S + BYTE_S * nbytes + FORWARDS * plan.time.forward_s * tokens


def source_bytes(recipe: Recipe, checkpoint: Checkpoint, itemsize: int) -> int:
    """What a source takes in memory: its weights, and the pages of the files that they are read from."""
    quant, specs = recipe.quant.in_type("none"), tensors.read_checkpoint(checkpoint.path)
    return 2 * sum(policy.encoded_bytes(spec, quant, itemsize) for spec in specs)


def ends_with_evaluation(prepared: Prepared, steps: pack.Steps, plan: Plan) -> bool:
    """Whether all held-out rows are evaluated after the last step: unless the recipe has no evaluations, or a run of
    less than an epoch, which has not asked for any, would take half as long again."""
    strategy, held_out = prepared.recipe.train.eval_strategy, prepared.evaluation
    if held_out is None or strategy == "no":
        return False
    seconds = plan.time.forward_s * int(held_out.lengths.sum())
    return (
        strategy != "auto"
        or steps.passes(len(steps)) >= 1
        or seconds <= max(6 * SHORT_S, plan.time.step_s * len(steps) / 2)
    )
