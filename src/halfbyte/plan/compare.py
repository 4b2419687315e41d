"""Full fine-tuning, LoRA on 16 bits and QLoRA on 4 bits, side by side, for one model and one machine.

Source: Hu et al. 2021 (arXiv:2106.09685) and Dettmers et al. 2023 (arXiv:2305.14314) for what each trains and holds.
Full fine-tuning is counted as mixed precision has it: weights and gradients in 16 bits, AdamW's two numbers in fp32
(and no fp32 master copy); its backward computes the gradient of each weight too, so every linear layer keeps its input.
Cost: three plans; no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from halfbyte.plan import choose
from halfbyte.plan.held import OPTIMIZER_BYTES
from halfbyte.plan.job import Job
from halfbyte.plan.lines import Line, Recompute
from halfbyte.plan.peak import largest_micro_batch
from halfbyte.plan.timing import Rates, assumed
from halfbyte.system.device import Device


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
    where = "private" if device.kind == "cpu" else "device"
    plan = choose.count(job, device, rates, placement="resident", recompute=recompute, tokens=tokens)
    count, c = job.parameters, job.itemsize
    micro_batch_tokens = largest_micro_batch(job, tokens).tokens
    state = OPTIMIZER_BYTES.get(str(job.recipe.train.optim), 8)
    read = {(s.layer, s.shape[-1 if not s.transposed else 0]) for s in job.specs if s.role == "linear"}
    # under full recomputation only one layer's at a time
    share = 1 if recompute != "full" else 1 / max(1, job.facts.layers)
    inputs = round(share * micro_batch_tokens * c * sum(width for _, width in read))
    kept = tuple(
        line for line in plan.lines if line.name not in ("adapters", "adapters' copies", "gradients", "optimiser")
    )
    lines = (
        *kept,
        Line("inputs of linears", inputs, "each linear layer keeps what it read", "", where),  # type: ignore[arg-type]
        Line("gradients", c * count, "of every weight, in the compute dtype", "", where),  # type: ignore[arg-type]
        Line("optimiser", state * count, f"{state} bytes a parameter", "", where),  # type: ignore[arg-type]
    )
    return Way("full fine-tuning", lines, count, count, plan.time.step_s + _weight_gradients(job, rates))


def _weight_gradients(job: Job, rates: Rates) -> float:
    """The third matrix product, and reading and writing every optimiser state once."""
    tokens = job.rows.mean * job.rows_per_step
    return tokens * 2 * job.linear_numel / rates.matmul_flops + 24 * job.parameters / rates.memory_bytes
