"""The plan of a run, before the first byte is loaded: every line of memory by name, disk, time, and the choices.

How a plan comes about, module by module, each standing on those before:
- `result`: what a plan is: `Plan`, its `Line`s of memory, its `Time`. A value to print, obey, and compare later.
- `layer`: bytes that a decoder layer keeps of a token, by architecture. `store_build`: what quantising a base takes.
- `job`: `Job`, what a plan follows from, as plain numbers: model, adapters, rows, recipe.
- `memory`: lines of memory and disk of a job. `timing`: seconds of its step, from `Rates` that `calibrate` measures.
- `choose`: every choice the recipe leaves open, counted and timed; of those that fit, the fastest.
- `alternatives`: what would help where nothing fits; full fine-tuning, LoRA and QLoRA side by side.
- `inference`: the same of a finished run's use. `estimate`: `halfbyte plan`, from headers and names alone.
- `number_format`: what `quant.type: auto` becomes. `rate`: what `train.learning_rate: auto` does.
Cost: a few milliseconds; no torch.
"""

from dataclasses import replace

from halfbyte.models.families import FAMILIES
from halfbyte.plan import alternatives, choose
from halfbyte.plan.choose import GENERATED_TOKENS, MARGIN, MAX_TOKENS_PER_MICRO_BATCH, plan_with
from halfbyte.plan.inference import InferencePlan, RunChoices, plan_inference, sequences_beside
from halfbyte.plan.job import Job, Rows
from halfbyte.plan.result import GB, ITEMSIZE, Fix, Line, Plan, Time
from halfbyte.plan.timing import Rates
from halfbyte.system.device import Device

__all__ = [
    "FAMILIES", "GB", "GENERATED_TOKENS", "ITEMSIZE", "MARGIN", "MAX_TOKENS_PER_MICRO_BATCH", "Fix", "InferencePlan",
    "Job", "Line", "Plan", "Rates", "Rows", "RunChoices", "Time", "plan_inference", "plan_training", "plan_with",
    "sequences_beside",
]  # fmt: skip


def plan_training(job: Job, device: Device, rates: Rates | None = None) -> Plan:
    """The plan of one training on one machine; where nothing fits, with the nearest changes that would. `rates`: what
    the machine does in a second, as `calibrate` measured it; None: assumed, and said so."""
    plan = choose.best_plan(job, device, rates)
    return replace(plan, fixes=alternatives.nearest_fixes(job, device, plan, rates))
