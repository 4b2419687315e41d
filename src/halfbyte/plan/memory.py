"""Lines of memory: what is there whatever a micro-batch does, and what a training step adds at its peak.

Static: libraries, rows, base, adapters and what trains them; and what lies on disk. Of a step: activations, what a
layer's backward takes for a moment, logits, slack.
Source: QLoRA, arXiv:2305.14314 (4 bits and two levels of scales; `quant.four_bit`, bitsandbytes' own bytes); AdamW
keeps two fp32 numbers a parameter, its 8-bit form two bytes (arXiv:2110.02861); `layer.py` for what backward needs;
`layers/loss.py` for the chunked head (Liger-Kernel, arXiv:2410.10989, 3.2); FlashAttention-2, arXiv:2307.08691, for the
attention's workspace. The process's own bytes are measured: `LIBRARIES_*` is what remains of a tiny training (torch CPU
build, transformers, peft, bitsandbytes, numba), `docs/log` has the figures. `SLACK` is what the pool
(`layers/kernels/pool.py`) and glibc's allocator hold beside what is in use, measured by `benchmarks/plan_accuracy.py`.
Cost: none; no torch.

Letters: T tokens of a micro-batch, K of them labelled, V vocabulary, D hidden, c bytes of the compute dtype.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.data import base_text
from halfbyte.layers.kernels.cpu.recurrent.sizes import thread_bytes
from halfbyte.plan import result
from halfbyte.plan.job import Job, Sizes
from halfbyte.plan.layer import NO_SCORES, PADDED, expert_products, pairs_of
from halfbyte.plan.result import POOL_RESERVE, RESERVE, Line, Recompute, Where
from halfbyte.quant import policy
from halfbyte.system import kernel_cache, pages
from halfbyte.system.device import Device
from halfbyte.system.threads import PRODUCTS_KEPT

LIBRARIES_PRIVATE_BYTES = 470_000_000
# Of each card, round figures that were not measured here: what the driver keeps for a process, code of kernels with it;
# and cuBLAS's workspace (torch: 32 MiB from compute capability 9.0 on, 8 before), once for each thread that multiplies.
CUDA_CONTEXT_BYTES, CUBLAS_BYTES = 530_000_000, 2 * 2**25
CARD_LINES = (  # what is taken on each card whatever runs there
    Line("CUDA context", CUDA_CONTEXT_BYTES, "of the driver, for each card: a round figure", "", "device"),
    Line("cuBLAS workspace", CUBLAS_BYTES, "forward and backward have a thread each", "torch", "device"),
)
HOST_OF_CARD_BYTES = 2_500_000_000  # a CUDA build's libraries and pinned buffers in RAM; a round figure, not measured
# What the first micro-batches leave in the process beside tensors: compiled kernels, buffers of threads, the Trainer's
# own. And what layers that carry a state leave more of it.
FIRST_MICRO_BATCH_BYTES = 50_000_000
STATE_BYTES = 25_000_000
# What the compiler (numba, LLVM) leaves in the process where kernels were not in its cache: most are compiled by other
# processes before (`ahead.py`), some here. Measured, int8: 691 MB before the first step for 583.
COMPILER_BYTES = 110_000_000
# oneDNN's code of a matrix product of one shape, and how many shapes a size of micro-batches has: 54 MB more in use for
# 6 sizes, 90 for 10 (docs/log). `system/threads.py` bounds how many are cached. The first micro-batch's are in its
# own line. In fp32 they are MKL's, 20 to 30 kB each.
PRODUCT_BYTES, PRODUCT_BYTES32 = 500_000, 50_000
PRODUCTS_OF_A_SIZE, PRODUCTS_OF_AN_EVALUATION = 25, 8
# Resident bytes per byte of tokenizer.json (7.7 at 262k entries, 4 at 49k). Without that file: per entry of the
# vocabulary (985 and 290).
TOKENIZER_SHARE, TOKENIZER_BYTES_PER_ENTRY = 8, 1000
ROW_BYTES = 60  # a row's length, labels and place in the order; its tokens lie in a mapped file

# Bytes of optimiser state for each trained parameter; AdamW's 8 for a name that is not here.
OPTIMIZER_BYTES = {
    "sgd": 0, "rmsprop": 4, "adagrad": 4, "lion_32bit": 4, "paged_lion_32bit": 4, "adafactor": 1, "adamw_bnb_8bit": 2,
    "adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1, "ademamix": 12, "ademamix_8bit": 3,
    "rmsprop_bnb": 4, "rmsprop_bnb_32bit": 4, "rmsprop_bnb_8bit": 1,
}  # fmt: skip

# layers/loss.py: logits at once at most, in bf16, in fp32 and on a card, in multiples of so many rows
LOGITS_CHUNK, LOGITS_CHUNK32 = 16_000_000, 32_000_000
CARD_LOGITS_CHUNK, LOGITS_ROWS = 128_000_000, 16
SCORES_BYTES, SCORES_ROWS = 24_000_000, 512  # layers/attention.py: scores in fp32 at once, rows of a long example
# layers/kernels/cpu/integer/products.py: rows of a result at least, numbers at most at once
INTEGER_ROWS, INTEGER_SUMS = 512, 3 << 19
TOKENS_STEP = 64
# Share of what is kept until backward: where it lies in the pool, and where torch's attention makes most of it.
SLACK, HEAP_SLACK = 0.02, 0.08
# More of it where sizes of micro-batches differ: free blocks, and fragmentation outside the pool. Measured: SmolLM2,
# micro-batches of 740 to 890 tokens, 40 steps.
MIXED, MIXED_SIZES = 0.15, 10
MOMENT_SLACK = 0.15  # share of what comes and goes in between
HEAP_BYTES = 32 << 20  # glibc's largest moving threshold: a larger block has pages of its own, a smaller one a hole
HEAP_TOP_BYTES = 2 * HEAP_BYTES  # free at its end, before glibc gives it back (mallopt(3), M_TRIM_THRESHOLD)
KEPT_SHARE = 0.1  # layers/kernels/pool.py: free blocks that are kept, of the most that was lent at once
CARD_SLACK = 0.05  # PyTorch's caching allocator rounds and splits; a round figure, not measured here


# --- static: whatever a micro-batch does -----------------------------------------------------------------------------


def process_lines(device: Device, job: Job) -> tuple[Line, ...]:
    """Libraries, tokenizer and rows: RAM of the process."""
    tokens = job.rows.tokens + int(np.sum(job.rows.evaluated))
    tokenizer = TOKENIZER_BYTES_PER_ENTRY * job.facts.vocab
    if job.tokenizer_json_bytes is not None:
        tokenizer = TOKENIZER_SHARE * job.tokenizer_json_bytes
    rows = 0 if job.rows.assumed else ROW_BYTES * (len(job.rows.lengths) + len(job.rows.evaluated))
    words = "tokenizer" if job.rows.assumed else f"tokenizer of {job.facts.vocab} entries, {tokens} tokens as rows"
    data = Line("data", tokenizer + rows, words)
    if device.on_card:
        return Line("libraries", HOST_OF_CARD_BYTES, "a CUDA build; a round figure"), data
    source, step = "measured on a tiny run", "kernels, threads' buffers and the Trainer, from then on"
    apart = {*kernel_cache.RECURRENT, *kernel_cache.INTERPRETERS}  # compiled in processes of their own
    compiler = COMPILER_BYTES * (not apart.issuperset(job.uncompiled))
    code = result.STEP_CODE_BYTES if pages.supported() else result.LIBRARIES_FILE_BYTES
    recurrent = STATE_BYTES * job.recurrent
    return (
        *result.library_lines(LIBRARIES_PRIVATE_BYTES, "torch, transformers, peft, numba and their state", code),
        Line("compiler", compiler, "kernels are compiled in the first run on a machine", source),
        Line("first micro-batch", FIRST_MICRO_BATCH_BYTES + recurrent, step, source),
        Line("compiled products", _products_bytes(job), "oneDNN's, of micro-batches of other sizes", source),
        data,
        Line(RESERVE, HEAP_TOP_BYTES, "what glibc keeps at the end of its heap: twice its largest threshold"),
    )


def recurrent_lines(job: Job, threads: int) -> tuple[Line, ...]:
    """What threads hold in backward of the layers that carry a state: of the longest row all chunks' states."""
    if not (job.recurrent and job.kernels):
        return ()
    longest, most = job.rows.longest, 0
    for r in (r for r in job.facts.recurrences if r.heads):
        groups = max(1, (r.channels - r.inner) // max(1, 2 * r.rows))
        most = max(most, thread_bytes(r.heads, groups, r.rows, r.inner // r.heads, longest, scan=r.scan))
    words = f"{threads} threads x {most / 1e6:.1f} MB, a row of {longest} tokens"
    return (Line("threads' states", threads * most, words, "cpu/recurrent/sizes.py"),)


def _products_bytes(job: Job) -> int:
    """oneDNN's compiled products, without those of the first size of micro-batches."""
    products = PRODUCTS_OF_A_SIZE * job.micro_batch_sizes + PRODUCTS_OF_AN_EVALUATION * job.evaluation_sizes
    if job.expert_numel:
        adapted = any(site.reads == "experts" for site in job.sites)
        products += expert_products(job.facts, job.step_tokens, adapted=adapted)
    each = PRODUCT_BYTES32 if job.dtype == "fp32" else PRODUCT_BYTES
    return each * (min(PRODUCTS_KEPT, products) - PRODUCTS_OF_A_SIZE)


def optimizer_bytes(job: Job) -> int:
    """Bytes of optimiser state for each trained parameter."""
    return OPTIMIZER_BYTES.get(job.recipe.train.optim, 8)


def training_lines(job: Job, where: Where, recompute: Recompute) -> tuple[Line, ...]:
    """What trains: fp32 masters, their copies in the compute dtype, and the optimiser's state. The base has its own
    copy of a module that trains whole."""
    count, state = job.trainable, optimizer_bytes(job)
    copies = job.lora_parameters
    if recompute == "full":  # they are made again with each layer
        copies //= max(1, job.facts.layers)
    # of a saved module its gradient too, before it is widened
    copies = (copies + 2 * job.saved_parameters) * (job.itemsize if job.dtype != "fp32" else 0)
    source, words = "LoRA, arXiv:2106.09685: r (in + out)", f"{job.recipe.train.optim}: {state} bytes a parameter"
    return (
        Line("adapters", 4 * count, f"{count} trained parameters in fp32", source, where),
        Line("adapters' copies", copies, f"in {job.dtype} while a micro-batch lasts", "layers/lora_linear.py", where),
        Line("optimiser", state * count, words, "AdamW: two numbers", where),
    )


def gradient_lines(job: Job, where: Where, *, micro_batches: int, micro_batch_bytes: int) -> tuple[Line, ...]:
    """Gradients at a step's peak.

    With several micro-batches all of them exist when the last one is at its peak. With one they come as its activations
    go: one layer's exist, or all of them once `micro_batch_bytes` are gone; but what goes stays in the pool, where
    kernels run (`layers/kernels/pool.py`), and gradients do not lie in it. Those of modules that train whole are made
    at once, and then added. On a card those before a micro-batch are copied, to be put back if it does not fit.
    """
    gradients, saved = 4 * job.trainable, 4 * job.saved_parameters
    if micro_batches == 1 and where == "private" and job.kernels:
        return (Line("gradients", max(gradients, saved), "fp32, beside what the pool keeps", "", where),)
    if micro_batches > 1:
        line = Line("gradients", gradients + saved, f"fp32, over {micro_batches} micro-batches", "", where)
        copied = gradients if where == "device" else 0
        return line, Line("gradients' copy", copied, "as they were before a micro-batch", "training/pace.py", where)
    peak = max(gradients // max(1, job.facts.layers), gradients - micro_batch_bytes, saved)
    return (Line("gradients", peak, f"fp32, {gradients / 1e6:.1f} MB at the end of the only micro-batch", "", where),)


def loading_bytes(job: Job, placement: result.Placement, lines: tuple[Line, ...]) -> int:
    """The peak while the base is opened and proven: what is in memory then, and one tensor more on its way."""
    there = ("libraries", result.CODE, "CUDA context", "cuBLAS workspace", "compiler", "data", RESERVE)
    process = sum(line.bytes for line in lines if line.name in there)
    if any(line.name == "libraries" for line in lines):  # not on a card
        process += max(0, result.LIBRARIES_FILE_BYTES - sum(line.bytes for line in lines if line.name == result.CODE))
    if job.mappable and placement in ("mapped", "streamed"):
        return process + job.outer_bytes
    base = sum(line.bytes for line in lines if line.name == "base")
    itemsize = job.itemsize if job.mappable or job.stored else job.itemsize + 4
    return process + base + job.largest_tensor_numel * itemsize


def disk_lines(job: Job) -> tuple[Line, ...]:
    """What a run leaves on disk: the base's store, checkpoints, the adapter."""
    train, lora = job.recipe.train, job.recipe.lora
    checkpoint = (4 + optimizer_bytes(job)) * job.trainable
    count = 0 if train.save_strategy == "no" and train.save_minutes is None else (train.save_total_limit or 1) + 1
    final = (4 if lora.save_dtype == "fp32" else 2) * job.trainable + job.tokenizer_bytes
    best = 4 * job.trainable if len(job.rows.evaluated) else 0
    base = job.store_build.disk_bytes if job.stored else 0
    words = f"{count} of {checkpoint / 1e6:.1f} MB, one of them being written"
    lines = (
        Line("base store", base, f"quantised once: {job.recipe.quant.type}", "", "disk"),
        Line("checkpoints", count * checkpoint, words, "", "disk"),
        Line("adapter", final, "the last, or the best where evaluations choose", "", "disk"),
        Line("best adapter", best, "so far, in fp32", "", "disk"),
    )
    return tuple(line for line in lines if line.bytes or line.name in ("checkpoints", "adapter"))


# --- the largest micro-batch -----------------------------------------------------------------------------------------


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
    rows = rows[np.searchsorted(-rows, -job.step_tokens) :]  # a longer one is in no step of this run
    max_rows = job.rows_per_step if job.packed else 1
    lengths = _longest_first(rows, max_rows, tokens)
    if job.trees and (longest := job.rows.longest) < tokens:  # rests of any lengths fill it
        return MicroBatch((longest, tokens - longest), round(tokens * job.labelled_share(tokens)))
    if lengths and job.packed and sum(lengths) < tokens:  # shorter rows fill what is left of it
        left, position = tokens - sum(lengths), len(lengths)
        while len(lengths) < max_rows:
            short_enough = bisect_left(rows, -left, key=lambda length: -int(length))  # the first such row
            position = max(position, short_enough)
            if position >= len(rows):
                break
            lengths.append(int(rows[position]))
            left, position = left - lengths[-1], position + 1
        lengths = max(lengths, _neighbours(rows, max_rows, tokens), key=sum)
    return MicroBatch(tuple(lengths) or (1,), round(sum(lengths) * job.rows.labelled_share))


def later_tokens(job: Job, tokens: int) -> int:
    """Tokens of a micro-batch that is not the first of its step, at most.

    Rows go into the first micro-batch that has space, the longest ahead (`data/pack.py`). So the first is too full for
    the shortest row of any other, and another of several rows has less than twice what a step has beyond the limit;
    else it is one row.
    """
    return max(1, min(tokens, max(job.rows.longest, 2 * (job.step_tokens - tokens))))


def _neighbours(rows: Sizes, max_rows: int, tokens: int) -> list[int]:
    """Of rows that follow one another, at most `max_rows`, those that come nearest to `tokens` and are no more."""
    ends, best = np.concatenate([[0], np.cumsum(rows)]), slice(0, 0)
    for count in range(1, min(max_rows, len(rows)) + 1):
        sums = ends[count:] - ends[:-count]  # falling
        first = int(np.searchsorted(-sums, -tokens))
        if first < len(sums) and sums[first] > ends[best.stop] - ends[best.start]:
            best = slice(first, first + count)
    return [int(length) for length in rows[best]]


def _longest_first(rows: Sizes, max_rows: int, tokens: int) -> list[int]:
    """The first of `rows` (descending) that have at most `tokens` together: at least one, at most `max_rows`."""
    fit = int(np.searchsorted(np.cumsum(rows[:max_rows]), tokens, side="right"))
    return [int(length) for length in rows[: max(1, fit)]]


# --- a training step at its peak -------------------------------------------------------------------------------------


def step_lines(job: Job, largest: MicroBatch, recompute: Recompute, where: Where, cards: int = 1) -> tuple[Line, ...]:
    """Lines of the peak of one micro-batch: at the end of the forward, in the loss, or in the last layer's backward.
    `cards`: layers are split over so many; each holds its share of what is kept."""
    layer, tokens = job.layer, largest.tokens
    c, hidden = job.itemsize, job.facts.hidden
    pairs = pairs_of(layer, largest.lengths)
    rows = len(largest.lengths) * max(largest.lengths) if layer.pairs in PADDED else tokens
    layers = -(-job.facts.layers // cards)
    activations = layers * (rows * layer.of(recompute) + (layer.pair * pairs if recompute != "full" else 0))
    # what is made again is held by the way to make it, also in the first layer
    if recompute == "none" or (recompute == "selective" and layer.selective == layer.kept):
        activations -= rows * layer.idle
    backward = layer.moment(recompute, rows, pairs, scores_bytes(job, largest))
    # the last norm's input and output; at labelled tokens what the head reads, and its gradient
    loss = logits_bytes(job, largest.labelled) + 2 * c * hidden * (tokens + largest.labelled)
    # the loss is over before the last layer's backward begins, so the larger of both counts
    moment = max(backward, loss)
    if backward >= loss:
        again = ", its forward done again" if recompute == "full" else ""
        moment_line = Line("backward of a layer", round(backward), f"{tokens} tokens{again}", "plan/layer.py", where)
    else:
        words = f"{largest.labelled} labelled tokens, vocabulary {job.facts.vocab}"
        moment_line = Line("logits", round(loss), words, "layers/loss.py", where)
    slack = CARD_SLACK * (activations + moment)
    if where == "private":
        slack = _slack_share(job, recompute) * activations + MOMENT_SLACK * moment + _scores_hole(job, pairs, recompute)
    kept = KEPT_SHARE * (activations + moment) if where == "private" else 0.0
    # nearly all lies in the pool, whose slack is free blocks already; not what torch's attention makes, nor what
    # experts do, whose tensors are of other sizes in each step
    if job.kernels and job.layer.pairs in NO_SCORES and not job.expert_numel and not job.recurrent:
        kept = max(0.0, kept - slack)
    words = f"{tokens} tokens x {layers} layers x {layer.of(recompute) / 1e3:.2f} kB"
    weight = f"{job.largest_linear / 1e6:.1f} M numbers"
    return (
        Line("activations", round(activations), words, f"plan/layer.py, recomputation {recompute}", where),
        moment_line,
        Line("dequantised weight", c * job.largest_linear, weight, "layers/lora_linear.py", where),
        *integer_lines(job, tokens, where),
        Line("allocator", round(slack), f"{slack / max(1, activations + moment):.0%} of these", "measured", where),
        Line(
            POOL_RESERVE, round(kept), f"{KEPT_SHARE:.0%} of these, where it keeps them free", "layers/kernels/pool.py"
        ),
    )


def _slack_share(job: Job, recompute: Recompute) -> float:
    """What the allocator holds beside activations, as a share of them."""
    share = SLACK if job.kernels and job.layer.pairs in NO_SCORES else HEAP_SLACK
    return share + (MIXED * min(1.0, (job.micro_batch_sizes - 1) / MIXED_SIZES) if recompute != "full" else 0.0)


def _scores_hole(job: Job, pairs: float, recompute: Recompute) -> float:
    """Bytes of the heap that one layer's scores in fp32 leave free behind them, where they are in memory at all."""
    scores = 0 if job.layer.pairs in NO_SCORES else 4 * job.facts.heads * pairs
    # once more where a forward is done again: there are those of the first, freed, and those of the second
    return scores * (2 if recompute == "full" else 1) if scores < HEAP_BYTES else 0.0


def integer_lines(job: Job, tokens: int, where: Where) -> tuple[Line, ...]:
    """What an integer product of the largest layer holds beside its operands: int8 copies, int32 sums."""
    if not job.integers:
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
    heads, peak = max(1, job.facts.heads), 0.0
    for length, count in Counter(largest.lengths).items():
        example = 4 * heads * length * length
        at_once = min(count, max(1, SCORES_BYTES // example)) * 4 * heads * length * min(length, SCORES_ROWS)
        peak = max(peak, at_once)
    return peak * (2 + (0 if job.itemsize == 4 else job.itemsize / 2))


def logits_bytes(job: Job, labelled: int) -> int:
    """Logits that exist at once: a chunk, without kernels also its fp32 log-probabilities; and an objective's own."""
    on_cpu = LOGITS_CHUNK32 if job.itemsize == 4 else LOGITS_CHUNK
    at_once = on_cpu if job.kernels else CARD_LOGITS_CHUNK
    max_rows = max(1, at_once // max(1, job.facts.vocab) // LOGITS_ROWS) * LOGITS_ROWS
    even = -(-labelled // max(1, -(-labelled // max_rows)))
    rows = min(max_rows, -(-even // LOGITS_ROWS) * LOGITS_ROWS)
    whole = 4 * job.objective.whole_logits * labelled * job.facts.vocab
    return rows * job.facts.vocab * (job.itemsize if job.kernels else job.itemsize + 8) + whole


# --- without gradients -----------------------------------------------------------------------------------------------


def evaluating_bytes(job: Job, max_tokens: int) -> int:
    """The peak of an evaluation above what is held: its largest micro-batch, no tensor of which is kept, or
    an answer that metrics ask for."""
    max_rows = job.recipe.train.per_device_eval_batch_size if job.packed else 1
    lengths = _longest_first(np.sort(job.rows.evaluated)[::-1], max_rows, max_tokens)
    longest = int(np.max(job.rows.evaluated, initial=0)) + job.recipe.eval.max_new_tokens
    answer = generating_bytes(job, longest) if job.recipe.eval.metrics else 0
    return max(_forward_bytes(job, lengths or [1], round(sum(lengths) * job.rows.labelled_share)), answer)


def _forward_bytes(job: Job, lengths: Sequence[int], labelled: int) -> int:
    """A micro-batch of rows of these tokens, without gradients: a layer, or its logits."""
    c, tokens = job.itemsize, sum(lengths)
    inside = tokens * job.layer.mlp + job.layer.pair * pairs_of(job.layer, lengths)
    moment = tokens * c * 3 * job.facts.hidden + max(inside, logits_bytes(job, labelled))
    return round((1 + SLACK) * moment) + c * job.largest_linear


def evaluation_tokens(job: Job, sizes: Iterable[int], room: int) -> int:
    """The first of these sizes of an evaluation's micro-batch that takes at most `room` bytes, whichever rows are in it
    and all their tokens labelled; the last, if none does."""
    longest = max(base_text.LONGEST, int(np.max(job.rows.evaluated, initial=0)))
    for size in sizes:
        lengths = [longest] * (size // longest) + [size % longest or 1]
        if _forward_bytes(job, lengths, size) <= room:
            break
    return size


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
    eight_bit_head = 0
    if not streamed and policy.head_in_eight_bits(head * job.itemsize, job.base_bytes - job.outer_bytes):
        eight_bit_head = head
    return (
        round(1.5 * cache + prompt + job.itemsize * job.largest_linear + sequences * facts.vocab * 4) + eight_bit_head
    )
