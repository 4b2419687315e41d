"""What a training step adds at its peak: activations, what a layer's backward needs for a moment, logits, slack.

Source: `layer.py` for what is kept; `layers/loss.py` for the chunked head (Liger-Kernel, arXiv:2410.10989, 3.2);
FlashAttention-2, arXiv:2307.08691, for the attention's workspace. `SLACK` is what the pool (`layers/kernels/pool.py`)
and glibc's allocator hold beside what is in use, measured by `benchmarks/plan_accuracy.py`.
Cost: none; no torch.

Letters: T tokens of a micro-batch, K of them labelled, V vocabulary, D hidden, c bytes of the compute dtype.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass

import numpy as np

from halfbyte.plan.job import Job, Sizes
from halfbyte.plan.layer import NO_SCORES, PADDED, pairs_of
from halfbyte.plan.lines import Line, Recompute, Where
from halfbyte.quant import policy

# layers/loss.py: at once at most, on a card too, in multiples of so many rows
LOGITS_CHUNK, LOGITS_CHUNK32, CARD_LOGITS_CHUNK, LOGITS_ROWS = 16_000_000, 32_000_000, 128_000_000, 16
SCORES_BYTES, SCORES_ROWS = 24_000_000, 512  # layers/attention.py: scores in fp32 at once, rows of a long example
# layers/kernels/cpu/integer/products.py: rows of a result at least, numbers at most at once
INTEGER_ROWS, INTEGER_SUMS = 512, 3 << 19
TOKENS_STEP = 64
# Of what is kept until backward: where it lies in the pool, and where torch's attention makes most of it.
SLACK, HEAP_SLACK = 0.02, 0.08
# More of it where sizes of micro-batches differ: free blocks, and holes between what is not the pool's. Measured:
# SmolLM2, micro-batches of 740 to 890 tokens, 40 steps.
MIXED, MIXED_SIZES = 0.15, 10
MOMENT_SLACK = 0.15  # of what comes and goes in between
HEAP_BYTES = 32 << 20  # glibc's largest moving threshold: a larger block has pages of its own, a smaller one a hole
CARD_SLACK = 0.05  # PyTorch's caching allocator rounds and splits; a round figure, not measured here


@dataclass(frozen=True)
class MicroBatch:
    """The largest micro-batch of a plan: its examples, its labelled tokens."""

    lengths: tuple[int, ...]
    labelled: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def largest_micro_batch(job: Job, tokens: int) -> MicroBatch:
    """The worst micro-batch of at most `tokens`, and no more than the largest step: the longest rows together, or more
    rows that are shorter, whichever are more tokens."""
    rows, tokens = job.rows.descending, min(tokens, job.step_tokens)
    most = job.rows_per_step if job.packed else 1
    taken = _first(rows, most, tokens)
    if taken and job.packed and sum(taken) < tokens:  # shorter rows fill what is left of it
        left, at = tokens - sum(taken), len(taken)
        while len(taken) < most:
            at = max(at, bisect_left(rows, -left, key=lambda length: -int(length)))  # the first that is short enough
            if at >= len(rows):
                break
            taken.append(int(rows[at]))
            left, at = left - taken[-1], at + 1
        taken = max(taken, _neighbours(rows, most, tokens), key=sum)
    return MicroBatch(tuple(taken) or (1,), round(sum(taken) * job.rows.labelled_share))


def later_tokens(job: Job, tokens: int) -> int:
    """Tokens of a micro-batch that is not the first of its step, at most. Rows go into the first that has room, the
    longest ahead (`data/pack.py`): the first is too full for the shortest row of any other, so another of several rows
    has less than twice what a step has beyond the limit; else it is one row."""
    return max(1, min(tokens, max(job.rows.longest, 2 * (job.step_tokens - tokens))))


def _neighbours(rows: Sizes, most: int, tokens: int) -> list[int]:
    """Of rows that follow one another, at most so many, those that come nearest to `tokens` and are no more."""
    ends, best = np.concatenate([[0], np.cumsum(rows)]), slice(0, 0)
    for count in range(1, min(most, len(rows)) + 1):
        sums = ends[count:] - ends[:-count]  # falling
        at = int(np.searchsorted(-sums, -tokens))
        if at < len(sums) and sums[at] > ends[best.stop] - ends[best.start]:
            best = slice(at, at + count)
    return [int(length) for length in rows[best]]


def _first(rows: Sizes, most: int, tokens: int) -> list[int]:
    """The first rows that have at most `tokens` together, but one at least and no more than `most`."""
    fit = int(np.searchsorted(np.cumsum(rows[:most]), tokens, side="right"))
    return [int(length) for length in rows[: max(1, fit)]]


def step_lines(job: Job, largest: MicroBatch, recompute: Recompute, where: Where, cards: int = 1) -> tuple[Line, ...]:
    """Lines of the peak of one micro-batch: at the end of the forward, in the loss, or in the last layer's backward.

    Args:
        cards: layers are split over so many; each holds its share of what is kept.
    """
    layer, c, tokens = job.layer, job.itemsize, largest.tokens
    hidden = job.facts.hidden
    pairs = pairs_of(layer, largest.lengths)
    rows = len(largest.lengths) * max(largest.lengths) if layer.pairs in PADDED else tokens
    here = -(-job.facts.layers // cards)
    kept = here * (rows * layer.of(recompute) + (layer.pair * pairs if recompute != "full" else 0))
    # what is made again is held by the way to make it, also in the first layer
    kept -= (
        rows * layer.idle if recompute == "none" or (recompute == "selective" and layer.selective == layer.kept) else 0
    )
    words = f"{tokens} tokens x {here} layers x {layer.of(recompute) / 1e3:.2f} kB"
    tile = c * job.largest_linear
    backward = layer.moment(recompute, rows, pairs, scores_bytes(job, largest))
    # the last norm's input and output; at labelled tokens what the head reads, and its gradient
    loss = logits_bytes(job, largest.labelled) + 2 * c * hidden * (tokens + largest.labelled)
    # the loss is over before the last layer's backward begins, so the larger of both counts
    moment = max(backward, loss)
    scores = 0 if layer.pairs in NO_SCORES else 4 * job.facts.heads * pairs  # of one layer, in fp32
    # once more where a forward is done again: there are those of the first, freed, and those of the second
    hole = scores * (2 if recompute == "full" else 1) if scores < HEAP_BYTES else 0.0
    of_kept = SLACK if job.kernels and layer.pairs in NO_SCORES else HEAP_SLACK
    if recompute != "full":
        of_kept += MIXED * min(1.0, (job.sizes - 1) / MIXED_SIZES)
    slack = of_kept * kept + MOMENT_SLACK * moment + hole if where == "private" else CARD_SLACK * (kept + moment)
    if backward >= loss:
        again = ", its forward done again" if recompute == "full" else ""
        at_once = Line("backward of a layer", round(backward), f"{tokens} tokens{again}", "plan/layer.py", where)
    else:
        share = f"{largest.labelled} labelled tokens, vocabulary {job.facts.vocab}"
        at_once = Line("logits", round(loss), share, "layers/loss.py", where)
    biggest = f"{job.largest_linear / 1e6:.1f} M numbers"
    return (
        Line("activations", round(kept), words, f"plan/layer.py, recomputation {recompute}", where),
        at_once,
        Line("dequantised weight", tile, biggest, "layers/lora_linear.py", where),
        *integer_lines(job, tokens, where),
        Line("allocator", round(slack), f"{slack / max(1, kept + moment):.0%} of these", "measured", where),
    )


def integer_lines(job: Job, tokens: int, where: Where) -> tuple[Line, ...]:
    """What an integer product of the largest layer holds beside its operands: int8 copies, int32 sums."""
    if job.recipe.quant.compute == "exact" or not job.kernels:
        return ()
    wide = max(job.facts.hidden, job.largest_linear // job.facts.hidden)
    sums = 4 * wide * min(tokens, max(INTEGER_ROWS, INTEGER_SUMS // wide))
    words = "int8 copies of a weight and its input, int32 sums of some rows"
    return (
        Line("integer products", job.largest_linear + tokens * wide + sums, words, "cpu/integer/products.py", where),
    )


def scores_bytes(job: Job, largest: MicroBatch) -> float:
    """Attention's scores that exist at once in backward where no kernel makes them in cache: S and dP in fp32, and both
    in the compute dtype if that is another."""
    if not job.kernels or job.layer.pairs not in NO_SCORES or job.whole_attention:
        return 0.0
    heads, most = max(1, job.facts.heads), 0.0
    for length, count in Counter(largest.lengths).items():
        whole = 4 * heads * length * length
        at_once = min(count, max(1, SCORES_BYTES // whole)) * 4 * heads * length * min(length, SCORES_ROWS)
        most = max(most, at_once)
    return most * (2 + (0 if job.itemsize == 4 else job.itemsize / 2))


def logits_bytes(job: Job, labelled: int) -> int:
    """Logits that exist at once: a chunk; without kernels also their fp32 log-probabilities."""
    on_cpu = LOGITS_CHUNK32 if job.itemsize == 4 else LOGITS_CHUNK
    at_once = on_cpu if job.kernels else CARD_LOGITS_CHUNK
    most = max(1, at_once // max(1, job.facts.vocab) // LOGITS_ROWS) * LOGITS_ROWS
    even = -(-labelled // max(1, -(-labelled // most)))
    rows = min(most, -(-even // LOGITS_ROWS) * LOGITS_ROWS)
    return rows * job.facts.vocab * (job.itemsize if job.kernels else job.itemsize + 8)


def evaluation_micro_batch(job: Job, tokens: int) -> MicroBatch:
    """The worst micro-batch of at most `tokens` of the held-out rows."""
    most = job.recipe.train.per_device_eval_batch_size if job.packed else 1
    taken = _first(np.sort(job.rows.evaluated)[::-1], most, tokens)
    return MicroBatch(tuple(taken) or (1,), round(sum(taken) * job.rows.labelled_share))


def evaluating_bytes(job: Job, most_tokens: int) -> int:
    """The peak of an evaluation's micro-batch above what is held: no tensor is kept for backward."""
    largest = evaluation_micro_batch(job, most_tokens)
    c, tokens = job.itemsize, largest.tokens
    pairs = pairs_of(job.layer, largest.lengths)
    inside = tokens * job.layer.mlp + job.layer.pair * pairs
    moment = tokens * c * 3 * job.facts.hidden + max(inside, logits_bytes(job, largest.labelled))
    return round((1 + SLACK) * moment) + c * job.largest_linear


def cache_bytes(job: Job, tokens: int) -> int:
    """Keys and values of one text of so many tokens: 2 x layers x key heads x head size x c bytes a token."""
    facts = job.facts
    return 2 * facts.layers * (facts.key_heads * facts.head_size or facts.hidden) * job.itemsize * tokens


def generating_bytes(job: Job, tokens: int, sequences: int = 1, *, streamed: bool = False) -> int:
    """The peak of generation above what is held: the key/value cache, and one token's way through the model.

    A growing cache is copied as it grows. A head that is most of what a token reads is there in 8 bits besides,
    but for a base that is `streamed`.
    """
    facts, cache = job.facts, cache_bytes(job, tokens) * sequences
    prompt = tokens * sequences * job.itemsize * 4 * facts.hidden
    head = facts.vocab * facts.hidden
    held = not streamed and policy.head_in_eight_bits(head * job.itemsize, job.base_bytes - job.outer_bytes)
    eight = head if held else 0
    return round(1.5 * cache + prompt + job.itemsize * job.largest_linear + sequences * facts.vocab * 4) + eight
