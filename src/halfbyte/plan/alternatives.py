"""Other ways than the plan's: what would fit when nothing does, and full fine-tuning, LoRA and QLoRA side by side.

Source: Hu et al. 2021 (arXiv:2106.09685) and Dettmers et al. 2023 (arXiv:2305.14314) for what each trains and holds.
Full fine-tuning is counted as mixed precision has it: weights and gradients in 16 bits, AdamW's two numbers in fp32
(and no fp32 master copy); its backward computes the gradient of each weight too, so every linear layer keeps its input.
Cost: a plan for each change or way; no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from halfbyte.models.lora_sites import sites
from halfbyte.plan import choose, held
from halfbyte.plan.job import Job
from halfbyte.plan.lines import Fix, Line, Plan, Recompute
from halfbyte.plan.peak import largest_micro_batch
from halfbyte.plan.timing import Rates, assumed
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


@dataclass(frozen=True)
class Way:
    """One way to fine-tune: what it takes on one machine of any size, and its time beside the others'."""

    name: str
    lines: tuple[Line, ...]
    trainable: int
    parameters: int
    step_s: float
    relative_time: float = 1.0

    @property
    def bytes(self) -> int:
        return sum(line.bytes for line in self.lines)

    @property
    def percent(self) -> float:
        return 100 * self.trainable / max(1, self.parameters)


def compare(
    job: Job, device: Device, rates: Rates | None = None, *, tokens: int | None = None, recompute: Recompute = "none"
) -> tuple[Way, ...]:
    """The three ways, with micro-batches of `tokens` (the longest row if not said) and the same recomputation."""
    rates = rates or assumed(device, job.dtype)
    tokens = tokens or job.rows.longest
    recipe = job.recipe
    plain = recipe.model_copy(update={"quant": recipe.quant.model_copy(update={"type": "none"})})
    packed = recipe.model_copy(update={"quant": recipe.quant.model_copy(update={"type": "nf4"})})
    ways = [_full(replace(job, recipe=plain, mappable=False), device, rates, tokens, recompute)]
    for name, changed in (("LoRA, 16-bit base", plain), ("QLoRA, 4-bit base", packed)):
        one = replace(job, recipe=changed, mappable=False)
        plan = choose.count(one, device, rates, placement="resident", recompute=recompute, tokens=tokens)
        ways.append(Way(name, plan.lines, job.trainable, job.parameters, plan.time.step_s))
    first = ways[0].step_s
    return tuple(replace(way, relative_time=way.step_s / max(1e-12, first)) for way in ways)


def _full(job: Job, device: Device, rates: Rates, tokens: int, recompute: Recompute) -> Way:
    where = choose.computes_in(device)
    plan = choose.count(job, device, rates, placement="resident", recompute=recompute, tokens=tokens)
    count, c = job.parameters, job.itemsize
    micro_batch_tokens = largest_micro_batch(job, tokens).tokens
    state = held.OPTIMIZER_BYTES.get(str(job.recipe.train.optim), 8)
    read = {(s.layer, s.shape[-1 if not s.transposed else 0]) for s in job.specs if s.role == "linear"}
    # under full recomputation only one layer's at a time
    share = 1 if recompute != "full" else 1 / max(1, job.facts.layers)
    inputs = round(share * micro_batch_tokens * c * sum(width for _, width in read))
    kept = tuple(
        line for line in plan.lines if line.name not in ("adapters", "adapters' copies", "gradients", "optimiser")
    )
    lines = (
        *kept,
        Line("inputs of linears", inputs, "each linear layer keeps what it read", "", where),
        Line("gradients", c * count, "of every weight, in the compute dtype", "", where),
        Line("optimiser", state * count, f"{state} bytes a parameter", "", where),
    )
    return Way("full fine-tuning", lines, count, count, plan.time.step_s + _weight_gradients(job, rates))


def _weight_gradients(job: Job, rates: Rates) -> float:
    """The third matrix product, and reading and writing every optimiser state once."""
    tokens = job.rows.mean * job.rows_per_step
    return tokens * 2 * job.linear_numel / rates.matmul_flops + 24 * job.parameters / rates.memory_bytes
