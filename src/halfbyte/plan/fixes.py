"""When nothing fits: the changes that would, nearest first, each with what it costs in time.

Cost: a plan for each change; no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from halfbyte.models.lora_sites import sites
from halfbyte.plan import choose, held
from halfbyte.plan.job import Job
from halfbyte.plan.lines import Fix, Plan
from halfbyte.plan.timing import Rates
from halfbyte.system.device import Device

NEAREST = 3
SMALL_OPTIMIZER = "adamw_bnb_8bit"


def nearest(job: Job, device: Device, plan: Plan, rates: Rates | None = None) -> tuple[Fix, ...]:
    """Up to three changes: those that fit, the least slower first; else those that come nearest."""
    if not plan.short_bytes:
        return ()
    found = []
    for change, setting, changed in _changes(job, device):
        made = choose.make(changed, device, rates)
        slower = made.time.step_s / max(1e-9, plan.time.step_s)
        found.append(Fix(change, setting, made.needed_bytes, made.short_bytes, slower))
    # of one kind the mildest that fits, else the one that comes nearest; `_changes` goes from mild to strong
    kinds: dict[str, Fix] = {}
    for fix in found:
        kind = fix.setting.partition("=")[0]
        if kind not in kinds or (kinds[kind].short_bytes and fix.short_bytes < kinds[kind].short_bytes):
            kinds[kind] = fix
    near = [fix for fix in kinds.values() if fix.short_bytes < plan.short_bytes]
    return tuple(sorted(near, key=lambda fix: (fix.short_bytes, fix.slower))[:NEAREST])


def _changes(job: Job, device: Device) -> Iterator[tuple[str, str, Job]]:
    recipe = job.recipe
    quant, lora, train = recipe.quant, recipe.lora, recipe.train
    base = recipe.model_copy
    if not quant.quantises:
        packed = base(update={"quant": quant.model_copy(update={"type": "nf4"})})
        yield "4 bits a weight", "quant.type=nf4", _with(job, recipe=packed, mappable=device.kind == "cpu")
    if train.gradient_checkpointing is False:
        again = base(update={"train": train.model_copy(update={"gradient_checkpointing": True})})
        yield "recompute activations", "train.gradient_checkpointing=true", _with(job, recipe=again)
    if isinstance(train.max_tokens_per_micro_batch, int) and train.max_tokens_per_micro_batch > job.rows.longest:
        smaller = base(update={"train": train.model_copy(update={"max_tokens_per_micro_batch": "auto"})})
        yield "smaller micro-batches", "train.max_tokens_per_micro_batch=auto", _with(job, recipe=smaller)
    asked = quant.placement
    if device.kind == "cpu" and asked not in ("auto", "streamed"):
        streamed = base(update={"quant": quant.model_copy(update={"placement": "streamed"})})
        yield "stream the base", "quant.placement=streamed", _with(job, recipe=streamed, mappable=True)
    length = job.rows.longest
    while length > 128:
        length //= 2
        yield f"rows of at most {length} tokens", f"data.max_length={length}", _with(job, rows=job.rows.cut(length))
    if held.OPTIMIZER_BYTES.get(str(train.optim), 8) > 2:
        small = base(update={"train": train.model_copy(update={"optim": SMALL_OPTIMIZER})})
        yield "8-bit optimiser states", f"train.optim={SMALL_OPTIMIZER}", _with(job, recipe=small)
    rank = lora.r
    while rank > 4:
        rank //= 2
        fewer = base(update={"lora": lora.model_copy(update={"r": rank})})
        changed = _with(
            job, recipe=fewer, sites=tuple(replace(s, rank=max(1, s.rank * rank // lora.r)) for s in job.sites)
        )
        yield f"rank {rank}", f"lora.r={rank}", changed
    attention = lora.model_copy(update={"target_modules": "auto"})
    fewer_sites = sites(job.specs, attention)
    if len(fewer_sites) < len(job.sites):
        recipe_of = base(update={"lora": attention})
        yield "adapters on attention only", "lora.target_modules=auto", _with(job, recipe=recipe_of, sites=fewer_sites)


def _with(job: Job, **changes: object) -> Job:
    """A job with other values; `replace` makes a new object, whose cached sums are counted again."""
    return replace(job, **changes)  # type: ignore[arg-type]
