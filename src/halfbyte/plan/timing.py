"""Seconds a step, from what this machine multiplies, moves and reads in a second.

Source: 2 FLOP a weight and token forward, 2 for the gradient of the input (a frozen weight needs no third), 2 more
where the forward is done again; attention 4 L A forward and 10 L A backward a token and layer (FlashAttention-2,
arXiv:2307.08691), half of it under a causal mask, whose edge runs through whole blocks of rows. A product y += x W^T
also reads x, W and y, and writes y. Rates come from `calibrate.py`; without them from a table of round figures by
instruction set, and the plan says "time assumed".
Cost: none; no torch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from halfbyte.models.families import FAMILIES, UNKNOWN
from halfbyte.plan.job import Job
from halfbyte.plan.memory import optimizer_bytes
from halfbyte.plan.result import Placement, Recompute, Time
from halfbyte.quant import formats
from halfbyte.system.device import Device
from halfbyte.system.words import duration

SPREAD = 0.25  # of a time from measured rates; shared machines and turbo clocks move that much
SPREAD_ASSUMED = 0.6
# Of writing: texts side by side; the share of the rate of large products that a tape reaches; seconds to draw a token,
# for each number of the vocabulary (in fp64); and for each layer to write tapes and to prove them. Measured: docs/log.
AT_ONCE, TAPE_SHARE = 16, 0.3
DRAWN_S, WRITER_LAYER_S = 3.5e-9, 0.02
# What a layer of a micro-batch takes besides arithmetic: some hundred calls from Python, forward and backward; and more
# for each linear layer with an adapter: its eight products and what is around them.
LAYER_OVERHEAD_S, SITE_OVERHEAD_S = 0.004, 0.001
EXPERT_OVERHEAD_S = 0.0005  # for each expert that is sent tokens, whose products are its own
# Bytes moved for each number between an expert's stacks by a gate of stock code (gpt-oss: clamps, a sigmoid, slices).
STOCK_GATE_BYTES = 136
# Once a step: what the optimiser, the clipping and the norm of gradients move for each trained number, and what their
# calls take for each tensor. Measured: AdamW, 420 tensors of 4.9 and 19.5 million numbers (docs/log).
UPDATE_BYTES, TENSOR_OVERHEAD_S = 60, 1e-4
EIGHT_BIT_UPDATE_S = 9e-9  # more for each trained number, where bitsandbytes keeps the optimiser's state in 8 bits
# A micro-batch of so many tokens multiplies at half the rate of a large one.
HALF_RATE_TOKENS = 48
# layers/kernels/cpu/attention/: rows of queries whose scores are made at once, up to the last one's own
BLOCK_ROWS = 48
# Bytes moved for each byte that a layer keeps, forward and backward, by all that is no matrix product.
TRAFFIC = 10.0
# Of that, what is done again under a policy.
TRAFFIC_AGAIN = {"none": 1.0, "selective": 1.2, "full": 1.4}
FORWARD_TRAFFIC = 0.4  # of a forward alone: what full recomputation does again
# From the plan to the first step (a base is opened, adapters are put on it, proofs), and from the last step to the
# report (checkpoint, adapter, logits to prove it with); and what the first step takes more than the others, as memory
# is touched. Measured on two cores at 2.4 GHz.
OPENING_S, OPENING_LAYER_S, OPENING_SITE_S, FIRST_STEP_S = 1.0, 0.003, 0.002, 0.3
RESUMING_S = 1.2  # more, where a run goes on: its checkpoint, and memory that no evaluation has touched before
OPENING_PASSES = 30  # the proofs' over the weights of all experts, twice as many where a gate is stock code
SAVING_S, SAVED_BYTES = 0.2, 400e6
PROOF_ROWS, PROOF_ROW_TOKENS = 3, 1024  # proofs/adapter.py
PROOF_TOKENS, PROOF_PASSES = 512, 2  # proofs/integers.py: of a forward and a backward, exact and in integers
# Compiling the kernels of a training, once on a machine: one thread, same cores.
COMPILING_S = {"fp32": 13.0, "bf16": 16.0, "integers": 8.0, "conv": 6.0, "delta_rule": 75.0, "state_space": 60.0,
               "decoding": 9.0, "decoding_with_states": 13.0, "decoding_with_blocks": 16.0,
               "decoding_with_blocks_states": 22.0}  # fmt: skip
# layers/kernels/cpu/integer/products.py: int8 is taken from so many times the rate of the compute dtype on.
INTEGERS_PAY = 1.3
# Bytes that an int8 product moves more: of a number of its input (read, written in 8 bits) and one of its output (sums
# in 32 bits, written and read) together; and of a weight, which is decoded on its way into 8 bits.
ROUND_BYTES, ROUND_WEIGHT = 3.0 + 8.0, 1.0
# Numbers of a dropout mask that torch draws in a second, whatever the threads, where a model drops by itself: from one
# run of GPT-2, 1.0 s beside 1.9 of all else for 75 million numbers (docs/log).
MASK_NUMBERS = 75e6


def compiling(missing: Iterable[str]) -> str:
    seconds = sum(COMPILING_S[kernels] for kernels in missing)
    return f"compiling kernels, once on this machine: about {duration(seconds)}"


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second, with all its threads."""

    matmul_flops: float
    memory_bytes: float
    dequant_elements: float
    attention_flops: float
    disk_bytes: float
    source: str
    measured: bool = True
    busy: str = ""  # what ran beside the measurement; such rates are not kept
    correction: float = 1.0  # seconds that finished runs took, over the planned ones
    dropped: float = 0.0  # numbers that LoRA's dropout passes over; 0 where that is not known
    integer_ops: float = 0.0
    """Operations of int8 products (`quant.compute`), as `matmul_flops` counts them; 0 where there are none."""


def assumed(device: Device, dtype: str) -> Rates:
    """Round figures for a machine that was not measured."""
    if device.on_card:
        return Rates(60e12, 600e9, 200e9, 30e12, 1e9, "time assumed: a card of 60 TFLOP/s", measured=False)
    fast = dtype == "bf16" and any(flag in device.isa for flag in ("avx512_bf16", "amx_bf16", "bf16"))
    per_core = 150e9 if fast else 60e9 if "avx512f" in device.isa else 25e9
    cores = max(1, device.cores)
    return Rates(
        per_core * cores, 8e9 * cores, 4e9 * cores, 0.4 * per_core * cores, 1e9,
        f"time assumed: {per_core * cores / 1e9:.0f} GFLOP/s by instruction set", measured=False,
    )  # fmt: skip


def step_time(
    job: Job, rates: Rates, *, tokens: int, recompute: Recompute, placement: Placement, read_bytes: float,
    eval_tokens: int = 0,
) -> Time:  # fmt: skip
    """Seconds of a mean step. `tokens`: of a micro-batch; `eval_tokens`: of an evaluation's, where that holds more.
    `read_bytes`: of the base, read from disk in a step."""
    eval_tokens = max(tokens, eval_tokens)
    step_tokens = max(1.0, job.rows.mean * job.mean_rows_per_step * job.computed_share(tokens))
    micro_batches = mean_micro_batches(job, tokens)
    parts = _parts(job, rates, step_tokens, micro_batches, recompute)
    many = max(step_tokens / micro_batches, min(eval_tokens, float(np.sum(job.rows.evaluated))))
    forward = sum(_parts(job, rates, many, 1, "none", trains=False).values())
    reading = read_bytes / rates.disk_bytes  # half of it in the forward
    if job.recipe.train.draws:
        parts["writing"] = writing_time(job, rates, job.rows.labelled_share * job.rows.mean * job.mean_rows_per_step)
    parts["waiting for disk"] = _waiting(placement, reading, sum(parts.values()))
    forward = (forward + _waiting(placement, reading / 2 / micro_batches, forward)) / many
    total = sum(parts.values())
    spread = total * (SPREAD if rates.measured else SPREAD_ASSUMED)
    around = around_the_steps(job, rates, eval_tokens)
    if integer_products(job, rates, 2.0)[0]:
        around["proof of products"] = PROOF_PASSES * min(1.0, PROOF_TOKENS / step_tokens) * total
    steps = (total - spread, total, total + spread, job.steps)
    return Time(*steps, rates.source, rates.measured, parts, reading, around, job.done, forward)


def writing_time(job: Job, rates: Rates, tokens: float) -> float:
    """Seconds to write so many tokens of answers, up to `AT_ONCE` side by side: each time the weights are read once,
    and multiplied with for every text. Half of the longest answer more: as the last ones end there are fewer. Memory
    of a micro-batch makes room for answers and is touched anew. Not corrected by finished runs: few of them write."""
    head, times = job.facts.vocab * job.facts.hidden, tokens / min(AT_ONCE, max(1.0, job.mean_rows_per_step))
    times += 0.5 * float(np.max(job.rows.labelled, initial=0))
    read = (job.base_bytes + job.itemsize * job.lora_parameters_per_token) / rates.memory_bytes
    multiplied = 2 * (job.linear_numel + job.lora_parameters_per_token + head) / (TAPE_SHARE * rates.matmul_flops)
    each = multiplied + DRAWN_S * job.facts.vocab
    return times * read + tokens * each + WRITER_LAYER_S * job.facts.layers + FIRST_STEP_S


def _waiting(placement: Placement, reading: float, computing: float) -> float:
    """Seconds that wait for the disk; a streamed base is read while the layer before computes."""
    return max(0.0, reading - computing) if placement == "streamed" else reading if placement == "mapped" else 0.0


def around_the_steps(job: Job, rates: Rates, tokens: int) -> dict[str, float]:
    """Seconds of a run beside its steps, but for what is proven of them."""
    opening = OPENING_S + FIRST_STEP_S + OPENING_LAYER_S * job.facts.layers + OPENING_SITE_S * len(job.sites)
    opening += OPENING_PASSES * (1 + _stock_gate(job)) * job.expert_numel / rates.dequant_elements
    # the last checkpoint, and the adapter; what this and its base say of some rows, one at a time
    saving = SAVING_S + (8 + optimizer_bytes(job)) * job.trainable / SAVED_BYTES
    tokens_proven = 2 * PROOF_ROWS * min(job.rows.mean, PROOF_ROW_TOKENS)
    proof = _parts(job, rates, tokens_proven, 2 * PROOF_ROWS, "none", trains=False)
    parts = {"opening": opening + RESUMING_S * bool(job.done), "saving": saving + sum(proof.values())}
    if job.uncompiled:
        parts["compiling"] = sum(COMPILING_S[kernels] for kernels in job.uncompiled)
    if job.evaluations:
        parts["evaluations"] = job.evaluations * evaluation_time(job, rates, tokens)
    return parts


def evaluation_time(job: Job, rates: Rates, tokens: int) -> float:
    """Seconds of one evaluation: a forward of the held-out rows, in micro-batches of at most `tokens`."""
    lengths = np.asarray(job.rows.evaluated)
    rows = replace(job.rows, lengths=lengths, labelled=np.rint(lengths * job.rows.labelled_share).astype(int))
    many = rows.tokens / max(1, len(rows.lengths)) * (job.recipe.train.per_device_eval_batch_size if job.packed else 1)
    micro_batches = math.ceil(rows.tokens / max(1.0, min(tokens, many)))
    alone = replace(job, rows=rows, trees=())
    writing = writing_time(alone, rates, float(np.sum(rows.labelled))) if job.recipe.train.draws else 0.0
    return writing + sum(_parts(alone, rates, rows.tokens, micro_batches, "none", trains=False).values())


def _parts(
    job: Job, rates: Rates, tokens: float, micro_batches: int, recompute: Recompute, *, trains: bool = True
) -> dict[str, float]:
    """Seconds of `tokens` in so many micro-batches, by what they go to: forward and backward, or forwards alone."""
    facts, backward, step_tokens = job.facts, int(trains), max(1.0, tokens)
    micro_batches, length = max(1, micro_batches), job.mean_of_a_token
    labelled = job.labelled_share(math.ceil(step_tokens / micro_batches))
    forwards = 1 + job.objective.forwards + (recompute == "full") * backward
    again = forwards + backward
    products = 2 * again * job.linear_numel + (2 + 4 * backward) * job.lora_parameters_per_token
    head = 2 * (1 + job.objective.forwards + backward) * facts.vocab * facts.hidden * labelled
    width = facts.heads * facts.head_size or facts.hidden
    attention = (4 * forwards + 10 * backward) * pairs_of_a_token(length) * width * facts.layers
    weights = job.dequantised_weights(step_tokens / micro_batches)
    experts = facts.experts * job.met_share(step_tokens / micro_batches)
    operands = again * (1.5 * step_tokens * job.linear_widths + micro_batches * weights)
    # an adapter's six thin products (two forward) pass once over the input, the output or a gradient of them
    operands = job.itemsize * (operands + (1 + 2 * backward) * step_tokens * job.lora_widths)
    # in the forward, and in backward for what was dropped and for its gradient
    dropped = (again + 1) * step_tokens * sum(s.inputs for s in job.sites) if job.recipe.lora.lora_dropout else 0.0
    dropped *= backward
    dequantised = rates.dequant_elements * formats.of(job.recipe.quant).speed
    # scores that are made in memory (ALiBi, softcap, dropout) go through it as what is kept does
    moved = TRAFFIC * (job.layer.kept + job.layer.pair * length) * facts.layers
    moved += STOCK_GATE_BYTES * _stock_gate(job) * facts.experts_per_token * facts.intermediate * facts.layers
    full_rate = 1 / (1 + HALF_RATE_TOKENS * micro_batches / step_tokens)
    scores = length * facts.heads if facts.attention_dropout and not job.whole_attention else 0.0
    stock = facts.residual_dropout and not FAMILIES.get(facts.model_type, UNKNOWN).dropout_modules
    masks = facts.layers * backward * (scores + (2 * facts.hidden if stock else 0))
    update = UPDATE_BYTES / rates.memory_bytes + EIGHT_BIT_UPDATE_S * ("8bit" in job.recipe.train.optim)
    eight, rounding = integer_products(job, rates, again) if trains else (0.0, 0.0)
    products, ops = products - eight, eight / rates.integer_ops if eight else 0.0
    parts = {
        "own dropout": step_tokens * masks * forwards / MASK_NUMBERS if job.kernels else 0.0,
        "matrix products": step_tokens * ((products + head) / rates.matmul_flops + ops) / full_rate,
        "rounding": (
            step_tokens * rounding * job.linear_widths + bool(eight) * micro_batches * again * ROUND_WEIGHT * weights
        )
        / rates.memory_bytes,
        "operands": operands / rates.memory_bytes,
        "LoRA's dropout": dropped / rates.dropped if rates.dropped else 0.0,
        "attention": step_tokens * attention / rates.attention_flops,
        "elementwise": step_tokens
        * moved
        * (TRAFFIC_AGAIN[recompute] if trains else FORWARD_TRAFFIC)
        / rates.memory_bytes,
        "dequantising": micro_batches * again * weights / dequantised if job.recipe.quant.quantises else 0.0,
        "overhead": (0.4 + 0.6 * backward)
        * micro_batches
        * ((LAYER_OVERHEAD_S + EXPERT_OVERHEAD_S * experts) * facts.layers + SITE_OVERHEAD_S * len(job.sites)),
        "optimiser": backward * (update * job.trainable + TENSOR_OVERHEAD_S * 2 * len(job.sites)),
    }
    return {name: seconds * rates.correction for name, seconds in parts.items()}


def _stock_gate(job: Job) -> bool:
    return FAMILIES.get(job.facts.model_type, UNKNOWN).stock_gate


def integer_products(job: Job, rates: Rates, again: float) -> tuple[float, float]:
    """(operations a token in int8 products, bytes moved for them for each number of the inputs and outputs of layers).

    `auto` is counted as its proof nearly always ends: the input gradient, and forward where that need not be exact.
    """
    least = INTEGERS_PAY * rates.matmul_flops if job.recipe.quant.compute == "auto" else 0.0
    if not job.integers or rates.integer_ops <= least:
        return 0.0, 0.0
    share = (1.0 if job.recipe.train.draws or job.recipe.train.referenced else again) / again
    return 2 * again * job.linear_numel * share, again * share * ROUND_BYTES / 2


def pairs_of_a_token(length: float) -> float:
    """Scores that a query of an example of this length computes on average."""
    return (length + BLOCK_ROWS) / 2


def mean_micro_batches(job: Job, tokens: int) -> int:
    """How many micro-batches of at most `tokens` a mean step has."""
    if job.trees:
        return math.ceil(job.shared_micro_batches(tokens))
    at_once = math.floor(tokens / max(1.0, job.rows.mean)) if job.packed else 1
    return math.ceil(job.mean_rows_per_step / max(1, at_once))
