"""A run as far as it is known before a weight is loaded: its rows, the layers that get an adapter, and its plan.

Why: a run, its dry run and `data check` must say the same.
Cost: tokenising, and the shapes of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfbyte.adapters import lora
from halfbyte.models.structure import meta_model
from halfbyte.training import fit
from halfbyte.training.events import Listener
from halfbyte.training.prepare import Prepared, data_note, prepare
from halfbyte.training.schedule import count_steps
from halfbyte.training.trainer import check_arguments

if TYPE_CHECKING:
    from halfbyte.adapters.targets import Targets
    from halfbyte.plan import Job, Plan
    from halfbyte.recipe.schema import Recipe
    from halfbyte.system.device import Device
    from halfbyte.types import Model


@dataclass(frozen=True)
class PlannedRun:
    """`meta` is the model without weights, `modules` the full names of the layers that get an adapter; the plan follows
    from `figures`."""

    prepared: Prepared
    machine: Device
    meta: Model
    targets: Targets
    modules: list[str]
    figures: Job
    plan: Plan


def planned(recipe: Recipe, machine: Device, listener: Listener | None = None) -> PlannedRun:
    """Prepare a run and plan it. Only with a `listener` may the machine be calibrated first.

    Raises:
        HalfbyteError: a mistake in the recipe, the data or the model.
    """
    prepared = prepare(recipe)
    check_arguments(prepared.recipe.train, total_steps=count_steps(prepared))
    tell = listener or Listener()
    tell.note("data", data_note(prepared))
    for finding in prepared.findings:
        tell.note("data", finding.line)
    return with_plan(prepared, machine, (lambda text: tell.note("machine", text)) if listener else None)


def with_plan(prepared: Prepared, machine: Device, say: Callable[[str], None] | None = None) -> PlannedRun:
    """The plan of rows that are prepared already. With `say` the machine may be calibrated first."""
    recipe = prepared.recipe
    meta = meta_model(prepared.config, trust_remote_code=recipe.trust_remote_code)
    targets, modules = lora.choose_targets(meta, recipe.lora)
    job, plan = fit.plan_of(prepared, machine, targets, meta, say)
    return PlannedRun(prepared, machine, meta, targets, modules, job, plan)
