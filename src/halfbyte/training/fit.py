"""The plan of a run from its real rows, and how the run obeys it: placement, recomputation, pace, and the comparison.

Cost: a few milliseconds; a calibration of this machine (seconds, once) before a run that takes minutes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte import plan as memory
from halfbyte.adapters.targets import Targets
from halfbyte.base import stream
from halfbyte.models import tensors
from halfbyte.models.sources.checkpoint import beside_bytes
from halfbyte.plan import calibrate, choose
from halfbyte.plan import peak as step
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

# A run that is thought to be shorter is not worth the seconds of a calibration.
CALIBRATE_FROM_S = 60.0
# A plan that takes no more of what is free need not be rehearsed: it would fit if it were wrong by a factor of four.
UNREHEARSED = 0.2


def job_of(prepared: Prepared, machine: Device, chosen: Targets, model: Any, *, packed: bool = True) -> memory.Job:
    """What the plan follows from. `model` gives the shapes where the checkpoint has no headers (pickled weights)."""
    recipe, found = prepared.recipe, prepared.checkpoint
    config = tensors.read_config(found.path)
    quantised = config.get("quantization_config") is not None
    if found.pickle or quantised:
        specs = [tensors.spec_of(name, tuple(p.shape), "BF16", config) for name, p in model.named_parameters()]
    else:
        specs = tensors.read_checkpoint(found.path)
    held_out = prepared.evaluation
    return memory.Job.of(
        recipe,
        specs,
        tensors.facts_of(config, specs),
        memory.Rows(
            prepared.train.lengths,
            prepared.train.labelled,
            held_out.lengths if held_out is not None else (),
        ),
        machine,
        targets=chosen.names,
        mappable=recipe.quant.quantises or None,
        packed=packed,
        steps=count_steps(prepared),
        beside_bytes=beside_bytes(found.path),
    )


def plan_of(
    prepared: Prepared, machine: Device, chosen: Targets, model: Any, say: Callable[[str], None] | None = None
) -> tuple[memory.Job, memory.Plan]:
    """The plan of a run with these targets, and what it follows from. `say`: the machine may be calibrated first."""
    job = job_of(prepared, machine, chosen, model)
    return job, memory.make(job, machine, rates_for(job, machine, say))


def rates_for(job: memory.Job, machine: Device, say: Callable[[str], None] | None = None) -> memory.Rates | None:
    """This machine's rates: the cached ones, or measured now if the run is long enough and `say` is given."""
    found = calibrate.cached(machine, job.dtype)
    if found is not None or say is None:
        return found
    if choose.make(job, machine).time.run_s < CALIBRATE_FROM_S:
        return None
    return calibrate.ensure(machine, job.dtype, say=say)


def place(model: Any, plan: memory.Plan, *, asked: bool) -> tuple[stream.Placed, str]:
    """Put the base where the plan says. One that does not lie in a file after all stays in memory, unless asked for.

    Returns:
        Where it is, and why if that is not the plan's.
    """
    wanted = plan.placement
    if wanted == "split":
        return stream.place(model, "resident"), ""
    if wanted != "resident" and not asked and not stream.is_mapped(model):
        return stream.place(
            model, "resident"
        ), f"planned {wanted}, but it does not lie in a file as it is computed with"
    return stream.place(model, wanted), ""


def make_pace(
    prepared: Prepared, plan: memory.Plan, job: memory.Job, machine: Device, model: Any, tell: Callable[[str], None]
) -> Pace:
    """The split of the run's steps, and the way down from it."""
    asked = choose.policies(job)[0]
    later = choose.POLICIES[choose.POLICIES.index(plan.recompute) + 1 :]
    where: Any = "device" if machine.kind == "cuda" else "private"
    cards = len(machine.cards) if plan.placement == "split" else 1

    def need(tokens: int, recompute: Recompute) -> int:
        lines = step.step_lines(job, step.largest_micro_batch(job, tokens), recompute, where, cards)
        return sum(line.bytes for line in lines)

    return Pace(
        lengths=prepared.train.lengths,
        tokens=plan.max_tokens_per_micro_batch,
        examples_per_micro_batch=None if job.packed else 1,
        recompute=plan.recompute,
        policies=(plan.recompute, *later) if asked else (plan.recompute,),
        need=need,
        apply=lambda recompute: recompute_as(model, recompute),
        tell=tell,
        ram_bytes=machine.ram_bytes,
        on_card=machine.kind == "cuda",
    )


def compared(
    plan: memory.Plan, opened: Base, held: usage.Usage, peak: usage.Usage, run: Path, step_s: float | None
) -> Sequence[Compared]:
    """Planned beside measured, line by line where a line can be measured alone.

    Args:
        held: before the first step. peak: the highest private and file bytes seen while training. step_s: of a usual
            step.
    """
    planned_held = sum(plan.line(name) for name in ("libraries", "data", "adapters"))
    passing = (
        "first micro-batch", "adapters' copies", "optimiser", "gradients", "activations", "backward of a layer",
        "dequantised weight", "logits",
    )  # fmt: skip
    found = [Compared("base", opened.expected_bytes, opened.resident_bytes)]
    if plan.host_lines:
        host = sum(line.bytes for line in plan.host_lines)
        found.append(Compared("host memory", host, peak.private))
    else:
        resident = plan.line("base") if plan.placement == "resident" else 0
        found += [
            Compared("before a micro-batch, private", planned_held + resident, held.private),
            Compared(
                "the longest micro-batch",
                sum(plan.line(n) for n in (*passing, "allocator")),
                max(0, peak.private - held.private),
            ),
            Compared("private memory", plan.private_bytes, peak.private),
            Compared("pages of files", plan.file_bytes, peak.file),
        ]
    disk = {line.name: line.bytes for line in plan.disk}
    found.append(Compared("adapter on disk", disk.get("adapter", 0), _bytes_below(run / "adapter")))
    if step_s is not None:
        found.append(Compared("seconds a step", plan.time.step_s, step_s))
    return found


def _bytes_below(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0
