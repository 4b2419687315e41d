"""The whole story on one page: recipe -> source -> data -> plan -> base -> adapters -> proof -> train -> report.

Only this room (and `cli.py`) tells the other rooms about each other. Each function below is a chapter.
"""

from __future__ import annotations

import math
import signal
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte import adapters, base, callbacks, checkpoint, device, memory, quant, shapes, store, stream, targets
from halfbyte import report as reporting
from halfbyte.callbacks import Best, Cadence, Listener, RunCallback, Silent, StopRequest, stop_on_signals
from halfbyte.data import collate, pack
from halfbyte.inputs import Prepared, data_note, prepare
from halfbyte.layers import fuse, loss, packing
from halfbyte.layers.proof import prove_fused
from halfbyte.recipe import Loaded, Origin, Recipe, rows
from halfbyte.recipe_file import to_yaml
from halfbyte.run import RunFolder, versions
from halfbyte.train import StepTrainer, rehearse, training_arguments

if TYPE_CHECKING:
    from halfbyte.data.template import Example


@dataclass(frozen=True)
class Resolution:
    """What `train --dry-run` shows: each value with its origin, then what follows from the values."""

    rows: list[tuple[str, Any, Origin]]
    lines: list[str]

    def to_json(self) -> dict[str, Any]:
        values = {field: {"value": value, "from": o.kind, "why": o.why} for field, value, o in self.rows}
        return {"values": values, "notes": self.lines}


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
    rehearse(recipe.train, total_steps=count_steps(prepared))
    found = prepared.checkpoint
    model = targets.meta_model(base.read_config(found.path, trust_remote_code=recipe.trust_remote_code))
    chosen, modules = choose_targets(model, recipe)
    plan = make_plan(prepared, machine, model, modules)
    auto = {
        "quant.compute_dtype": device.compute_dtype(machine, recipe.quant.compute_dtype),
        "lora.target_modules": (chosen.names, chosen.reason),
        "train.gradient_checkpointing": (plan.gradient_checkpointing, plan.reasons["gradient_checkpointing"]),
        "train.max_tokens_per_pass": (plan.max_tokens_per_pass, plan.reasons["max_tokens_per_pass"]),
    }
    resolved = []
    for field, value, origin in rows(loaded):
        if field in auto and auto[field][0] != value:
            shown, why = auto[field]
            resolved.append((field, shown, Origin("auto", why.removeprefix("auto: "))))
        else:
            resolved.append((field, value, origin))
    revision = f" at {found.revision}" if found.revision else ""
    trainable = targets.lora_parameter_count(model, modules, recipe.lora.r, recipe.lora.rank_pattern)
    lines = [
        f"model     {found.id}{revision}",
        f"data      {data_note(prepared)}; {count_steps(prepared)} steps of {rows_per_step(recipe)} rows",
        f"adapters  on {len(modules)} modules, {trainable:,} parameters train",
        *plan.text_lines(),
    ]
    return Resolution(resolved, [*lines, *(f"warning: {w}" for w in loaded.warnings)])


def rows_per_step(recipe: Recipe) -> int:
    return recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps


def count_steps(prepared: Prepared) -> int:
    train = prepared.recipe.train
    return pack.count_steps(
        len(prepared.train.examples),
        rows_per_step=rows_per_step(prepared.recipe),
        epochs=train.num_train_epochs,
        max_steps=train.max_steps,
    )


def choose_targets(model: Any, recipe: Recipe) -> tuple[targets.Targets, list[str]]:
    """The target names, and the full names of the modules that they hit under the recipe's limits."""
    lora = recipe.lora
    chosen = targets.resolve_targets(model, lora.target_modules)
    modules = targets.matched(
        model,
        chosen,
        exclude=lora.exclude_modules or (),
        layers_to_transform=lora.layers_to_transform,
        layers_pattern=lora.layers_pattern,
        modules_to_save=lora.modules_to_save or (),
    )
    adapters.check_names(model, lora, modules)
    return chosen, modules


def make_plan(prepared: Prepared, machine: device.Device, model: Any, modules: list[str]) -> memory.Plan:
    """Decide, from sizes alone, how a step is split and whether to recompute."""
    recipe, folder = prepared.recipe, prepared.checkpoint.path
    specs = [] if prepared.checkpoint.pickle else shapes.read_checkpoint(folder)
    itemsize = memory.ITEMSIZE[device.compute_dtype(machine, recipe.quant.compute_dtype)[0]]
    return memory.plan(
        recipe,
        specs,
        machine,
        prepared.train.lengths,
        labelled=prepared.train.labelled,
        trainable=targets.lora_parameter_count(model, modules, recipe.lora.r, recipe.lora.rank_pattern),
        facts=shapes.facts_of(shapes.read_config(folder), specs),
        resident_bytes=lambda spec: quant.encoded_bytes(spec, recipe.quant, itemsize),
    )


def plan_steps(prepared: Prepared, *, max_tokens_per_pass: int, examples_per_pass: int | None) -> list[pack.Step]:
    """Every optimiser step of the run: which rows, in which order, in which passes."""
    train = prepared.recipe.train
    return pack.plan_steps(
        prepared.train.lengths,
        prepared.train.labelled,
        rows_per_step=rows_per_step(prepared.recipe),
        epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        seed=train.seed if train.data_seed is None else train.data_seed,
        max_tokens_per_pass=max_tokens_per_pass,
        examples_per_pass=examples_per_pass,
    )


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
    prepared = prepare(recipe)
    rehearse(recipe.train, total_steps=count_steps(prepared))
    notices = [*prepared.train.notices, *(prepared.evaluation.notices if prepared.evaluation else ())]
    tell.note(f"data      {data_note(prepared)}")
    opened = base.open_base(
        prepared.checkpoint,
        recipe.quant,
        machine,
        trust_remote_code=recipe.trust_remote_code,
        tell=store.Tell(progress=tell.building, note=lambda text: tell.note(f"base      {text}")),
    )
    tell.note(
        f"base      {prepared.checkpoint.id}: {recipe.quant.type}, {opened.resident_bytes / 1e9:.3f} GB resident "
        f"({opened.expected_bytes / 1e9:.3f} planned), computing in {opened.compute_dtype} ({opened.dtype_reason})"
    )
    tell.note(f"base      {opened.origin}")
    placement, why = stream.choose(recipe.quant.placement, opened.model, machine.ram_available_bytes)
    placed = stream.place(opened.model, placement)
    tell.note(f"placement {placed} ({why})")
    chosen, modules = choose_targets(opened.model, recipe)
    plan = make_plan(prepared, machine, opened.model, modules)
    notices += plan.warnings
    model = adapters.add(opened.model, recipe.lora, chosen, seed=recipe.train.seed)
    tell.note(f"adapters  {adapters.summary(model)} ({chosen.reason})")
    with stream.shallow(model) if placement == "streamed" else nullcontext():
        proof = packing.prove(model)
        fused = prove_fused(model, packed=proof.ok)
        loss.head_of(model)
    (fuse.install if fused.ok else fuse.remove)(model)  # on the layers that the proofs have not seen
    notices += [] if proof.ok else [f"packing: {proof.reason}"]
    tell.note(f"packing   {proof.mode}: {proof.reason}")
    notices += [] if fused.ok else [f"engine: {fused.reason}"]
    tell.note(f"engine    {fused.reason}")
    for name, why in plan.reasons.items():
        tell.note(f"plan      {name} {getattr(plan, name)}: {why}")
    tell.note(f"plan      peak memory about {plan.peak_bytes / 1e9:.2f} GB of {plan.available_bytes / 1e9:.1f} GB free")
    for notice in notices:
        tell.note(f"note      {notice}")
    if plan.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    folder = RunFolder.reopen(out) if resume else RunFolder.create(out, to_yaml(recipe))
    with folder as run, stop_on_signals() as stop:
        story = _Story(run, prepared, opened, model, plan, proof, machine, tell, stop, tuple(notices))
        try:
            return story.tell_it(resume=resume)
        finally:
            placed.remove()


@dataclass
class _Story:
    """The training itself, once everything it needs is known to be good."""

    run: RunFolder
    prepared: Prepared
    opened: base.Base
    model: Any
    plan: memory.Plan
    proof: packing.Proof
    machine: device.Device
    tell: Listener
    stop: StopRequest
    notices: tuple[str, ...]

    def tell_it(self, *, resume: bool) -> Outcome:
        recipe, run = self.prepared.recipe, self.run
        examples_per_pass = None if self.proof.ok else 1
        budget = self.plan.max_tokens_per_pass
        steps = plan_steps(self.prepared, max_tokens_per_pass=budget, examples_per_pass=examples_per_pass)
        planned = {**self.plan.to_json(), "steps": len(steps), "tokens": sum(s.tokens for s in steps)}
        run.write_plan(planned)
        held_out = self.prepared.evaluation
        batches: Any = ()
        if held_out is not None:
            per_pass = 1 if not self.proof.ok else recipe.train.per_device_eval_batch_size
            batches = collate.EvalPasses(held_out.examples, pack.eval_passes(held_out.lengths, budget, per_pass))
        point = checkpoint.newest(run.checkpoints) if resume else None
        if point is not None:
            run.truncate_metrics(checkpoint.step_of(point))
        callback = RunCallback(
            run=run,
            listener=self.tell,
            cadence=cadence(recipe, len(steps), math.ceil(len(self.prepared.train.examples) / rows_per_step(recipe))),
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
            eval_batches=batches,
            loraplus_lr_ratio=recipe.train.loraplus_lr_ratio,
            callbacks=[callback],
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

    def finish(self, callback: RunCallback, steps: list[pack.Step]) -> Outcome:
        """Save the adapter (the best one where evaluations chose it) and the report."""
        recipe, run = self.prepared.recipe, self.run
        chosen = callback.best if recipe.train.load_best_model_at_end else None
        if chosen is not None and chosen.step is not None:
            adapters.put_weights(self.model, chosen.folder)
            self.tell.note(f"adapter   the best of {len(callback.evals)} evaluations, from step {chosen.step}")
        found = self.prepared.checkpoint
        dtype = base.DTYPES[recipe.lora.save_dtype]
        adapters.save(self.model, run.adapter, base_id=found.id, revision=found.revision, dtype=dtype)
        used = callbacks.process_memory()
        card = max((c.total_bytes - c.free_bytes for c in self.machine.cards), default=None)
        report = reporting.build(
            run.read_metrics(),
            planned=reporting.Figures(
                tokens=sum(s.tokens for s in steps),
                steps=len(steps),
                peak_rss_bytes=self.plan.peak_bytes if card is None else None,
                peak_device_bytes=None if card is None else self.plan.peak_bytes,
            ),
            peak_rss_bytes=used["peak_rss_bytes"],
            peak_device_bytes=used.get("peak_device_bytes"),
            versions=versions(),
            machine=self.machine.to_json(),
            notices=self.notices,
            adapter_step=None if chosen is None else chosen.step,
        ).to_json()
        run.write_report(report)
        return Outcome(run.path, report, len(steps))

    def write_adapter(self, folder: Path) -> None:
        """PEFT's two files at full precision, so that a resumed run continues from the same numbers."""
        found = self.prepared.checkpoint
        adapters.write_files(self.model, folder, base_id=found.id, revision=found.revision, dtype=None)


def cadence(recipe: Recipe, total_steps: int, steps_per_epoch: int) -> Cadence:
    train = recipe.train
    steps = {"no": 0, "epoch": steps_per_epoch}.get(train.save_strategy, _count(train.save_steps, total_steps))
    return Cadence(
        steps=steps, minutes=train.save_minutes, keep=train.save_total_limit, at_end=train.save_strategy != "no"
    )


def eval_every(recipe: Recipe, train_rows: int) -> int:
    """Steps between evaluations; 0 for none. The Trainer sees one epoch of all steps, so epochs become steps here."""
    train = recipe.train
    steps_per_epoch = math.ceil(train_rows / rows_per_step(recipe))
    if train.eval_strategy == "no":
        return 0
    if train.eval_strategy == "epoch" or (train.eval_strategy == "auto" and train.eval_steps is None):
        return steps_per_epoch
    total = pack.count_steps(
        train_rows, rows_per_step=rows_per_step(recipe), epochs=train.num_train_epochs, max_steps=train.max_steps
    )
    return _count(train.eval_steps or train.logging_steps, total)


def best(recipe: Recipe, run: RunFolder) -> Best:
    name = recipe.train.metric_for_best_model or "loss"
    found = Best(
        metric=name if name.startswith("eval_") else f"eval_{name}",
        folder=run.checkpoints / "best",
    )
    found.restore()
    return found


def _count(value: float, total: int) -> int:
    """Steps from a number, or from a share of all steps below 1, as the Trainer reads `save_steps` and `eval_steps`."""
    return max(1, math.ceil(value * total)) if value < 1 else int(value)


def _rows_note(examples: list[Example], step: pack.Step) -> str:
    where = [examples[row].where for rows in step.passes for row in rows]
    return f" (rows {', '.join(where[:4])}{' ...' if len(where) > 4 else ''})"
