"""A run as far as it is known before a weight is loaded: its rows, the layers that get an adapter, and its plan; how it
obeys that plan, and what was measured beside it.

Why: a run, its dry run and `data check` must say the same.
Cost: tokenising, and the shapes of the model; before a run of minutes a calibration of this machine (seconds, once),
and before the first run its kernels.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from halfbyte.adapters import lora
from halfbyte.adapters.assembly import AdaptedBase
from halfbyte.adapters.targets import Targets
from halfbyte.base.load import Base
from halfbyte.data import collate, pack
from halfbyte.distributed import shard
from halfbyte.distributed.world import World
from halfbyte.errors import RunError
from halfbyte.layers import heads, packing
from halfbyte.layers.kernels.cpu import ahead
from halfbyte.models.structure import meta_model
from halfbyte.models.tensors import read_checkpoint
from halfbyte.objectives.objective import Objective
from halfbyte.plan import Job, Plan, calibrate, choose, memory
from halfbyte.plan.job import ATTENTION_NEEDS
from halfbyte.plan.result import POOL_RESERVE, RESERVE, Recompute
from halfbyte.plan.timing import compiling
from halfbyte.proofs import integers
from halfbyte.proofs.integers import Decision
from halfbyte.proofs.memory import RememberedProofs
from halfbyte.proofs.sharing import prove_sharing
from halfbyte.recipe.adapter_folder import PASSPORT
from halfbyte.recipe.schema import Recipe
from halfbyte.runs.folder import ANOTHER
from halfbyte.runs.report import MeasuredLine
from halfbyte.system import files, kernel_cache, usage
from halfbyte.system.device import Device, compute_dtype, may_use_integers
from halfbyte.training.events import Listener
from halfbyte.training.forecast import LOOKED_AT, asks_theirs, check_steps, job_of, plan_of, settle, sharing_note
from halfbyte.training.pace import Pace, give_back, recompute_as, rehearse
from halfbyte.training.prepare import Prepared, data_note, prepare
from halfbyte.training.schedule import count_steps, plan_steps
from halfbyte.types import Document, Model

# A run that is thought to be shorter is not worth the seconds of a calibration.
CALIBRATE_FROM_S = 15.0
# A plan that takes no more of what is free need not be rehearsed: it would fit if it were wrong by a factor of four.
UNREHEARSED = 0.2


@dataclass(frozen=True)
class PlannedRun:
    """`modules` are the full names of the layers that get an adapter; the plan follows from `job`."""

    prepared: Prepared
    machine: Device
    targets: Targets
    modules: list[str]
    job: Job
    plan: Plan
    foreign_bytes: int = 0
    """What this process held before, beyond what libraries take: of a program that halfbyte is a part of."""

    def computed_tokens(self, steps: pack.Steps) -> int:
        """Of the tokens of all steps those that are computed, as planned."""
        share = self.job.computed_share(steps.max_tokens_per_micro_batch) if self.prepared.shares else 1.0
        return round(steps.tokens * share)


def plan_run(
    recipe: Recipe, machine: Device, listener: Listener | None = None, *, ranks: int = 1,
    objective: Objective | None = None, done: int = 0,
) -> PlannedRun:  # fmt: skip
    """Prepare a run and plan it. Only with a `listener` may the machine be calibrated first.

    Args:
        ranks: processes that share the rows of a step; the plan is one's.
        objective: None for the loss of a causal LM. done: steps that earlier processes have made.
    """
    shard.check(recipe, ranks)
    compiled = _begin_to_compile(recipe, machine, listener) if listener is not None else lambda: None
    return with_plan(prepare(recipe, objective), machine, listener, ranks=ranks, done=done, compiled=compiled)


def _begin_to_compile(recipe: Recipe, machine: Device, tell: Listener) -> Callable[[], None]:
    """Compile the kernels of most models beside reading the rows, where they are not there. Returns what waits."""
    dtype, _ = compute_dtype(machine, recipe.quant.compute_dtype)
    if machine.kind != "cpu" or dtype not in ATTENTION_NEEDS:
        return lambda: None
    attention, eight = ATTENTION_NEEDS[dtype] in machine.isa, may_use_integers(machine, dtype, recipe.quant.compute)
    missing = kernel_cache.uncompiled(dtype, attention=attention, integers=eight)
    if missing:
        tell.note("machine", compiling(missing))
    return ahead.begin(missing, machine.cores, dtype)


def with_plan(
    prepared: Prepared, machine: Device, listener: Listener | None = None, *, ranks: int = 1, done: int = 0,
    compiled: Callable[[], None] = lambda: None,
) -> PlannedRun:  # fmt: skip
    """The plan of rows that are prepared already; `compiled` waits for kernels. The rest as of `plan_run`."""
    recipe, tell = prepared.recipe, listener or Listener()
    check_steps(total := count_steps(prepared))
    if asks_theirs(recipe.train):
        from halfbyte.training.trainer import check_arguments

        check_arguments(recipe.train, total_steps=total)
    tell.note("data", data_note(prepared))
    for finding in prepared.findings:
        tell.note("data", finding.line)
    compiled()
    meta = meta_model(prepared.config, trust_remote_code=recipe.trust_remote_code)
    if (head := heads.wanted(prepared.objective))[0]:
        names = [] if prepared.checkpoint.pickle else [s.name for s in read_checkpoint(prepared.checkpoint.path)]
        drawn = heads.attach(meta, *head, seed=0, names=names)
        recipe = recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"modules_to_save": drawn})})
        prepared = replace(prepared, recipe=recipe)
    targets, modules = lora.choose_targets(meta, recipe.lora)
    job_for = partial(job_of, machine=machine, model=meta, targets=targets.names, ranks=ranks, done=done)
    prepared, job = settle(prepared, machine, job_for)
    rates = calibrate.cached(machine, job.dtype)
    if rates is None and listener is not None and choose.best_plan(job, machine).time.run_s >= CALIBRATE_FROM_S:
        rates = calibrate.ensure(machine, job.dtype, say=partial(tell.note, "machine"))
    plan = plan_of(prepared, job, machine, rates)
    tell.note("shared", sharing_note(prepared, job, plan, machine))
    foreign = max(0, usage.now().private - plan.line("libraries"))
    return PlannedRun(prepared, machine, targets, modules, job, plan, foreign)


def decisions(run: PlannedRun) -> Document:
    """What every process of a run must have decided alike, beside recipe, rows and base. JSON."""
    return {
        "compute_dtype": run.job.dtype,
        "objective": run.prepared.objective.name,
        "steps": run.job.steps,
        "trained": run.job.trainable,
        "adapters": len(run.modules),
        "sharded": run.plan.placement == shard.PLACEMENT,
        "shares": run.prepared.shares,
    }


def announce(plan: Plan, tell: Listener, *, timed: bool = False) -> None:
    """Say what was planned; of a run in a given time, `timed`, but for its time."""
    for name, why in plan.reasons.items():
        tell.note("plan", f"{name} {getattr(plan, name)}: {why}")
    tell.note("plan", f"memory {plan.memory_line}")
    if not timed:
        tell.note("plan", f"time {plan.time.line}")


def check_disk(plan: Plan, output: Path) -> None:
    """Refuse a run whose checkpoints and adapters do not fit on its disk (RunError). What a run that is resumed has
    written counts as room; the base's store is checked where it is built."""
    need = sum(line.bytes for line in plan.disk if line.name != "base store")
    written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    free = files.free_bytes(output)
    if need > free + written:
        raise RunError(
            f"no space left for the run {output}: its checkpoints and adapter take {need / 1e9:.3f} GB, and "
            f"{free / 1e9:.3f} GB are free.",
            fix=f"free some space, {ANOTHER}, or keep fewer checkpoints (train.save_total_limit)",
        )


def make_pace(run: PlannedRun, model: Model, tell: Callable[[str], None], *, packed: bool) -> Pace:
    """The split of the run's steps, and the way down from it. `packed`: examples may share a micro-batch."""
    job, plan = replace(run.job, packed=packed), run.plan
    machine = run.machine
    where = choose.compute_memory(machine)
    cards = len(machine.cards) if plan.placement == "split" else 1

    @cache
    def need(tokens: int, recompute: Recompute) -> int:
        lines = memory.step_lines(job, memory.largest_micro_batch(job, tokens), recompute, where, cards)
        return sum(line.bytes for line in lines)

    return Pace(
        lengths=run.prepared.train.lengths, tokens=plan.max_tokens_per_micro_batch,
        examples_per_micro_batch=None if packed else 1, padded=packing.installed(model) == "rows",
        longest=plan.tokens_in_micro_batch,
        recompute=plan.recompute, policies=choose.step_down_policies(job, plan.recompute), need=need,
        apply=lambda recompute: recompute_as(model, recompute), tell=tell, ram_bytes=machine.ram_bytes,
        on_card=machine.on_card, ids=run.prepared.ids_of(run.prepared.train),
        limit=None if plan.host_lines else usage.limit(plan.private_bytes + run.foreign_bytes, plan.file_bytes),
    )  # fmt: skip


def memory_before_steps(
    run: PlannedRun, model: Model, pace: Pace, steps: pack.Steps, held_out: collate.Batches, tell: Listener
) -> usage.Usage:
    """Memory before the first step, after the longest micro-batch has run once unless the plan leaves much free."""
    plan, longest = run.plan, steps.longest_micro_batch()
    if plan.needed_bytes <= UNREHEARSED * plan.available_bytes or not longest:
        tell.note("rehearsed", f"nothing: {plan.needed_bytes / 1e9:.2f} GB are planned, a small part of what is free")
        return usage.now()
    objective = run.prepared.objective
    batches = collate.Batches(run.prepared.train.examples, (), run.prepared.lay_out)
    rehearsal = rehearse(objective, model, pace, longest, batches.of, held_out)
    before = rehearsal.memory_before
    took = f"{rehearsal.micro_batch_bytes / 1e9:.2f} GB above {before.private / 1e9:.2f} GB held"
    tell.note("rehearsed", f"{rehearsal.tokens} tokens, the longest micro-batch, in {rehearsal.seconds:.1f} s: {took}")
    return before


def compare(
    plan: Plan, base: Base, memory_before: usage.Usage, peak: usage.Usage, run: Path, step_s: float | None,
    on_cards: Sequence[tuple[int, int]] = (),
) -> Sequence[MeasuredLine]:  # fmt: skip
    """Planned beside measured, line by line where a line can be measured alone.

    Args:
        memory_before: what was used before the first step. peak: the highest private and file bytes seen while
            training. step_s: of a usual step. on_cards: (allocated, reserved) bytes of each at their peak.
    """
    lines = [MeasuredLine("base", base.expected_bytes, base.resident_bytes)]
    if plan.host_lines:
        lines.append(MeasuredLine("host memory", sum(line.bytes for line in plan.host_lines), peak.private))
        allocated, reserved = max(on_cards, default=(0, 0))
        lines.append(MeasuredLine("tensors on a card", plan.allocated_bytes, allocated))
        lines.append(MeasuredLine("held by torch on a card", plan.allocated_bytes + plan.line("allocator"), reserved))
    else:
        before = ["libraries", "compiler", "data", "adapters"] + ["base"] * (plan.placement == "resident")
        others = (*before, "base", RESERVE, POOL_RESERVE)
        passing = (line.bytes for line in plan.lines if line.where != "file" and line.name not in others)
        lines += [
            MeasuredLine("before a micro-batch, private", sum(map(plan.line, before)), memory_before.private),
            MeasuredLine("the longest micro-batch", sum(passing), max(0, peak.private - memory_before.private)),
            MeasuredLine("private memory", plan.private_bytes, peak.private),
            MeasuredLine("pages of files", plan.file_bytes, peak.file),
        ]
    adapter = sum(line.bytes for line in plan.disk if line.name == "adapter")
    files_of = (file for file in (run / "adapter").rglob("*") if file.is_file() and file.name != PASSPORT)
    written = sum(file.stat().st_size for file in files_of)
    lines.append(MeasuredLine("adapter on disk", adapter, written))
    if step_s is not None:
        lines.append(MeasuredLine("seconds a step", plan.time.step_s, step_s))
    return lines


def decide_sharing(run: PlannedRun, base: AdaptedBase, tell: Listener) -> PlannedRun:
    """The run as it is after the proof on its own rows, those of a step that have the most in common."""
    prepared = run.prepared
    if not prepared.shares:
        return run
    examples, shared = prepared.train.examples, prepared.train.shared
    if prepared.recipe.train.draws:  # two answers to one prompt: the expected one, and it backwards
        row = max(examples[:LOOKED_AT], key=lambda row: len(row.prompt_ids))
        alike = [row, replace(row, input_ids=row.prompt_ids + row.input_ids[: len(row.prompt_ids) - 1 : -1])]
    elif shared is not None:
        alike = examples[int(shared.argmax())].texts
    else:
        steps = plan_steps(prepared, 1, 1)
        index = max(range(min(len(steps), LOOKED_AT)), key=lambda i: max(steps.tree(i).shared))
        rows = steps.rows(index)
        alike = [examples[rows[place]] for place in steps.tree(index).alike()]
    if shared is not None and not shared.any():
        return replace(run, prepared=prepared.apart)
    proof = prove_sharing(base.model, alike, base.memory)
    tell.note("shared", proof.reason)
    return run if proof.ok else replace(run, prepared=prepared.apart)


def decide_compute(run: PlannedRun, base: AdaptedBase, step: pack.Step, tell: Listener, world: World) -> Decision:
    """How the frozen products are computed; proven on some rows of the first step where that is not exact. All
    processes take what the slowest or roughest of them can."""
    train, objective = run.prepared.train, run.prepared.objective
    asks, how = run.prepared.recipe.train, str(run.prepared.recipe.quant.compute)
    if how == "exact":
        return integers.decide(base.model, how, {})
    if asks.draws or asks.referenced:
        how = "gradient"  # answers are written, and a reference is read, by exact products: so the forward is
    give_back()  # what opening the base left, and code of libraries: the proof runs a micro-batch
    examples = [train.examples[row] for row in integers.rows_for_proof(step, train.lengths, packed=base.packed.ok)]
    about = hashlib.sha256(repr([how, objective, asks.seed, examples]).encode()).hexdigest()
    ours = world.alone and type(objective).__module__.startswith("halfbyte.")  # another's code may have changed
    memory, least = base.memory if ours else RememberedProofs(), lambda value: min(world.gather(value))
    proof = partial(integers.decide, base.model, how, objective.collate(examples), objective.loss, least)
    decision = integers.decide_once(base.model, memory, about, proof)
    tell.note("compute", str(decision))
    return decision
