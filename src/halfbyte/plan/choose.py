"""The choices: placement of the base, recomputation, size of a micro-batch; fitting with a margin, fastest first.

What: every combination that the recipe leaves open is counted and timed; of those that fit within `MARGIN` the fastest
is taken. Among those that are as fast within `SAME_TIME`, memory decides: where one leaves half of the machine free,
time alone; else the one that takes least. Where none fits, `fixes.py` says what would.
Cost: a few milliseconds; no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from halfbyte.plan import held as state
from halfbyte.plan import peak
from halfbyte.plan.job import Job
from halfbyte.plan.lines import GB, Line, Placement, Plan, Recompute, Where
from halfbyte.plan.timing import Rates, assumed, step_time
from halfbyte.system.device import Device

MARGIN = 0.15  # of free memory that a plan leaves: its own error, and what the system needs meanwhile
SAME_TIME = 1.02  # plans whose times differ by less are told apart by memory
PLENTY = 0.5  # of free memory: a plan that takes no more need not save any
CACHE_SHARE = 0.9  # of what is left, that the system keeps of a mapped file
MAX_TOKENS_PER_MICRO_BATCH = 4096  # larger micro-batches no longer run faster, they only take memory
GENERATED_TOKENS = 1024
POLICIES: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class _Candidate:
    placement: Placement
    recompute: Recompute
    tokens: int
    plan: Plan
    asked_tokens: bool = False


def make(job: Job, device: Device, rates: Rates | None = None) -> Plan:
    """Plan one training. The recipe's own values win; what they make impossible is a warning with what is missing."""
    rates = rates or assumed(device, job.dtype)
    found = list(_candidates(job, device, rates))
    fitting = [c for c in found if c.plan.short_bytes == 0 and _room(c.plan) <= 1 - MARGIN]
    if fitting:
        fastest = min(c.plan.time.step_s for c in fitting)
        level = [c for c in fitting if c.plan.time.step_s <= SAME_TIME * fastest]
        roomy = [c for c in level if _room(c.plan) <= PLENTY]
        if roomy:
            return _told(min(roomy, key=lambda c: c.plan.time.step_s), found, job)
        return _told(min(level, key=lambda c: c.plan.private_bytes), found, job)
    tight = [c for c in found if c.plan.short_bytes == 0]
    if tight:
        return _told(min(tight, key=lambda c: (_room(c.plan), c.plan.time.step_s)), found, job, tight=True)
    return _told(min(found, key=lambda c: (c.plan.needed_bytes, c.plan.time.step_s)), found, job)


def count(job: Job, device: Device, rates: Rates, *, placement: Placement, recompute: Recompute, tokens: int) -> Plan:
    """The plan of given choices: its lines, peaks, disk and time. `reasons` are empty."""
    on_cpu = device.kind == "cpu"
    where: Where = "private" if on_cpu else "device"
    cards = max(1, len(device.cards)) if placement == "split" else 1
    largest = peak.largest_micro_batch(job, tokens)
    process = state.process_lines(device, job)
    held = (
        *state.base_lines(job, placement, cards, where),
        *_share(state.training_lines(job, where, recompute), cards),
    )
    fixed: tuple[Line, ...] = (*process, *held)
    host: tuple[Line, ...] = ()
    if not on_cpu:
        context = Line("CUDA context", state.CUDA_CONTEXT_BYTES, "a round figure for each card", "", "device")
        fixed, host = (context, *held), process
    during = peak.step_lines(job, largest, recompute, where, cards)
    micro_batches = -(-job.step_tokens // max(1, largest.tokens))
    gradients = state.gradients_line(
        job, where, micro_batches=micro_batches, micro_batch_bytes=sum(line.bytes for line in during)
    )
    lines = (*fixed, *_share((gradients,), cards), *during)
    fixed_bytes = sum(line.bytes for line in fixed)
    available = device.ram_available_bytes if on_cpu else min((card.free_bytes for card in device.cards), default=0)
    private = sum(line.bytes for line in lines if line.where != "file")
    libraries = sum(line.bytes for line in lines if line.where == "file" and line.name != "base")
    cached = CACHE_SHARE * (available - private) - libraries
    return Plan(
        compute_dtype=job.dtype,
        placement=placement,
        recompute=recompute,
        max_tokens_per_micro_batch=tokens,
        tokens_in_micro_batch=largest.tokens,
        lines=tuple(line for line in lines if line.bytes),
        host_lines=host,
        disk=state.disk_lines(job, store=job.mappable),
        loading_bytes=state.loading_bytes(job, placement, fixed) // cards,
        evaluating_bytes=fixed_bytes + peak.evaluating_bytes(job, largest) if len(job.rows.evaluated) else 0,
        generating_bytes=fixed_bytes + peak.generating_bytes(job, GENERATED_TOKENS),
        available_bytes=available,
        host_available_bytes=device.ram_available_bytes,
        trainable=job.trainable,
        parameters=job.parameters,
        time=step_time(
            job, rates, tokens=tokens, recompute=recompute, placement=placement, cached_bytes=max(0.0, cached)
        ),
        reasons={},
        warnings=(),
        busy_file_bytes=state.busy_file_bytes(job) if placement in ("mapped", "streamed") else 0,
        building=job.building.lines(device.cores) if job.mappable and job.recipe.quant.type != "none" else (),
    )


def placements(job: Job, device: Device) -> tuple[tuple[Placement, ...], bool]:
    """The placements that are open, and whether the recipe chose."""
    asked = job.recipe.quant.placement
    if asked != "auto":
        return (asked,), True
    if device.kind == "cuda":
        return (("resident", "split") if len(device.cards) > 1 else ("resident",)), False
    return (("mapped", "streamed") if job.mappable else ("resident",)), False


def policies(job: Job) -> tuple[tuple[Recompute, ...], bool]:
    asked = job.recipe.train.gradient_checkpointing
    if asked is True:
        return ("full",), True
    if asked is False:
        return ("none",), True
    if asked in POLICIES:
        return (asked,), True
    return SUPPORTED_POLICIES, False


# What the engine can do; `selective` keeps the outputs of matrix products and makes what is cheap again.
SUPPORTED_POLICIES: tuple[Recompute, ...] = POLICIES


def _candidates(job: Job, device: Device, rates: Rates) -> Iterator[_Candidate]:
    asked = job.recipe.train.max_tokens_per_micro_batch
    longest, whole = job.rows.longest, job.step_tokens
    for placement in placements(job, device)[0]:
        for recompute in policies(job)[0]:
            if isinstance(asked, int):
                plan = count(job, device, rates, placement=placement, recompute=recompute, tokens=max(asked, 1))
                yield _Candidate(placement, recompute, asked, plan, asked_tokens=True)
                continue
            # a base that is streamed from disk is read once a pass, so there the whole step in one micro-batch is worth
            # having
            read_again = placement == "streamed" and job.base_bytes > PLENTY * device.ram_available_bytes
            cap = whole if read_again else min(MAX_TOKENS_PER_MICRO_BATCH, whole)
            for tokens in _sizes(longest, max(longest, cap)):
                plan = count(job, device, rates, placement=placement, recompute=recompute, tokens=tokens)
                yield _Candidate(placement, recompute, tokens, plan)


def _sizes(longest: int, largest: int) -> Iterator[int]:
    """Sizes of a micro-batch to try: the largest, then 7/8 of the one before, down to the longest example alone."""
    size = largest
    while size > longest:
        yield size
        size = min(size - 1, size * 7 // 8 // peak.TOKENS_STEP * peak.TOKENS_STEP)
    yield longest


def _share(lines: tuple[Line, ...], cards: int) -> tuple[Line, ...]:
    return lines if cards == 1 else tuple(replace(line, bytes=-(-line.bytes // cards)) for line in lines)


def _room(plan: Plan) -> float:
    """The share of what is free that a plan cannot give back."""
    return plan.needed_bytes / max(1, plan.available_bytes)


def _told(chosen: _Candidate, found: list[_Candidate], job: Job, *, tight: bool = False) -> Plan:
    plan = chosen.plan
    reasons = {
        "placement": _why_placement(chosen, job),
        "recompute": _why_recompute(chosen, found, job),
        "max_tokens_per_micro_batch": _why_tokens(chosen, found, job),
    }
    warnings = []
    longest, asked = job.rows.longest, job.recipe.train.max_tokens_per_micro_batch
    if plan.short_bytes:
        host = sum(line.bytes for line in plan.host_lines)
        what = "RAM" if plan.host_lines and host > plan.host_available_bytes else "memory"
        warnings.append(
            f"{plan.short_bytes / GB:.1f} GB short of {what}: about {plan.needed_bytes / GB:.1f} GB needed, "
            f"{plan.available_bytes / GB:.1f} GB free, with {plan.tokens_in_micro_batch} tokens in a micro-batch (the "
            f"longest example has {longest})."
        )
    elif tight:
        warnings.append(
            f"it fits without the margin of {MARGIN:.0%}: {plan.needed_bytes / GB:.2f} GB of "
            f"{plan.available_bytes / GB:.2f} GB free. The run steps down if memory runs out."
        )
    if isinstance(asked, int) and asked < longest:
        warnings.append(f"the longest example has {longest} tokens, more than train.max_tokens_per_micro_batch {asked}")
    return replace(plan, reasons=reasons, warnings=tuple(warnings))


def _why_placement(chosen: _Candidate, job: Job) -> str:
    plan = chosen.plan
    if job.recipe.quant.placement != "auto":
        return "as the recipe says"
    if chosen.placement == "split":
        return "the base and its activations do not fit on one card"
    if chosen.placement == "streamed":
        return (
            f"the base of {job.base_bytes / GB:.1f} GB does not stay in {plan.available_bytes / GB:.1f} GB beside the "
            "rest; layers come and go"
        )
    if chosen.placement == "mapped":
        return "it fits, and pages of its file need no copy"
    return "it fits" if not plan.short_bytes else "it cannot lie elsewhere here"


def _why_recompute(chosen: _Candidate, found: list[_Candidate], job: Job) -> str:
    if policies(job)[1]:
        return "as the recipe says"
    if chosen.recompute == "none":
        return "activations fit" if not chosen.plan.short_bytes else "the least that is short"
    same = [c for c in found if c.recompute == "none" and c.placement == chosen.placement]
    least = min((c.plan.needed_bytes for c in same), default=0)
    if least > (1 - MARGIN) * chosen.plan.available_bytes:
        return f"without it even the longest example takes {least / GB:.1f} GB"
    return "larger micro-batches that recompute are faster here than small ones that do not"


def _why_tokens(chosen: _Candidate, found: list[_Candidate], job: Job) -> str:
    if chosen.asked_tokens:
        return "as the recipe says"
    if chosen.plan.short_bytes and chosen.tokens <= job.rows.longest:
        return "the longest example alone, as not even that fits"
    if chosen.tokens >= job.step_tokens:
        return "a whole step fits in one micro-batch"
    larger = [
        c
        for c in found
        if c.tokens > chosen.tokens and (c.placement, c.recompute) == (chosen.placement, chosen.recompute)
    ]
    if chosen.tokens >= MAX_TOKENS_PER_MICRO_BATCH or any(_room(c.plan) <= 1 - MARGIN for c in larger):
        return "larger micro-batches run no faster"
    return f"as many as fit in {1 - MARGIN:.0%} of the free memory"
