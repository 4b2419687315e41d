"""The plan of a run, before the first byte is loaded: every line of memory by name, disk, time, and the choices.

What: `Job` holds what a plan follows from, as plain numbers; `make` chooses; `Plan` is a value that is printed, obeyed,
and later compared with what was measured.
Cost: a few milliseconds; no torch.
"""

from dataclasses import replace

from halfbyte.plan import alternatives, choose
from halfbyte.plan.choose import GENERATED_TOKENS, MARGIN, MAX_TOKENS_PER_MICRO_BATCH, count
from halfbyte.plan.inference import InferencePlan, Trained, plan_inference, sequences_beside
from halfbyte.plan.job import Job, Rows
from halfbyte.plan.layer import FAMILIES
from halfbyte.plan.lines import GB, ITEMSIZE, Fix, Line, Plan, Time
from halfbyte.plan.timing import Rates
from halfbyte.system.device import Device

__all__ = [
    "FAMILIES", "GB", "GENERATED_TOKENS", "ITEMSIZE", "MARGIN", "MAX_TOKENS_PER_MICRO_BATCH", "Fix", "InferencePlan",
    "Job", "Line", "Plan", "Rates", "Rows", "Time", "Trained", "count", "make", "plan_inference", "sequences_beside",
]  # fmt: skip


def make(job: Job, device: Device, rates: Rates | None = None) -> Plan:
    """The plan of one training on one machine; where nothing fits, with the nearest changes that would.

    Args:
        rates: what the machine does in a second, as `calibrate` measured it; None: assumed, and said so.
    """
    plan = choose.make(job, device, rates)
    return replace(plan, fixes=alternatives.nearest(job, device, plan, rates))
