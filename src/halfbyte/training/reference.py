"""What the reference of a preference run gives each answer: computed once, before the first step, and kept in the run.

Why: the reference is the model as the run begins with it, the base or the adapter of `lora.adapter`; after a step it is
gone, and a copy of it beside the one that trains would cost its memory and a forward of every step.
What: log p of each text's labels, in evaluation mode, over all rows, by all processes; `reference.json` has them with
what they depend on. A run that goes on reads them.
Cost: a forward of all rows, once.
"""

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace

import numpy as np

from halfbyte.adapters import lora
from halfbyte.data import collate
from halfbyte.data.encoding.encoder import EncodedRows
from halfbyte.errors import RunError, typed
from halfbyte.objectives import preference
from halfbyte.recipe.adapter_folder import ADAPTER_FILES
from halfbyte.runs.folder import RunFolder, read_json, space_for
from halfbyte.system import files
from halfbyte.system.words import duration
from halfbyte.training.events import Listener
from halfbyte.training.schedule import eval_batches
from halfbyte.training.setup import Setup
from halfbyte.training.trainer import StepTrainer
from halfbyte.types import Document


def ensure(setup: Setup, folder: RunFolder, trainer: StepTrainer, tell: Listener) -> bool:
    """Every row has what the reference gives it, where the run's method asks for that. False where the run was stopped
    meanwhile. Raises RunError: it is not there, and the model of the beginning is gone; or it is of other rows."""
    prepared, world = setup.run.prepared, setup.world
    objective = prepared.objective
    if not isinstance(objective, preference.Preference) or not objective.asks.referenced:
        return True
    sets = {"train": prepared.train, **({"eval": prepared.evaluation} if prepared.evaluation is not None else {})}
    of, began = _depends_on(setup), time.monotonic()
    known = world.from_first(lambda: _read(folder, of, sets, setup.start.step))
    asks = preference.LogLikelihoods(objective.asks)
    values = known or {name: _given(setup, trainer, rows, asks) for name, rows in sets.items()}
    if not all(values.values()):
        return False
    for name, rows in sets.items():
        rows.examples.reference = np.array(values[name])
    if not known and world.first:
        with space_for(folder.reference):
            files.write(folder.reference, json.dumps(files.seal({"of": of, **values})).encode())
    count, whose = sum(map(len, values.values())), prepared.recipe.lora.adapter or "the base"
    how = f"computed in {duration(time.monotonic() - began)}" if not known else "as they were kept"
    tell.note("reference", f"{whose}: log p of the answers of {count:,} rows, {how}")
    return True


def _given(setup: Setup, trainer: StepTrainer, rows: EncodedRows, asks: preference.LogLikelihoods) -> list[list[float]]:
    """What each row's texts are given; nothing where the run was stopped meanwhile."""
    prepared, base = setup.run.prepared, setup.model.assembled
    both = replace(_micro_batches(setup, rows), lay_out=asks.collate_tree if prepared.shares else asks.collate)
    # a fresh adapter gives 0: without its products the numbers are the same
    fresh = setup.start.adapter is None and prepared.recipe.lora.init_lora_weights is True
    with lora.base_alone(base.model, base.own_biases) if fresh else nullcontext():
        sums, stopped = trainer.row_sums(both, np.arange(len(rows.examples)), objective=asks)
    return [] if stopped else sums.tolist()


def _micro_batches(setup: Setup, rows: EncodedRows) -> collate.Batches:
    """This process's share of some rows; those that train as in the first epoch's steps, so that both round alike."""
    pace, prepared = setup.pace, setup.run.prepared
    if rows is prepared.train and prepared.mixture is None:
        epoch = replace(setup.steps, total=setup.steps.per_epoch)
        parts = [part for step in epoch for part in pace.split(step.micro_batches)]
        return collate.Batches(rows.examples, parts, prepared.lay_out)
    world, limits = setup.world, (setup.run.plan.evaluation_tokens, pace.examples_per_micro_batch)
    return eval_batches(prepared, rows, *limits, rank=world.rank, ranks=world.size, padded=pace.padded)


def _depends_on(setup: Setup) -> Document:
    """JSON. The adapter is that which the run began with, of a run that goes on null."""
    adapter = setup.start.adapter
    sha = None if adapter is None else files.sha256(adapter / ADAPTER_FILES[0])
    return {"belongs_to": setup.trained["belongs_to"], "adapter": sha, "rows": setup.trained["rows"]}


def _read(folder: RunFolder, of: Document, sets: Mapping[str, EncodedRows], step: int) -> dict[str, list[list[float]]]:
    """Of each set of rows what each row's texts are given, as the run has kept it; nothing where it has yet to be
    computed."""
    known = read_json(folder.reference)
    mine = known.get("of", {}) if files.is_sealed(known) else {}
    same = mine and all(mine[name] == of[name] for name in ("belongs_to", *(() if step else ("adapter",))))
    if same and all(mine["rows"][name] == of["rows"][name] for name in sets):
        return {name: known[name] for name in sets}
    if not step:
        return {}
    raise RunError(
        f"{folder.reference} is not that of these rows and this base, and after step {step} the reference, the model "
        "that the run began with, is gone.",
        fix=f"put it back, or start a new run: halfbyte train {typed(f'{folder.path}/recipe.yaml')} --output runs/NAME",
    )
