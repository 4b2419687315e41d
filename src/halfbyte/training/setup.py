"""What the steps of a run need: an open model that is equipped to train as planned.

Cost: a proof of integer products, and the longest micro-batch once, where they are asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from halfbyte.adapters import passport
from halfbyte.adapters.assembly import AdaptedBase, assemble, memory_of, take_off
from halfbyte.base import load, residual, stream
from halfbyte.base.config import check_vocabulary
from halfbyte.base.store import supply
from halfbyte.data import collate, pack
from halfbyte.data.encoding.chatml import chat_template
from halfbyte.distributed import agree, shard
from halfbyte.distributed.world import World
from halfbyte.errors import DataError
from halfbyte.layers import heads
from halfbyte.proofs.integers import Decision
from halfbyte.proofs.memory import Proofs
from halfbyte.recipe.task import CAUSAL_LM
from halfbyte.runs import points
from halfbyte.system.threads import ProcessSettings
from halfbyte.system.usage import Usage
from halfbyte.training import fit, pace, prepare, schedule
from halfbyte.training.comparison import Comparison, compare
from halfbyte.training.deadline import Schedule
from halfbyte.training.events import Listener
from halfbyte.training.pace import Pace, StepRows
from halfbyte.training.preflight import RunStart
from halfbyte.types import Document


@dataclass(frozen=True)
class TrainingModel:
    """A base with adapters that train. `notices`: what is not as the recipe or the plan had it."""

    assembled: AdaptedBase
    placed: stream.Placement
    belongs_to: Document
    """Base, quantiser, tokenizer and chat template that the adapters belong to, as `adapters.passport` makes it."""
    notices: tuple[str, ...]


def open_model(
    run: fit.PlannedRun, start: RunStart, tell: Listener, *, force: bool, before: TrainingModel | None = None,
    proofs: Proofs = "every",
) -> TrainingModel:  # fmt: skip
    """The base, with fresh adapters or those that the run begins with; a checkpoint's weights are put in later.

    Args:
        before: whose base is taken, without its adapters; None: it is opened.
        force: also where base, tokenizer or chat template are not those of the checkpoint; else that is an error. Of an
            adapter that the run begins with it is only noted.
        proofs: which of them are made.
    """
    recipe, tokenizer = run.prepared.recipe, run.prepared.tokenizer
    if before is None:
        base, placed, notices = _open_base(run, tell)
    else:
        base, placed = take_off(before.assembled), before.placed
        notices = list[str]()
    factors = residual.ensure(base, recipe.lora, tell.note) if start.point is None else None
    if before is None and recipe.task != CAUSAL_LM:
        names = [spec.name for spec in base.specs]
        heads.attach(base.model, *heads.wanted(run.prepared.objective), seed=recipe.train.seed, names=names)
    proofs = proofs if factors is None else "every"
    memory = memory_of(base, recipe, {"adapter": start.adapter}, proofs, placement=str(placed))
    model = assemble(base, recipe, start=start.adapter, factors=factors, memory=memory, note=tell.note)
    if not model.packed.ok and (recipe.data.packing == "stream" or run.prepared.train.examples.seconds() is not None):
        stream = recipe.data.packing == "stream"
        what = "data.packing stream" if stream else f"train.method {recipe.train.method}"
        raise DataError(
            f"{what} lays several texts end to end, and here that is not safe: {model.packed.reason}",
            fix="data.packing: rows" if stream else "train.method: sft on the better answers",
        )
    tell.note("packing", f"{model.packed.mode}: {model.packed.reason}")
    tell.note("engine", model.engine)
    notices += [] if model.dequantised.ok else [f"base: {model.dequantised.reason}"]
    notices += [] if model.packed.ok else [f"packing: {model.packed.reason}"]
    notices += [] if model.fused.ok else [f"engine: {model.fused.reason}"]
    belongs_to = passport.belongs_to(base, recipe.quant, tokenizer, chat_template(tokenizer, recipe.data))
    if start.point is not None and "belongs_to" in start.point.trained:
        differences = passport.differences(start.point.trained["belongs_to"], belongs_to)
        notices += passport.refuse(f"the checkpoint {start.point.path}", differences, force=force)
    if start.adapter is not None:
        notices += passport.check(start.adapter, belongs_to, force=True)
    return TrainingModel(model, placed, belongs_to, tuple(notices))


def _open_base(run: fit.PlannedRun, tell: Listener) -> tuple[load.Base, stream.Placement, list[str]]:
    """The base where the plan wants it, and what is not as the plan had it."""
    prepared, plan = run.prepared, run.plan
    recipe = prepared.recipe
    base = load.open_base(
        prepared.checkpoint,
        recipe.quant,
        run.machine,
        trust_remote_code=recipe.trust_remote_code,
        device_map="split" if plan.placement == "split" else {"": run.machine.main},
        tell=supply.Tell(progress=tell.building, note=tell.note),
    )
    check_vocabulary(prepared.checkpoint, prepared.tokenizer, base.model)
    tell.note(
        "base",
        f"{prepared.checkpoint.id}: {recipe.quant.type}, {base.resident_bytes / 1e9:.3f} GB resident "
        f"({base.expected_bytes / 1e9:.3f} planned), computing in {base.compute_dtype} ({base.dtype_reason})",
    )
    if base.origin != prepared.checkpoint.id:
        tell.note("base", base.origin)
    placed, elsewhere = stream.place_as_planned(base.model, plan.placement, asked=recipe.quant.placement != "auto")
    tell.note("placement", f"{placed} ({elsewhere or plan.reasons['placement']})")
    return base, placed, [f"placement: {elsewhere}"] if elsewhere else []


@dataclass(frozen=True)
class Setup:
    """Everything that the steps of a run and its report need, known to be good. Nothing of it is written yet."""

    start: RunStart
    world: World
    process: ProcessSettings
    run: fit.PlannedRun
    model: TrainingModel
    shards: shard.Shards | None
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
    run: fit.PlannedRun, start: RunStart, world: World, process: ProcessSettings, model: TrainingModel, tell: Listener,
    began: float,
) -> Setup:  # fmt: skip
    """What an open model needs to train as planned."""
    plan, assembled = run.plan, model.assembled
    prepared = (run := fit.decide_sharing(run, assembled, tell)).prepared
    pace.recompute_as(assembled.model, plan.recompute)
    speed = fit.make_pace(run, assembled.model, lambda text: tell.note("memory", text), packed=assembled.packed.ok)
    examples = speed.examples_per_micro_batch
    mine: Document = {"rank": world.rank, "ranks": world.size, "padded": speed.padded}
    steps = schedule.plan_steps(prepared, speed.tokens, examples, **mine)
    held_out = schedule.eval_batches(prepared, prepared.evaluation, plan.evaluation_tokens, examples, **mine)
    first = schedule.plan_steps(prepared, speed.tokens, examples)[0]
    compute = fit.decide_compute(run, assembled, first, tell, world)
    agree.check(world, {"shares": prepared.shares, "compute": {"products": str(compute.products)}})
    rows, learns = prepare.fingerprints(prepared), prepared.objective.name
    return Setup(
        start=start, world=world, process=process, run=run, model=model, pace=speed, steps=steps, held_out=held_out,
        compute=compute,
        comparison=compare(prepared, steps, plan, world, examples, assembled.base.store, compute.products),
        memory_before=fit.memory_before_steps(run, assembled.model, speed, steps, held_out, tell),
        shards=shard.over(world, plan, assembled.model, tell.note),
        trained=points.trained_with(start.recipe, learns, rows, model.belongs_to),
        notices=(f"compute: {compute}",) if any(not seen.ok for _, seen in compute.tried) else (), began=began,
    )  # fmt: skip
