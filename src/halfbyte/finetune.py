"""The whole story on one page: recipe -> rows -> plan -> base -> adapters -> proofs -> train -> report.

Only this file (and `doctor.py` and the command line) tells the rooms about each other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import Signals

from halfbyte.adapters import lora, passport
from halfbyte.adapters.assembly import Assembled, assembled
from halfbyte.base import load, residual, stream
from halfbyte.base.store import supply
from halfbyte.base.tokenizer import check_vocabulary
from halfbyte.data import collate, pack, split
from halfbyte.distributed import agree, send, shard
from halfbyte.distributed import world as worlds
from halfbyte.distributed.launch import launched
from halfbyte.distributed.world import World
from halfbyte.errors import DataError, TrainError
from halfbyte.inference import evaluate, verify
from halfbyte.layers.kernels import pool
from halfbyte.objectives.objective import Objective
from halfbyte.plan import calibrate
from halfbyte.proofs import adapter, integers
from halfbyte.recipe.adapter import folder_of
from halfbyte.recipe.file import seen_from, to_yaml
from halfbyte.recipe.schema import Loaded, Recipe
from halfbyte.report import page
from halfbyte.report import start as beginning
from halfbyte.runs import checkpoint, crash, points
from halfbyte.runs import report as reporting
from halfbyte.runs.folder import DiskRetry, RunFolder, space_for, write_json
from halfbyte.system import accelerator, device, files, threads, usage
from halfbyte.system.libraries import versions
from halfbyte.training import fit, prepare, resuming
from halfbyte.training.callback import Follower, RunCallback
from halfbyte.training.events import Listener, StopRequest, stop_on_signals, without_a_terminal
from halfbyte.training.pace import Pace, recompute_as
from halfbyte.training.schedule import cadence, eval_every, micro_batches, plan_steps
from halfbyte.training.stopping import EarlyStopping
from halfbyte.training.trainer import Left, StepTrainer, training_arguments
from halfbyte.training.watch import spikes
from halfbyte.training.watch.witness import Witness
from halfbyte.types import Document


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `stopped_by` is the signal that ended it early, with a checkpoint of `step` written. `at_once`:
    in the middle of a step; then `step` is that of the last checkpoint, 0 for none."""

    run: Path
    report: Document
    step: int
    stopped_by: Signals | None = None
    at_once: bool = False

    @property
    def exit_code(self) -> int:
        """Of a process: as a shell has it after a signal; not 0 for an adapter that is of no use."""
        if self.stopped_by is not None:
            return 128 + self.stopped_by
        unmoved = (self.report.get("adapters") or {}).get("moved") == 0
        useless = unmoved or self.report["diverged"] or self.report["verified"]["ok"] is False
        return TrainError.exit_code if useless else 0


@dataclass(frozen=True)
class Ready:
    """Everything that the steps of a run need, known to be good. `held`: memory before the first step. `point`: where
    a resumed run goes on; `trained`: what its checkpoints and its adapter say that it was trained with."""

    job: fit.PlannedRun
    base: Assembled
    placed: stream.Placed
    pace: Pace
    steps: pack.Steps
    held_out: collate.Batches
    scores: Callable[[], dict[str, float]]
    held: usage.Usage
    settings: threads.ProcessSettings
    notices: Sequence[str]
    point: points.Point | None
    trained: Document
    compute: integers.Decision
    world: World
    shards: shard.Shards | None


def train(
    loaded: Loaded,
    *,
    resume: bool = False,
    force: bool = False,
    listener: Listener | None = None,
    world: World | None = None,
    objective: Objective | None = None,
) -> Outcome:
    """Fine-tune. Nothing is written before the model, the data and the adapters are known to be good.

    Args:
        resume: go on from the run's newest checkpoint; a finished run of which no more is asked stays as it is.
        force: go on also where base, tokenizer or chat template are not those of the checkpoint.
        world: the processes that train together; None for those that a launcher has started (`distributed.world`).
        objective: what is learned of the rows (`objectives/`); None for what the recipe asks for.

    Raises:
        HalfbyteError: a mistake in the recipe, the data or the model, before the run folder exists; TrainError after.
    """
    if world is None:
        with worlds.opened() as found:
            return train(loaded, resume=resume, force=force, listener=listener, world=found, objective=objective)
    tell, out = (listener if world.first else None) or Listener(), Path(loaded.recipe.output)
    machine = world.share(device.detect())
    with without_a_terminal():
        resume = world.goes_on(out, resume)
        begun = world.from_first(lambda: resuming.begin(loaded.recipe, resume=resume))
        if begun["report"] is not None:
            return Outcome(out, begun["report"], begun["report"]["steps"])
        point = resuming.point_of(begun["point"])
        if resume and point is None:
            tell.note("resume", "from the beginning: the run was ended before its first checkpoint")
        agree.check(world, points.values_that_train(loaded.recipe))
        ready = make_ready(loaded.recipe, machine, tell, point, force=force, world=world, objective=objective)
        if not world.first:
            return _followed(ready, out)
        local = ready.job.prepared.checkpoint.kind in ("folder", "gguf")
        kept = to_yaml(seen_from(loaded.recipe, out, model=local))
        beside = launched(world.agents)
        if resume and (point is None or point.changes(loaded.recipe)):
            beside["recipe.yaml"] = kept.encode()
        folder = RunFolder(out) if resume else RunFolder.create(out, kept, beside)
        for name, content in beside.items() if resume else ():
            files.write(out / name, content)
        return _trained(loaded, ready, folder, tell)


def _trained(loaded: Loaded, ready: Ready, folder: RunFolder, tell: Listener) -> Outcome:
    """Every step, and what a finished run leaves, in a folder that is this process's alone."""
    machine = ready.job.machine.to_json()
    noted = crash.reporting(folder, machine)
    with (
        folder.lock() as run,
        stop_on_signals(tell.stopping) as stop,
        page.at_end(run),
        noted,
        usage.Peak() as peak,
    ):
        try:
            room = DiskRetry(tell.warn, lambda: stop.signal is not None)
            room.write(lambda: keep_rows(loaded, ready, run))
            callback, ended = run_steps(ready, run, stop, tell)
            if ended.stopped_by is None and callback is not None:
                ended = Outcome(run.path, finish(ready, run, callback, peak, room), ended.step)
            shard.settle(ready.shards)
            return ended
        except KeyboardInterrupt:
            saved = [points.step_of(path) for path in points.checkpoints(run.checkpoints)]
            return Outcome(run.path, {}, max(saved, default=0), stop.signal or Signals.SIGINT, at_once=True)
        finally:
            ready.placed.remove()


def _followed(ready: Ready, out: Path) -> Outcome:
    """Every step, in a process that is not the first one: nothing of it is kept."""
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as folder, stop_on_signals() as stop:
        try:
            _, ended = run_steps(ready, RunFolder(Path(folder)), stop, Listener())
            shard.settle(ready.shards)
            return Outcome(out, {}, ended.step, ended.stopped_by)
        finally:
            ready.placed.remove()


def make_ready(
    recipe: Recipe,
    machine: device.Device,
    tell: Listener,
    point: points.Point | None = None,
    *,
    force: bool = False,
    world: World | None = None,
    objective: Objective | None = None,
) -> Ready:
    """Rows, plan, base, adapters and micro-batches; the longest of these runs once unless the plan leaves much free."""
    world = world or World()
    settings = threads.settle(machine.cores, world.env, sharing=world.sharing)
    tell.note("process", settings.line)
    for text in machine.notes:
        tell.note("machine", text)
    with world.node_first():
        job = fit.planned(recipe, machine, tell, ranks=world.size, objective=objective)
    if world.first:
        fit.check_disk(job.plan, Path(recipe.output))
    prepared, plan = job.prepared, job.plan
    if point is None:
        residual.look(prepared.checkpoint, prepared.config, prepared.recipe, job.modules)
    fingerprints = prepare.fingerprints(prepared)
    agree.check(world, {"rows": fingerprints, **fit.alike(job)})
    notices = resuming.check(point, recipe, prepared.objective, fingerprints, job.job.steps, tell) if point else []
    for name, why in plan.reasons.items():
        tell.note("plan", f"{name} {getattr(plan, name)}: {why}")
    dropped = "" if plan.host_lines else f"; {plan.peak_bytes / 1e9:.2f} GB with pages of files, which can be dropped"
    tell.note(
        "plan",
        f"peak memory about {plan.needed_bytes / 1e9:.2f} GB of {plan.available_bytes / 1e9:.1f} GB free{dropped}",
    )
    notices += [*prepare.notices(prepared), *(str(f) for f in prepared.findings if f.level != "ok"), *plan.warnings]
    start = folder_of(recipe.lora.adapter) if recipe.lora.adapter is not None and point is None else None
    placed, base = _assembled(job, tell, notices, start, fresh=point is None)
    belongs = resuming.belongs(job.prepared, base, notices, start, point, force=force)
    if said := agree.join(world, belongs, base.model, settings.threads):
        tell.note("world", said)
    recompute_as(base.model, plan.recompute)
    pace = fit.make_pace(job, base.model, lambda text: tell.note("memory", text), packed=base.packed.ok)
    examples = pace.examples_per_micro_batch
    steps, held_out = micro_batches(prepared, pace.tokens, examples, rank=world.rank, ranks=world.size)
    compute = fit.compute(job, base, plan_steps(prepared, pace.tokens, examples)[0], tell, notices)
    agree.check(world, {"compute": {"products": str(compute.products)}})
    for notice in notices:
        tell.note("note", notice)
    accelerator.reset_peaks()  # of a calibration and the proofs
    usage.trim()  # what the proofs and the opening of the base left, in the heap and in blocks of our own
    pool.POOL.give_back()
    scores = evaluate.of_run(job, base.model, pace.tokens)
    held = fit.rehearsed(job, base.model, pace, steps, held_out, tell)
    shards = shard.over(world, plan, base.model, tell.note)
    trained = points.trained_with(recipe, prepared.objective.name, fingerprints, belongs)
    kept = (settings, notices, point, trained, compute, world, shards)
    return Ready(job, base, placed, pace, steps, held_out, scores, held, *kept)


def _assembled(
    job: fit.PlannedRun, tell: Listener, notices: list[str], start: Path | None, *, fresh: bool
) -> tuple[stream.Placed, Assembled]:
    """The base where the plan wants it, with fresh adapters (or those of `start`) and proofs. What falls back is added
    to `notices`.

    Args:
        fresh: the adapters begin as the recipe says; else a checkpoint's weights take their place.
    """
    prepared, recipe, plan = job.prepared, job.prepared.recipe, job.plan
    base = load.open_base(
        prepared.checkpoint,
        recipe.quant,
        job.machine,
        trust_remote_code=recipe.trust_remote_code,
        device_map="split" if plan.placement == "split" else {"": job.machine.main},
        with_tokenizer=False,
        tell=supply.Tell(progress=tell.building, note=tell.note),
    )
    check_vocabulary(prepared.checkpoint, prepared.tokenizer, base.model)
    tell.note(
        "base",
        f"{prepared.checkpoint.id}: {recipe.quant.type}, {base.resident_bytes / 1e9:.3f} GB resident "
        f"({base.expected_bytes / 1e9:.3f} planned), computing in {base.compute_dtype} ({base.dtype_reason})",
    )
    tell.note("base", base.origin)
    factors = residual.ensure(base, recipe.lora, tell.note) if fresh else None
    placed, elsewhere = stream.place_as_planned(base.model, plan.placement, asked=recipe.quant.placement != "auto")
    notices += [f"placement: {elsewhere}"] if elsewhere else []
    tell.note("placement", f"{placed} ({elsewhere or plan.reasons['placement']})")
    made = assembled(base, recipe, start=start, factors=factors, note=tell.note)
    if not made.packed.ok and recipe.data.packing == "stream":
        raise DataError(
            f"data.packing stream lays several texts end to end, and here that is not safe: {made.packed.reason}",
            fix="data.packing: rows",
        )
    tell.note("packing", f"{made.packed.mode}: {made.packed.reason}")
    tell.note("engine", made.engine)
    notices += [] if made.dequantised.ok else [f"base: {made.dequantised.reason}"]
    notices += [] if made.packed.ok else [f"packing: {made.packed.reason}"]
    notices += [] if made.fused.ok else [f"engine: {made.fused.reason}"]
    return placed, made


def keep_rows(loaded: Loaded, ready: Ready, run: RunFolder) -> None:
    """Write the plan, the rows that were held out, and what is known before the first step."""
    plan = {**ready.job.plan.to_json(), "steps": len(ready.steps), "tokens": ready.steps.tokens}
    write_json(run.plan, plan)
    with space_for(run.held_out):
        split.keep(ready.job.prepared.held_out, run.held_out)
    at = 0 if ready.point is None else ready.point.step
    beginning.write(run, partial(beginning.facts, run, loaded, ready.job, ready.base, ready.compute, ready.notices, at))


def run_steps(ready: Ready, run: RunFolder, stop: StopRequest, tell: Listener) -> tuple[RunCallback | None, Outcome]:
    """Every step, from the first or from a checkpoint, until the last or until a signal. The callback of the first
    process is what writes the run."""
    prepared, steps, point, world = ready.job.prepared, ready.steps, ready.point, ready.world
    recipe, model, base = prepared.recipe, ready.base.model, ready.base.base
    resume = None if point is None else send.checkpoint(world, point.path, run.path)
    if world.first:
        run.truncate_metrics(point.step if point is not None else 0)
        run.report.unlink(missing_ok=True)  # of the shorter run that goes on
    arguments = training_arguments(
        recipe.train if world.first else recipe.train.model_copy(update={"report_to": "none"}),
        folder=run.path,
        total_steps=len(steps),
        fp16=base.compute_dtype == "fp16",
        use_cpu=base.model.device.type == "cpu",
        eval_steps=eval_every(prepared),
    )
    trainer = StepTrainer(
        model,
        arguments,
        train_dataset=collate.StepDataset(prepared.train.examples, steps, prepared.objective.collate),
        eval_batches=ready.held_out,
        objective=prepared.objective,
        loraplus_lr_ratio=recipe.train.loraplus_lr_ratio,
        pace=ready.pace,
        world=world,
        shards=ready.shards,
    )
    agreed = stop if world.alone else StopRequest()  # of several processes none ends alone
    trainer.heard = lambda: setattr(agreed, "signal", agreed.signal or stop.signal or Signals.SIGTERM)
    callback = _writer(ready, run, trainer, agreed, tell, resume) if world.first else None
    trainer.add_callback(callback or Follower(trainer, agreed, resume))
    early = None
    if recipe.train.early_stopping_patience is not None:
        early = EarlyStopping(recipe.train, world.from_first(run.read_metrics))
        trainer.add_callback(early)
    trainer.scores = ready.scores
    # early stopping decides on the evaluation itself, so that one is always finished
    trainer.evaluating, trainer.stops = tell.evaluating, lambda: stop.signal is not None and early is None
    trainer.leaves = lambda: stop.signal is not None
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    except Left:
        if callback is not None:
            callback.leave()
    finally:
        if callback is not None:
            callback.writing.abandon()
        tell.end()
    at = trainer.state.global_step
    stopped_early = early is not None and early.stops and at < len(steps)
    if stopped_early and callback is not None:
        patience = recipe.train.early_stopping_patience
        callback.stopped_early = True
        callback.notices.append(f"stopped early at step {at} of {len(steps)}: no better evaluation in {patience}")
        tell.note("note", callback.notices[-1])
    stopped = agreed.signal if at < len(steps) and not stopped_early else None
    return callback, Outcome(run.path, {}, at, stopped)


def _writer(
    ready: Ready, run: RunFolder, trainer: StepTrainer, stop: StopRequest, tell: Listener, resume: Path | None
) -> RunCallback:
    """Who writes the run folder while it trains."""
    prepared, model = ready.job.prepared, ready.base.model
    source = prepared.checkpoint
    return RunCallback(
        trainer=trainer,
        run=run,
        listener=tell,
        cadence=cadence(prepared),
        # at full precision, so that a resumed run continues from the same numbers
        adapter=partial(lora.writer, model, base_id=source.id, revision=source.revision, dtype=None),
        stop=stop,
        best=checkpoint.Best.of(prepared.recipe, run) if prepared.evaluation is not None else None,
        trained=ready.trained,
        witness=Witness(prepared.objective, model, ready.base.packed.ok, shard.first_whole(ready.shards)),
        resume=resume,
    )


def save(ready: Ready, run: RunFolder, callback: RunCallback) -> int | None:
    """Save the adapter, the best one where evaluations chose it, with its passport, and what it says of some rows.
    Returns the step that was chosen."""
    callback.keep_late()
    prepared, model = ready.job.prepared, ready.base.model
    source, recipe, rows = prepared.checkpoint, prepared.recipe, run.read_metrics()
    best = callback.best if recipe.train.load_best_model_at_end else None
    step = None if best is None else best.step
    if best is not None and step is not None:
        lora.put_weights(model, best.folder)
        count = sum("eval_loss" in row for row in rows)
        callback.listener.note("adapter", f"the best of {count} evaluations, from step {step}")

    def beside(folder: Path) -> None:
        if prepared.chatml is not None:
            prepared.tokenizer.save_pretrained(folder)
        passport.write(folder, ready.trained, reporting.reached(rows, step))

    dtype = load.DTYPES[recipe.lora.save_dtype]
    lora.save(model, run.adapter, base_id=source.id, revision=source.revision, dtype=dtype, beside=beside)
    said = (prepared.evaluation or prepared.train).examples
    with space_for(run.proof):
        adapter.keep_logits(run.proof, model, said, lora.base_alone(model, []), dtype)
    return step


def finish(ready: Ready, run: RunFolder, callback: RunCallback, peak: usage.Peak, room: DiskRetry) -> Document:
    """Save the adapter and the report; returns the report. After a run of some length the adapter is opened once more,
    in a process of its own."""
    prepared, plan, machine = ready.job.prepared, ready.job.plan, ready.job.machine
    adapter_step = room.write(lambda: save(ready, run, callback))
    used, cards, rows = usage.process_memory(), accelerator.peaks(), run.read_metrics()
    on_card, timed = machine.on_card, plan.time.measured
    seen, step_s = usage.Usage(peak.private, peak.file), reporting.usual_seconds(rows)
    if step_s is not None and ready.world.alone:  # of several, the link's time is in it
        ran = usage.cpu_time()
        calibrate.correct(machine, plan.compute_dtype, plan.time, step_s, ran.waited_share if ran else None)
    report = reporting.build(
        rows,
        planned={
            "tokens": ready.steps.tokens,
            "steps": len(ready.steps),
            "train_seconds": plan.time.run_s if timed else None,
            "peak_rss_bytes": None if on_card else plan.peak_bytes,
            "peak_device_bytes": plan.allocated_bytes if on_card else None,
        },
        lines=fit.compared(plan, ready.base.base, ready.held, seen, run.path, step_s if timed else None, cards),
        peak_rss_bytes=used["peak_rss_bytes"],
        peak_device_bytes=used.get("peak_device_bytes"),
        adapter_step=adapter_step,
    )
    verified = verify.after(run.path, 0 if room.stops() else report["train_seconds"], plan, machine)
    if verified["ok"] is False:
        callback.listener.warn(f"the saved adapter does not say what it said when it was trained: {verified['seen']}")
    worse, diverged = reporting.got_worse(rows)
    if worse:
        callback.listener.warn(worse)
    report |= {
        "versions": versions(),
        "machine": {**machine.to_json(), "process": ready.settings.to_json()},
        "data": prepare.data_report(prepared),
        "diverged": diverged,
        "stopped_early": callback.stopped_early,
        "adapters": callback.moved,
        "compute": ready.compute.to_json(),
        "spikes": [{"step": row["step"], **row["spike"]} for row in rows if row.get("spike")],
        "verified": verified,
        "notices": [
            *([worse] if worse else []),
            *ready.notices,
            *callback.notices,
            *spikes.notice(rows),
            *(f"memory: {down}" for down in ready.pace.downs),
        ],
    }
    room.write(run.end_metrics)
    room.write(lambda: write_json(run.report, report))
    return report
