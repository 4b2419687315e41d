"""The plan of a run from its real rows, and how the run obeys it: placement, recomputation, pace, and the comparison.

Cost: a few milliseconds; a calibration of this machine (seconds, once) before a run that takes minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.adapters.targets import Targets
from halfbyte.plan import Job, Plan, Rows, calibrate, choose, make, peak
from halfbyte.plan.lines import Recompute
from halfbyte.runs.report import Compared
from halfbyte.system import usage
from halfbyte.system.device import Device
from halfbyte.training.pace import Pace, recompute_as
from halfbyte.training.prepare import Prepared
from halfbyte.training.schedule import count_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from halfbyte.base.load import Base
    from halfbyte.types import Model

# A run that is thought to be shorter is not worth the seconds of a calibration.
CALIBRATE_FROM_S = 60.0
# A plan that takes no more of what is free need not be rehearsed: it would fit if it were wrong by a factor of four.
UNREHEARSED = 0.2


def plan_of(
    prepared: Prepared, machine: Device, chosen: Targets, model: Model, say: Callable[[str], None] | None = None
) -> tuple[Job, Plan]:
    """The plan of a run with these targets, and what it follows from.

    Args:
        model: gives the shapes where the checkpoint has no headers (pickled weights).
        say: the machine may be calibrated first, if it was not yet and the run is long enough.
    """
    held_out = prepared.evaluation.lengths if prepared.evaluation is not None else ()
    rows = Rows(prepared.train.lengths, prepared.train.labelled, held_out)
    job = Job.of_checkpoint(prepared.recipe, prepared.checkpoint, model, rows, machine, targets=chosen.names)
    job = replace(job, steps=count_steps(prepared))
    rates = calibrate.cached(machine, job.dtype)
    if rates is None and say is not None and choose.make(job, machine).time.run_s >= CALIBRATE_FROM_S:
        rates = calibrate.ensure(machine, job.dtype, say=say)
    return job, make(job, machine, rates)


def correct_rates(plan: Plan, machine: Device, step_s: float | None) -> None:
    """Let a finished run correct this machine's rates, where nothing else ran beside it."""
    ran = usage.scheduled()
    if step_s is not None:
        calibrate.correct(machine, plan.compute_dtype, plan.time, step_s, ran.waited_share if ran else None)


def make_pace(
    prepared: Prepared, plan: Plan, job: Job, machine: Device, model: Model, tell: Callable[[str], None]
) -> Pace:
    """The split of the run's steps, and the way down from it."""
    where = choose.computes_in(machine)
    cards = len(machine.cards) if plan.placement == "split" else 1

    def need(tokens: int, recompute: Recompute) -> int:
        lines = peak.step_lines(job, peak.largest_micro_batch(job, tokens), recompute, where, cards)
        return sum(line.bytes for line in lines)

    return Pace(
        lengths=prepared.train.lengths,
        tokens=plan.max_tokens_per_micro_batch,
        examples_per_micro_batch=None if job.packed else 1,
        recompute=plan.recompute,
        policies=choose.POLICIES[choose.POLICIES.index(plan.recompute) :],
        need=need,
        apply=lambda recompute: recompute_as(model, recompute),
        tell=tell,
        ram_bytes=machine.ram_bytes,
        on_card=machine.kind == "cuda",
    )


def compared(
    plan: Plan, opened: Base, held: usage.Usage, seen: usage.Usage, run: Path, step_s: float | None
) -> Sequence[Compared]:
    """Planned beside measured, line by line where a line can be measured alone.

    Args:
        held: before the first step. seen: the highest private and file bytes seen while training. step_s: of a usual
            step.
    """
    lines = [Compared("base", opened.expected_bytes, opened.resident_bytes)]
    if plan.host_lines:
        lines.append(Compared("host memory", sum(line.bytes for line in plan.host_lines), seen.private))
    else:
        before = ["libraries", "compiler", "data", "adapters"] + ["base"] * (plan.placement == "resident")
        passing = (line.bytes for line in plan.lines if line.where != "file" and line.name not in (*before, "base"))
        lines += [
            Compared("before a micro-batch, private", sum(map(plan.line, before)), held.private),
            Compared("the longest micro-batch", sum(passing), max(0, seen.private - held.private)),
            Compared("private memory", plan.private_bytes, seen.private),
            Compared("pages of files", plan.file_bytes, seen.file),
        ]
    adapter = sum(line.bytes for line in plan.disk if line.name == "adapter")
    written = sum(file.stat().st_size for file in (run / "adapter").rglob("*") if file.is_file())
    lines.append(Compared("adapter on disk", adapter, written))
    if step_s is not None:
        lines.append(Compared("seconds a step", plan.time.step_s, step_s))
    return lines
