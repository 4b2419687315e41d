"""The plan of a run: what will lie in memory, line by line, and how a step is split so that it fits. Pure arithmetic.

Why: a run that ends in "killed" after an hour of loading is the worst way to learn that a model does not fit; and the
largest pass without recomputation is the fastest one, so the size is worth choosing before anything is loaded.
Source: tensors kept for backward were counted with `torch.autograd.graph.saved_tensors_hooks` on Llama and GPT-2 blocks
with bitsandbytes 4-bit weights and PEFT's LoRA layers; `LIBRARIES_BYTES` is the measured RSS of a process that has
imported torch (CPU build), transformers, peft and bitsandbytes and multiplied one matrix.
Cost: none. This is an **estimate**: what autograd keeps, counted high (attention counts full key/value heads, every MLP
four intermediate tensors), but not what the allocator keeps beside it. Peak RSS of real runs was 1% (after 3 steps)
to 50% (after 200 steps of ever new pass lengths) above it; `docs/log.md` has the figures. A model whose attention is
not fused is not covered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from halfbyte.device import Device, compute_dtype
from halfbyte.shapes import Facts, TensorSpec

if TYPE_CHECKING:
    from halfbyte.recipe import Recipe

GB = 1e9
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
LIBRARIES_BYTES = 500_000_000
CUDA_CONTEXT_BYTES = 600_000_000  # driver context and cuBLAS workspace; a round figure, not measured here
COMFORT = 0.5  # share of free memory that a plan uses by choice; the rest is for the system and for what is not counted
LIMIT = 0.9  # share that it uses when there is no other way
MAX_TOKENS_PER_PASS = 4096  # larger passes no longer run faster, they only take memory
TOKENS_STEP = 64

# Bytes of optimiser state for each trained parameter; AdamW's 8 for a name that is not here.
OPTIMIZER_BYTES = {
    "sgd": 0, "rmsprop": 4, "adagrad": 4, "lion_32bit": 4, "paged_lion_32bit": 4, "adafactor": 1, "adamw_bnb_8bit": 2,
    "adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1, "ademamix": 12, "ademamix_8bit": 3,
    "rmsprop_bnb": 4, "rmsprop_bnb_32bit": 4, "rmsprop_bnb_8bit": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One thing that takes memory, and how its bytes were counted."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class Plan:
    """What a run is expected to take, and the two choices that follow from it.

    `reasons` has one for each choice, under its name. `tokens_in_pass` is what the activations were counted for:
    `max_tokens_per_pass`, or less when a whole step is shorter, or more when one example is longer. `available_bytes`
    is what is free now, in RAM or on the cards.
    """

    compute_dtype: str
    max_tokens_per_pass: int
    gradient_checkpointing: bool
    tokens_in_pass: int
    lines: tuple[Line, ...]
    available_bytes: int
    reasons: dict[str, str]
    warnings: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        return sum(line.bytes for line in self.lines)

    def text_lines(self) -> list[str]:
        """The plan as printable lines: name, GB, how it was counted; then the choices and the warnings."""
        rows = [f"{line.name:<22} {line.bytes / GB:8.3f} GB  {line.how}" for line in self.lines]
        rows.append(
            f"{'peak (estimate)':<22} {self.peak_bytes / GB:8.3f} GB  of {self.available_bytes / GB:.1f} GB free"
        )
        rows += [f"{name} {getattr(self, name)}: {why}" for name, why in self.reasons.items()]
        return [*rows, *(f"warning: {text}" for text in self.warnings)]

    def to_json(self) -> dict[str, Any]:
        return {"estimate": True, "peak_bytes": self.peak_bytes, **asdict(self)}


def plan(
    recipe: Recipe,
    specs: Sequence[TensorSpec],
    device: Device,
    lengths: Sequence[int],
    *,
    labelled: Sequence[int] = (),
    trainable: int,
    facts: Facts,
    resident_bytes: Callable[[TensorSpec], int],
) -> Plan:
    """Choose `max_tokens_per_pass` and `gradient_checkpointing`, and count what the run will take.

    Without recomputation and in passes as large as fit in half of the free memory; else smaller passes, down to the
    longest example alone; else recomputation, then in nine tenths of it; else the smallest there is, with a warning.
    The recipe's own values win.

    Args:
        lengths: tokens of each training example; `labelled`: how many of them carry a label (none given: all do).
        trainable: number of trained parameters.
        resident_bytes: bytes of one tensor under the policy, `quant.encoded_bytes` with its settings bound.
    """
    dtype, _ = compute_dtype(device, recipe.quant.compute_dtype)
    fixed = _fixed(recipe, specs, device, trainable, resident_bytes)
    free = device.ram_available_bytes if device.kind == "cpu" else sum(card.free_bytes for card in device.cards)
    room = {share: share * free - sum(line.bytes for line in fixed) for share in (COMFORT, LIMIT)}
    longest = max(lengths, default=1)
    step = _step_tokens(recipe, lengths)
    share = sum(labelled) / max(1, sum(lengths)) if labelled else 1.0
    cost = {
        again: _Cost.of(recipe, specs, facts, trainable, ITEMSIZE[dtype], share, recompute=again)
        for again in (False, True)
    }

    asked_tokens, asked_again = _asked(recipe)
    largest = asked_tokens or max(longest, min(MAX_TOKENS_PER_PASS, step))
    smallest = max(longest, asked_tokens or 0)
    choices = (False, True) if asked_again is None else (asked_again,)
    measures = (*((again, COMFORT) for again in choices), (choices[-1], LIMIT))
    fitting = ((again, b) for again, b in measures if cost[again].bytes(min(smallest, step)) <= room[b])
    again, budget = next(fitting, (choices[-1], None))
    tokens = smallest if budget is None else max(smallest, min(largest, cost[again].tokens(room[budget])))
    counted = min(tokens, max(step, longest))

    lines = (*fixed, *cost[again].lines(counted))
    peak = sum(line.bytes for line in lines)
    warnings = []
    if peak > free:
        warnings.append(
            f"{(peak - free) / GB:.1f} GB short: about {peak / GB:.1f} GB needed, {free / GB:.1f} GB free, with "
            f"{counted} tokens in a pass (the longest example has {longest}). Lower data.max_length or "
            "train.max_tokens_per_pass, or take a smaller model or a machine with more memory."
        )
    if asked_tokens is not None and asked_tokens < longest:
        warnings.append(f"the longest example has {longest} tokens, more than train.max_tokens_per_pass {asked_tokens}")
    reasons = {
        "max_tokens_per_pass": _why_tokens(asked_tokens, tokens, step, largest, budget),
        "gradient_checkpointing": _why_again(asked_again, again, budget),
    }
    return Plan(dtype, asked_tokens or tokens, again, counted, lines, free, reasons, tuple(warnings))


def layer_bytes_per_token(facts: Facts, itemsize: int) -> float:
    """What backward needs of one token and one decoder layer, without LoRA's own inputs.

    Two norms keep fp32 inputs, attention keeps query, key, value and output, the MLP four intermediate tensors.
    """
    mlp = facts.intermediate * max(1, facts.experts_per_token)
    return 2 * 4 * facts.hidden + 4 * itemsize * facts.hidden + 4 * itemsize * mlp


@dataclass(frozen=True)
class _Cost:
    """Bytes of one pass: so many a token, and a part that does not grow with it."""

    activation: float
    logits: float
    constant: int
    how: str
    how_logits: str

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        specs: Sequence[TensorSpec],
        facts: Facts,
        trainable: int,
        itemsize: int,
        labelled_share: float,
        *,
        recompute: bool,
    ) -> _Cost:
        hidden, layers = facts.hidden, max(1, facts.layers)
        linears = [s for s in specs if s.role == "linear"]
        # PEFT's LoRA layer keeps its input in fp32, and once more after a dropout. The inputs' total width is about
        # half of what the trained parameters say: r * (in + out) for each target.
        width = (
            min(trainable / max(1, recipe.lora.r) / 2, sum(s.shape[0 if s.transposed else 1] for s in linears)) / layers
        )
        kept = 4 * width * (2 if recipe.lora.lora_dropout else 1)
        layer = layer_bytes_per_token(facts, itemsize) + kept
        ends = (4 + itemsize) * hidden
        how = f"a token: {layers} layers x {layer / 1e3:.1f} kB"
        total = layers * layer + ends
        if recompute:
            total = layers * itemsize * hidden + layer + ends
            inputs = itemsize * hidden / 1e3
            how = f"a token: {layers} layers' inputs of {inputs:.1f} kB and one layer of {layer / 1e3:.1f} kB"
        # 16-bit logits, fp32 log-probabilities, and two fp32 gradients of them while the loss goes backward
        logits = labelled_share * facts.vocab * (itemsize + 3 * 4)
        constant = 2 * itemsize * max((s.numel for s in linears), default=0)
        return cls(total, logits, constant, how, f"{labelled_share:.0%} of them labelled, vocabulary {facts.vocab}")

    def bytes(self, tokens: int) -> float:
        return self.constant + tokens * (self.activation + self.logits)

    def tokens(self, room: float) -> int:
        """The most tokens that fit, in steps of `TOKENS_STEP`."""
        fit = int((room - self.constant) / (self.activation + self.logits))
        return fit // TOKENS_STEP * TOKENS_STEP

    def lines(self, tokens: int) -> tuple[Line, ...]:
        return (
            Line("activations", round(tokens * self.activation), f"{tokens} tokens; {self.how}"),
            Line("logits", round(tokens * self.logits), f"{tokens} tokens, {self.how_logits}"),
            Line("dequantised weight", self.constant, "the largest matrix in the compute dtype, twice"),
        )


def _fixed(
    recipe: Recipe,
    specs: Sequence[TensorSpec],
    device: Device,
    trainable: int,
    resident_bytes: Callable[[TensorSpec], int],
) -> tuple[Line, ...]:
    optimizer = str(recipe.train.optim)
    state = OPTIMIZER_BYTES.get(optimizer, 8)
    base = sum(resident_bytes(s) for s in specs)
    start = (
        Line("libraries", LIBRARIES_BYTES, "torch, transformers, peft, bitsandbytes; measured")
        if device.kind == "cpu"
        else Line("CUDA context", CUDA_CONTEXT_BYTES * len(device.cards), "a round figure for each card")
    )
    return (
        start,
        Line(
            "base",
            base,
            f"{len(specs)} tensors, {sum(s.numel for s in specs) / 1e6:.1f} M weights, quant.type {recipe.quant.type}",
        ),
        Line("adapters", 4 * trainable, f"{trainable} trained parameters in fp32"),
        Line("gradients", 4 * trainable, "fp32"),
        Line("optimiser", state * trainable, f"{optimizer}: {state} bytes a parameter"),
    )


def _step_tokens(recipe: Recipe, lengths: Sequence[int]) -> int:
    """Tokens of the largest step there can be: its rows are drawn at random, so the longest may come together."""
    rows = recipe.train.per_device_train_batch_size * recipe.train.gradient_accumulation_steps
    return max(1, sum(sorted(lengths, reverse=True)[:rows]))


def _asked(recipe: Recipe) -> tuple[int | None, bool | None]:
    tokens, again = recipe.train.max_tokens_per_pass, recipe.train.gradient_checkpointing
    return (tokens if isinstance(tokens, int) else None), (again if isinstance(again, bool) else None)


def _why_tokens(asked: int | None, tokens: int, step: int, largest: int, budget: float | None) -> str:
    if asked is not None:
        return "as the recipe says"
    if budget is None:
        return "the longest example alone, as not even that fits"
    if tokens >= step:
        return "a whole step fits in one pass"
    if tokens == largest:
        return "larger passes run no faster"
    return f"as many as fit in {budget:.0%} of the free memory"


def _why_again(asked: bool | None, again: bool, budget: float | None) -> str:
    if asked is not None:
        return "as the recipe says"
    if not again:
        return f"activations fit in {budget:.0%} of the free memory, and recomputing costs a third more time"
    return "without it not even the longest example fits" + (" in half of the free memory" if budget == COMFORT else "")
