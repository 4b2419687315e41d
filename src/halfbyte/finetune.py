"""The whole story on one page: recipe -> source -> data -> plan -> base -> adapters -> proof -> train -> report.

Only this room (and `cli.py`) tells the other rooms about each other. Each function below is a chapter.
"""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte import plan as memory
from halfbyte.adapters import lora, targets
from halfbyte.base import load, store
from halfbyte.data import collate, pack
from halfbyte.errors import DataError
from halfbyte.layers import fuse, loss, packing
from halfbyte.layers.fused_proof import prove_fused
from halfbyte.models import structure
from halfbyte.models.structure import meta_model
from halfbyte.recipe.file import to_yaml
from halfbyte.recipe.schema import Loaded, Origin, rows
from halfbyte.runs import checkpoint
from halfbyte.runs import report as reporting
from halfbyte.runs.folder import RunFolder
from halfbyte.system import device, threads, usage
from halfbyte.system.versions import versions
from halfbyte.training import callback as callbacks
from halfbyte.training import fit
from halfbyte.training.callback import Listener, RunCallback, Silent, StopRequest, stop_on_signals
from halfbyte.training.pace import Pace, Rows, recompute_as, rehearse
from halfbyte.training.prepare import Prepared, data_note, data_report, prepare
from halfbyte.training.prepare import notices as data_notices
from halfbyte.training.schedule import best, cadence, count_steps, eval_every, plan_steps
from halfbyte.training.trainer import StepTrainer, check_arguments, training_arguments

if TYPE_CHECKING:
    from halfbyte.data.encoding.examples import Examples


@dataclass(frozen=True)
class Resolution:
    """What `train --dry-run` shows: each value with its origin, then what follows from the values.

    Args:
        notes: labels and texts. warnings: of the recipe; the plan has its own.
    """

    rows: list[tuple[str, Any, Origin]]
    notes: tuple[tuple[str, str], ...]
    plan: memory.Plan
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        values = {field: {"value": value, "from": o.kind, "why": o.why} for field, value, o in self.rows}
        notes = [{"label": label, "text": text} for label, text in self.notes]
        return {"values": values, "notes": notes, "plan": self.plan.to_json(), "warnings": self.warnings}


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `stopped_by` is the number of the signal that ended it early, with a checkpoint written."""

    run: Path
    report: dict[str, Any]
    step: int
    stopped_by: int | None = None

    @property
    def signal_name(self) -> str:
        return signal.Signals(self.stopped_by).name if self.stopped_by is not None else ""


def resolve(loaded: Loaded) -> Resolution:
    """Resolve every `auto` without loading a weight; the data is read, since the plan follows from its lengths."""
    recipe, machine = loaded.recipe, device.detect()
    prepared = prepare(recipe)
    recipe = prepared.recipe
    check_arguments(recipe.train, total_steps=count_steps(prepared))
    found = prepared.checkpoint
    model = meta_model(prepared.config, trust_remote_code=recipe.trust_remote_code)
    chosen, modules = lora.choose_targets(model, recipe.lora)
    _, plan = fit.plan_of(prepared, machine, chosen, model)
    auto: dict[str, tuple[Any, str]] = {
        "quant.compute_dtype": device.compute_dtype(machine, recipe.quant.compute_dtype),
        "lora.target_modules": (chosen.names, chosen.reason),
        "train.gradient_checkpointing": (plan.gradient_checkpointing, plan.reasons["recompute"]),
        "quant.placement": (plan.placement, plan.reasons["placement"]),
        "train.max_tokens_per_micro_batch": (
            plan.max_tokens_per_micro_batch,
            plan.reasons["max_tokens_per_micro_batch"],
        ),
    }
    if prepared.chatml is not None:
        auto["lora.trainable_token_indices"] = (recipe.lora.trainable_token_indices, prepared.chatml.notice)
    resolved = []
    for field, value, origin in rows(loaded):
        if field in auto and auto[field][0] != value:
            shown, why = auto[field]
            resolved.append((field, shown, Origin("auto", why.removeprefix("auto: "))))
        else:
            resolved.append((field, value, origin))
    revision = f" at {found.revision}" if found.revision else ""
    trainable = targets.lora_parameter_count(model, modules, recipe.lora.r, recipe.lora.rank_pattern)
    notes = (
        ("model", f"{found.id}{revision}"),
        ("data", f"{data_note(prepared)}; {count_steps(prepared)} steps of {recipe.train.rows_per_step} rows"),
        *(("data", finding.line) for finding in prepared.findings),
        ("adapters", f"on {len(modules)} modules, {trainable:,} parameters train"),
    )
    return Resolution(resolved, notes, plan, loaded.warnings)


def train(loaded: Loaded, *, resume: bool = False, listener: Listener | None = None) -> Outcome:
    """Fine-tune. Nothing is written before the model, the data and the adapters are known to be good.

    Raises:
        HalfbyteError: a mistake in the recipe, the data or the model, before the run folder exists; TrainError after.
    """
    tell = listener or Silent()
    recipe, out = loaded.recipe, Path(loaded.recipe.output)
    machine = device.detect()
    if resume:
        checkpoint.newest(RunFolder.open(out, need_adapter=False).checkpoints)
    else:
        RunFolder.check_free(out)
    settings = threads.settle(machine.cores)
    tell.note("process", settings.line)
    prepared = prepare(recipe)
    recipe = prepared.recipe
    check_arguments(recipe.train, total_steps=count_steps(prepared))
    notices = [*data_notices(prepared), *(str(f) for f in prepared.findings if f.level != "ok")]
    tell.note("data", data_note(prepared))
    for finding in prepared.findings:
        tell.note("data", finding.line)
    meta = meta_model(prepared.config, trust_remote_code=recipe.trust_remote_code)
    chosen, _ = lora.choose_targets(meta, recipe.lora)
    job, plan = fit.plan_of(prepared, machine, chosen, meta, say=lambda text: tell.note("machine", text))
    for name, why in plan.reasons.items():
        tell.note("plan", f"{name} {getattr(plan, name)}: {why}")
    tell.note("plan", f"peak memory about {plan.peak_bytes / 1e9:.2f} GB of {plan.available_bytes / 1e9:.1f} GB free")
    notices += plan.warnings
    opened = load.open_base(
        prepared.checkpoint,
        recipe.quant,
        machine,
        trust_remote_code=recipe.trust_remote_code,
        device_map="auto" if plan.placement == "split" else {"": 0},
        with_tokenizer=False,
        tell=store.Tell(progress=tell.building, note=tell.note),
    )
    load.check_vocabulary(prepared.checkpoint, prepared.tokenizer, opened.model)
    tell.note(
        "base",
        f"{prepared.checkpoint.id}: {recipe.quant.type}, {opened.resident_bytes / 1e9:.3f} GB resident "
        f"({opened.expected_bytes / 1e9:.3f} planned), computing in {opened.compute_dtype} ({opened.dtype_reason})",
    )
    tell.note("base", opened.origin)
    placed, elsewhere = fit.place(opened.model, plan, asked=recipe.quant.placement != "auto")
    notices += [f"placement: {elsewhere}"] if elsewhere else []
    tell.note("placement", f"{placed} ({elsewhere or plan.reasons['placement']})")
    chosen, _ = lora.choose_targets(opened.model, recipe.lora)
    model = lora.add(opened.model, recipe.lora, chosen, seed=recipe.train.seed)
    tell.note("adapters", f"{lora.summary(model)} ({chosen.reason})")
    with structure.shallow(model):
        proof = packing.prove(model)
        fused = prove_fused(model, packed=proof.ok)
        loss.head_of(model)
    # on the layers that the proofs have not seen too
    engine = f"{fuse.install(model)}; {fused.reason}" if fused.ok else fused.reason
    if not fused.ok:
        fuse.remove(model)
    if not proof.ok and recipe.data.packing == "stream":
        raise DataError(
            f"data.packing stream lays several texts end to end, and here that is not safe: {proof.reason}",
            fix="data.packing: rows",
        )
    notices += [] if proof.ok else [f"packing: {proof.reason}"]
    tell.note("packing", f"{proof.mode}: {proof.reason}")
    notices += [] if fused.ok else [f"engine: {fused.reason}"]
    tell.note("engine", engine)
    for notice in notices:
        tell.note("note", notice)
    recompute_as(model, plan.recompute)
    split_job = replace(job, packed=proof.ok)
    pace = fit.make_pace(prepared, plan, split_job, machine, model, lambda text: tell.note("memory", text))
    micro_batches = MicroBatches.of(prepared, pace)
    rehearsed = None
    if plan.needed_bytes <= fit.UNREHEARSED * plan.available_bytes:
        tell.note("rehearsed", f"nothing: {plan.needed_bytes / 1e9:.2f} GB are planned, a small part of what is free")
    else:
        rehearsed = rehearse(
            model, pace, micro_batches.steps.longest_micro_batch(), micro_batches.batch, micro_batches.held_out
        )
        tell.note(
            "rehearsed",
            f"{rehearsed.tokens} tokens, the longest micro-batch, in {rehearsed.seconds:.1f} s: "
            f"{rehearsed.micro_batch_bytes / 1e9:.2f} GB above {rehearsed.held.private / 1e9:.2f} GB held",
        )
    held = rehearsed.held if rehearsed else usage.now()
    folder = RunFolder.reopen(out) if resume else RunFolder.create(out, to_yaml(loaded.recipe))
    with folder as run, stop_on_signals() as stop, usage.Peak() as peak:
        story = _Story(
            run,
            prepared,
            opened,
            model,
            plan,
            pace,
            micro_batches,
            held,
            peak,
            machine,
            settings,
            tell,
            stop,
            tuple(notices),
        )
        try:
            return story.tell_it(resume=resume)
        finally:
            placed.remove()


@dataclass
class _Story:
    """The training itself, once everything it needs is known to be good."""

    run: RunFolder
    prepared: Prepared
    opened: load.Base
    model: Any
    plan: memory.Plan
    pace: Pace
    micro_batches: MicroBatches
    held: usage.Usage  # before the first step
    peak: usage.Peak
    machine: device.Device
    settings: threads.Settings
    tell: Listener
    stop: StopRequest
    notices: tuple[str, ...]

    def tell_it(self, *, resume: bool) -> Outcome:
        recipe, run = self.prepared.recipe, self.run
        steps, held_out = self.micro_batches.steps, self.prepared.evaluation
        planned = {**self.plan.to_json(), "steps": len(steps), "tokens": steps.tokens}
        run.write_plan(planned)
        point = checkpoint.newest(run.checkpoints) if resume else None
        if point is not None:
            run.truncate_metrics(checkpoint.step_of(point))
        callback = RunCallback(
            run=run,
            listener=self.tell,
            cadence=cadence(
                recipe, len(steps), math.ceil(len(self.prepared.train.examples) / recipe.train.rows_per_step)
            ),
            write_adapter=self.write_adapter,
            stop=self.stop,
            best=best(recipe, run) if held_out is not None else None,
            resume=point,
        )
        trainer = StepTrainer(
            self.model,
            training_arguments(
                recipe.train,
                folder=run.path,
                total_steps=len(steps),
                fp16=self.opened.compute_dtype == "fp16",
                use_cpu=self.opened.device.type == "cpu",
                eval_steps=eval_every(recipe, len(self.prepared.train.examples)) if held_out is not None else 0,
            ),
            train_dataset=collate.StepDataset(self.prepared.train.examples, steps),
            eval_batches=self.micro_batches.held_out,
            loraplus_lr_ratio=recipe.train.loraplus_lr_ratio,
            callbacks=[callback],
            pace=self.pace,
        )
        trainer.where_rows = lambda step: _rows_note(self.prepared.train.examples, step)
        callback.trainer = trainer
        try:
            trainer.train(resume_from_checkpoint=str(point) if point is not None else None)
        finally:
            self.tell.end()
        if self.stop.signal is not None and trainer.state.global_step < len(steps):
            return Outcome(run.path, {}, trainer.state.global_step, self.stop.signal)
        return self.finish(callback, steps)

    def finish(self, callback: RunCallback, steps: pack.Steps) -> Outcome:
        """Save the adapter (the best one where evaluations chose it) and the report."""
        recipe, run = self.prepared.recipe, self.run
        chosen = callback.best if recipe.train.load_best_model_at_end else None
        if chosen is not None and chosen.step is not None:
            lora.put_weights(self.model, chosen.folder)
            self.tell.note("adapter", f"the best of {len(callback.evals)} evaluations, from step {chosen.step}")
        found = self.prepared.checkpoint
        dtype = load.DTYPES[recipe.lora.save_dtype]
        lora.save(
            self.model,
            run.adapter,
            base_id=found.id,
            revision=found.revision,
            dtype=dtype,
            tokenizer=self.prepared.tokenizer if self.prepared.chatml is not None else None,
        )
        used = callbacks.process_memory()
        on_card, timed = bool(self.machine.cards), self.plan.time.measured
        peak = usage.Usage(self.peak.private, self.peak.file)
        rows = run.read_metrics()
        step_s = reporting.usual_seconds(rows)
        report = reporting.build(
            rows,
            planned=reporting.Figures(
                tokens=steps.tokens,
                steps=len(steps),
                train_seconds=self.plan.time.run_s if timed else None,
                peak_rss_bytes=None if on_card else self.plan.peak_bytes,
                peak_device_bytes=self.plan.peak_bytes if on_card else None,
            ),
            lines=fit.compared(self.plan, self.opened, self.held, peak, run.path, step_s if timed else None),
            peak_rss_bytes=used["peak_rss_bytes"],
            peak_device_bytes=used.get("peak_device_bytes"),
            versions=versions(),
            machine={**self.machine.to_json(), "process": self.settings.to_json()},
            data=data_report(self.prepared),
            notices=(*self.notices, *(f"memory: {down}" for down in self.pace.downs)),
            adapter_step=None if chosen is None else chosen.step,
        ).to_json()
        run.write_report(report)
        return Outcome(run.path, report, len(steps))

    def write_adapter(self, folder: Path) -> None:
        """PEFT's two files at full precision, so that a resumed run continues from the same numbers."""
        found = self.prepared.checkpoint
        lora.write_files(self.model, folder, base_id=found.id, revision=found.revision, dtype=None)


@dataclass(frozen=True)
class MicroBatches:
    """Every step's micro-batches and the evaluation's, as the pace splits them at the start."""

    steps: pack.Steps
    examples: Examples
    held_out: Any

    @classmethod
    def of(cls, prepared: Prepared, pace: Pace) -> MicroBatches:
        steps = plan_steps(
            prepared, max_tokens_per_micro_batch=pace.tokens, examples_per_micro_batch=pace.examples_per_micro_batch
        )
        held_out: Any = ()
        if prepared.evaluation is not None:
            per_micro_batch = pace.examples_per_micro_batch or prepared.recipe.train.per_device_eval_batch_size
            lengths = prepared.evaluation.lengths
            held_out = collate.Batches(
                prepared.evaluation.examples, pack.eval_micro_batches(lengths, pace.tokens, per_micro_batch)
            )
        return cls(steps, prepared.train.examples, held_out)

    def batch(self, rows: Rows) -> Any:
        return collate.collate([self.examples[r] for r in rows])


def _rows_note(examples: Examples, step: pack.Step) -> str:
    where = [examples.where(row) for rows in step.micro_batches for row in rows]
    return f" (rows {', '.join(where[:4])}{' ...' if len(where) > 4 else ''})"
