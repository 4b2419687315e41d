"""What the steps of a run need: an open model that is equipped to train as planned.

Cost: a proof of integer products, and the longest micro-batch once, where they are asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from halfbyte.data import collate, pack
from halfbyte.distributed import agree, shard
from halfbyte.distributed.shard import Shards
from halfbyte.distributed.world import World
from halfbyte.proofs import integers
from halfbyte.proofs.integers import Decision
from halfbyte.runs import points
from halfbyte.system.threads import ProcessSettings
from halfbyte.system.usage import Usage
from halfbyte.training import fit, pace, prepare, schedule
from halfbyte.training.comparison import Comparison, compare
from halfbyte.training.deadline import Schedule
from halfbyte.training.events import Listener
from halfbyte.training.fit import PlannedRun
from halfbyte.training.model import TrainingModel
from halfbyte.training.pace import Pace, StepRows
from halfbyte.training.preflight import RunStart
from halfbyte.types import Document


@dataclass(frozen=True)
class Setup:
    """Everything that the steps of a run and its report need, known to be good. Nothing of it is written yet."""

    start: RunStart
    world: World
    process: ProcessSettings
    run: PlannedRun
    model: TrainingModel
    shards: Shards | None
    pace: Pace
    steps: pack.Steps
    held_out: collate.Batches
    compute: Decision
    comparison: Comparison
    memory_before: Usage
    trained: Document  # what checkpoints and adapter say that they were trained with, as `points.trained_with` makes it
    notices: tuple[str, ...]
    began: float  # when the plan was made, by `time.monotonic`
    answer_scores: Callable[[], dict[str, float]] = dict  # scores of answers to the held-out rows, for each evaluation
    rollouts: StepRows | None = None  # of a run that writes what it learns from
    schedule: Schedule | None = None  # of a run that ends at a time, and of a probe
    is_probe: bool = False  # whether nothing but its losses is asked for

    @property
    def planned_steps(self) -> pack.Steps:
        """The steps that the run is expected to make."""
        return self.steps if self.schedule is None else replace(self.steps, total=self.schedule.expected)


def equip(
    run: PlannedRun, start: RunStart, world: World, process: ProcessSettings, model: TrainingModel, tell: Listener,
    began: float,
) -> Setup:  # fmt: skip
    """What an open model needs to train as planned."""
    plan, assembled = run.plan, model.assembled
    prepared = (run := fit.decide_sharing(run, assembled, tell)).prepared
    pace.recompute_as(assembled.model, plan.recompute)
    speed = fit.make_pace(run, assembled.model, lambda text: tell.note("memory", text), packed=assembled.packed.ok)
    limits = speed.tokens, speed.examples_per_micro_batch
    steps, held_out = schedule.micro_batches(prepared, *limits, rank=world.rank, ranks=world.size, padded=speed.padded)
    compute = fit.decide_compute(run, assembled, schedule.plan_steps(prepared, *limits)[0], tell)
    agree.check(world, {"shares": prepared.shares, "compute": {"products": str(compute.products)}})
    exact = prepared.recipe.quant.compute == "exact" or compute.products == integers.BOTH
    rows, learns = prepare.fingerprints(prepared), prepared.objective.name
    return Setup(
        start=start, world=world, process=process, run=run, model=model, pace=speed, steps=steps, held_out=held_out,
        compute=compute,
        comparison=compare(prepared, steps, plan, world, limits, assembled.base.store, compute.products),
        memory_before=fit.memory_before_steps(run, assembled.model, speed, steps, held_out, tell),
        shards=shard.over(world, plan, assembled.model, tell.note),
        trained=points.trained_with(start.recipe, learns, rows, model.belongs_to),
        notices=() if exact else (f"compute: {compute}",), began=began,
    )  # fmt: skip
