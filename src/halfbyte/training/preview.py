"""What a run would do, seen before anything is trained: `train --dry-run` and `halfbyte data check`.

Why: a mask that is wrong, or an end token that is never learned, shows at a glance, and never in a loss.
Cost: tokenising, and the shapes of the model; no weight is read.
"""

from dataclasses import asdict, dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING

import numpy as np

from halfbyte.data import pack
from halfbyte.data.encoding.examples import Example
from halfbyte.errors import DataError
from halfbyte.models.describe import describe
from halfbyte.plan import Plan, calibrate, number_format
from halfbyte.plan.alternatives import compare
from halfbyte.plan.estimate import Estimate, format_note
from halfbyte.recipe.schema import Loaded, Origin, rows
from halfbyte.system import device
from halfbyte.training import forecast, prepare
from halfbyte.training.schedule import plan_steps
from halfbyte.types import Document, Tokenizer

if TYPE_CHECKING:
    from halfbyte.training.fit import PlannedRun

SHOWN_ROWS, COUNTED_STEPS = 2, 20_000
BINS, BIN_TOKENS = 10, 16  # edges of the histogram are multiples of the tokens


@dataclass(frozen=True)
class Resolution:
    """What `train --dry-run` shows: each value with its origin, then what follows from the values. `notes` are labels
    and texts, `warnings` those of the recipe; the plan has its own."""

    rows: list[tuple[str, object, Origin]]
    notes: tuple[tuple[str, str], ...]
    plan: Plan
    warnings: tuple[str, ...]

    def to_json(self) -> Document:
        values = {field: {"value": value, "from": o.kind, "why": o.why} for field, value, o in self.rows}
        notes = [{"label": label, "text": text} for label, text in self.notes]
        return {"values": values, "notes": notes, "plan": self.plan.to_json(), "warnings": self.warnings}


def resolve(loaded: Loaded) -> Resolution:
    """Resolve every `auto` without loading a weight; the data is read, since the plan follows from its lengths."""
    from halfbyte.base import residual
    from halfbyte.training.fit import plan_run

    loaded = number_format.settle(loaded)
    job = plan_run(loaded.recipe, device.detect())
    prepared, source = job.prepared, job.prepared.checkpoint
    begin = residual.look(source, prepared.config, prepared.recipe, job.modules)
    steps = f"{job.job.steps} steps of {min(prepared.recipe.train.rows_per_step, len(prepared.train.examples))} rows"
    notes = (
        ("model", f"{source.id}{f' at {source.revision}' if source.revision else ''}"),
        ("data", f"{prepare.data_note(prepared)}; {steps}"),
        *(("data", finding.line) for finding in prepared.findings),
        ("adapters", f"on {len(job.modules)} modules, {job.job.trainable:,} parameters train"),
        *(() if begin is None else (("residual", str(begin)),)),
    )
    return Resolution(resolve_fields(loaded, job), notes, job.plan, loaded.warnings)


def estimate(loaded: Loaded, *, side_by_side: bool = False) -> Estimate:
    """What `halfbyte plan` shows of a model that is at hand: the run's own plan, of the rows' tokens."""
    from halfbyte.training.fit import plan_run

    run = plan_run(loaded.recipe, device.detect())
    job, rates = run.job, calibrate.cached(run.machine, run.job.dtype)
    recipe, shape = run.prepared.recipe, describe(loaded.recipe.model, loaded.recipe.revision)
    methods = compare(job, run.machine, rates) if side_by_side else ()
    notes = (*format_note(loaded), prepare.data_note(run.prepared), *prepare.notices(run.prepared))
    return Estimate(shape, recipe, run.machine, run.plan, notes, job, rates, methods)


def resolve_fields(loaded: Loaded, job: "PlannedRun") -> list[tuple[str, object, Origin]]:
    """Every field with its value, no longer `auto`, and where that came from."""
    auto, values = auto_values(job), list[tuple[str, object, Origin]]()
    for field, value, origin in rows(loaded):
        chosen, why = auto.get(field, (value, ""))
        values.append((field, chosen, origin if chosen == value else Origin("auto", why.removeprefix("auto: "))))
    return values


def auto_values(job: "PlannedRun") -> dict[str, tuple[object, str]]:
    """The value of each field that may be `auto`, and why it is this one."""
    plan, recipe = job.plan, job.prepared.recipe
    tokens = "max_tokens_per_micro_batch"
    values: dict[str, tuple[object, str]] = {
        "quant.compute_dtype": device.compute_dtype(job.machine, recipe.quant.compute_dtype),
        "lora.target_modules": (job.targets.names, job.targets.reason),
        "train.gradient_checkpointing": (plan.gradient_checkpointing, plan.reasons["recompute"]),
        "quant.placement": (plan.placement, plan.reasons["placement"]),
        f"train.{tokens}": (plan.max_tokens_per_micro_batch, plan.reasons[tokens]),
    }
    if recipe.data.eval == "auto":
        held_out, total = job.prepared.held_out, job.prepared.train.tally.kept
        values["data.eval"] = (
            f"{len(held_out)} rows" if held_out is not None else "none",
            f"of {total:,} training rows; none trains on all",
        )
    if job.prepared.chatml is not None:
        values["lora.trainable_token_indices"] = (recipe.lora.trainable_token_indices, job.prepared.chatml.notice)
    return values


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of one kind, as text."""

    text: str
    labelled: bool
    special: bool
    weight: float = 1.0  # what each of its labels counts for


@dataclass(frozen=True)
class ShownRow:
    """A row as the model sees it. `row` counts from 1, among the rows that are trained on."""

    row: int
    where: str
    tokens: int
    labelled: int
    pieces: tuple[Piece, ...]
    rejected: tuple[Piece, ...] = ()  # of a pair the worse text; then `pieces` are the better one


@dataclass(frozen=True)
class Bin:
    """How many rows have from `least` to `most` tokens."""

    least: int
    most: int
    rows: int


@dataclass(frozen=True)
class DataCheck:
    prepared: prepare.Prepared
    plan: Plan
    steps: int
    micro_batches: int
    tokens: int
    sharing: Document
    histogram: tuple[Bin, ...]
    shown: tuple[ShownRow, ...]

    @property
    def refused(self) -> bool:
        return any(finding.level == "refused" for finding in self.prepared.findings)

    def to_json(self) -> Document:
        recipe, rows = self.prepared.recipe, len(self.prepared.train.examples)
        return {
            "model": self.prepared.checkpoint.id,
            **prepare.data_report(self.prepared),
            "notices": prepare.notices(self.prepared),
            "refused": self.refused,
            "run": {
                "steps": self.steps,
                "rows_per_step": min(rows, recipe.train.rows_per_step),
                "micro_batches_per_step": self.micro_batches / max(1, self.steps),
                "rows_per_micro_batch": min(rows, recipe.train.rows_per_step) * self.steps / max(1, self.micro_batches),
                "max_tokens_per_micro_batch": self.plan.max_tokens_per_micro_batch,
                "tokens": self.tokens,
                **self.sharing,
                "seconds": self.plan.time.run_s,
                "seconds_from": self.plan.time.source,
            },
            "plan": self.plan.to_json(),
            "histogram": [asdict(part) for part in self.histogram],
            "rows": [asdict(row) for row in self.shown],
        }


def check(loaded: Loaded, *, row: int | None = None) -> DataCheck:
    """Everything that a run would know of its rows before its first step; shows `row` (from 1), or the first few.

    A HalfbyteError tells of no model, bad rows, no such row. What the gates refuse is among the findings.
    """
    prepared = prepare.look(number_format.settle(loaded).recipe)
    count = len(prepared.train.examples)
    if row is not None and not 1 <= row <= count:
        raise DataError(f"there is no row {row}: {count:,} rows are trained on.", fix=f"--row 1 to --row {count}")
    machine = device.detect()
    planned = forecast.plan_by_names(prepared, machine)
    if planned is None:
        from halfbyte.training.fit import with_plan

        run = with_plan(prepared, machine)
        planned = run.prepared, run.job, run.plan
    prepared, job, plan = planned
    steps = plan_steps(prepared, plan.max_tokens_per_micro_batch, None)
    counted = [len(step.micro_batches) for step in islice(steps, COUNTED_STEPS)]
    numbers = [row - 1] if row is not None else range(min(SHOWN_ROWS, count))
    return DataCheck(
        prepared,
        plan,
        len(steps),
        # of more than `COUNTED_STEPS`, as many a step as the first ones have
        round(sum(counted) * len(steps) / max(1, len(counted))),
        steps.tokens,
        {
            "computed_tokens": round(steps.tokens * job.computed_share(plan.max_tokens_per_micro_batch)),
            "shared": forecast.sharing_note(prepared, job, plan, machine),
        },
        histogram(prepared.train.lengths),
        tuple(show_row(prepared.train.examples[n], n + 1, prepared.tokenizer) for n in numbers),
    )


def histogram(lengths: pack.Sizes) -> tuple[Bin, ...]:
    """At most `BINS` bins of one width, from the shortest row to the longest."""
    first = int(np.min(lengths)) // BIN_TOKENS * BIN_TOKENS
    width = -(-(int(np.max(lengths)) + 1 - first) // (BINS * BIN_TOKENS)) * BIN_TOKENS
    counts = np.bincount((np.asarray(lengths) - first) // width)
    return tuple(Bin(first + i * width, first + (i + 1) * width - 1, int(n)) for i, n in enumerate(counts))


def show_row(example: Example, row: int, tokenizer: Tokenizer) -> ShownRow:
    """A row as text, cut where a label or a special token begins or ends."""
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(tokenizer.all_special_ids)
    as_it_is = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}

    def pieces(text: Example) -> tuple[Piece, ...]:
        each = zip(text.input_ids, text.labels, text.weights or (1.0,) * len(text.labels), strict=True)
        marked = [(i, label >= 0, i in special, weight if label >= 0 else 1.0) for i, label, weight in each]
        return tuple(
            Piece(str(tokenizer.decode([i for i, *_ in group], **as_it_is)), *kind)
            for kind, group in groupby(marked, key=lambda token: token[1:])
        )

    texts = example.texts if example.prompt_ids else [example]  # a block of several is one
    texts = texts[:1] if example.desirable is not None else texts
    tokens, labelled = (
        sum(n) for n in zip(*((len(t.labels), sum(x >= 0 for x in t.labels)) for t in texts), strict=True)
    )
    return ShownRow(row, example.where, tokens, labelled, *map(pieces, texts))
