"""Other plans than the chosen one: what would fit if nothing does; full fine-tuning, LoRA and QLoRA side by side.

Source: Hu et al. 2021 (arXiv:2106.09685) and Dettmers et al. 2023 (arXiv:2305.14314) for what each trains and holds.
Full fine-tuning is counted as mixed precision has it: weights and gradients in 16 bits, AdamW's two numbers in fp32
(and no fp32 master copy); its backward computes the gradient of each weight too, so every linear layer keeps its input.
Cost: a plan for each change or method; no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from halfbyte.models.lora_sites import sites
from halfbyte.plan import choose, memory
from halfbyte.plan.job import Job
from halfbyte.plan.result import Fix, Line, Plan, Recompute
from halfbyte.plan.timing import Rates, assumed
from halfbyte.recipe import number_formats
from halfbyte.recipe.schema import Recipe
from halfbyte.system.device import Device
from halfbyte.upstream.bitsandbytes import CPU_OPTIMISERS

NEAREST = 3
SMALL_OPTIMIZER = "adamw_bnb_8bit"


def nearest_fixes(job: Job, device: Device, plan: Plan, rates: Rates | None = None) -> tuple[Fix, ...]:
    """Up to three changes: those that fit, the least slower first; else those that come nearest."""
    if not plan.short_bytes:
        return ()
    # of one kind the mildest that fits, else the one that comes nearest; `_changes` goes from mild to strong
    kinds: dict[str, Fix] = {}
    for change, setting, changed in _changes(job, device):
        other = choose.best_plan(changed, device, rates)
        slower = other.time.step_s / max(1e-9, plan.time.step_s)
        kind, fix = setting.split("=")[0], Fix(change, setting, other.needed_bytes, other.short_bytes, slower)
        before = kinds.get(kind)
        if before is None or (before.short_bytes and fix.short_bytes < before.short_bytes):
            kinds[kind] = fix
    near = [fix for fix in kinds.values() if fix.short_bytes < plan.short_bytes]
    return tuple(sorted(near, key=lambda fix: (fix.short_bytes, fix.slower))[:NEAREST])


def _changes(job: Job, device: Device) -> Iterator[tuple[str, str, Job]]:
    """What could be changed (in words, and as a setting), and the job with that change."""
    quant, lora, train = job.recipe.quant, job.recipe.lora, job.recipe.train

    def change(words: str, setting: str, value: object, **more: Any) -> tuple[str, str, Job]:
        shown = str(value).lower() if isinstance(value, bool) else value
        return words, f"{setting}={shown}", replace(job, recipe=_with(job.recipe, setting, value), **more)

    for info in number_formats.smaller(quant.type):
        words = f"{info.bits} bits a weight"
        yield change(words, "quant.type", info.name, mappable=device.kind == "cpu", stored=True)
    if train.gradient_checkpointing is False:
        yield change("recompute activations", "train.gradient_checkpointing", True)
    if isinstance(train.max_tokens_per_micro_batch, int) and train.max_tokens_per_micro_batch > job.rows.longest:
        yield change("smaller micro-batches", "train.max_tokens_per_micro_batch", "auto")
    if device.kind == "cpu" and quant.placement not in ("auto", "streamed"):
        yield change("stream the base", "quant.placement", "streamed", mappable=True, stored=quant.quantises)
    length = job.rows.longest
    while length > 128:
        length //= 2
        rows = job.rows.cut(length)
        yield f"rows of at most {length} tokens", f"data.max_length={length}", replace(job, rows=rows)
    if memory.optimizer_bytes(job) > 2 and (device.on_card or CPU_OPTIMISERS.there):
        yield change("8-bit optimiser states", "train.optim", SMALL_OPTIMIZER)
    rank = lora.r
    while rank > 4:
        rank //= 2
        fewer = tuple(replace(site, rank=max(1, site.rank * rank // lora.r)) for site in job.sites)
        yield change(f"rank {rank}", "lora.r", rank, sites=fewer)
    on_attention = sites(job.specs, lora.model_copy(update={"target_modules": "auto"}))
    if len(on_attention) < len(job.sites):
        yield change("adapters on attention only", "lora.target_modules", "auto", sites=on_attention)


def _with(recipe: Recipe, setting: str, value: object) -> Recipe:
    section, _, field = setting.partition(".")
    if setting == "quant.type":
        return recipe.model_copy(update={"quant": recipe.quant.in_type(str(value))})
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update={field: value})})


@dataclass(frozen=True)
class Method:
    """One method of fine-tuning: the memory it needs, whatever the machine has, its time beside full fine-tuning."""

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
) -> tuple[Method, ...]:
    """The three methods, with micro-batches of `tokens` (the longest row if not said) and the same recomputation."""
    rates = rates or assumed(device, job.dtype)
    tokens = tokens or job.rows.longest
    plain, packed = (
        replace(job, recipe=_with(job.recipe, "quant.type", t), mappable=False, stored=False) for t in ("none", "nf4")
    )
    methods = [_full(plain, device, rates, tokens, recompute)]
    for name, one in (("LoRA, 16-bit base", plain), ("QLoRA, 4-bit base", packed)):
        plan = choose.plan_with(one, device, rates, placement="resident", recompute=recompute, tokens=tokens)
        methods.append(Method(name, plan.lines, job.trainable, job.parameters, plan.time.step_s))
    first = methods[0].step_s
    return tuple(replace(method, relative_time=method.step_s / max(1e-12, first)) for method in methods)


def _full(job: Job, device: Device, rates: Rates, tokens: int, recompute: Recompute) -> Method:
    where = choose.compute_memory(device)
    plan = choose.plan_with(job, device, rates, placement="resident", recompute=recompute, tokens=tokens)
    count, c = job.parameters, job.itemsize
    micro_batch_tokens = memory.largest_micro_batch(job, tokens).tokens
    state = memory.optimizer_bytes(job)
    read = {(s.layer, s.shape[-1 if not s.transposed else 0]) for s in job.specs if s.role == "linear"}
    # under full recomputation only one layer's at a time
    share = 1 if recompute != "full" else 1 / max(1, job.facts.layers)
    inputs = round(share * micro_batch_tokens * c * sum(width for _, width in read))
    trained = ("adapters", "adapters' copies", "gradients", "optimiser")
    lines = (
        *(line for line in plan.lines if line.name not in trained),
        Line("inputs of linears", inputs, "each linear layer keeps what it read", "", where),
        Line("gradients", c * count, "of every weight, in the compute dtype", "", where),
        Line("optimiser", state * count, f"{state} bytes a parameter", "", where),
    )
    # the third matrix product, and reading and writing every optimiser state once
    products = job.rows.mean * job.mean_rows_per_step * 2 * job.linear_numel / rates.matmul_flops
    seconds = plan.time.step_s + products + 24 * count / rates.memory_bytes
    return Method("full fine-tuning", lines, count, count, seconds)
