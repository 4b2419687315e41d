"""`quant.type: auto`: the most exact number format that fits the memory there is and costs no time that matters.

What: every format is planned as the recipe would run with it. Of those that stay in memory with the planner's margin,
and whose step is no more than `COSTS` times the fastest one's, the most exact is taken: of a quantised GGUF file its
own blocks, which are the file's weights to the bit in the least memory; 16 bits; int8; nf4. Where none stays there,
the one that misses by the least, or is read from disk the least.
Cost: shapes from headers, a few milliseconds a format, and counting the rows' tokens; no torch.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from halfbyte.errors import AdapterError, BaseModelError, HalfbyteError, SourceError
from halfbyte.models import describe
from halfbyte.models.gguf.blocks import BLOCKS, PLAIN_TYPES
from halfbyte.models.gguf.header import read_header
from halfbyte.models.sources import lookup, pypi
from halfbyte.plan import Plan, calibrate, plan_training, rate
from halfbyte.plan.choose import MARGIN
from halfbyte.plan.estimate import job_of, parse_device, rows_of
from halfbyte.plan.result import GB
from halfbyte.recipe import number_formats
from halfbyte.recipe.command import as_begun, with_type
from halfbyte.recipe.schema import Loaded
from halfbyte.system.device import Device, detect
from halfbyte.types import Document

COSTS = 1.05  # of a step's time: what a more exact format may cost


def settle(
    loaded: Loaded, machine: Device | None = None, *, device: str | None = None, length: int | None = None,
    resume: bool = False, agreed: Callable[[Callable[[], Document]], Document] = lambda decide: decide(),
) -> Loaded:  # fmt: skip
    """A recipe whose learning rate and number format are chosen, each with the reason as its origin; what it names
    stays as it is.

    Args:
        machine: None for this one. device, length: as of `plan_model`.
        resume: take the format that the run has begun with.
        agreed: what makes all processes of a run take the first one's choice.
    """
    loaded = rate.settle(loaded)
    if loaded.recipe.quant.type != number_formats.AUTO:
        return loaded

    def decide() -> Document:
        begun = as_begun(loaded) if resume else loaded
        if begun is not loaded:
            return {"name": begun.recipe.quant.type, "why": begun.origins["quant.type"].why}
        where = machine or (detect() if device is None else parse_device(device))
        return _choice(loaded, where, here=device is None, length=length)

    return with_type(loaded, **agreed(decide))


def _choice(loaded: Loaded, machine: Device, *, here: bool, length: int | None) -> Document:
    """The name of the format, and why it is this one."""
    plans, left = _plans(loaded, machine, here=here, length=length)
    fitting = {name: plan for name, plan in plans.items() if _lacks(plan) is None}
    left |= {name: reason for name, plan in plans.items() if (reason := _lacks(plan)) is not None}
    if not fitting:
        name = min(plans, key=lambda name: (plans[name].short_bytes, plans[name].read_bytes, plans[name].needed_bytes))
        why = f"no format stays in memory beside the rest; with this one {_lacks(plans[name])}"
    else:
        fastest = min(plan.time.step_s for plan in fitting.values())
        slower = {name: plan.time.step_s / max(fastest, 1e-9) for name, plan in fitting.items()}
        name = next(name for name in fitting if slower[name] <= COSTS)
        left |= {other: f"a step takes {times:.2f} times as long" for other, times in slower.items() if times > COSTS}
        exact = {"gguf": "the file's own weights, to the bit", "none": "16 bits, as the model is"}.get(name)
        exact = exact or f"{number_formats.FORMATS[name].bits} bits"
        why = f"{exact}; {_memory(plans[name])}; a step takes {slower[name]:.2f} times that of the fastest format"
    others = (f"not {other}: {reason}" for other, reason in left.items() if other != name)
    return {"name": name, "why": "; ".join([why, *others])}


def _plans(
    loaded: Loaded, machine: Device, *, here: bool, length: int | None
) -> tuple[dict[str, Plan], dict[str, str]]:
    """The plan in each format that is open, the most exact first; and why others are not. Raises AdapterError,
    BaseModelError: none is open."""
    plans, left = dict[str, Plan](), dict[str, HalfbyteError]()
    in_blocks = None if machine.on_card else _in_blocks(loaded.recipe.model)
    shape = describe.describe(str(in_blocks or loaded.recipe.model), loaded.recipe.revision)
    rows, _ = rows_of(loaded, replace(shape, path=None), length)  # by characters: counting tokens may take minutes
    every = ["none", *(info.name for info in number_formats.smaller())]
    for name in every if in_blocks is None else ["gguf", *every]:
        try:
            job = job_of(with_type(loaded, name, "").recipe, shape, rows, machine, here=here)
        except (AdapterError, BaseModelError) as error:  # what this format cannot hold, or not train
            left[name] = error
            continue
        plans[name] = plan_training(job, machine, calibrate.cached(machine, job.dtype) if here else None)
    if not plans:
        raise next(iter(left.values()))
    return plans, {name: error.message for name, error in left.items()}


def _in_blocks(model: str) -> Path | None:
    """The GGUF file of a model, if it can be held in its own blocks, and has some."""
    if model not in pypi.MODELS and Path(model).suffix != ".gguf":
        return None
    try:
        file = lookup.blocks_at_hand(model)
        types = {tensor.type for tensor in read_header(file).tensors}
    except SourceError:
        return None
    return file if types <= PLAIN_TYPES | BLOCKS.keys() and not types.isdisjoint(BLOCKS) else None


def _lacks(plan: Plan) -> str | None:
    """What keeps a plan from staying in memory, with the planner's margin."""
    if plan.short_bytes or plan.needed_bytes > (1 - MARGIN) * plan.available_bytes:
        return _memory(plan)
    return f"{plan.read_bytes / GB:.2f} GB are read from disk in a step" if plan.read_bytes else None


def _memory(plan: Plan) -> str:
    return f"{plan.peak_bytes / GB:.2f} of {plan.available_bytes / GB:.2f} GB free"
