"""Every step of a run: the trainer and what happens around it, from the first step or a checkpoint to the last step or
a signal."""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from signal import Signals

import numpy as np

from halfbyte.adapters import lora
from halfbyte.data import collate
from halfbyte.distributed import agree
from halfbyte.distributed.shard import first_layers_whole
from halfbyte.errors import DataError, RewardError
from halfbyte.layers import packing
from halfbyte.objectives.objective import scores_of
from halfbyte.recipe.task import CAUSAL_LM
from halfbyte.runs.checkpoint import Best
from halfbyte.runs.folder import RunFolder, read_json
from halfbyte.scoring.sheet import BASE_TEXT
from halfbyte.scoring.verdict import beside_source
from halfbyte.system import accelerator, device, usage
from halfbyte.training import reference, source
from halfbyte.training.callback import EarlyStopping, Follower, RunCallback
from halfbyte.training.comparison import SOURCE, Comparison, Rows
from halfbyte.training.events import Listener, StopRequest
from halfbyte.training.schedule import StreamedRows, cadence, eval_every
from halfbyte.training.setup import Setup
from halfbyte.training.trainer import RunHooks, StepInterrupted, StepTrainer, training_arguments
from halfbyte.training.watch import Witness
from halfbyte.types import Document


@dataclass(frozen=True)
class Ended:
    """How far the steps came. `callback` has written the run, in the first process; `stopped_by`: the signal that ended
    it early; `compared`: what the last step's adapter has lost on the rows of the run's comparison."""

    step: int
    stopped_by: Signals | None
    callback: RunCallback | None
    compared: Rows | None = None


def run_steps(setup: Setup, folder: RunFolder, stop: StopRequest, tell: Listener) -> Ended:
    """Train until the last step, until early stopping, or until a signal, after which a checkpoint is written."""
    steps, world = setup.steps, setup.world
    train, point = setup.run.prepared.recipe.train, setup.start.point
    resume = None if point is None else agree.share_checkpoint(world, point.path, folder.path)
    if world.first:
        folder.truncate_metrics(-1 if point is None else point.step)  # an evaluation before the first step is of step 0
        folder.report.unlink(missing_ok=True)  # of the shorter run that goes on
    early = None
    if train.early_stopping_patience is not None:
        early = EarlyStopping(train, world.from_first(folder.read_metrics))
    stop_of_all = stop if world.alone else StopRequest()  # of several processes none ends alone
    flow = setup.run.prepared.flow
    hooks = RunHooks(
        stops_step=lambda: stop.signal is not None,
        # early stopping decides on the evaluation itself, so that one is always finished
        stops_evaluation=lambda: stop.signal is not None and early is None,
        on_stop=lambda: stop_of_all.give(stop.signal or Signals.SIGTERM),
        on_evaluation=tell.evaluating,
        answer_scores=lambda: {**setup.answer_scores(), **_text_score(setup, trainer)},
        rollouts=setup.rollouts or _streamed(setup, folder, tell),
    )
    trainer = _trainer(setup, folder, hooks)
    callback = _run_callback(setup, folder, trainer, stop_of_all, tell, resume) if world.first else None
    trainer.add_callback(callback or Follower(trainer=trainer, stop=stop_of_all, resume=resume))
    if early is not None:
        trainer.add_callback(early)
    if not reference.ensure(setup, folder, trainer, tell):
        return Ended(setup.start.step, stop_of_all.signal, callback)
    if not setup.is_probe and setup.rollouts is None:  # a loss says nothing of rewards
        _measure_base(setup, trainer, tell)
        setup.pace.begin()
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume is not None else None)
    except (StepInterrupted, RewardError, DataError) as error:
        if isinstance(error, StepInterrupted):
            hooks.on_stop()  # it may be another process that was asked to end
        if callback is not None:
            callback.save_last_step(type(error).__name__)
        if not isinstance(error, StepInterrupted):
            raise
    finally:
        if callback is not None:
            callback.writer.abandon()
        if flow is not None and flow.left_out and callback is not None:
            callback.notices.append(flow.left_out.listing(f"{flow.left_out.count:,} rows could not be used"))
        tell.end()
    done = trainer.state.global_step
    stopped_early = early is not None and early.stops and done < len(steps)
    if stopped_early and callback is not None:
        callback.stopped_early = True
        patience = train.early_stopping_patience
        callback.notices.append(f"stopped early at step {done} of {len(steps)}: no better evaluation in {patience}")
        tell.note("note", callback.notices[-1])
    if not trainer.is_done and not stopped_early and stop_of_all.signal is not None:
        return Ended(done, stop_of_all.signal, callback)
    return Ended(done, None, callback, _compared(setup.comparison, trainer))


def _streamed(setup: Setup, folder: RunFolder, tell: Listener) -> StreamedRows | None:
    """The rows of a run that reads them as it goes."""
    flow, world = setup.run.prepared.flow, setup.world
    path = folder.path / "stream.json"
    if flow is None:
        return None
    flow.keep(path if world.first else None, world.from_first(lambda: read_json(path)))
    return StreamedRows(setup.run.prepared, flow, world, tell)


def _text_score(setup: Setup, trainer: StepTrainer) -> dict[str, float]:
    """Of an evaluation, where `train.max_forgetting` bounds it: the loss on the text of the base's kind."""
    text = setup.comparison.text
    if isinstance(text, str) or setup.run.prepared.recipe.train.max_forgetting is None:
        return {}
    rows, _ = trainer.row_sums(text.batches, text.chosen, whole=True)
    return {BASE_TEXT: scores_of(setup.run.prepared.objective, rows)["loss"]}


def sums_of(setup: Setup, trainer: StepTrainer, one: Comparison, *, whole: bool = False) -> tuple[Rows, bool] | None:
    """As `row_sums`; None where memory ran out on the text of the base's kind, whose parts may be longer than all rows.
    That ends no run that does not depend on it; `text` says so from then on."""
    try:
        return trainer.row_sums(one.batches, one.chosen, whole=whole)
    except (RuntimeError, MemoryError) as error:
        spared = one is setup.comparison.text and setup.run.prepared.recipe.train.max_forgetting is None
        if not spared or not accelerator.out_of_memory(error):
            raise
    accelerator.empty_cache()
    setup.comparison.text = "memory ran out"
    return None


def _remembers(setup: Setup, row: Document) -> bool:
    """Whether an evaluation is within `train.max_forgetting` of the base."""
    text, most = setup.comparison.text, setup.run.prepared.recipe.train.max_forgetting
    if most is None or isinstance(text, str) or text.base is None:
        return True
    return bool(row[f"eval_{BASE_TEXT}"] <= scores_of(setup.run.prepared.objective, text.base)["loss"] + most)


def _no_source_rises(setup: Setup, trainer: StepTrainer) -> bool:
    """Whether the last evaluation is within `train.max_source_rise` of the base on each source, row by row."""
    prepared, compared = setup.run.prepared, setup.comparison
    most, of = prepared.recipe.train.max_source_rise, prepared.evaluation and prepared.evaluation.sources
    if most is None or not of or compared.base is None:
        return True
    rows, of_row = trainer.evaluated[1][compared.chosen], of.of_row[compared.chosen]
    losses = (
        [scores_of(prepared.objective, sums[of_row == number])["loss"] for sums in (rows, compared.base)]
        for number in np.unique(of_row)
    )
    return all(now <= base + most for now, base in losses)


def _measure_base(setup: Setup, trainer: StepTrainer, tell: Listener) -> None:
    """What the base alone loses on the rows of each comparison: as its store keeps it, or measured and kept there."""
    compared, text = setup.comparison, setup.comparison.text
    if isinstance(text, str):
        tell.note("base text", f"not read: {text}")
    every = [compared, *([] if isinstance(text, str) else [text])]
    for one in every:
        began, kept = time.monotonic(), setup.world.from_first(one.read)
        if kept is not None:
            one.base, how = np.array(kept), "kept with its store"
        else:
            with lora.base_alone(setup.model.assembled.model, setup.model.assembled.own_biases):
                sums = sums_of(setup, trainer, one)
            if sums is None:
                tell.note("base text", f"not read: {setup.comparison.text}")
                every = [compared]
                break
            if sums[1]:
                return
            one.base, how = sums[0], f"measured in {time.monotonic() - began:.1f} s"
            if setup.world.first:
                one.keep(one.base)
        loss = scores_of(setup.run.prepared.objective, one.base)["loss"]
        tell.note("base" if one is compared else "base text", f"loss {loss:.4f} on {one.words}, {how}")
    why = setup.world.from_first(lambda: _measure_source(setup, every))
    beside = beside_source(compared.source, compared.base) if setup.world.first and compared.base is not None else None
    if beside is not None and not beside.is_base:
        why = f"{beside.text[0].upper()}{beside.text[1:]}"
        if beside.cost[1][0] > 0:
            why += f"; {source.costs_nothing(setup.run.prepared.checkpoint)}"
    if why:
        tell.note("source", why)


def _measure_source(setup: Setup, every: list[Comparison]) -> str:
    """What the model as it came loses on the rows of the comparisons, in the first process; empty, or why it is not
    known."""
    prepared, unread = setup.run.prepared, list[Comparison]()
    if prepared.recipe.train.method != "sft" or prepared.recipe.task != CAUSAL_LM:
        return ""  # its loss is measured from the base that trains, or a fresh head on it says nothing
    itself = source.is_the_base(prepared.recipe, prepared.checkpoint)
    for one in every:
        kept = None if itself else one.read(SOURCE)
        one.source = one.base if itself else None if kept is None else np.array(kept)
        unread += [one] if one.source is None else []
    if not unread:
        return ""
    machine = device.detect()
    planned = setup.run.plan.peak_bytes + setup.run.foreign_bytes
    most = machine.cards[0].free_bytes if machine.on_card else planned - usage.now().total
    rows = [one.batches.examples[number] for one in unread for number in one.chosen.tolist()]
    sums = source.sums(
        prepared.recipe, prepared.checkpoint, prepared.objective, rows, machine=machine, most_bytes=most,
        layout=packing.installed(setup.model.assembled.model),
    )  # fmt: skip
    if isinstance(sums, str):
        return f"what quantising costs is not known: the source model was not measured, {sums}"
    ends = np.cumsum([len(one.chosen) for one in unread])
    for one, part in zip(unread, np.split(sums, ends[:-1]), strict=True):
        one.source = part
        one.keep(part, SOURCE)
    return ""


def _compared(comparison: Comparison, trainer: StepTrainer) -> Rows:
    """What the adapter loses on the rows of the comparison; the last evaluation has seen them where it was of now."""
    step, rows = trainer.evaluated
    apart = len(rows) == len(comparison.chosen) or not trainer.objective.together
    if comparison.held_out and step == trainer.state.global_step and apart:
        return rows[comparison.chosen]
    return trainer.row_sums(comparison.batches, comparison.chosen, whole=True)[0]


def _trainer(setup: Setup, folder: RunFolder, hooks: RunHooks) -> StepTrainer:
    prepared, assembled = setup.run.prepared, setup.model.assembled
    train = prepared.recipe.train
    update: Document = {"eval_on_start": train.eval_on_start and setup.start.point is None}
    update |= {} if setup.world.first else {"report_to": "none"}
    arguments = training_arguments(
        train.model_copy(update=update), folder=folder.path,
        total_steps=len(setup.steps), fp16=assembled.base.compute_dtype == "fp16",
        use_cpu=assembled.base.model.device.type == "cpu", eval_steps=eval_every(prepared),
    )  # fmt: skip
    arranged = hooks.rollouts is None  # else rows are known when a step begins
    rows = collate.StepDataset(prepared.train.examples, setup.steps, prepared.lay_out, arranged=arranged)
    of = prepared.evaluation and prepared.evaluation.sources
    return StepTrainer(
        assembled.model, arguments, train_dataset=rows, eval_batches=setup.held_out, objective=prepared.objective,
        loraplus_lr_ratio=train.loraplus_lr_ratio, pace=setup.pace, hooks=hooks, world=setup.world,
        shards=setup.shards, ends_with_evaluation=setup.comparison.ends, schedule=setup.schedule,
        sources=of.numbers() if of else {},
    )  # fmt: skip


def _run_callback(
    setup: Setup, folder: RunFolder, trainer: StepTrainer, stop: StopRequest, tell: Listener, resume: Path | None
) -> RunCallback:
    prepared, assembled = setup.run.prepared, setup.model.assembled
    source, readable = prepared.checkpoint, first_layers_whole(setup.shards)
    # at full precision, so that a resumed run continues from the same numbers
    adapter = partial(lora.writer, assembled.model, base_id=source.id, revision=source.revision, dtype=None)
    return RunCallback(
        trainer=trainer, run=folder, listener=tell, cadence=cadence(prepared), adapter=adapter, stop=stop,
        best=Best.of(prepared.recipe, folder) if prepared.evaluation is not None else None,
        comparison=setup.comparison, trained=setup.trained, resume=resume,
        allowed=lambda row: _remembers(setup, row) and _no_source_rises(setup, trainer),
        witness=Witness(assembled.model, assembled.packed.ok, readable),
    )  # fmt: skip
