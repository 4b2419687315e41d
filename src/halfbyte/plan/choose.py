"""The choices: placement of the base, recomputation, size of a micro-batch; fitting with a margin, fastest first.

What: every combination that the recipe leaves open is counted and timed; of those that fit within `MARGIN` the fastest
is taken. Among those that are as fast within `SAME_TIME` and recompute no more, memory decides: if some leave half of
the machine free, the fastest of these; else the one that takes least. Where none fits, `alternatives` says what would.
Cost: a few milliseconds; no torch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from halfbyte.errors import RecipeError
from halfbyte.plan import base_memory, memory
from halfbyte.plan.calibrate import threads
from halfbyte.plan.job import Job
from halfbyte.plan.result import GB, POOL_RESERVE, Line, Placement, Plan, Recompute, Where
from halfbyte.plan.timing import Rates, assumed, mean_micro_batches, step_time
from halfbyte.system.device import Device

MARGIN = 0.15  # of free memory that a plan leaves: its own error, and what the system needs meanwhile
SAME_TIME = 1.02  # plans whose times differ by less are told apart by memory
PLENTY = 0.5  # of free memory: a plan that takes no more need not save any
CACHE_SHARE = 0.9  # of what is left, that the system keeps of a mapped file
MAX_TOKENS_PER_MICRO_BATCH = 4096  # larger micro-batches no longer run faster, they only take memory
GENERATED_TOKENS = 1024
EVALUATED_SHARE = 0.5  # of a step's memory, for an evaluation: it fits where a step was made smaller, too
SMALL_BYTES = 8 << 20  # in RAM an evaluation may take as much, however small a step is
# From the least to the most that is done again. `selective` keeps outputs of matrix products, and no more.
POLICIES: tuple[Recompute, ...] = ("none", "selective", "full")


def best_plan(job: Job, device: Device, rates: Rates | None = None) -> Plan:
    """Plan one training. The recipe's own values win; what they make impossible is a warning with what is missing."""
    plans = list(_candidates(job, device, rates or assumed(device, job.dtype)))
    fitting = [p for p in plans if p.short_bytes == 0 and _share_needed(p) <= 1 - MARGIN]
    if fitting:
        fastest = min(fitting, key=lambda p: p.time.step_s)
        again = POLICIES[: POLICIES.index(fastest.recompute) + 1]  # no more than the fastest does again
        level = [p for p in fitting if p.time.step_s <= SAME_TIME * fastest.time.step_s and p.recompute in again]
        roomy = [p for p in level if _share_needed(p) <= PLENTY]
        chosen = min(roomy, key=lambda p: p.time.step_s) if roomy else min(level, key=lambda p: p.private_bytes)
        return _with_reasons(chosen, plans, job)
    # without the margin; else what misses by the least
    tight = [p for p in plans if p.short_bytes == 0]
    return _with_reasons(min(tight or plans, key=lambda p: (p.needed_bytes, p.time.step_s)), plans, job)


def plan_with(
    job: Job, device: Device, rates: Rates, *, placement: Placement, recompute: Recompute, tokens: int
) -> Plan:
    """The plan with these choices: its lines, peaks, disk and time. `reasons` are empty."""
    where, available = compute_memory(device), available_bytes(device, placement)
    cards = max(1, len(device.cards)) if placement == "split" else 1
    largest = memory.largest_micro_batch(job, tokens)
    around, host = process_lines(job, device)
    if any(card.shares_ram for card in device.cards):  # one memory for both
        available = max(0, available - sum(line.bytes for line in host))
    trained = _on_one_card(memory.training_lines(job, where, recompute), cards)
    trained = (*trained, *memory.recurrent_lines(job, threads(device)))
    several = job.step_tokens > largest.tokens
    during = _during(job, largest, recompute, where, cards, before=several)
    if several and where == "device" and job.packed:
        # the gradients that later ones find lie in what the first one took and freed; a CPU's pool keeps that
        first = _during(job, largest, recompute, where, cards, before=False)
        smaller = memory.largest_micro_batch(job, memory.later_tokens(job, tokens))
        during = max(first, _during(job, smaller, recompute, where, cards, before=True), key=_bytes)
    cache = page_cache_bytes((*around, *trained, *during), available)
    fixed = (*around, *base_memory.base_lines(job, placement, cards, where, cache), *trained)
    fixed_bytes = sum(line.bytes for line in fixed)
    eval_tokens = _evaluation_tokens(job, tokens, during)
    in_files = placement in ("mapped", "streamed")
    read = 2 * mean_micro_batches(job, tokens) * max(0, job.base_bytes - int(cache)) if in_files else 0
    time = step_time(
        job, rates, tokens=tokens, eval_tokens=eval_tokens, recompute=recompute, placement=placement, read_bytes=read
    )
    return Plan(
        compute_dtype=job.dtype, placement=placement, recompute=recompute, max_tokens_per_micro_batch=tokens,
        tokens_in_micro_batch=largest.tokens, evaluation_tokens=eval_tokens,
        lines=tuple(line for line in (*fixed, *during) if line.bytes),
        host_lines=host, disk=memory.disk_lines(job),
        loading_bytes=memory.loading_bytes(job, placement, fixed) // cards,
        evaluating_bytes=fixed_bytes + memory.evaluating_bytes(job, eval_tokens) if len(job.rows.evaluated) else 0,
        generating_bytes=fixed_bytes + memory.generating_bytes(job, GENERATED_TOKENS, streamed=placement == "streamed"),
        available_bytes=available, host_available_bytes=device.ram_available_bytes, trainable=job.trainable,
        parameters=job.parameters, time=time, reasons={}, warnings=(), read_bytes=read,
        busy_file_bytes=base_memory.busy_file_bytes(job) if in_files else 0,
        building=job.store_build.lines(device.cores) if job.stored else (),
    )  # fmt: skip


def _during(
    job: Job, micro_batch: memory.MicroBatch, recompute: Recompute, where: Where, cards: int, *, before: bool
) -> tuple[Line, ...]:
    """Lines of one micro-batch at its peak, and of gradients: with `before`, of other micro-batches of its step too."""
    lines = memory.step_lines(job, micro_batch, recompute, where, cards)
    count = -(-job.step_tokens // max(1, micro_batch.tokens)) if before else 1
    taken = _bytes(line for line in lines if line.name != POOL_RESERVE)
    gradients = memory.gradient_lines(job, where, micro_batches=count, micro_batch_bytes=taken)
    return (*_on_one_card(gradients, cards), *lines)


def _evaluation_tokens(job: Job, tokens: int, during: Iterable[Line]) -> int:
    """Of an evaluation's micro-batch: no fewer than a step's, and as many as take a share of a step, of these lines."""
    if isinstance(job.recipe.train.max_tokens_per_micro_batch, int):
        return tokens
    sizes = micro_batch_sizes(tokens, max(tokens, MAX_TOKENS_PER_MICRO_BATCH))
    room = round(EVALUATED_SHARE * _bytes(line for line in during if line.name != POOL_RESERVE))
    return memory.evaluation_tokens(job, sizes, max(room, SMALL_BYTES * job.kernels))


def _bytes(lines: Iterable[Line]) -> int:
    return sum(line.bytes for line in lines)


def available_bytes(device: Device, placement: Placement = "resident") -> int:
    """What is free where the model computes: in RAM, on the card that is used, or of several on the fullest one."""
    if not device.on_card:
        return device.ram_available_bytes
    used = device.cards if placement == "split" else device.cards[:1]
    return min((card.free_bytes for card in used), default=0)


def compute_memory(device: Device) -> Where:
    """Where the tensors of a computation lie."""
    return "private" if device.kind == "cpu" else "device"


def process_lines(job: Job, device: Device) -> tuple[tuple[Line, ...], tuple[Line, ...]]:
    """The process's own lines, where the model computes, and in RAM beside a card."""
    process = memory.process_lines(device, job)
    return (process, ()) if device.kind == "cpu" else (memory.CARD_LINES, process)


def page_cache_bytes(lines: Iterable[Line], available: int) -> float:
    """Bytes of a mapped file that stay in memory beside `lines`."""
    private = sum(line.bytes for line in lines if line.where != "file")
    libraries = sum(line.bytes for line in lines if line.where == "file")
    return max(0.0, CACHE_SHARE * (available - private) - libraries)


def placements(job: Job, device: Device) -> tuple[Placement, ...]:
    """The placements that are open: the recipe's, or those that this machine has, the fastest first."""
    asked = job.recipe.quant.placement
    if asked in ("mapped", "streamed") and device.on_card:
        raise RecipeError(
            f"quant.placement {asked} keeps the base in RAM, and this machine computes on {device.cards[0].name}.",
            fix="--set quant.placement=auto; or CUDA_VISIBLE_DEVICES= in front of the command, to compute on the CPU",
        )
    if asked != "auto" and (asked != "sharded" or job.ranks > 1):
        return (asked,)
    if device.on_card:
        return ("resident", "split") if len(device.cards) > 1 else ("resident",)
    return ("mapped", "streamed") if job.mappable else ("resident",)


def recompute_policies(job: Job) -> tuple[Recompute, ...]:
    """Policies that are open. Selective recomputation makes again what our kernels made: without them, as on a card, it
    would change nothing."""
    asked = job.recipe.train.gradient_checkpointing
    if asked == "auto":
        return POLICIES if job.kernels else tuple(policy for policy in POLICIES if policy != "selective")
    return ("selective" if asked == "selective" and job.kernels else "full" if asked else "none",)


def step_down_policies(job: Job, recompute: Recompute) -> tuple[Recompute, ...]:
    """Policies from one on, each recomputing more than the one before."""
    return tuple(p for p in POLICIES[POLICIES.index(recompute) :] if job.kernels or p != "selective" or p == recompute)


def _candidates(job: Job, device: Device, rates: Rates) -> Iterator[Plan]:
    asked = job.recipe.train.max_tokens_per_micro_batch
    step = job.step_tokens
    longest = min(job.rows.longest, step)  # a run of few steps may never meet the longest row
    for placement in placements(job, device):
        # a base that is read from disk is read for every micro-batch, so a whole step in one is worth having
        read_again = placement == "streamed" and job.base_bytes > PLENTY * device.ram_available_bytes
        largest = max(longest, step if read_again else min(MAX_TOKENS_PER_MICRO_BATCH, step))
        budgets = (max(asked, 1),) if isinstance(asked, int) else tuple(micro_batch_sizes(longest, largest))
        for recompute in recompute_policies(job):
            for tokens in budgets:
                plan = plan_with(job, device, rates, placement=placement, recompute=recompute, tokens=tokens)
                # the kernel's paging does not know which layer is next; streaming does
                if job.recipe.quant.placement != "auto" or placement != "mapped" or not plan.read_bytes:
                    yield plan


def micro_batch_sizes(longest: int, largest: int) -> Iterator[int]:
    """Sizes of a micro-batch to try: the largest, then 7/8 of the one before, down to the longest example alone."""
    size = largest
    while size > longest:
        yield size
        size = min(size - 1, size * 7 // 8 // memory.TOKENS_STEP * memory.TOKENS_STEP)
    yield longest


def _on_one_card(lines: tuple[Line, ...], cards: int) -> tuple[Line, ...]:
    return lines if cards == 1 else tuple(replace(line, bytes=-(-line.bytes // cards)) for line in lines)


def _share_needed(plan: Plan) -> float:
    """The share of what is free that a plan cannot give back."""
    return plan.needed_bytes / max(1, plan.available_bytes)


def _with_reasons(plan: Plan, plans: list[Plan], job: Job) -> Plan:
    reasons = {
        "placement": placement_reason(plan.placement, job, plan.available_bytes, short=bool(plan.short_bytes)),
        "recompute": _recompute_reason(plan, plans, job),
        "max_tokens_per_micro_batch": _tokens_reason(plan, plans, job),
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
    elif _share_needed(plan) > 1 - MARGIN:
        warnings.append(
            f"it fits without the margin of {MARGIN:.0%}: {plan.needed_bytes / GB:.2f} GB of "
            f"{plan.available_bytes / GB:.2f} GB free. The run steps down if memory runs out."
        )
    if isinstance(asked, int) and asked < longest:
        warnings.append(f"the longest example has {longest} tokens, more than train.max_tokens_per_micro_batch {asked}")
    if job.recipe.train.optim.startswith("paged_") and not plan.host_lines:
        warnings.append(f"train.optim {job.recipe.train.optim}: nothing is paged on a CPU, its state stays in memory")
    return replace(plan, reasons=reasons, warnings=tuple(warnings))


def placement_reason(placement: Placement, job: Job, available: int, *, short: bool = False) -> str:
    if job.recipe.quant.placement in (placement, "resident", "mapped", "streamed"):
        return "as the recipe says"
    sizes = f"the base of {job.base_bytes / GB:.1f} GB does not stay in {available / GB:.1f} GB beside the rest"
    return {
        "split": "the base and its activations do not fit on one card",
        "streamed": f"{sizes}, so its layers are read from disk as they are needed",
        "mapped": "it fits, and pages of its file need no copy",
        "resident": "the only placement that this machine supports" if short else "it fits",
    }[placement]


def _recompute_reason(plan: Plan, plans: list[Plan], job: Job) -> str:
    asked = job.recipe.train.gradient_checkpointing
    if asked == "selective" and plan.recompute != asked:
        return "selective recomputation would save nothing here: it makes again what kernels for CPUs made"
    if asked != "auto":
        return "as the recipe says"
    if plan.recompute == "none":
        return "activations fit" if not plan.short_bytes else "nothing fits; this misses by the least"
    least = min((p.needed_bytes for p in plans if (p.placement, p.recompute) == (plan.placement, "none")), default=0)
    if least > (1 - MARGIN) * plan.available_bytes:
        return f"without it even the longest example takes {least / GB:.1f} GB"
    return "larger micro-batches that recompute are faster here than small ones that do not"


def _tokens_reason(plan: Plan, plans: list[Plan], job: Job) -> str:
    tokens = plan.max_tokens_per_micro_batch
    if isinstance(job.recipe.train.max_tokens_per_micro_batch, int):
        return "as the recipe says"
    if plan.short_bytes and tokens <= job.rows.longest:
        return "the longest example alone, and not even that fits"
    if tokens >= job.step_tokens:
        return "a whole step fits in one micro-batch"
    same = (p for p in plans if (p.placement, p.recompute) == (plan.placement, plan.recompute))
    larger = (p for p in same if p.max_tokens_per_micro_batch > tokens)
    if tokens >= MAX_TOKENS_PER_MICRO_BATCH or any(_share_needed(p) <= 1 - MARGIN for p in larger):
        return "larger micro-batches run no faster"
    return f"as many as fit in {1 - MARGIN:.0%} of the free memory"
